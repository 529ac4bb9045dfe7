"""C9: a person promotes the body of a conflicting webhook; the former one is kept, and nothing is lost."""

import asyncio
import hashlib
import os
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy import select
from support.events import Recorder, World, opened, plain, until, with_files
from support.payloads import SECRET, body, failure, signed

from receiver import retention
from receiver.api.answers import status_of
from receiver.core.output_files import FileRules
from receiver.core.signature import Secret
from receiver.db import leases, promotions, reads
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import event_id, new_id
from receiver.db.tables import deliveries, events, jobs, media, receipts, replays
from receiver.db.views import EventDetails
from receiver.errors import RequestError
from receiver.explain import explain_key
from receiver.ingest import Ingest, SignedRequest
from receiver.lanes.base import LEASE_SECONDS
from receiver.promotions import Promoted, Promotions
from receiver.sandbox import SandboxOptions, create_app, running

IMAGE = "/sandbox/sample-image.png"
PICTURE = "/sandbox/another.webp"


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """All but the web process, with a destination for everything and one for failures."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        made.add_destination("failures", status="ERROR")
        yield made


@pytest.fixture
def ingest(database: Database) -> Ingest:
    """The ingest, as a process has it."""
    secrets = {"clipia": [Secret.from_text(SECRET)]}
    return Ingest(database, secrets=secrets, tolerance=300, clock=time.time, on_accepted=lambda: None)


async def deliver(ingest: Ingest, content: bytes) -> str:
    """Send a webhook; return its outcome."""
    headers = signed(content)
    signature = headers["X-Clipia-Signature"].encode()
    request = SignedRequest("clipia", [signature], content, headers["X-Clipia-Webhook-Id"])
    return (await ingest.receive(request)).outcome


def service(world: World) -> Promotions:
    """Return the promotions of the destinations that are configured now."""
    return Promotions(world.database, world.replays, rules=FileRules)


async def promote(world: World, key: str, seq: int, **options: Any) -> Promoted:
    """Promote a receipt."""
    done = await service(world).promote(key, seq, **{"by": "ops", "reason": "a correction"} | options)
    assert done is not None
    return done


async def refusal(world: World, key: str, seq: int) -> str:
    """Return the code with which a promotion is rejected."""
    before = await everything(world)
    with pytest.raises(RequestError) as caught:
        await promote(world, key, seq)
    assert status_of(caught.value) == 409
    assert await everything(world) == before
    return caught.value.code


async def everything(world: World) -> list[Any]:
    """Return all rows that a promotion may change."""
    return [await world.rows(table) for table in (events, receipts, media, deliveries, jobs, replays)]


async def show(world: World, key: str) -> EventDetails:
    """Return an event as the API shows it."""
    async with world.database.read() as connection:
        found = await reads.show_event(connection, key)
    assert found is not None
    return found


async def outcomes(world: World, key: str) -> list[tuple[str, bytes | None]]:
    """Return the outcomes and the bodies of all receipts."""
    return [(row["outcome"], row["body"]) for row in (await show(world, key))["receipts"]]


async def seq_of(world: World, outcome: str) -> int:
    """Return the number of the receipt with an outcome."""
    (row,) = await world.rows(receipts, receipts.c.outcome == outcome)
    return int(row["seq"])


async def settle(world: World) -> None:
    """Wait until all work is done."""

    async def is_done() -> bool:
        waiting = [
            *await world.rows(events, events.c.state != "ready"),
            *await world.rows(deliveries, deliveries.c.state == "pending"),
            *await world.rows(replays, replays.c.state == "pending"),
        ]
        return not waiting

    await until(is_done)


def data_of(event: CloudEvent) -> dict[str, Any]:
    """Return the data of a message."""
    data = event.get_data()
    assert isinstance(data, dict)
    return data


def statuses(recorder: Recorder) -> list[tuple[str, bool]]:
    """Return the status of each message, and whether it has a promoted body."""
    found = [data_of(event) for event in recorder.published]
    return [(data["status"], data.get("promoted", False)) for data in found]


async def test_a_promoted_body_becomes_the_events_and_is_sent_to_every_destination(
    world: World, ingest: Ingest
) -> None:
    """C9: the bodies change places, and each destination that takes the new one gets a message of its own."""
    first, second = plain("r-1", model="a"), failure("r-1")
    assert await deliver(ingest, first) == "accepted"
    async with world.working():
        await settle(world)
        assert await deliver(ingest, second) == "conflict"
        done = await promote(world, "r-1", await seq_of(world, "conflict"))
        await settle(world)
    assert (done.event_id, done.status_before, done.status) == (event_id("clipia", "r-1"), "OK", "ERROR")
    assert done.destinations == ["main", "failures"]
    event = await show(world, "r-1")
    assert (event["status"], event["model"], event["cost"], event["body"]) == ("ERROR", None, None, second)
    assert event["body_sha256"] == hashlib.sha256(second).hexdigest()
    assert await outcomes(world, "r-1") == [("promoted", None), ("superseded", first)]
    assert event["receipts_total"] == 2
    assert done.former_receipt == event["receipts"][1]["seq"]
    main, failures = world.recorders["main"], world.recorders["failures"]
    assert statuses(main) == [("OK", False), ("ERROR", True)]
    assert statuses(failures) == [("ERROR", True)]
    old, new = main.published
    assert (old.get_id(), old.get_subject()) == (new.get_id(), new.get_subject())
    assert new.get_extension("replayid") == str(done.replay_id)
    assert old.get_extension("deliveryid") < new.get_extension("deliveryid")
    assert (old.get_type(), new.get_type()) == (
        "ai.clipia.generation.completed",
        "ai.clipia.generation.failed",
    )
    assert (new.get_time(), event["received_at"]) == (event["receipts"][0]["received_at"],) * 2


async def test_receipts_keep_the_facts_of_their_requests(world: World, ingest: Ingest) -> None:
    """C9: each receipt keeps the id, secret and times of its own request, there and back."""
    contents = [plain("r-1", model=name) for name in "abc"]
    for content in contents:
        await deliver(ingest, content)
    await world.fan_out()
    facts = ("webhook_id", "secret_id", "signed_at", "received_at", "body_sha256")

    async def known() -> set[tuple[Any, ...]]:
        return {tuple(row[name] for name in facts) for row in (await show(world, "r-1"))["receipts"]}  # type: ignore[literal-required] # the names are keys

    before = await known()
    assert len(before) == 3
    seq = (await show(world, "r-1"))["receipts"][1]["seq"]
    done = await promote(world, "r-1", seq)
    assert await known() == before
    assert [outcome for outcome, _ in await outcomes(world, "r-1")] == [
        "promoted",
        "superseded",
        "superseded",
    ]
    assert done.former_receipt is not None
    again = await promote(world, "r-1", done.former_receipt)
    assert await known() == before
    assert again.former_receipt == seq
    found = {content for _, content in await outcomes(world, "r-1")}
    assert (await show(world, "r-1"))["body"] == contents[0]
    assert found == {None, contents[1], contents[2]}


async def test_a_repeated_promotion_changes_nothing(world: World, ingest: Ingest) -> None:
    """C9: a call that is sent again after a lost answer does not swap the bodies back."""
    for content in (plain("r-1"), failure("r-1")):
        await deliver(ingest, content)
    await world.fan_out()
    seq = await seq_of(world, "conflict")
    done = await promote(world, "r-1", seq)
    assert await refusal(world, "r-1", seq) == "not_promotable"
    async with world.working():
        await world.until_replayed({"id": done.replay_id})
    assert await refusal(world, "r-1", seq) == "not_promotable"
    assert len(await world.rows(replays)) == 1


async def test_a_dry_run_shows_the_result_and_changes_nothing(world: World, ingest: Ingest) -> None:
    """A dry run has the numbers of the promotion that follows it."""
    for content in (plain("r-1"), failure("r-1")):
        await deliver(ingest, content)
    await world.fan_out()
    before = await everything(world)
    seq = await seq_of(world, "conflict")
    planned = await promote(world, "r-1", seq, dry_run=True)
    assert await everything(world) == before
    done = await promote(world, "r-1", seq)
    assert (planned.former_receipt, planned.replay_id) == (None, None)
    unknown = {"former_receipt": None, "replay_id": None}
    assert vars(planned) == vars(done) | unknown
    assert planned.deliveries_canceled == 1


@pytest.mark.parametrize("state", ["pending", "dead", "held"])
async def test_the_former_body_is_not_sent_any_more(world: World, ingest: Ingest, state: str) -> None:
    """C9: what was still to be sent of the former body is canceled, on record, and cannot be retried."""
    for content in (plain("r-1", model="a"), plain("r-1", model="b")):
        await deliver(ingest, content)
    await world.fan_out()
    if state == "dead":
        await world.change(deliveries, state="dead", error="refused", **leases.ENDED)
    elif state == "held":
        await world.change(deliveries, next_attempt_at=None)
    await promote(world, "r-1", await seq_of(world, "conflict"))
    (old,) = (await show(world, "r-1"))["deliveries"]
    assert (old["state"], old["next_attempt_at"]) == ("canceled", None)
    assert old["error"] == "superseded: ops promoted the receipt 1: a correction"
    assert [attempt["outcome"] for attempt in old["attempt_log"]] == ["superseded"]
    async with world.working():
        await settle(world)
    (sent,) = world.recorders["main"].published
    assert data_of(sent)["model"] == "b"
    assert sent.get_extension("deliveryid") != str(old["id"])


async def test_an_event_is_not_promoted_while_it_is_sent(world: World, ingest: Ingest) -> None:
    """C9: a message is of one body: while a worker sends it, a promotion is 409; afterwards it succeeds."""
    release = asyncio.Event()
    world.recorders["main"].behave = lambda _event: release.wait()
    for content in (plain("r-1"), failure("r-1")):
        await deliver(ingest, content)
    async with world.working():
        seq = await until(lambda: _under_way(world))
        assert await refusal(world, "r-1", seq) == "not_settled"
        release.set()
        await settle(world)
        await promote(world, "r-1", seq)
        await settle(world)
    assert statuses(world.recorders["main"]) == [("OK", False), ("ERROR", True)]


async def _under_way(world: World) -> int | None:
    busy = world.recorders["main"].under_way and await world.rows(deliveries, deliveries.c.lease.is_not(None))
    return await seq_of(world, "conflict") if busy else None


async def test_what_cannot_be_promoted(world: World, ingest: Ingest) -> None:
    """C9: 409 with a code, and 404 for what is not there; nothing changes."""
    unknown = b'{"request_id": "r-9", "status": "NEW"}'
    for content in (plain("r-1"), plain("r-1"), failure("r-1"), unknown, unknown):
        await deliver(ingest, content)
    conflict, duplicate = await seq_of(world, "conflict"), await seq_of(world, "duplicate")
    assert await refusal(world, "r-1", conflict) == "not_settled"  # before its fan-out
    await world.fan_out()
    assert await refusal(world, "r-1", 0) == "not_promotable"
    assert await refusal(world, "r-1", duplicate) == "not_promotable"
    (odd,) = await world.rows(events, events.c.state == "unrecognized")
    assert await refusal(world, str(odd["id"]), await seq_of(world, "unrecognized")) == "not_promotable"
    ops: dict[str, Any] = {"by": "ops", "reason": None}
    for key, seq in (("r-1", 999), ("absent", conflict), ("r\0", conflict), (str(odd["id"]), conflict)):
        assert await service(world).promote(key, seq, **ops) is None, key
    await world.change(deliveries, state="delivered", **leases.ENDED)
    await retention.erase(world.database, world.storage, "r-1")
    assert await refusal(world, "r-1", conflict) == "not_promotable"


async def test_a_body_that_a_person_decided_against_is_no_new_conflict(world: World, ingest: Ingest) -> None:
    """C9: late webhooks with either body are duplicates after a promotion; a third body is a conflict."""
    first, second, third = (plain("r-1", model=name) for name in "abc")
    for content in (first, second, second):
        await deliver(ingest, content)
    await world.fan_out()
    seq = (await show(world, "r-1"))["receipts"][1]["seq"]
    await promote(world, "r-1", seq)
    assert await outcomes(world, "r-1") == [("promoted", None), ("duplicate", None), ("superseded", first)]
    assert [await deliver(ingest, each) for each in (first, second, third)] == [
        "duplicate",
        "duplicate",
        "conflict",
    ]
    explained = await explain_key(world.database, "r-1", list)
    assert "conflict" in explained["verdict"] or explained["state"] == "conflict"


async def test_why_no_longer_asks_for_a_decision(world: World, ingest: Ingest) -> None:
    """C9: a conflict needs action, with the command to promote it; a promoted event does not."""
    for content in (plain("r-1"), failure("r-1")):
        await deliver(ingest, content)
    async with world.working():
        await settle(world)
    await world.change(deliveries, finished_at=db_time(0.0))
    before = await explain_key(world.database, "r-1", list)
    seq = await seq_of(world, "conflict")
    assert (before["state"], before["outcome"]) == ("conflict", "needs_action")
    assert f"receiver events promote {event_id('clipia', 'r-1')} {seq} --dry-run" in before["commands"]
    await promote(world, "r-1", seq)
    async with world.working():
        await settle(world)
    after = await explain_key(world.database, "r-1", list)
    assert after["outcome"] != "needs_action"
    assert any("webhook promoted" in fact["text"] for fact in after["facts"])


@pytest.mark.parametrize(("status", "charged"), [("OK", 12), ("ERROR", 0)])
async def test_the_job_gets_the_result_of_the_promoted_body(
    world: World, ingest: Ingest, status: str, charged: int
) -> None:
    """F5: a promotion changes the job's state, error and charged credits, and not the time of its end."""
    bodies = {"OK": body("r-1"), "ERROR": failure("r-1")}
    job_id = await world.add_job("j-1", request_id="r-1")
    other = "ERROR" if status == "OK" else "OK"
    await deliver(ingest, bodies[other])
    await world.fan_out()
    await world.change(jobs, finished_at=db_time(-60.0))
    (before,) = await world.rows(jobs)
    assert before["state"] == ("failed" if status == "OK" else "completed")
    await deliver(ingest, bodies[status])
    await promote(world, "r-1", await seq_of(world, "conflict"))
    (job,) = await world.rows(jobs)
    assert (job["id"], job["charged"], job["finished_at"]) == (job_id, charged, before["finished_at"])
    assert (job["state"], job["error"] is None) == (
        ("completed", True) if status == "OK" else ("failed", False)
    )
    assert (job["lease"], job["next_attempt_at"]) == (None, None)


async def test_a_polled_body_can_be_replaced_and_comes_back_as_a_polled_one(
    world: World, ingest: Ingest
) -> None:
    """C9, F8: a webhook that contradicts a polled result is promoted; the way back keeps the origin."""
    polled = failure("r-1")
    await ingest.record_result("clipia", polled)
    await deliver(ingest, plain("r-1"))
    await world.fan_out()
    done = await promote(world, "r-1", await seq_of(world, "conflict"))
    event = await show(world, "r-1")
    assert (event["origin"], event["status"]) == ("webhook", "OK")
    assert [row["secret_id"] == "poll" for row in event["receipts"]] == [False, True]
    assert done.former_receipt is not None
    await promote(world, "r-1", done.former_receipt)
    event = await show(world, "r-1")
    assert (event["origin"], event["status"], event["body"]) == ("poll", "ERROR", polled)


async def test_other_receipts_and_events_are_left_alone(world: World, ingest: Ingest) -> None:
    """A promotion touches the rows of its event only."""
    for name in ("r-1", "r-2"):
        for content in (plain(name), failure(name)):
            await deliver(ingest, content)
    await world.fan_out()
    before = await show(world, "r-2")
    rows = await world.rows(receipts)
    await promote(world, "r-1", rows[0]["seq"])
    assert await show(world, "r-2") == before


# --- files ---


@pytest.fixture
async def cdn() -> AsyncIterator[str]:
    """Run a CDN."""
    async with running(create_app(SandboxOptions())) as url:
        yield url


async def test_files_are_kept_added_and_brought_back(
    database: Database, tmp_path: Path, cdn: str, ingest: Ingest
) -> None:
    """C9, D12: each message has the files of its body alone; no file is overwritten or downloaded twice."""
    first = with_files(cdn, "r-1", IMAGE, "/sandbox/first.png")
    second = with_files(cdn, "r-1", "/sandbox/second.png", IMAGE)
    async with opened(database, tmp_path / "media", cdn) as world:
        main = world.add_destination("main")
        await deliver(ingest, first)
        async with world.working():
            await settle(world)
            await deliver(ingest, second)
            seq = await seq_of(world, "conflict")
            done = await promote(world, "r-1", seq)
            assert (done.files_kept, done.files_added, done.files_superseded) == (1, 1, 1)
            await settle(world)
            assert done.former_receipt is not None
            back = await promote(world, "r-1", done.former_receipt)
            assert (back.files_kept, back.files_added, back.files_superseded) == (2, 0, 1)
            await settle(world)
        files = await world.rows(media)
        assert len({row["storage_key"] for row in files}) == len(files) == 3
        assert {row["attempts"] for row in files} == {1}
        for row in files:
            assert await world.storage.stat(row["storage_key"]) is not None
        told = [
            {
                (file["url"].removeprefix(cdn), file["field"], file["state"])
                for file in data_of(event)["media"]
            }
            for event in main.published
        ]
        assert told == [
            {(IMAGE, "images[0].url", "stored"), ("/sandbox/first.png", "images[1].url", "stored")},
            {("/sandbox/second.png", "images[0].url", "stored"), (IMAGE, "images[1].url", "stored")},
            {(IMAGE, "images[0].url", "stored"), ("/sandbox/first.png", "images[1].url", "stored")},
        ]


async def test_downloads_of_the_former_body_end(world: World, ingest: Ingest) -> None:
    """D12: a pending download is dropped with its lease, and starts anew if its body is promoted again."""
    await deliver(ingest, body("r-1"))
    await world.fan_out()
    await world.change(media, lease=new_id(), next_attempt_at=db_time(LEASE_SECONDS), attempts=3)
    await deliver(ingest, failure("r-1"))
    done = await promote(world, "r-1", await seq_of(world, "conflict"))
    (file,) = await world.rows(media)
    assert (file["state"], file["lease"], file["next_attempt_at"]) == ("superseded", None, None)
    assert (await show(world, "r-1"))["state"] == "ready"
    assert done.former_receipt is not None
    async with world.working():
        await world.until_replayed({"id": done.replay_id})
    await promote(world, "r-1", done.former_receipt)
    (file,) = await world.rows(media)
    assert (file["state"], file["attempts"], file["error"]) == ("pending", 0, None)
    assert (await show(world, "r-1"))["state"] == "fetching"


# --- at once, and killed ---


async def test_promotions_and_webhooks_at_once(world: World, ingest: Ingest) -> None:
    """C9, C1: of many promotions of several receipts at once each body stays on record exactly once."""
    contents = [plain("r-1", model=name) for name in "abcd"]
    for content in contents:
        await deliver(ingest, content)
    await world.fan_out()
    await world.change(deliveries, state="delivered", **leases.ENDED)
    seqs = [row["seq"] for row in await world.rows(receipts)]
    others = [Database(world.database.url) for _ in range(3)]

    async def run(database: Database, seq: int) -> str:
        try:
            await Promotions(database, world.replays, rules=FileRules).promote(
                "r-1", seq, by="ops", reason=None
            )
        except RequestError as error:
            return error.code
        return "done"

    try:
        async with asyncio.timeout(60):
            results = await asyncio.gather(
                *(run(database, seq) for database in others for seq in seqs),
                *(deliver(ingest, content) for content in contents for _ in range(3)),
            )
    finally:
        for each in others:
            await each.close()
    counts = Counter(results)
    assert counts["done"] >= 1
    assert set(counts) <= {"done", "not_promotable", "duplicate", "conflict"}
    event = await show(world, "r-1")
    kept = [content for _, content in await outcomes(world, "r-1") if content is not None]
    assert Counter([event["body"], *kept]) >= Counter(contents)
    assert len(await world.rows(receipts, receipts.c.outcome == "promoted")) == 1
    assert counts["done"] == len(await world.rows(replays))
    (row,) = await world.rows(events)
    assert hashlib.sha256(row["body"]).digest() == row["body_sha256"]
    assert len(await world.rows(receipts)) <= 4 + 12


STEPS = ["lock_event", "supersede_deliveries", "exchange_bodies", "set_state_by_files"]
KILLED = textwrap.dedent("""
    import asyncio, os, signal, sys
    from receiver.core.output_files import FileRules
    from receiver.db import promotions
    from receiver.db.database import Database
    from receiver.destination_settings import FilterSettings
    from receiver.promotions import Promotions
    from receiver.replays import Replays

    url, seq, step = sys.argv[1:]
    work = getattr(promotions, step)

    async def die(*args, **options):
        await work(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(promotions, step, die)

    async def main():
        database = Database(url)
        service = Promotions(database, Replays(database, {"main": FilterSettings()}), rules=FileRules)
        await service.promote("r-1", int(seq), by="ops", reason=None)

    asyncio.run(main())
""")


@pytest.mark.parametrize("step", STEPS)
async def test_a_killed_promotion_leaves_no_trace(world: World, ingest: Ingest, step: str) -> None:
    """C9, C12: kill -9 between two statements changes nothing, and the promotion can be repeated."""
    assert callable(getattr(promotions, step))
    for content in (body("r-1"), plain("r-1")):
        await deliver(ingest, content)
    await world.fan_out()
    before = await everything(world)
    seq = await seq_of(world, "conflict")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", KILLED, world.database.url, str(seq), step, env=os.environ
    )
    async with asyncio.timeout(60):
        assert await process.wait() == -signal.SIGKILL
    assert await everything(world) == before
    done = await promote(world, "r-1", seq)
    async with world.working():
        await world.until_replayed({"id": done.replay_id})
    assert statuses(world.recorders["main"]) == [("OK", True)]
    async with world.database.read() as connection:
        assert len((await connection.execute(select(replays.c.id))).all()) == 1
