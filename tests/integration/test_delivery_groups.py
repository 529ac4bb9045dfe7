"""Deliveries to a destination that takes groups: each has its own result, on both databases."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent
from structlog.testing import capture_logs
from support.events import GroupRecorder, World, opened, plain, until
from support.payloads import body

from receiver.db import inbox, leases
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.tables import attempts, deliveries, events
from receiver.errors import DatabaseUnavailable, PublishFailed, PublishRejected
from receiver.lanes import attempts as lane_attempts
from receiver.lanes import delivery


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server."""
    async with opened(database, tmp_path / "media") as made:
        yield made


async def fill(world: World, count: int, *, recorder: GroupRecorder | None = None) -> GroupRecorder:
    """Configure a destination and add due deliveries to it."""
    recorder = recorder or GroupRecorder()
    world.add_destination("main", recorder=recorder)
    for number in range(count):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    return recorder


def tell(event: CloudEvent) -> str:
    """Return an event's `request_id`."""
    return str(event.get_subject())


async def test_deliveries_of_a_group_are_recorded_one_by_one(world: World) -> None:
    """E1, E7, E10: in one group some are confirmed, some fail, some are rejected, one crashes its workers."""
    main = await fill(world, 40)

    def behave(event: CloudEvent) -> None:
        if tell(event) in {"r-3", "r-4"}:
            raise PublishFailed("not now", reason="status")
        if tell(event) == "r-5":
            raise PublishRejected("never", reason="status")

    main.behave = behave
    rows = await world.rows(deliveries)
    await world.change(deliveries, deliveries.c.id == rows[6]["id"], lost=lane_attempts.MAX_CRASHES)
    await world.change(events, events.c.request_id == "r-7", body=b"no JSON any more")
    [work] = await world.delivery_lane(concurrency=100).claim(50)
    assert len(work.claims) == 40
    await work.run()
    assert main.groups == [38]
    found = {row["id"]: row for row in await world.rows(deliveries)}
    states = [found[row["id"]]["state"] for row in rows]
    odd = {3: "pending", 4: "pending", 5: "dead", 6: "dead"}
    assert states[:7] == [odd.get(number, "delivered") for number in range(7)]
    assert states[8:] == ["delivered"] * 32
    assert {row["lease"] for row in found.values()} == {None}
    made = {row["work_id"]: row for row in await world.rows(attempts)}
    assert len(made) == 40
    outcomes = [made[row["id"]]["outcome"] for row in rows]
    assert outcomes[:7] == ["succeeded"] * 3 + ["retry"] * 2 + ["failed"] * 2
    assert {(row["number"], row["error"]) for row in made.values() if row["outcome"] == "succeeded"} == {
        (1, None)
    }
    assert sorted(main.subjects) == sorted(f"r-{number}" for number in range(40) if not 3 <= number <= 7)


async def test_a_lost_lease_in_a_group_changes_no_row(world: World) -> None:
    """E10: a delivery that another worker has claimed meanwhile is not recorded; the others are."""
    await fill(world, 10)
    [late] = await world.delivery_lane(concurrency=100).claim(50)
    rows = await world.rows(deliveries)
    await world.change(deliveries, deliveries.c.id == rows[4]["id"], next_attempt_at=db_time(0.0))
    [other] = await world.delivery_lane(concurrency=100).claim(50)
    assert [claim.id for claim in other.claims] == [rows[4]["id"]]
    before = await world.rows(deliveries, deliveries.c.id == rows[4]["id"])
    await late.run()
    assert await world.rows(deliveries, deliveries.c.id == rows[4]["id"]) == before
    assert await world.states(deliveries) == {"delivered": 9, "pending": 1}
    assert len(await world.rows(attempts)) == 9
    await other.run()
    assert await world.states(deliveries) == {"delivered": 10}
    assert {row["number"] for row in await world.rows(attempts)} == {1, 2}


async def test_confirmed_deliveries_are_recorded_after_an_outage(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E10: if the database is away after the confirmation, a group waits; a bug takes them one by one."""
    main = await fill(world, 10)
    finish, errors = (
        leases.finish_delivered,
        [DatabaseUnavailable("away", reason="database"), ZeroDivisionError()],
    )

    async def fail(connection: SqlConnection, claims: Any, **values: Any) -> None:
        await finish(connection, claims, **values)
        raise errors.pop(0)

    monkeypatch.setattr(leases, "finish_delivered", fail)
    [work] = await world.delivery_lane(concurrency=100).claim(50)
    await work.run()
    assert not errors
    assert await world.states(deliveries) == {"delivered": 10}
    assert len(await world.rows(attempts)) == len(main.published) == 10


async def test_a_group_that_breaks_is_tried_again(world: World) -> None:
    """E7: if the destination has a bug, each delivery of the group has a failed attempt."""
    main = await fill(world, 3)

    def break_down(_event: CloudEvent) -> None:
        raise ZeroDivisionError("bug")

    main.behave = break_down
    [work] = await world.delivery_lane(concurrency=100).claim(50)
    await work.run()
    assert await world.states(deliveries) == {"pending": 3}
    assert {row["error"] for row in await world.rows(attempts)} == {"ZeroDivisionError, see the log"}


async def test_the_rest_of_a_group_is_released_if_no_message_arrives(world: World) -> None:
    """E4: after a request in which all messages failed no other begins, and the rest counts no attempt."""
    main = await fill(world, 40)
    main.at_once = 10

    def fail(_event: CloudEvent) -> None:
        if len(main.published) == 10:
            raise PublishFailed("down", reason="connection")

    main.behave = fail
    lane = world.delivery_lane(concurrency=100)
    [work] = await lane.claim(100)
    assert len(work.claims) == 40
    await work.run()
    assert main.groups == [10, 10]
    rows = await world.rows(deliveries)
    assert sorted(row["attempts"] for row in rows) == [0] * 20 + [1] * 20
    assert {row["lease"] for row in rows} == {None}
    assert len(await world.rows(attempts)) == 20
    assert await lane.claim(100) == []


async def test_messages_are_recorded_before_the_next_ones_of_their_group(world: World) -> None:
    """E1: the confirmed messages of a request are recorded, even if the group's next request hangs."""
    main = await fill(world, 40)
    main.at_once = 10
    gate = asyncio.Event()

    async def hang(_event: CloudEvent) -> None:
        if len(main.published) == 20:
            await gate.wait()

    main.behave = hang
    [work] = await world.delivery_lane(concurrency=100).claim(100)
    running = asyncio.gather(work.run())
    await world.until_states(deliveries, delivered=20, pending=20)
    gate.set()
    await running
    assert await world.states(deliveries) == {"delivered": 40}


async def test_a_group_that_takes_long_is_cut(world: World) -> None:
    """E10: a request that could begin after the group's lease does not begin; its messages are released."""
    main = await fill(world, 40)
    main.at_once = 10

    async def take(_event: CloudEvent) -> None:
        await asyncio.sleep(0.3)

    main.behave = take
    lane = world.delivery_lane(concurrency=100)
    lane.lease_seconds = 0.9
    [work] = await lane.claim(100)
    await work.run()
    assert main.groups == [10]
    assert await world.states(deliveries, deliveries.c.lease.is_(None)) == {"delivered": 10, "pending": 30}


async def test_a_small_limit_is_claimed_as_one_group(world: World) -> None:
    """C13: two groups would cost more transactions than one if they are small."""
    main = await fill(world, 20)
    world.targets[0] = replace(world.targets[0], concurrency=4)
    async with world.working():
        await world.until_states(deliveries, delivered=20)
    assert main.groups == [4] * 5


async def test_a_line_of_the_log_has_100_ids_at_most(world: World) -> None:
    """G7: a large group is logged in several lines."""
    await fill(world, 230)
    with capture_logs() as logs:
        [work] = await world.delivery_lane(concurrency=600).claim(300)
        await work.run()
    lines = [line["request_ids"] for line in logs if line["event"] == "events delivered"]
    assert [len(ids) for ids in lines] == [100, 100, 30]
    assert len({each for ids in lines for each in ids}) == 230


@pytest.mark.parametrize("groups", [True, False])
async def test_bodies_that_a_lane_holds_are_bounded(
    world: World, monkeypatch: pytest.MonkeyPatch, *, groups: bool
) -> None:
    """C13: a lane claims as many deliveries as their bodies fit; the others count no attempt and follow."""
    gate, most = asyncio.Event(), 0
    recorder = GroupRecorder()
    if not groups:
        monkeypatch.setattr(GroupRecorder, "publish_first", None)
    world.add_destination("main", recorder=recorder)
    monkeypatch.setattr(inbox, "SMALL_BODY_BYTES", 100)
    large = [body(f"r-{number}", payload={"output": {"text": "x" * 1000}}) for number in range(12)]
    monkeypatch.setattr(delivery, "MAX_BYTES", 3 * len(large[-1]))

    async def behave(_event: CloudEvent) -> None:
        nonlocal most
        most = max(most, recorder.under_way)
        await gate.wait()

    recorder.behave = behave
    for content in large:
        await world.add(content)
    async with world.working():

        async def waits() -> bool:
            return most == 3

        await until(waits)
        held = await world.rows(deliveries, deliveries.c.lease.is_not(None))
        assert len(held) == 3
        free = await world.rows(deliveries, deliveries.c.lease.is_(None))
        assert {row["attempts"] for row in free} == {0}
        gate.set()
        await world.until_states(deliveries, delivered=12)
    assert most == 3
    assert sorted(recorder.subjects) == sorted(f"r-{number}" for number in range(12))
    assert {row["number"] for row in await world.rows(attempts)} == {1}


async def test_a_body_that_is_larger_than_the_bound_is_delivered(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C13: one body may be larger than the bound; it goes alone."""
    monkeypatch.setattr(delivery, "MAX_BYTES", 10)
    main = await fill(world, 3)
    async with world.working():
        await world.until_states(deliveries, delivered=3)
    assert main.groups == [1, 1, 1]


async def test_a_backlog_is_delivered_in_large_groups(world: World) -> None:
    """E5: a group has half of the places at most, so that the next one is claimed meanwhile."""
    recorder = GroupRecorder()
    main = await fill(world, 100, recorder=recorder)
    world.targets[0] = replace(world.targets[0], concurrency=40)

    async def wait(_event: CloudEvent) -> None:
        await asyncio.sleep(0.02)

    main.behave = wait
    async with world.working():
        await world.until_states(deliveries, delivered=100)
    assert main.groups[:4] == [20, 20, 20, 20]
    assert len(set(main.subjects)) == len(main.subjects) == 100


async def test_replays_in_groups_keep_their_share(world: World) -> None:
    """E12: replays have a quarter of the places in groups, too, and live deliveries go beside them."""
    main = GroupRecorder()
    world.add_destination("main", recorder=main)
    world.targets[0] = replace(world.targets[0], concurrency=16)
    await world.add_history(*(plain(f"old-{number}") for number in range(30)))
    under_way: list[int] = []

    async def note(event: CloudEvent) -> None:
        if event.get_extension("replayid"):
            under_way.append(1)
            await asyncio.sleep(0.01)
            under_way.pop()
            assert len(under_way) < 4

    main.behave = note
    order = await world.order(to=["main"], reason="test")
    async with world.working():
        for number in range(10):
            await world.add(plain(f"new-{number}"))
        found = await world.until_replayed(order)
        await world.until_states(deliveries, deliveries.c.replay_id.is_(None), delivered=40)
    assert found["deliveries"]["main"]["delivered"] == 30
    assert sorted(main.subjects) == sorted(
        [f"old-{number}" for number in range(30)] + [f"new-{number}" for number in range(10)]
    )
