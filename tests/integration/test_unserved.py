"""Deliveries whose destination was removed or renamed, on both databases: none waits for ever."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.events import World, opened, plain, until, with_files

from receiver import retention
from receiver.core.lane_names import destination_lane
from receiver.core.retry import DAY, GIVE_UP_SECONDS
from receiver.db import pruning, replays, unserved
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.tables import attempts, deliveries, events, workers
from receiver.db.tables import replays as orders
from receiver.db.unserved import NOT_CONFIGURED, Taken
from receiver.lanes.replay import MAX_FAILED_STEPS
from receiver.lanes.unserved import check, giving_up


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Everything but the web."""
    async with opened(database, tmp_path / "media") as made:
        yield made


async def leave(world: World, *names: str, count: int = 2) -> None:
    """Store events with deliveries to destinations that are not there afterwards."""
    for name in names:
        world.add_destination(name)
    for number in range(count):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    world.targets = [target for target in world.targets if target.name not in names]


async def test_what_waits_in_vain_is_told_once(world: World) -> None:
    """E4: the log names each destination that deliveries wait for in vain, and says how many."""
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


async def test_a_worker_looks_at_its_start(world: World) -> None:
    """E4: it is told when a process starts to work, not after a minute."""
    await leave(world, "gone")
    with capture_logs() as logs:
        async with giving_up(world.database, []):

            async def told() -> bool:
                return bool(logs)

            await until(told)
    assert [entry["destination"] for entry in logs] == ["gone"]


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
    """E4: its destination's own time may have been longer; a restart does not begin the three days anew."""
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
    """E4: what could not be tried while it was back has three days again after it is gone once more."""
    await leave(world, "gone", count=1)
    await check(world.database, [], seen=set())
    await world.change(deliveries, restarted_at=db_time(-GIVE_UP_SECONDS - 1))
    await check(world.database, ["gone"], seen=set())
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"pending": 1}


async def test_its_next_try_is_not_waited_for(world: World) -> None:
    """E4: there will be none, so a delivery that is old enough is dead although its next try is not due."""
    await leave(world, "gone", count=1)
    await check(world.database, [], seen=set())
    await world.change(deliveries, restarted_at=db_time(-GIVE_UP_SECONDS - 1), next_attempt_at=db_time(600.0))
    await check(world.database, [], seen=set())
    assert await world.states(deliveries) == {"dead": 1}


async def test_what_another_worker_delivers_is_left(world: World) -> None:
    """E4: a process with newer settings may have the destination: old deliveries are its own to give up."""
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
    """E4: one that waits for its media has its time after that; one that is under way is its worker's."""
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
    """E4: the other destination gets what waited, with all its tries, and each event once."""
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
    """E1: moved live deliveries meet those that are there; a replay's are apart, as ever."""
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
    """E1: a delivery that was discarded or given up sent nothing: the moved one takes its place."""
    world.add_destination("old")
    new = world.add_destination("new")
    await world.add(plain("r-0"))
    await world.fan_out()
    over = {"state": ended, "error": "x", "next_attempt_at": None, "finished_at": db_time(0.0)}
    await world.change(deliveries, deliveries.c.destination == "new", **over)
    world.targets = [target for target in world.targets if target.name == "new"]
    async with world.database.read() as connection:
        assert await unserved.count_free(connection, "old", dead=False, had_by="new") == 0
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
    """E1: a delivered one counts as well as one that is still tried."""
    world.add_destination("old")
    world.add_destination("new")
    await world.add(plain("r-0"))
    await world.fan_out()
    over = {"state": "delivered", "next_attempt_at": None, "finished_at": db_time(0.0)}
    await world.change(deliveries, deliveries.c.destination == "new", **over)
    async with world.database.read() as connection:
        assert await unserved.count_free(connection, "old", dead=False, had_by="new") == 1
    assert await move(world, "old", "new") == Taken(discarded=1)
    assert await world.states(deliveries) == {"delivered": 1, "canceled": 1}


async def test_held_deliveries_stay_held_for_a_destination_that_waits(world: World) -> None:
    """E8: moved to one that waits for media they wait on; to one that does not they are due."""
    for waits, due in ((True, False), (False, True)):
        world.add_destination("old")
        await world.add(with_files("https://media.clipia.ai", f"r-{waits}", "/a.png"))
        await world.fan_out()
        world.targets.clear()
        await move(world, "old", f"new-{waits}", waits=waits)
        (row,) = await world.rows(deliveries, deliveries.c.destination == f"new-{waits}")
        assert (row["state"], row["next_attempt_at"] is not None) == ("pending", due)


async def test_dead_letters_are_moved_and_discarded_if_that_is_asked_for(world: World) -> None:
    """E4: without `dead` they stay; with it they are delivered by the other one, or over for good."""
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
    """E4: after they are discarded their events are settled, so that they can be pruned."""
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
    """E3: what is under way is neither moved nor discarded; its result counts."""
    await leave(world, "old", count=1)
    await world.change(deliveries, lease=uuid.uuid4(), next_attempt_at=db_time(60.0))
    assert await move(world, "old", "new", dead=True) == Taken()
    assert await discard(world, "old", dead=True) == Taken()
    await world.change(deliveries, next_attempt_at=db_time(-1.0))
    assert await discard(world, "old") == Taken(discarded=1), "a dead worker's lease has ended"


async def test_a_replay_to_a_removed_destination_ends(world: World) -> None:
    """E15: it fails after three days of trouble, unless another worker has the destination; else it waits."""
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

    held_up = "this worker has no destination 'gone': restart it, or cancel"
    assert await step() == ("pending", f"SettingsError: {held_up}")
    await world.change(orders, created_at=db_time(-30 * DAY))
    assert (await step())[0] == "pending", "it may have gone on until now"
    await world.change(orders, attempts=MAX_FAILED_STEPS)
    async with world.database.write() as connection:
        await connection.execute(
            workers.insert().values(**run, started_at=db_time(0.0), seen_at=db_time(0.0))
        )
    assert await step() == ("pending", f"TransientError: {held_up}")
    await world.change(workers, seen_at=db_time(-60.0))
    assert (await step())[0] == "failed"


async def test_a_replay_that_goes_on_has_its_time_again(world: World) -> None:
    """E15: the three days of trouble are three days in a row: a step that is done, or waits, ends them."""
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
    """E15: a replay that is not through goes to the other destination, or to one fewer."""
    for name in ("kept", "old"):
        world.add_destination(name)
    await world.add_history(plain("r-1"))
    await world.order(to=["kept", "old"])
    async with world.database.write() as connection:
        assert await unserved.redirect_replays(connection, "old", to=to) == 1
        assert await unserved.redirect_replays(connection, "old", to=to) == 0
    (row,) = await world.rows(orders)
    assert (row["destinations"], row["state"]) == (left, state)


async def test_a_replay_with_no_destination_left_is_canceled(world: World) -> None:
    """E15: discarding what a destination was to get ends a replay that was for it alone."""
    world.add_destination("old")
    await world.add_history(plain("r-1"))
    await world.order(to=["old"])
    async with world.database.write() as connection:
        await unserved.redirect_replays(connection, "old", to=None)
    (row,) = await world.rows(orders)
    assert (row["state"], row["next_attempt_at"]) == ("canceled", None)


async def test_a_canceled_replay_leaves_nothing_to_a_dead_worker(world: World) -> None:
    """E15: a delivery that its worker left behind is canceled with its replay: no lane may take it again."""
    world.add_destination("gone")
    await world.add_history(plain("r-1"))
    order = await world.order(to=["gone"])
    for work in await world.replay_lane().claim(1):
        await work.run()
    mine = deliveries.c.replay_id == order["id"]
    await world.change(deliveries, mine, lease=uuid.uuid4(), next_attempt_at=db_time(-1.0))
    async with world.database.write() as connection:
        assert await replays.drop_waiting(connection, order["id"], limit=10) == 1
    assert await world.states(deliveries, mine) == {"canceled": 1}


async def move(world: World, destination: str, to: str, *, waits: bool = True, dead: bool = False) -> Taken:
    """Move up to ten deliveries."""
    async with world.database.write() as connection:
        return await unserved.move(connection, destination, to=to, waits=waits, dead=dead, by="ops", limit=10)


async def discard(world: World, destination: str, *, dead: bool = False) -> Taken:
    """Discard up to ten deliveries."""
    async with world.database.write() as connection:
        return await unserved.discard(connection, destination, dead=dead, by="ops", limit=10)
