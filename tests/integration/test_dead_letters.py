"""Dead letters that the operator restarts, on both databases."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy import select
from support.events import World, opened, plain

from receiver.core.retry import DAY, RetryPolicy
from receiver.db import outbox
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.outbox import DeadLetters
from receiver.db.tables import attempts, deliveries, events
from receiver.errors import PublishFailed, PublishRejected


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server and without destinations."""
    async with opened(database, tmp_path / "media") as made:
        yield made


async def test_a_dead_letter_is_delivered_after_all(world: World) -> None:
    """E4: the delivery id stays, the attempts start over, and the old ones and the operator are on record."""
    main = world.add_destination("main")

    def reject(_event: CloudEvent) -> None:
        raise PublishRejected("422 from the destination", reason="status")

    main.behave = reject
    await world.add(plain("r-1"))
    async with world.working():
        await world.until_states(deliveries, dead=1)
        (dead,) = await world.rows(deliveries)
        main.behave = lambda _event: None
        assert await restart(world, ids=[dead["id"]]) == {"main": 1}
        await world.until_states(deliveries, delivered=1)
    (message,) = main.published
    assert message.get_extension("deliveryid") == str(dead["id"])
    assert message.get_extension("attempt") == 1
    recorded = [(row["number"], row["outcome"], row["error"]) for row in await world.rows(attempts)]
    assert recorded == [
        (1, "failed", "PublishRejected: 422 from the destination"),
        (0, "restarted", "by ops"),
        (1, "succeeded", None),
    ]
    (row,) = await world.rows(deliveries)
    assert (row["error"], row["restarted_at"] > row["created_at"]) == (None, True)


async def test_a_restarted_dead_letter_has_all_its_time_again(world: World) -> None:
    """E4: its age starts over: a dead letter from ten days ago is not given up at the first failure."""
    main = world.add_destination("main", retry=RetryPolicy(initial=0.02, cap=0.02, give_up_after=3 * DAY))
    await kill(world, "r-1")

    def fail_twice(event: CloudEvent) -> None:
        if event.get_extension("attempt") != 3:
            raise PublishFailed("503", reason="status")

    main.behave = fail_twice
    await restart(world)
    async with world.working():
        await world.until_states(deliveries, delivered=1)
    recorded = [row["outcome"] for row in await world.rows(attempts)]
    assert recorded == ["restarted", "retry", "retry", "succeeded"]
    await world.change(
        deliveries, state="pending", restarted_at=db_time(-4 * DAY), next_attempt_at=db_time(0.0), attempts=0
    )
    async with world.working():
        await world.until_states(deliveries, dead=1)


async def test_dead_letters_are_restarted_by_filter(world: World) -> None:
    """E4: the filters are id, destination and the time of giving up; no other dead letter is restarted."""
    world.add_destination("main")
    world.add_destination("other")
    ids = await kill(world, "r-1", "r-2", "r-3")
    (old, *_) = ids
    await world.change(deliveries, deliveries.c.id == old, finished_at=db_time(-9 * DAY))
    now = datetime.now(UTC)
    nothing: list[dict[str, Any]] = [
        {"ids": [uuid.uuid4()]},
        {"destination": "absent"},
        {"ids": [old], "since": now - timedelta(days=5)},
        {"until": now - timedelta(days=30)},
    ]
    for which in nothing:
        assert await restart(world, **which) == {}
    assert await world.states(deliveries) == {"dead": 6}
    assert sum((await restart(world, until=now - timedelta(days=5))).values()) == 1
    assert await restart(world, destination="other", since=now - timedelta(days=5)) in (
        {"other": 3},
        {"other": 2},
    )
    left = await world.rows(deliveries, deliveries.c.state == "dead")
    assert {row["destination"] for row in left} <= {"main"}
    assert sum((await restart(world)).values()) == len(left)
    assert await world.states(deliveries) == {"pending": 6}
    assert len(await world.rows(attempts, attempts.c.outcome == "restarted")) == 6


async def test_dead_letters_are_restarted_in_batches(world: World) -> None:
    """E5: one call restarts no more than the limit, the oldest first, until none is left."""
    world.add_destination("main")
    ids = await kill(world, *(f"r-{number}" for number in range(5)))
    counts = []
    for _ in range(4):
        counts.append(await restart(world, limit=2))
        restarted = await world.rows(deliveries, deliveries.c.state == "pending")
        assert [row["id"] for row in restarted] == ids[: len(restarted)]
    assert counts == [{"main": 2}, {"main": 2}, {"main": 1}, {}]


async def test_a_dead_letter_restarted_many_times_at_once_is_restarted_once(world: World) -> None:
    """E15: if five operators restart it at once, there is one restart on record and one delivery."""
    main = world.add_destination("main")
    await kill(world, "r-1", "r-2")
    done = await asyncio.gather(*(restart(world) for _ in range(5)))
    assert sum(sum(each.values()) for each in done) == 2
    assert len(await world.rows(attempts)) == 2
    async with world.working():
        await world.until_states(deliveries, delivered=2)
    assert sorted(main.subjects) == ["r-1", "r-2"]


async def test_other_deliveries_are_not_restarted(world: World) -> None:
    """E15: a delivery that is pending, under way, delivered or canceled is not restarted."""
    world.add_destination("main")
    await world.add_history(plain("done"))
    await world.add_history(plain("canceled"))
    await world.change(deliveries, deliveries.c.event_seq == 2, state="canceled")
    await world.add(plain("waits"))
    await world.add(plain("under way"))
    await world.fan_out()
    await world.delivery_lane().claim(1)
    before = await world.rows(deliveries)
    assert await restart(world) == {}
    assert await restart(world, ids=[row["id"] for row in before]) == {}
    assert await world.rows(deliveries) == before


async def test_a_dead_letter_of_a_replay_is_restarted_as_such(world: World) -> None:
    """E15: it keeps the replay's id, and the event's live delivery stays as it was."""
    main = world.add_destination("main")

    def reject_replays(event: CloudEvent) -> None:
        if event.get_extension("replayid"):
            raise PublishRejected("422", reason="status")

    main.behave = reject_replays
    await world.add(plain("r-1"))
    async with world.working():
        await world.until_states(deliveries, delivered=1)
        order = await world.order()
        await world.until_states(deliveries, delivered=1, dead=1)
        main.behave = lambda _event: None
        assert await restart(world) == {"main": 1}
        done = await world.until_replayed(order)
    assert done["deliveries"] == {"main": {"delivered": 1}}
    live, again = main.published
    assert live.get_extension("replayid") is None
    assert again.get_extension("replayid") == str(order["id"])
    assert live.get_extension("deliveryid") != again.get_extension("deliveryid")


async def kill(world: World, *request_ids: str) -> list[uuid.UUID]:
    """Make dead letters of the deliveries of some events to every destination; return their ids."""
    await world.add_history(*(plain(request_id) for request_id in request_ids))
    chosen = deliveries.c.event_seq.in_(select(events.c.seq).where(events.c.request_id.in_(request_ids)))
    await world.change(
        deliveries,
        chosen,
        state="dead",
        error="PublishRejected: 422",
        attempts=7,
        created_at=db_time(-10 * DAY),
        finished_at=db_time(-4 * DAY),
    )
    return [row["id"] for row in await world.rows(deliveries, chosen)]


async def restart(world: World, *, limit: int = 1000, **which: Any) -> dict[str, int]:
    """Restart dead letters."""
    async with world.database.write() as connection:
        return await outbox.restart(connection, DeadLetters(**which), by="ops", limit=limit)


async def test_a_held_delivery_has_all_its_time(world: World) -> None:
    """E4: a delivery that was held for three days is not given up at its first failure."""
    main = world.add_destination("main")

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("down", reason="connect")

    main.behave = fail
    await world.add_history(plain("r-1"))
    await world.change(
        deliveries, state="pending", next_attempt_at=None, finished_at=None, created_at=db_time(-4 * DAY)
    )
    async with world.database.write() as connection:
        assert await outbox.release_held(connection, 1) == ["main"]
    (work,) = await world.delivery_lane().claim(1)
    await work.run()
    assert await world.states(deliveries) == {"pending": 1}
