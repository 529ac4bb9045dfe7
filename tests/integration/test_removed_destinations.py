"""Deliveries to a destination that was removed or renamed, on both databases: none waits forever."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.events import World, opened, plain, until, with_files

from receiver import retention
from receiver.core.lane_names import destination_lane
from receiver.core.retry import DAY, GIVE_UP_SECONDS
from receiver.db import pruning, removed_destinations, replays
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.removed_destinations import NOT_CONFIGURED, Taken
from receiver.db.tables import attempts, deliveries, events, workers
from receiver.db.tables import replays as orders
from receiver.lanes import removed_destinations as lanes_of_removed
from receiver.lanes.removed_destinations import check, giving_up
from receiver.lanes.replay import MAX_FAILED_STEPS


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server."""
    async with opened(database, tmp_path / "media") as made:
        yield made


async def leave(world: World, *names: str, count: int = 2) -> None:
    """Store events with deliveries to destinations that are removed then."""
    for name in names:
        world.add_destination(name)
    for number in range(count):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    world.targets = [target for target in world.targets if target.name not in names]


async def test_a_missing_destination_is_logged_once(world: World) -> None:
    """E4: each missing destination with waiting deliveries is logged once, with their number."""
    world.add_destination("kept")
    await leave(world, "gone", "renamed", count=3)
    seen: set[str] = set()
    with capture_logs() as logs:
        for _ in range(2):
            await check(world.database, ["kept"], seen=seen)
    assert [(entry["log_level"], entry["destination"], entry["count"]) for entry in logs] == [
        ("warning", "gone", 3),
        ("warning", "renamed", 3),
    ]
    assert await world.states(deliveries) == {"pending": 9}


async def test_a_worker_checks_at_its_start(world: World) -> None:
    """E4: it is logged when a process starts, not only half a minute later."""
    await leave(world, "gone")
    with capture_logs() as logs:
        async with giving_up(world.database, []):

            async def is_logged() -> bool:
                return bool(logs)

            await until(is_logged)
    assert [entry["destination"] for entry in logs] == ["gone"]


async def test_a_destination_that_is_back_after_a_reload_has_its_whole_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: a destination that a reload removes is missing, and one that adds it again undoes that."""
    monkeypatch.setattr(lanes_of_removed, "CHECK_SECONDS", 0.02)
    await leave(world, "orders", count=1)
    configured = {"orders"}

    async def is_marked() -> bool:
        return {row["error"] for row in await world.rows(deliveries)} == {NOT_CONFIGURED}

    async def is_clear() -> bool:
        return not await is_marked()

    async with giving_up(world.database, configured):
        configured.clear()
        await until(is_marked)
        configured.add("orders")
        await until(is_clear)
        configured.clear()
        await until(is_marked)


async def test_it_is_a_dead_letter_three_days_after_it_was_missed(world: World) -> None:
    """E4: after three days, and not before, the delivery is dead, with the reason on record."""
    await leave(world, "gone")
    young, old = await world.rows(deliveries)
    await check(world.database, ["other"], seen=set())
    await world.change(
        deliveries,
        deliveries.c.id == old["id"],
        restarted_at=db_time(-GIVE_UP_SECONDS - 1),
        lease=uuid.uuid4(),
        next_attempt_at=db_time(-1.0),
    )
    await world.change(
        deliveries, deliveries.c.id == young["id"], restarted_at=db_time(-GIVE_UP_SECONDS + 60)
    )
    with capture_logs() as logs:
        await check(world.database, ["other"], seen={"gone"})
    found = {row["id"]: row for row in await world.rows(deliveries)}
    assert (found[young["id"]]["state"], found[young["id"]]["error"]) == ("pending", NOT_CONFIGURED)
    assert (found[old["id"]]["state"], found[old["id"]]["error"]) == ("dead", NOT_CONFIGURED)
    assert found[old["id"]]["finished_at"] is not None
    assert [(row["work_id"], row["error"]) for row in await world.rows(attempts)] == [
        (old["id"], NOT_CONFIGURED)
    ]
    assert [(entry["event"], entry["count"]) for entry in logs] == [("dead letters", 1)]


async def test_an_old_delivery_has_three_days_from_when_it_is_missed(world: World) -> None:
    """E4: even an old delivery has three days; a restart of the worker does not begin them again."""
    await leave(world, "gone")
    one, other = await world.rows(deliveries)
    await world.change(deliveries, created_at=db_time(-5 * DAY))
    await world.change(deliveries, deliveries.c.id == other["id"], restarted_at=db_time(-4 * DAY), error="x")
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"pending": 2}
    await world.change(deliveries, deliveries.c.id == one["id"], restarted_at=db_time(-GIVE_UP_SECONDS - 1))
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"pending": 1, "dead": 1}


async def test_a_destination_that_was_back_is_missed_anew(world: World) -> None:
    """E4: if the destination was back in between, the three days begin again after it is gone."""
    await leave(world, "gone", count=1)
    await check(world.database, [], seen=set())
    await world.change(deliveries, restarted_at=db_time(-GIVE_UP_SECONDS - 1))
    await check(world.database, ["gone"], seen=set())
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"pending": 1}


async def test_its_next_attempt_is_not_waited_for(world: World) -> None:
    """E4: an old delivery is dead even if its next attempt is not due, because there will be none."""
    await leave(world, "gone", count=1)
    await check(world.database, [], seen=set())
    await world.change(deliveries, restarted_at=db_time(-GIVE_UP_SECONDS - 1), next_attempt_at=db_time(600.0))
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"dead": 1}


async def test_deliveries_of_another_worker_are_left(world: World) -> None:
    """E4: if another process, with newer settings, has the destination, its deliveries are left to it."""
    await leave(world, "new")
    await check(world.database, [], seen=set())
    await world.change(deliveries, restarted_at=db_time(-30 * DAY))
    run = {"id": uuid.uuid4(), "host": "h", "pid": 1, "lanes": [destination_lane("new")]}
    async with world.database.write() as connection:
        await connection.execute(
            workers.insert().values(**run, started_at=db_time(0.0), seen_at=db_time(0.0))
        )
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"pending": 2}
    await world.change(workers, seen_at=db_time(-60.0))
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"dead": 2}


async def test_a_held_or_claimed_delivery_is_not_given_up(world: World) -> None:
    """E4: a delivery that waits for its media gets its time after that; one under way is its worker's."""
    world.add_destination("gone")
    await world.add(with_files("https://media.clipia.ai", "r-1", "/a.png"))
    await world.add(plain("r-2"))
    await world.fan_out()
    world.targets.clear()
    await world.change(
        deliveries,
        deliveries.c.next_attempt_at.is_not(None),
        next_attempt_at=db_time(60.0),
        lease=uuid.uuid4(),
    )
    await world.change(deliveries, created_at=db_time(-30 * DAY))
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"pending": 2}


async def test_deliveries_are_moved(world: World) -> None:
    """E4: the other destination gets the waiting deliveries with all their attempts, each event once."""
    await leave(world, "old", count=3)
    new = world.add_destination("new")
    await world.add(plain("r-3"))
    await world.fan_out()
    await world.change(
        deliveries, deliveries.c.destination == "old", attempts=7, created_at=db_time(-30 * DAY), error="x"
    )
    async with world.working():
        await world.until_states(deliveries, deliveries.c.destination == "new", delivered=1)
        assert await move(world, "old", "new") == Taken(moved=3, discarded=0)
        await world.until_states(deliveries, delivered=4)
    assert sorted(new.subjects) == ["r-0", "r-1", "r-2", "r-3"]
    assert [message.get_extension("attempt") for message in new.published] == [1] * 4
    assert "moved from old by ops" in {row["error"] for row in await world.rows(attempts)}


async def test_an_event_that_the_other_one_has_is_not_sent_twice(world: World) -> None:
    """E1: if the other destination has a live delivery of the event already, it is not sent twice."""
    world.add_destination("old")
    new = world.add_destination("new")
    await world.add(plain("r-0"))
    await world.fan_out()
    replay = await world.order(to=["old", "new"])
    lane = world.replay_lane()
    for work in await lane.claim(1):
        await work.run()
    world.targets = [target for target in world.targets if target.name == "new"]
    assert await move(world, "old", "new") == Taken(moved=0, discarded=2)
    canceled = await world.rows(deliveries, deliveries.c.destination == "old")
    assert {(row["state"], row["error"]) for row in canceled} == {
        ("canceled", "new has this event already; moved by ops")
    }
    async with world.working():
        await world.until_states(deliveries, delivered=2, canceled=2)
    assert len(new.published) == 2
    assert len(new.replayed(replay["id"])) == 1


@pytest.mark.parametrize("ended", ["canceled", "dead"])
async def test_an_event_that_the_other_one_never_got_is_moved(world: World, ended: str) -> None:
    """E1: if the other destination's delivery was discarded or given up, the moved one replaces it."""
    world.add_destination("old")
    new = world.add_destination("new")
    await world.add(plain("r-0"))
    await world.fan_out()
    over = {"state": ended, "error": "x", "next_attempt_at": None, "finished_at": db_time(0.0)}
    await world.change(deliveries, deliveries.c.destination == "new", **over)
    world.targets = [target for target in world.targets if target.name == "new"]
    async with world.database.read() as connection:
        assert await removed_destinations.count_free(connection, "old", dead=False, had_by="new") == 0
    assert await move(world, "old", "new") == Taken(moved=1)
    async with world.working():
        await world.until_states(deliveries, delivered=1, canceled=1)
    assert new.subjects == ["r-0"]
    (over,) = await world.rows(deliveries, deliveries.c.state == "canceled")
    assert (over["destination"], over["error"]) == (
        "old",
        "the delivery from old took its place; moved by ops",
    )
    assert over["error"] in {row["error"] for row in await world.rows(attempts)}


async def test_an_event_that_the_other_one_has_delivered_is_not_sent_twice(world: World) -> None:
    """E1: a delivered delivery counts like one that is still tried."""
    world.add_destination("old")
    world.add_destination("new")
    await world.add(plain("r-0"))
    await world.fan_out()
    over = {"state": "delivered", "next_attempt_at": None, "finished_at": db_time(0.0)}
    await world.change(deliveries, deliveries.c.destination == "new", **over)
    async with world.database.read() as connection:
        assert await removed_destinations.count_free(connection, "old", dead=False, had_by="new") == 1
    assert await move(world, "old", "new") == Taken(discarded=1)
    assert await world.states(deliveries) == {"delivered": 1, "canceled": 1}


async def test_held_deliveries_stay_held_for_a_destination_that_waits(world: World) -> None:
    """E8: moved to a destination that waits for media they stay held; to another one they become due."""
    for waits, due in ((True, False), (False, True)):
        world.add_destination("old")
        await world.add(with_files("https://media.clipia.ai", f"r-{waits}", "/a.png"))
        await world.fan_out()
        world.targets.clear()
        await move(world, "old", f"new-{waits}", waits=waits)
        (row,) = await world.rows(deliveries, deliveries.c.destination == f"new-{waits}")
        assert (row["state"], row["next_attempt_at"] is not None) == ("pending", due)


async def test_dead_letters_are_moved_and_discarded_with_dead_only(world: World) -> None:
    """E4: without `dead` dead letters stay; with it they are delivered by the other one, or canceled."""
    await leave(world, "old", count=2)
    await world.change(deliveries, state="dead", next_attempt_at=None, finished_at=db_time(0.0), attempts=9)
    assert await move(world, "old", "new") == Taken()
    assert await discard(world, "old") == Taken()
    one, other = await world.rows(deliveries)
    await world.change(deliveries, deliveries.c.id == other["id"], destination="older")
    assert await move(world, "old", "new", dead=True) == Taken(moved=1)
    assert await discard(world, "older", dead=True) == Taken(discarded=1)
    found = {row["id"]: row for row in await world.rows(deliveries)}
    assert (found[one["id"]]["state"], found[one["id"]]["destination"]) == ("pending", "new")
    assert (found[other["id"]]["state"], found[other["id"]]["error"]) == ("canceled", "discarded by ops")


async def test_discarded_deliveries_keep_no_event(world: World) -> None:
    """E4: discarded deliveries no longer keep their events from being pruned."""
    await leave(world, "gone")
    await world.change(events, received_at=db_time(-40 * DAY))
    seqs = [row["seq"] for row in await world.rows(events)]
    async with world.database.read() as connection:
        assert await pruning.select_finished(connection, seqs, dead_letters=False) == []
    assert await discard(world, "gone") == Taken(discarded=2)
    async with world.database.read() as connection:
        assert sorted(await pruning.select_finished(connection, seqs, dead_letters=False)) == seqs
    assert retention.MIN_AGE.days == 30


async def test_a_worker_that_holds_one_keeps_it(world: World) -> None:
    """E3: a delivery under way is neither moved nor discarded, and its result counts."""
    await leave(world, "old", count=1)
    await world.change(deliveries, lease=uuid.uuid4(), next_attempt_at=db_time(60.0))
    assert await move(world, "old", "new", dead=True) == Taken()
    assert await discard(world, "old", dead=True) == Taken()
    await world.change(deliveries, next_attempt_at=db_time(-1.0))
    assert await discard(world, "old") == Taken(discarded=1), "the lease of a crashed worker has expired"


async def test_a_replay_to_a_removed_destination_ends(world: World) -> None:
    """E15: a replay to a missing destination fails after three days, unless another worker has it."""
    world.add_destination("gone")
    await world.add_history(plain("r-1"))
    await world.order(to=["gone"])
    world.targets.clear()
    run = {"id": uuid.uuid4(), "host": "h", "pid": 1, "lanes": [destination_lane("gone")]}

    async def step() -> tuple[str, str]:
        await world.change(orders, next_attempt_at=db_time(0.0))
        for work in await world.replay_lane().claim(1):
            await work.run()
        (row,) = await world.rows(orders)
        return row["state"], row["error"]

    held_up = "this worker has no destination 'gone': restart it, or cancel the replay"
    assert await step() == ("pending", f"SettingsError: {held_up}")
    await world.change(orders, created_at=db_time(-30 * DAY))
    assert (await step())[0] == "pending", "the replay may have made steps until now"
    await world.change(orders, attempts=MAX_FAILED_STEPS)
    async with world.database.write() as connection:
        await connection.execute(
            workers.insert().values(**run, started_at=db_time(0.0), seen_at=db_time(0.0))
        )
    assert await step() == ("pending", f"TransientError: {held_up}")
    await world.change(workers, seen_at=db_time(-60.0))
    assert (await step())[0] == "failed"


async def test_a_replay_that_goes_on_has_its_time_again(world: World) -> None:
    """E15: only three days of failures in a row end a replay; a step that succeeds or waits resets them."""
    world.add_destination("kept")
    await world.add_history(plain("r-1"))
    await world.order(to=["kept"])
    await world.change(orders, created_at=db_time(-30 * DAY), attempts=MAX_FAILED_STEPS)
    for work in await world.replay_lane().claim(1):
        await work.run()
    (row,) = await world.rows(orders)
    assert (row["state"], row["attempts"]) == ("pending", 0)


@pytest.mark.parametrize(
    ("to", "left", "state"),
    [("new", ["kept", "new"], "pending"), ("kept", ["kept"], "pending"), (None, ["kept"], "pending")],
)
async def test_a_replay_follows_a_moved_destination(
    world: World, to: str | None, left: list[str], state: str
) -> None:
    """E15: an unfinished replay goes to the other destination, or to one fewer."""
    for name in ("kept", "old"):
        world.add_destination(name)
    await world.add_history(plain("r-1"))
    await world.order(to=["kept", "old"])
    async with world.database.write() as connection:
        assert await removed_destinations.redirect_replays(connection, "old", to=to) == 1
        assert await removed_destinations.redirect_replays(connection, "old", to=to) == 0
    (row,) = await world.rows(orders)
    assert (row["destinations"], row["state"]) == (left, state)


async def test_a_replay_with_no_destination_left_is_canceled(world: World) -> None:
    """E15: if its only destination is discarded, a replay is canceled."""
    world.add_destination("old")
    await world.add_history(plain("r-1"))
    await world.order(to=["old"])
    async with world.database.write() as connection:
        await removed_destinations.redirect_replays(connection, "old", to=None)
    (row,) = await world.rows(orders)
    assert (row["state"], row["next_attempt_at"]) == ("canceled", None)


async def test_a_canceled_replay_leaves_nothing_to_a_dead_worker(world: World) -> None:
    """E15: a delivery of a crashed worker is canceled with its replay, because no lane may claim it."""
    world.add_destination("gone")
    await world.add_history(plain("r-1"))
    order = await world.order(to=["gone"])
    for work in await world.replay_lane().claim(1):
        await work.run()
    mine = deliveries.c.replay_id == order["id"]
    await world.change(deliveries, mine, lease=uuid.uuid4(), next_attempt_at=db_time(-1.0))
    async with world.database.write() as connection:
        assert await replays.cancel_deliveries(connection, order["id"], limit=10) == 1
    assert await world.states(deliveries, mine) == {"canceled": 1}


async def move(world: World, destination: str, to: str, *, waits: bool = True, dead: bool = False) -> Taken:
    """Move up to ten deliveries."""
    async with world.database.write() as connection:
        return await removed_destinations.move(
            connection, destination, to=to, waits=waits, dead=dead, by="ops", limit=10
        )


async def discard(world: World, destination: str, *, dead: bool = False) -> Taken:
    """Discard up to ten deliveries."""
    async with world.database.write() as connection:
        return await removed_destinations.discard(connection, destination, dead=dead, by="ops", limit=10)
