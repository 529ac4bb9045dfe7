"""Filters in the fan-out: it adds a delivery if the event passes the destination's filter."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.events import Recorder, World, opened, plain, with_files
from support.payloads import failure

from receiver.core.lane_names import wake_no_lane
from receiver.core.routing import mismatch
from receiver.db import inbox, job_events
from receiver.db.database import Database
from receiver.db.tables import deliveries, events, jobs, media
from receiver.lanes.fan_out import FanOut
from receiver.lanes.targets import facts_of
from receiver.sandbox import SandboxOptions, create_app, running


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server."""
    async with opened(database, tmp_path / "media") as made:
        yield made


async def test_each_destination_gets_the_events_that_pass_its_filter(world: World) -> None:
    """Filters on status, model and source; a destination without a filter gets all events."""
    filters: dict[str, dict[str, Any]] = {
        "all": {},
        "done": {"status": "OK"},
        "failed": {"status": "ERROR"},
        "video": {"model": ["seedance-*", "veo-?"]},
        "staging": {"source": "staging"},
        "nothing": {"status": "ERROR", "model": "seedance-*"},
    }
    for name, wanted in filters.items():
        world.add_destination(name, **wanted)
    await world.add(plain("image", model="nano-banana-2"))
    await world.add(plain("video", model="seedance-2"))
    await world.add(plain("other", model="veo-3"), source="staging")
    await world.add(failure("broken"))
    await world.fan_out()
    assert await world.sent_to() == {
        *((request_id, "all") for request_id in ("image", "video", "other", "broken")),
        *((request_id, "done") for request_id in ("image", "video", "other")),
        ("broken", "failed"),
        *((request_id, "video") for request_id in ("video", "other")),
        ("other", "staging"),
    }
    assert await world.states(events) == {"ready": 4}


async def test_the_message_goes_where_the_filters_say(world: World) -> None:
    """A worker publishes to each destination exactly the events that pass its filter."""
    done = world.add_destination("done", status="OK")
    failed = world.add_destination("failed", status="ERROR")
    for number in range(20):
        await world.add(failure(f"bad-{number}") if number % 4 == 0 else plain(f"good-{number}"))
    async with world.working():
        await world.until_states(deliveries, delivered=20)
    assert {subject.partition("-")[0] for subject in done.subjects} == {"good"}
    assert {subject.partition("-")[0] for subject in failed.subjects} == {"bad"}
    assert (len(done.subjects), len(failed.subjects)) == (15, 5)


async def test_filters_on_the_job(world: World) -> None:
    """Caller and metadata are the job's; an event without a job of this receiver passes no filter on them."""
    add_job_filters(world)
    await world.add_job("gold", request_id="gold", metadata={"tier": "gold"})
    await world.add_job("tin", request_id="tin", metadata={"tier": "tin", "gold": "tier"})
    await world.add_job("blog", request_id="blog", caller="blog")
    await world.add_job("elsewhere", request_id="stranger", source="staging", metadata={"tier": "gold"})
    for request_id in ("gold", "tin", "blog", "stranger"):
        await world.add(plain(request_id))
    await world.fan_out()
    assert await world.sent_to() == {
        *((request_id, "all") for request_id in ("gold", "tin", "blog", "stranger")),
        *((request_id, "shop") for request_id in ("gold", "tin")),
        ("gold", "gold"),
    }


async def test_a_webhook_may_be_faster_than_the_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """An event waits for the answer that names its job; if none comes, its path decides, for filters too."""
    add_job_filters(world)
    early = await world.add_job("early", metadata={"tier": "gold"})
    await world.add(plain("early"), job_id=early, token="early")
    await world.fan_out()
    assert await world.sent_to() == set()
    monkeypatch.setattr(job_events, "ANSWER_WAIT_SECONDS", 0.0)
    await world.fan_out()
    assert await world.sent_to() == {("early", "all"), ("early", "shop"), ("early", "gold")}
    (job,) = await world.rows(jobs)
    assert (job["state"], job["request_id"]) == ("completed", "early")


async def test_a_path_that_names_a_wrong_job_routes_nothing(world: World) -> None:
    """The unsigned id in the callback's path is ignored if it fits no job of the source."""
    add_job_filters(world)
    foreign = await world.add_job("foreign", source="staging", metadata={"tier": "gold"})
    known = await world.add_job("known", request_id="known", metadata={"tier": "gold"})
    sent = await world.add_job("sent", metadata={"tier": "gold"})
    paths = [
        *((foreign, "foreign"), (known, "known"), (uuid.uuid4(), "x")),
        *((sent, None), (sent, "other"), (sent, "Sent"), (sent, "")),
    ]
    for number, (job_id, token) in enumerate(paths):
        await world.add(plain(f"forged-{number}"), job_id=job_id, token=token)
    await world.fan_out()
    assert await world.sent_to() == {(f"forged-{number}", "all") for number in range(len(paths))}


async def test_an_event_without_a_destination_is_kept_with_its_files(world: World, tmp_path: Path) -> None:
    """If an event passes no filter, its files are stored, it is not sent, and a replay can send it later."""
    async with running(create_app(SandboxOptions())) as cdn, opened(world.database, tmp_path, cdn) as other:
        other.add_destination("failed", status="ERROR")
        await other.add(with_files(cdn, "r-1", "/sandbox/sample-image.png"))
        async with other.working():
            await other.until_states(media, stored=1)
    assert await other.states(events) == {"ready": 1}
    assert await other.rows(deliveries) == []


async def test_the_fan_out_agrees_with_the_filters(world: World) -> None:
    """For each event and destination there is a delivery if, and only if, `receiver route` says yes."""
    add_job_filters(world)
    world.add_destination("done", status="OK", model=["m", "nano-*"])
    world.add_destination("others", caller=["blog", "shop"], metadata={"tier": ["tin", "gold"]})
    for number in range(12):
        request_id = f"r-{number}"
        if number % 3:
            tier = {"tier": "gold"} if number % 2 else {}
            await world.add_job(
                request_id, request_id=request_id, caller=("shop", "blog")[number % 2], metadata=tier
            )
        await world.add(failure(request_id) if number % 4 == 0 else plain(request_id, model=f"m{number % 2}"))
    await world.fan_out()
    expected = set()
    for row in await world.rows(events):
        seq = row["seq"]
        async with world.database.read() as connection:
            event = (await inbox.load_events(connection, [seq]))[seq]
            refs = await job_events.load_refs(connection, [seq])
        facts = facts_of(event, row["model"], refs.get(seq))
        expected |= {
            (row["request_id"], target.name)
            for target in world.targets
            if mismatch(target.filter, facts) is None
        }
    assert await world.sent_to() == expected
    assert len(expected) > 12


def add_job_filters(world: World) -> list[Recorder]:
    """Configure three destinations: for all, for one caller, and for that caller's gold tier."""
    return [
        world.add_destination("all"),
        world.add_destination("shop", caller="shop"),
        world.add_destination("gold", caller="shop", metadata={"tier": "gold"}),
    ]


async def test_a_run_keeps_the_destinations_that_it_began_with(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: a reload during a run routes no event by facts that were not loaded; the next run follows it."""
    world.add_destination("all")
    first = world.targets[:]
    world.add_destination("shop", caller="shop")
    world.add_destination("more")
    for name in ("r-1", "r-2"):
        await world.add_job(name, request_id=name)
        await world.add(plain(name))
    fan_out = FanOut(world.database, first, wake=wake_no_lane, rules=world.rules)
    find = job_events.find_with_open_jobs

    async def replace_meanwhile(*arguments: Any) -> Any:
        fan_out.targets = world.targets
        return await find(*arguments)

    monkeypatch.setattr(job_events, "find_with_open_jobs", replace_meanwhile)
    assert await fan_out.run(limit=1) == 1
    assert await world.sent_to() == {("r-1", "all")}
    assert await fan_out.run(limit=1) == 1
    later = {("r-2", name) for name in ("all", "shop", "more")}
    assert await world.sent_to() == {("r-1", "all")} | later
