"""Replays from the order to the message, on both databases."""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy import select
from support.events import World, opened, plain, until
from support.payloads import failure

from receiver.api.answers import status_of
from receiver.core.lane_names import wake_no_lane
from receiver.db import job_events, leases, outbox
from receiver.db import replays as replay_rows
from receiver.db.clock import db_time, seconds_since
from receiver.db.database import Database
from receiver.db.rows import event_id
from receiver.db.selection import Selection
from receiver.db.tables import deliveries, events, replays
from receiver.errors import DatabaseUnavailable, PublishFailed, RequestError
from receiver.lanes.attempts import MAX_CRASHES
from receiver.lanes.base import Work
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.replay import ReplayLane, ReplayPace
from receiver.replays import ReplayRequest


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server and without destinations."""
    async with opened(database, tmp_path / "media") as made:
        yield made


async def test_an_order_sends_stored_events_again(world: World) -> None:
    """E12: messages have the same event ids, new delivery ids and the replay's id; the caller is recorded."""
    first, second = world.add_destination("first"), world.add_destination("second")
    for number in range(3):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until_states(deliveries, delivered=6)
        live = list(first.published)
        order = await world.order(selection={}, reason="the shop lost its disk", caller="ops")
        done = await world.until_replayed(order)
    assert {name: done[name] for name in ("state", "caller", "reason", "matched", "handled", "ordered")} == {
        "state": "completed",
        "caller": "ops",
        "reason": "the shop lost its disk",
        "matched": 3,
        "handled": 3,
        "ordered": 6,
    }
    assert done["deliveries"] == {"first": {"delivered": 3}, "second": {"delivered": 3}}
    assert (done["downloads"], done["error"], done["media"], done["rate"]) == (0, None, False, None)
    assert done["finished_at"] is not None
    assert done["finished_at"] >= done["created_at"]
    for recorder in (first, second):
        again = recorder.replayed(order["id"])
        assert sorted(event.get_id() for event in again) == sorted(event.get_id() for event in live)
        assert {event.get_extension("attempt") for event in again} == {1}
    assert {event.get_extension("replayid") for event in live} == {None}
    before = {message.get_id(): message for message in live}
    for message in first.replayed(order["id"]):
        assert message.get_data() == before[message.get_id()].get_data()
        assert message.get_time() == before[message.get_id()].get_time()
    ids = [event.get_extension("deliveryid") for event in first.published + second.published]
    assert len(set(ids)) == 12
    assert await world.states(deliveries) == {"delivered": 12}


async def test_two_orders_are_two_replays(world: World) -> None:
    """E12: without a key each order is a replay of its own, and sends each event again."""
    main = world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(5)))
    orders = [await world.order() for _ in range(2)]
    async with world.working():
        for order in orders:
            await world.until_replayed(order)
    for order in orders:
        assert sorted(event.get_subject() or "" for event in main.replayed(order["id"])) == [
            f"r-{number}" for number in range(5)
        ]
    assert len(main.published) == 10


async def seed_selections(world: World) -> datetime:
    """Store events that differ in each field of a selection; return a moment between them."""
    world.add_destination("main")
    world.add_destination("seedance", model="seedance-*")
    await world.add(plain("image", model="nano-banana-2"))
    await world.add(plain("video", model="seedance-2"))
    await world.add(plain("pro", model="seedance-pro_max"))
    await world.add(plain("odd", model="100%_wide\\x"))
    await world.add(plain("staging", model="seedance-2"), source="staging")
    await world.add(failure("broken"))
    await world.add_job("by shop", request_id="image")
    await world.add_job("by blog", request_id="video", caller="blog")
    await world.add_job("elsewhere", request_id="pro", source="staging")
    await world.fan_out()
    await world.add(b"strange")
    await world.add(plain("new"))
    to = {
        name: deliveries.c.event_seq.in_(select(events.c.seq).where(events.c.request_id.in_(ids)))
        for name, ids in {"early": ("image", "video"), "broken": ("broken",)}.items()
    }
    await world.change(deliveries, state="delivered", finished_at=db_time(0.0))
    await world.change(deliveries, to["broken"], state="dead")
    await world.change(deliveries, to["early"], deliveries.c.destination == "seedance", state="pending")
    between = datetime.now(UTC) - timedelta(days=3)
    for request_id, days in (("image", 5), ("video", 4), ("pro", 2)):
        await world.change(
            events,
            events.c.request_id == request_id,
            received_at=between + timedelta(days=3 - days),
        )
    return between


async def test_a_selection_is_all_its_conditions(world: World) -> None:
    """E12: each field, and several together; events before their fan-out are never part of a replay."""
    between = await seed_selections(world)
    everything = {"image", "video", "pro", "odd", "staging", "broken"}
    known = str(event_id("clipia", "video"))
    exactly = between - timedelta(days=1)
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({}, everything),
        ({"ids": ["image", "absent", known]}, {"image", "video"}),
        ({"ids": ["absent", str(uuid.uuid4())]}, set()),
        ({"since": between}, everything - {"image", "video"}),
        ({"until": between}, {"image", "video"}),
        ({"since": exactly, "until": between}, {"video"}),
        ({"until": exactly}, {"image"}),
        ({"status": "OK"}, everything - {"broken"}),
        ({"status": "ERROR"}, {"broken"}),
        ({"model": "seedance-2"}, {"video", "staging"}),
        ({"model": "seedance-?"}, {"video", "staging"}),
        ({"model": "seedance-*"}, {"video", "pro", "staging"}),
        ({"model": "*"}, everything - {"broken"}),
        ({"model": "100%_wide\\?"}, {"odd"}),
        ({"model": "100%*"}, {"odd"}),
        ({"model": "seedance-pro?max"}, {"pro"}),
        ({"model": "seedance_*"}, set()),
        ({"model": "%"}, set()),
        ({"source": "staging"}, {"staging"}),
        ({"source": "absent"}, set()),
        ({"caller": "shop"}, {"image"}),
        ({"caller": "blog"}, {"video"}),
        ({"destination": "seedance"}, {"video", "pro", "staging"}),
        ({"delivery_state": "dead"}, {"broken"}),
        ({"delivery_state": "pending"}, {"video"}),
        ({"destination": "main", "delivery_state": "pending"}, set()),
        ({"destination": "seedance", "delivery_state": "delivered"}, {"pro", "staging"}),
        ({"status": "OK", "source": "clipia", "model": "seedance-*", "caller": "blog"}, {"video"}),
        ({"status": "ERROR", "model": "*"}, set()),
    ]
    found = []
    names = {row["seq"]: row["request_id"] for row in await world.rows(events)}
    for given, _ in cases:
        selection = Selection.model_validate(given)
        async with world.database.read() as connection:
            scope = await replay_rows.find_scope(connection, selection)
            rows, _ = await replay_rows.select_events(connection, selection, scope)
            assert await replay_rows.count(connection, selection, scope) == len(rows)
        found.append((given, {names[event.seq] for event in rows}))
    assert found == cases


async def test_globs_mean_the_same_on_every_database(world: World) -> None:
    """E12: globs of models are case-sensitive, as in the filters of destinations, on SQLite too."""
    await seed_selections(world)
    counts = [
        (await world.dry_run(selection={"model": glob}))["events"]
        for glob in ("seedance-*", "SEEDANCE-*", "Seedance-?", "SEEDANCE-2")
    ]
    assert counts == [3, 0, 0, 0]


async def test_a_page_follows_another(world: World) -> None:
    """Events come in pages by `seq`, after `after_seq` and up to `until_seq`."""
    await world.add_history(*(plain(f"r-{number}") for number in range(7)))
    seqs = [row["seq"] for row in await world.rows(events)]
    async with world.database.read() as connection:
        scope = replay_rows.Scope(after_seq=seqs[1], until_seq=seqs[5])
        page, reached = await replay_rows.select_events(connection, Selection(), scope, limit=3)
        assert [(event.seq, event.model, event.state) for event in page] == [
            (seq, "m", "ready") for seq in seqs[2:5]
        ]
        assert reached == seqs[4]
        scope = replay_rows.Scope(after_seq=reached, until_seq=seqs[5])
        page, reached = await replay_rows.select_events(connection, Selection(), scope, limit=3)
    assert ([event.seq for event in page], reached) == (seqs[5:6], seqs[5])


async def test_a_long_history_is_gone_through_in_spans(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """E12: each statement scans a limited number of events, even if none of them matches."""
    monkeypatch.setattr(replay_rows, "SPAN", 5)
    main = world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}", model=f"m{number % 9}") for number in range(23)))
    assert (await world.dry_run(selection={"model": "m8"}))["events"] == 2
    order = await world.order(selection={"model": "m8"})
    assert order["matched"] == 2
    steps = await run_to_the_end(world.replay_lane())
    assert steps == 6, "five spans, and the end"
    async with world.working():
        await world.until_replayed(order)
    assert sorted(main.subjects) == ["r-17", "r-8"]
    (last,) = (await world.rows(events))[-1:]
    order = await world.order(selection={"ids": [last["request_id"], str(last["id"])]})
    assert await run_to_the_end(world.replay_lane()) == 2, "ids need no scan"


async def test_a_replay_to_one_destination_leaves_the_others_alone(world: World) -> None:
    """E12: `to` selects the destinations; a destination that was added later gets the history."""
    old = world.add_destination("old")
    await world.add_history(*(plain(f"r-{number}") for number in range(4)))
    new = world.add_destination("new")
    order = await world.order(to=["new", "new"])
    async with world.working():
        done = await world.until_replayed(order)
    assert done["deliveries"] == {"new": {"delivered": 4}}
    assert done["ordered"] == 4
    assert sorted(new.subjects) == [f"r-{number}" for number in range(4)]
    assert old.published == []


async def test_orders_that_cannot_be_carried_out_are_rejected(world: World) -> None:
    """E12: an unknown destination, or no destination, is an error, and no order is stored."""
    with pytest.raises(RequestError, match="no destination is configured") as caught:
        await world.order()
    assert (status_of(caught.value), caught.value.code) == (400, "invalid_request")
    with pytest.raises(RequestError, match="configured: none"):
        await world.order(to=["main"])
    world.add_destination("main")
    world.add_destination("other")
    for ask in (world.order, world.dry_run):
        with pytest.raises(RequestError, match="no destination 'mian'; configured: main, other"):
            await ask(to=["main", "mian"])
    assert await world.rows(replays) == []


async def test_a_dry_run_has_the_numbers_of_the_replay(world: World) -> None:
    """E12: filters apply to replays, and a dry run has the numbers of the replay that follows."""
    recorders = {
        "all": world.add_destination("all"),
        "seedance": world.add_destination("seedance", model="seedance-*", waits_for_media=False),
        "shop": world.add_destination("shop", caller="shop"),
        "none": world.add_destination("none", source="elsewhere"),
    }
    for number in range(30):
        await world.add(plain(f"r-{number}", model=("seedance-2", "nano")[number % 2]))
        if number % 5 == 0:
            await world.add_job(f"{number}", request_id=f"r-{number}")
    await world.fan_out()
    await world.change(deliveries, state="delivered", next_attempt_at=None)
    await world.add(b"strange")
    wanted: dict[str, Any] = {"selection": {"source": "clipia"}, "to": ["all", "seedance", "shop", "none"]}
    counted = await world.dry_run(**wanted)
    assert counted == {"events": 30, "deliveries": {"all": 30, "seedance": 15, "shop": 6, "none": 0}}
    assert await world.rows(replays) == []
    order = await world.order(**wanted)
    assert order["matched"] == counted["events"]
    async with world.working():
        done = await world.until_replayed(order)
    sent = {name: len(recorder.replayed(order["id"])) for name, recorder in recorders.items()}
    assert sent == counted["deliveries"]
    assert {name: sum(counts.values()) for name, counts in done["deliveries"].items()} == {
        name: count for name, count in counted["deliveries"].items() if count
    }


async def test_a_dry_run_goes_through_all_pages(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """E12: a dry run counts all pages."""
    world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(25)))
    select_events = replay_rows.select_events
    pages = 0

    async def by_ten(*arguments: Any, **options: Any) -> Any:
        nonlocal pages
        pages += 1
        return await select_events(*arguments, **options, limit=10)

    monkeypatch.setattr(replay_rows, "select_events", by_ten)
    assert await world.dry_run() == {"events": 25, "deliveries": {"main": 25}}
    assert pages == 3


async def test_a_key_stands_for_one_order(world: World) -> None:
    """E12: the same order under the same key adds no replay; a different order is a conflict."""
    main = world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(3)))
    order = await world.order(key="monday", selection={"status": "OK"}, rate=500, reason="disk")
    async with world.working():
        await world.until_replayed(order)
        again = await world.order(key="monday", selection={"status": "OK"}, rate=500, reason="disk")
        assert (again["id"], again["state"]) == (order["id"], "completed")
        others: list[dict[str, Any]] = [
            {"selection": {"status": "ERROR"}},
            {"selection": {"status": "OK"}, "media": True},
            {"selection": {"status": "OK"}, "rate": 1},
            {"selection": {"status": "OK"}, "to": ["main"]},
        ]
        for changes in others:
            values: dict[str, Any] = {"rate": 500, "reason": "disk"} | changes
            with pytest.raises(RequestError, match="another replay") as caught:
                await world.order(key="monday", **values)
            assert (status_of(caught.value), caught.value.code) == (409, "idempotency_key_reuse")
        theirs = await world.order(key="monday", caller="somebody else")
        assert theirs["id"] != order["id"]
        await world.until_replayed(theirs)
    assert len(await world.rows(replays)) == 2
    assert len(main.published) == 6


async def test_a_key_used_many_times_at_once_is_one_replay(world: World) -> None:
    """E12: eight concurrent orders with one key get the same replay."""
    world.add_destination("main")
    await world.add_history(plain("r-1"))
    orders = await asyncio.gather(*(world.order(key="k", selection={}) for _ in range(8)))
    assert len({order["id"] for order in orders}) == 1
    assert len(await world.rows(replays)) == 1


async def test_several_workers_make_each_delivery_once(world: World) -> None:
    """E15: three workers carry out two replays of 150 events without a double or a gap."""
    world.replay_pace = ReplayPace(step_events=20)
    main, other = world.add_destination("main"), world.add_destination("other", status="OK")
    await world.add_history(*(plain(f"r-{number}") for number in range(150)))
    orders = [await world.order(to=["main"]), await world.order()]
    async with world.working(count=3):
        done = [await world.until_replayed(order) for order in orders]
    assert [each["ordered"] for each in done] == [150, 300]
    for recorder, order in ((main, orders[0]), (main, orders[1]), (other, orders[1])):
        sent = Counter(event.get_id() for event in recorder.replayed(order["id"]))
        assert len(sent) == 150
        assert set(sent.values()) == {1}
    assert len(main.published) + len(other.published) == 3 * 150


async def take(lane: ReplayLane) -> Work:
    """Claim the next step of the only replay."""
    (work,) = await lane.claim(2)
    return work


async def lose_lease(world: World) -> None:
    """Make the lease of the replay expire."""
    await world.change(replays, replays.c.state == "pending", next_attempt_at=db_time(0.0))


async def run_to_the_end(lane: ReplayLane, *, steps: int = 50) -> int:
    """Carry out a replay until it is no longer due; return the number of steps."""
    for step in range(steps):
        works = await lane.claim(2)
        if not works:
            return step
        for work in works:
            await work.run()
    return steps


async def test_a_step_whose_lease_is_lost_changes_nothing(world: World) -> None:
    """E10: if a worker sleeps through its lease in mid-replay, there is no double and no gap."""
    world.replay_pace = ReplayPace(step_events=10)
    world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(35)))
    order = await world.order()
    sleeper, other = world.replay_lane(), world.replay_lane()
    zombies = []
    for _ in range(3):
        zombies.append(await take(sleeper))
        await lose_lease(world)
        await (await take(other)).run()
    before = await world.rows(deliveries, deliveries.c.replay_id == order["id"])
    assert len(before) == 30
    for zombie in zombies:
        await zombie.run()
    assert await world.rows(deliveries, deliveries.c.replay_id == order["id"]) == before
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert (shown["handled"], shown["ordered"], shown["state"]) == (30, 30, "pending")
    await run_to_the_end(other)
    rows = await world.rows(deliveries, deliveries.c.replay_id == order["id"])
    assert len({row["event_seq"] for row in rows}) == len(rows) == 35
    await zombies[0].run()
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert (shown["state"], shown["handled"], shown["ordered"]) == ("completed", 35, 35)


async def test_a_crash_between_steps_is_resumed(world: World) -> None:
    """E12: if the process dies, the replay is claimed again after its lease, and goes on from there."""
    world.replay_pace = ReplayPace(step_events=10)
    main = world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(45)))
    order = await world.order()
    for _ in range(3):
        dying = world.replay_lane()
        await (await take(dying)).run()
        await take(dying)
        assert await world.replay_lane().claim(2) == [], "its lease holds"
        await lose_lease(world)
    async with world.working():
        done = await world.until_replayed(order)
    assert (done["state"], done["handled"], done["ordered"], done["error"]) == ("completed", 45, 45, None)
    assert sorted(main.subjects) == sorted(f"r-{number}" for number in range(45))


async def test_a_step_that_is_given_back_is_due_at_once(world: World) -> None:
    """E16: at shutdown a step that was not done is released, without an attempt, to another worker."""
    world.add_destination("main")
    await world.add_history(plain("r-1"))
    await world.order()
    leaving, other = world.replay_lane(), world.replay_lane()
    held = await take(leaving)
    assert await leaving.renew([held.claim]) == {held.claim.id}
    await leaving.release([held.claim])
    taken = await take(other)
    assert (taken.claim.attempt, taken.claim.lost) == (1, 0)
    assert await leaving.renew([held.claim]) == set()
    await held.run()
    assert await world.rows(deliveries, deliveries.c.replay_id.is_not(None)) == []
    await taken.run()
    assert len(await world.rows(deliveries, deliveries.c.replay_id.is_not(None))) == 1


async def test_a_step_that_breaks_off_leaves_nothing_of_itself(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E12: progress and deliveries are one transaction; if it fails, the whole step is repeated."""
    world.replay_pace = ReplayPace(step_events=10, failure_pause_seconds=0.0)
    world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(25)))
    order = await world.order()
    lane = world.replay_lane()
    add_counts = replay_rows.add_counts

    async def away(*_arguments: Any, **_options: Any) -> None:
        raise DatabaseUnavailable("gone for a moment", reason="database")

    monkeypatch.setattr(replay_rows, "add_counts", away)
    await (await take(lane)).run()
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert (shown["state"], shown["handled"], shown["deliveries"]) == ("pending", 0, {})
    assert "gone for a moment" in (shown["error"] or "")
    monkeypatch.setattr(replay_rows, "add_counts", add_counts)
    await run_to_the_end(lane)
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert (shown["state"], shown["handled"], shown["ordered"], shown["error"]) == ("completed", 25, 25, None)
    assert shown["deliveries"] == {"main": {"pending": 25}}


async def test_a_replay_that_kills_its_workers_is_given_up(world: World) -> None:
    """E8: if the steps of a replay crashed five workers in a row, it fails with the reason."""
    world.add_destination("main")
    await world.add_history(plain("r-1"))
    order = await world.order()
    for _ in range(MAX_CRASHES):
        await take(world.replay_lane())
        await lose_lease(world)
    await run_to_the_end(world.replay_lane())
    shown = await world.replays.show(order["id"])
    assert shown is not None
    error = f"gave up: {MAX_CRASHES} workers crashed while carrying out this replay"
    assert (shown["state"], shown["error"]) == ("failed", error)
    assert shown["deliveries"] == {}


async def test_a_replay_waits_while_too_much_of_it_waits(world: World) -> None:
    """E12: above `max_waiting` unfinished deliveries a replay adds none, until some are done."""
    world.replay_pace = ReplayPace(step_events=10, max_waiting=25, pause_seconds=0.0)
    world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(60)))
    order = await world.order()
    lane = world.replay_lane()
    mine = deliveries.c.replay_id == order["id"]
    await run_to_the_end(lane, steps=6)
    assert await world.states(deliveries, mine) == {"pending": 30}
    await world.change(deliveries, mine, state="delivered", next_attempt_at=None)
    await run_to_the_end(lane, steps=6)
    assert await world.states(deliveries, mine) == {"pending": 30, "delivered": 30}
    await world.change(deliveries, mine, state="delivered", next_attempt_at=None)
    await run_to_the_end(lane)
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert (shown["state"], shown["handled"]) == ("completed", 60)


async def test_a_rate_is_kept(world: World) -> None:
    """E12: a step has the events of one second at most, and the next one is due when their time is over."""
    world.replay_pace = ReplayPace(step_events=20)
    world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(50)))
    lane = world.replay_lane()
    due_in = -seconds_since(replays.c.next_attempt_at)
    cases = [(0.5, 1, 2.0), (1, 1, 1.0), (4, 4, 1.0), (7.9, 7, 7 / 7.9), (1000, 20, 0.02)]
    for rate, size, pause in cases:
        order = await world.order(rate=rate)
        await (await take(lane)).run()
        async with world.database.read() as connection:
            waits = (await connection.execute(select(due_in).where(replays.c.id == order["id"]))).scalar_one()
        shown = await world.replays.show(order["id"])
        assert shown is not None
        assert shown["handled"] == size
        assert waits <= pause + 0.01
        if pause > 0.5:
            assert waits > pause - 0.5
            assert await lane.claim(2) == []
        await world.replays.cancel(order["id"], by="ops")


async def test_a_rate_holds_to_the_end(world: World) -> None:
    """E12: 30 events at 20 a second take a second at least, for any number of workers."""
    main = world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(30)))
    loop = asyncio.get_running_loop()
    order = await world.order(rate=20)
    began = loop.time()
    async with world.working(count=2):
        await world.until_replayed(order)
    # A step of 20 has to pass before the last 10.
    assert loop.time() - began >= 0.99
    assert sorted(main.subjects) == sorted(f"r-{number}" for number in range(30))


async def test_events_still_received_are_left_to_live_traffic(world: World) -> None:
    """E12: an event before its fan-out is sent once, as a live event, and not by the replay too."""
    main = world.add_destination("main")
    await world.add_history(plain("old"))
    await world.add(plain("new"))
    order = await world.order()
    assert order["matched"] == 1
    await run_to_the_end(world.replay_lane())
    async with world.working():
        await world.until_replayed(order)
        await world.until_states(deliveries, delivered=3)
    assert sorted((event.get_subject(), event.get_extension("replayid")) for event in main.published) == [
        ("new", None),
        ("old", str(order["id"])),
    ]


async def test_an_event_on_its_way_is_sent_once(world: World) -> None:
    """E12: an event that is fanned out during the replay is sent once, in either order."""
    main = world.add_destination("main")
    await world.add_history(plain("old"))
    await world.add(plain("new"))
    order = await world.order()
    await world.fan_out()
    async with world.working():
        done = await world.until_replayed(order)
        await world.until_states(deliveries, deliveries.c.replay_id.is_(None), delivered=2)
    assert (done["matched"], done["handled"]) == (1, 1)
    assert sorted(main.subjects) == ["new", "old"]


async def test_a_replay_ends_with_the_events_of_its_order(world: World) -> None:
    """E12: later events are not part of a replay, so that it ends under live traffic."""
    main = world.add_destination("main")
    await world.add_history(plain("old"))
    order = await world.order()
    await world.add_history(plain("later"))
    async with world.working():
        done = await world.until_replayed(order)
    assert (done["matched"], done["handled"]) == (1, 1)
    assert main.subjects == ["old"]


async def test_a_worker_without_the_destination_leaves_the_replay_to_others(world: World) -> None:
    """E12: a worker with older settings leaves the order to others, and the order shows the reason."""
    world.replay_pace = ReplayPace(failure_pause_seconds=0.05)
    world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(3)))
    older = world.replay_lane()
    new = world.add_destination("new")
    order = await world.order(to=["new"])
    (work,) = await older.claim(1)
    await work.run()
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert (shown["state"], shown["handled"]) == ("pending", 0)
    assert "no destination 'new'" in (shown["error"] or "")
    async with world.working():
        done = await world.until_replayed(order)
    assert (done["state"], done["deliveries"]) == ("completed", {"new": {"delivered": 3}})
    assert (len(new.published), done["error"]) == (3, None)


async def test_a_dead_destination_holds_up_no_other_of_the_replay(world: World) -> None:
    """E6: if one of two destinations is down, the replay goes on for the other one."""
    world.replay_pace = ReplayPace(step_events=10, max_waiting=20, pause_seconds=0.05)
    dead, fine = world.add_destination("dead"), world.add_destination("fine")

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("down", reason="connect")

    dead.behave = fail
    await world.add_history(*(plain(f"r-{number}") for number in range(60)))
    order = await world.order()

    async def is_sent() -> bool:
        return len(fine.replayed(order["id"])) == 60

    async with world.working():
        await until(is_sent, seconds=5)


async def test_a_failed_step_is_tried_again_by_the_worker(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E12: an error in a step delays the replay, but ends neither the replay nor the lane."""
    world.replay_pace = ReplayPace(failure_pause_seconds=0.05)
    main = world.add_destination("main")
    await world.add_history(plain("r-1"))
    waiting = replay_rows.count_waiting
    errors: list[Exception] = [RuntimeError("a bug"), DatabaseUnavailable("away", reason="database")]

    async def fail(*arguments: Any) -> int:
        if errors:
            raise errors.pop()
        return await waiting(*arguments)

    monkeypatch.setattr(replay_rows, "count_waiting", fail)
    order = await world.order()
    async with world.working():
        await world.until_replayed(order)
    assert main.subjects == ["r-1"]


async def test_canceling_stops_waiting_deliveries(world: World) -> None:
    """E12: no step and no waiting delivery follows; deliveries under way end, and live ones are untouched."""
    world.replay_pace = ReplayPace(step_events=10)
    main = world.add_destination("main")
    await world.add_history(*(plain(f"r-{number}") for number in range(40)))
    await world.add(plain("live"))
    await world.fan_out()
    order = await world.order()
    lane = world.replay_lane()
    await (await take(lane)).run()
    delivering = world.delivery_lane(concurrency=12)
    under_way = await delivering.claim(12)
    zombie = await take(lane)
    assert len(under_way) == 4, "one live and three replayed"
    assert await world.replays.cancel(order["id"], by="ops")
    await zombie.run()
    for work in under_way:
        await work.run()
    assert await world.replay_lane().claim(2) == []
    mine = deliveries.c.replay_id == order["id"]
    assert await world.states(deliveries, mine) == {"canceled": 7, "delivered": 3}
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert (shown["state"], shown["handled"]) == ("canceled", 10)
    assert shown["finished_at"] is not None
    assert await delivering.claim(12) == []
    assert len(main.published) == 4
    assert not await world.replays.cancel(order["id"], by="ops")
    assert not await world.replays.cancel(uuid.uuid4(), by="ops")


async def test_canceling_a_finished_order_drops_waiting_deliveries(world: World) -> None:
    """E12: if all events of an order are handled, it can be canceled while deliveries of it wait."""
    main = world.add_destination("main")

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("down", reason="connect")

    main.behave = fail
    await world.add_history(*(plain(f"r-{number}") for number in range(4)))
    order = await world.order()
    await run_to_the_end(world.replay_lane())
    lane = world.delivery_lane(concurrency=4)
    (work,) = await lane.claim(4)
    assert await world.replays.cancel(order["id"], by="ops")
    await work.run()
    mine = deliveries.c.replay_id == order["id"]
    assert await world.states(deliveries, mine) == {"canceled": 3, "pending": 1}
    assert await world.replays.cancel(order["id"], by="ops"), "the delivery that was under way has failed"
    assert await world.states(deliveries, mine) == {"canceled": 4}
    shown = await world.replays.show(order["id"])
    assert shown is not None
    assert shown["state"] == "canceled"


async def test_deliveries_of_a_canceled_replay_are_not_retried(world: World) -> None:
    """E12: deliveries that were claimed when their replay was canceled are not retried; in batches."""
    world.max_canceled = 3
    main = world.add_destination("main")

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("down", reason="connect")

    await world.add_history(*(plain(f"r-{number}") for number in range(20)))
    order = await world.order()
    await run_to_the_end(world.replay_lane())
    lane = world.delivery_lane(concurrency=32)
    works = await lane.claim(32)
    assert len(works) == 8
    assert await world.replays.cancel(order["id"], by="ops")
    mine = deliveries.c.replay_id == order["id"]
    assert await world.states(deliveries, mine) == {"canceled": 12, "pending": 8}
    main.behave = fail
    for work in works:
        await work.run()
    main.behave = lambda _event: None
    await world.change(deliveries, mine, deliveries.c.state == "pending", next_attempt_at=db_time(0.0))
    for work in await world.delivery_lane(concurrency=32).claim(32):
        await work.run()
    assert await world.states(deliveries, mine) == {"canceled": 20}
    assert main.published == []


async def test_replays_are_listed_newest_first(world: World) -> None:
    """E12: each order is listed with its caller and reason, in pages."""
    world.add_destination("main")
    orders = [await world.order(reason=f"reason {number}", caller=f"c{number}") for number in range(5)]
    first = await world.replays.list_orders(limit=3)
    rest = await world.replays.list_orders(limit=3, before=first[-1]["seq"])
    assert [row["id"] for row in first + rest] == [order["id"] for order in reversed(orders)]
    assert [(row["caller"], row["reason"]) for row in rest] == [("c1", "reason 1"), ("c0", "reason 0")]
    assert await world.replays.show(uuid.uuid4()) is None


async def test_live_deliveries_go_before_replayed_ones(world: World) -> None:
    """E12: a lane claims live deliveries first, and replayed ones for a quarter of its places."""
    world.add_destination("main")
    await world.add_history(*(plain(f"old-{number}") for number in range(60)))
    await world.order()
    await run_to_the_end(world.replay_lane())
    lane = world.delivery_lane()
    replayed = await lane.claim(32)
    assert len(replayed) == 8
    assert await lane.claim(24) == [], "the other places are for live deliveries"
    for number in range(40):
        await world.add(plain(f"new-{number}"))
    await world.fan_out()
    live = await lane.claim(24)
    assert len(live) == 24
    claimed = await world.rows(deliveries, deliveries.c.lease.is_not(None))
    assert Counter(row["replay_id"] is None for row in claimed) == {True: 24, False: 8}
    for work in [*replayed[:3], *live[:5]]:
        await work.run()
    more = await lane.claim(8)
    assert len(more) == 8
    claimed = await world.rows(deliveries, deliveries.c.lease.is_not(None))
    assert Counter(row["replay_id"] is None for row in claimed) == {True: 27, False: 5}, "live ones first"


async def test_a_lane_knows_whether_it_took_all(world: World) -> None:
    """After a claim that took all due rows, the end of their work is no reason to claim again."""
    main = world.add_destination("main")
    for number in range(3):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    lane = world.delivery_lane()
    works = await lane.claim(2)
    assert lane.may_have_more, "the claim took as many as its limit"
    works += await lane.claim(2)
    assert (len(works), lane.may_have_more) == (3, False)
    await world.order()
    await run_to_the_end(world.replay_lane())
    works += await lane.claim(29)
    assert (len(works), lane.may_have_more) == (6, True), "replays have a share of the places"
    for work in works:
        await work.run()

    def reject(_event: CloudEvent) -> None:
        raise PublishFailed("down", reason="connect")

    main.behave = reject
    for number in range(10):
        await world.add(plain(f"s-{number}"))
    await world.fan_out()
    for work in await lane.claim(20):
        await work.run()
    await world.change(deliveries, deliveries.c.state == "pending", next_attempt_at=db_time(0.0))
    assert await lane.claim(20) == []
    assert lane.may_have_more, "the circuit breaker lets no delivery through"


async def test_replays_are_claimed_only_now_and_then_beside_live_deliveries(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E12: beside live deliveries a lane claims replays only now and then; without them, at once."""
    world.add_destination("main")
    await world.add_history(plain("old"))
    lane = DeliveryLane(world.database, world.targets[0], wake=wake_no_lane, max_rest_seconds=3600.0)
    claims: list[bool] = []
    claim = leases.claim_deliveries

    async def ask(*arguments: Any, **options: Any) -> Any:
        claims.append(options["replayed"])
        return await claim(*arguments, **options)

    monkeypatch.setattr(leases, "claim_deliveries", ask)
    for number in range(3):
        await world.add(plain(f"new-{number}"))
        await world.fan_out()
        if number == 2:
            await world.order()
            await run_to_the_end(world.replay_lane())
        assert len(await lane.claim(8)) == 1
    assert claims == [False, True, False, False]
    assert await lane.claim(8), "there is no live delivery, but a replay"


@pytest.mark.parametrize("width", [1, 3])
async def test_the_narrowest_lane_replays_too(world: World, width: int) -> None:
    """E12: replays have at least one place while no live delivery waits."""
    world.add_destination("main")
    await world.add_history(plain("old-1"), plain("old-2"))
    await world.order()
    await run_to_the_end(world.replay_lane())
    lane = world.delivery_lane(concurrency=width)
    (work,) = await lane.claim(width)
    await work.run()
    assert len(await lane.claim(width)) == 1


async def test_a_claim_that_was_rolled_back_takes_no_share(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E3, E12: if the database goes away during a claim, replays lose none of their places."""
    world.add_destination("main")
    await world.add_history(*(plain(f"old-{number}") for number in range(30)))
    order = await world.order()
    await run_to_the_end(world.replay_lane())
    lane = world.delivery_lane()
    load_refs = job_events.load_refs

    async def away(*_arguments: Any) -> Any:
        raise DatabaseUnavailable("gone for a moment", reason="database")

    monkeypatch.setattr(job_events, "load_refs", away)
    with pytest.raises(DatabaseUnavailable):
        await lane.claim(32)
    monkeypatch.setattr(job_events, "load_refs", load_refs)
    assert await world.states(deliveries, deliveries.c.lease.is_not(None)) == {}
    works = await lane.claim(32)
    assert len(works) == 8
    for work in works:
        await work.run()
    assert await world.states(deliveries, deliveries.c.replay_id == order["id"]) == {
        "delivered": 8,
        "pending": 22,
    }


async def test_replays_rest_beside_live_traffic(world: World) -> None:
    """E12: after a replayed delivery, the lane is free for live ones for a while."""
    main = world.add_destination("main")
    await world.add_history(*(plain(f"old-{number}") for number in range(30)))
    await world.order()
    await run_to_the_end(world.replay_lane())
    woken: list[str] = []
    lane = DeliveryLane(
        world.database, world.targets[0], wake=woken.append, concurrency=16, max_rest_seconds=3600.0
    )
    for _ in range(2):
        for work in await lane.claim(16):
            await work.run()
    assert len(main.published) == 8, "no rest without live traffic"
    main.behave = lambda event: asyncio.sleep(0.2 if event.get_extension("replayid") else 0)
    await world.add(plain("new"))
    await world.fan_out()
    works = await lane.claim(16)
    assert len(works) == 5
    await asyncio.gather(*(work.run() for work in works))
    assert await lane.claim(16) == [], "a rest as long as the work"

    async def is_woken() -> bool:
        return woken == ["destination:main"]

    await until(is_woken)
    assert len(await lane.claim(16)) == 4


async def test_a_full_replay_backlog_leaves_places_for_live_traffic(world: World) -> None:
    """E12: if a destination is slow, live events are still sent before a replay is done."""
    slow = world.add_destination("slow")
    slow.behave = lambda event: asyncio.sleep(0.4 if event.get_extension("replayid") else 0)
    await world.add_history(*(plain(f"old-{number}") for number in range(80)))
    order = await world.order()
    async with world.working():

        async def is_under_way() -> bool:
            return len(slow.replayed(order["id"])) > 0

        await until(is_under_way)
        for number in range(10):
            await world.add(plain(f"new-{number}"))
        await world.until_replayed(order)
        await world.until_states(deliveries, delivered=170)
    live = [index for index, subject in enumerate(slow.subjects) if subject.startswith("new")]
    assert len(live) == 10
    assert max(live) < 70, "live events must not queue behind the replay"


async def test_an_event_has_one_live_delivery_per_destination(world: World) -> None:
    """E15: the database rejects a second live delivery, or a second one of the same replay."""
    world.add_destination("main")
    await world.add_history(plain("r-1"))
    order = await world.order()
    await run_to_the_end(world.replay_lane())
    async with world.database.write() as connection:
        insert = partial(outbox.insert_deliveries, connection)
        added = [
            await insert([(1, "main")], due=True, replay_id=order["id"]),
            await insert([(1, "main")] * 2, due=False, replay_id=uuid.uuid4()),
            await insert([(1, "main")], due=True),
            await insert([], due=True),
        ]
    assert added == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"rate": 0}, "rate"),
        ({"rate": 100_001}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"reason": "x" * 1001}, "reason"),
        ({"reason": "a\x00b"}, "reason"),
        ({"to": ["x"] * 101}, "to"),
        ({"dry_run": True}, "dry_run"),
        ({"selection": {"ids": ["x"] * 10_001}}, "ids"),
        ({"selection": {"ids": [""]}}, "ids"),
        ({"selection": {"since": "monday"}}, "since"),
        ({"selection": {"status": "ok"}}, "status"),
        ({"selection": {"delivery_state": "canceled"}}, "delivery_state"),
        ({"selection": {"caller": "a\x00b"}}, "caller"),
        ({"selection": {"modle": "x"}}, "modle"),
    ],
)
def test_invalid_orders_are_rejected(values: dict[str, Any], field: str) -> None:
    """E12: the fields of an order are limited, and an unknown field is an error."""
    with pytest.raises(ValueError, match=field):
        ReplayRequest.model_validate(values)
