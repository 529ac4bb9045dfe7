"""The state of destinations that all processes share: pauses, and open circuits."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy import select, update
from support.events import GroupRecorder, World, plain, until
from support.events import opened as open_world

from receiver.core.lane_names import wake_no_lane
from receiver.core.retry import RetryPolicy
from receiver.db import destinations as sql
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.destinations import FRESH_SECONDS, Circuit
from receiver.db.operation_tables import circuits
from receiver.db.tables import deliveries
from receiver.errors import PublishFailed
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.destination_states import DestinationStates


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world whose workers share the states of destinations."""
    async with open_world(database, tmp_path / "media") as made:
        made.shares_states = True
        yield made


def opened(process: uuid.UUID, destination: str = "orders", error: str = "no answer") -> Circuit:
    """Return a circuit that a process has opened."""
    since = datetime.now(UTC)
    return Circuit(destination=destination, process=process, owner="web-1:41", open_since=since, error=error)


async def test_a_pause_keeps_its_author_and_ends_once(database: Database) -> None:
    """A second pause changes no row, and only the first resumption of a pause ends it."""
    async with database.write() as connection:
        await sql.pause(connection, "orders", by="mia", reason="migration")
        await sql.pause(connection, "orders", by="tom", reason=None)
        state = (await sql.read_pauses(connection))["orders"]
        assert state.pause is not None
        assert (state.pause.by, state.pause.reason, state.resumed) == ("mia", "migration", None)
        assert await sql.resume(connection, "orders")
        assert not await sql.resume(connection, "orders")
        state = (await sql.read_pauses(connection))["orders"]
        assert state.pause is None
        assert state.resumed is not None
        assert 0 <= state.resumed < 60
        await sql.pause(connection, "orders", by="tom", reason=None)
        state = (await sql.read_pauses(connection))["orders"]
        assert state.pause is not None
        assert state.pause.by == "tom"


async def test_a_circuit_is_open_while_a_process_reports_it(database: Database) -> None:
    """A process closes its own circuit only, and that of a process that does not report it any more ends."""
    first, second = uuid.uuid4(), uuid.uuid4()
    async with database.write() as connection:
        await sql.report(connection, [opened(first), opened(first, "mail"), opened(second)])
        await sql.report(connection, [opened(first, error="refused")])
        found = {(each.destination, each.process): each.error for each in await sql.read_circuits(connection)}
        assert found == {
            ("orders", first): "refused",
            ("mail", first): "no answer",
            ("orders", second): "no answer",
        }
        await sql.withdraw(connection, first, ["orders"])
        assert {(each.destination, each.process) for each in await sql.read_circuits(connection)} == {
            ("mail", first),
            ("orders", second),
        }
        old = db_time(-FRESH_SECONDS - 1)
        await connection.execute(update(circuits).where(circuits.c.process == second).values(reported_at=old))
        assert [each.destination for each in await sql.read_circuits(connection)] == ["mail"]
        await sql.withdraw(connection, first, [])
        assert list((await connection.execute(select(circuits.c.destination))).scalars()) == ["mail"]


async def change(world: World, name: str, *, paused: bool) -> None:
    """Pause or resume a destination."""
    async with world.database.write() as connection:
        if paused:
            await sql.pause(connection, name, by="mia", reason="migration")
        else:
            assert await sql.resume(connection, name)


async def test_a_pause_stops_the_claims_of_all_workers(world: World) -> None:
    """E4: after a pause no worker begins a delivery to the destination, and another destination goes on.

    The deliveries under way end, the events wait, and after the pause each is delivered once.
    """
    slow, other = world.add_destination("orders"), world.add_destination("mail")
    places, begun = asyncio.Semaphore(20), list[CloudEvent]()

    async def wait_for_place(event: CloudEvent) -> None:
        begun.append(event)
        await places.acquire()

    slow.behave = wait_for_place
    names = [f"r-{number}" for number in range(200)]
    for name in names:
        await world.add(plain(name))
    await world.fan_out()
    orders = deliveries.c.destination == "orders"
    async with world.working(count=2):

        async def are_busy() -> bool:
            return len(slow.published) == 20 and slow.under_way == 64

        await until(are_busy)
        await change(world, "orders", paused=True)

        async def is_known() -> bool:
            return all(each.is_paused("orders") for each in world.states_of_workers)

        await until(is_known)
        began = len(begun)
        for _ in names:
            places.release()
        await world.add(plain("later"))
        await world.until_states(deliveries, deliveries.c.destination == "mail", delivered=len(names) + 1)
        waiting = len(names) + 1 - began
        await world.until_states(deliveries, orders, delivered=began, pending=waiting)
        assert len(begun) == began
        assert {row["lease"] for row in await world.rows(deliveries, orders)} == {None}
        places.release()
        await change(world, "orders", paused=False)
        await world.until_states(deliveries, orders, delivered=len(names) + 1)
    assert sorted(slow.subjects) == sorted(other.subjects)
    assert len(set(slow.subjects)) == len(slow.subjects)


async def test_a_group_that_is_paused_gives_its_rest_back(world: World) -> None:
    """Of a claimed group only the part under way is delivered; the rest counts no attempt, and waits."""
    group = GroupRecorder()
    group.at_once = 2
    world.add_destination("orders", recorder=group)
    for number in range(10):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    woken: list[str] = []
    states = DestinationStates(world.database, wake=woken.append)
    lane = DeliveryLane(world.database, world.targets[0], wake=wake_no_lane, concurrency=10, states=states)

    async def pause(_event: CloudEvent) -> None:
        await change(world, "orders", paused=True)
        await states.refresh()

    group.behave = pause
    (work,) = await lane.claim(10)
    await work.run()
    assert group.groups == [2]
    rows = await world.rows(deliveries)
    assert (
        sorted((row["state"], row["attempts"]) for row in rows)
        == [("delivered", 1)] * 2 + [("pending", 0)] * 8
    )
    assert await lane.claim(10) == []
    await change(world, "orders", paused=False)
    await states.refresh()
    assert woken == ["destination:orders"]
    assert await lane.claim(10)


async def test_a_pause_extends_the_time_to_give_up(world: World) -> None:
    """A delivery that waited in a pause for longer than `give_up_after` has its whole time after it."""
    retry = RetryPolicy(initial=0.05, cap=0.05, give_up_after=3600.0)
    recorder = world.add_destination("orders", retry=retry)
    world.add_destination("mail", retry=retry, recorder=recorder)

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("no answer", reason="connect")

    recorder.behave = fail
    await world.add(plain("r-1"))
    await world.fan_out()
    await world.change(deliveries, created_at=db_time(-7200.0))
    await change(world, "orders", paused=True)
    await change(world, "orders", paused=False)
    states = DestinationStates(world.database)
    await states.refresh()
    for target in world.targets:
        lane = DeliveryLane(world.database, target, wake=wake_no_lane, states=states)
        (work,) = await lane.claim(1)
        await work.run()
    found = {row["destination"]: row["state"] for row in await world.rows(deliveries)}
    assert found == {"orders": "pending", "mail": "dead"}


async def test_a_circuit_is_followed_by_other_processes(world: World) -> None:
    """E4: after one process has opened its circuit, another one sends a single delivery, and so at its start.

    When the first one has closed it, the other one probes at once.
    """
    recorder = world.add_destination("orders")
    for number in range(40):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("no answer", reason="connect")

    recorder.behave = fail
    woken: list[str] = []
    states = [DestinationStates(world.database, wake=woken.append) for _ in range(3)]
    first, second = (
        DeliveryLane(world.database, world.targets[0], wake=woken.append, concurrency=10, states=each)
        for each in states[:2]
    )
    for work in await first.claim(10):
        await work.run()
    await states[0].refresh()
    await states[1].refresh()
    (work,) = await second.claim(10)
    await work.run()
    assert await second.claim(10) == []
    await states[1].refresh()
    async with world.database.read() as connection:
        found = await sql.read_circuits(connection)
    assert [each.error for each in found] == ["PublishFailed: no answer"] * 2
    await states[2].refresh()
    third = DeliveryLane(
        world.database, world.targets[0], wake=woken.append, concurrency=10, states=states[2]
    )
    (work,) = await third.claim(10)
    recorder.behave = lambda _event: None
    await work.run()
    assert len(await third.claim(10)) == 2
    states[0].closed("orders")
    await states[0].refresh()
    woken.clear()
    await states[1].refresh()
    assert woken == ["destination:orders"]
    assert len(await second.claim(10)) == 1
