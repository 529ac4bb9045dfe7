"""Old events are pruned, except unfinished ones, on both databases."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, get_args

import pytest
from sqlalchemy import insert, select, update
from sqlalchemy.exc import IntegrityError
from support.events import World, opened, plain
from support.history import DAY, count_rows, fill, fill_jobs, whole
from support.payloads import SECRET, signed
from support.servers import Postgres

from receiver import retention
from receiver.core.signature import Secret
from receiver.db import inbox, leases, outbox, pruning
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.rows import Attempt, DeliveryState, EventState, JobState, NewMedia
from receiver.db.tables import deliveries, events, jobs, media, replays
from receiver.errors import DatabaseUnavailable, RequestError
from receiver.ingest import Ingest, SignedRequest, make_event
from receiver.retention import Limits, Pruned


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """All but the web process, with one destination."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        yield made


@pytest.fixture
async def on_postgresql(postgres: Postgres, tmp_path: Path) -> AsyncIterator[World]:
    """The same on PostgreSQL, for tests that need several writers."""
    database = Database(postgres.url(template="migrated"))
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        yield made
    await database.close()


async def prune(world: World, *, days: float = 90.0, **options: Any) -> Pruned:
    """Prune to the end."""
    begun = await retention.begin(world.database, older_than=timedelta(days=days))
    return [done async for done in retention.prune(world.database, begun, **options)][-1]


async def add_old(world: World, *names: str, days: float = 100.0) -> None:
    """Store events of so many days ago, delivered everywhere."""
    await world.add_history(*map(plain, names))
    await age(world, *names, days=days)


async def age(world: World, *names: str, days: float) -> None:
    """Set the age of events, in days."""
    await world.change(events, events.c.request_id.in_(names), received_at=db_time(-days * DAY))


async def change(world: World, name: str, **values: Any) -> None:
    """Change an event."""
    await world.change(events, events.c.request_id == name, **values)


async def set_delivery(world: World, name: str, state: str) -> None:
    """Set the state of an event's delivery."""
    seq = select(events.c.seq).where(events.c.request_id == name).scalar_subquery()
    await world.change(deliveries, deliveries.c.event_seq == seq, state=state)


async def add_file(world: World, name: str, state: str) -> None:
    """Add a file in a state to an event."""
    async with world.database.write() as connection:
        found = select(events.c.seq).where(events.c.request_id == name)
        seq = (await connection.execute(found)).scalar_one()
        file = NewMedia(position=0, variant="original", kind="image", url="https://media.clipia.ai/a.png")
        await outbox.insert_media(connection, [(seq, file)])
        await connection.execute(update(media).where(media.c.event_seq == seq).values(state=state))


async def left(world: World) -> set[str]:
    """Return the names of the remaining events."""
    return {row["request_id"] for row in await world.rows(events)}


def ingest_of(world: World) -> Ingest:
    """Return the ingest, as a process has it."""
    secrets = {"clipia": [Secret.from_text(SECRET)]}
    return Ingest(world.database, secrets=secrets, tolerance=300, clock=time.time, on_accepted=lambda: None)


async def deliver(ingest: Ingest, name: str) -> str:
    """Send an event's webhook; return its outcome."""
    content = plain(name)
    signature = signed(content)["X-Clipia-Signature"].encode()
    try:
        return (await ingest.receive(SignedRequest("clipia", [signature], content))).outcome
    except DatabaseUnavailable as error:
        return error.reason


# --- pruned and kept events ---


async def test_old_events_go_with_all_that_hangs_on_them(world: World) -> None:
    """C13: receipts, files, deliveries and attempts are deleted with their event; others keep theirs."""
    ingest = ingest_of(world)
    for name in ("old", "young"):
        assert [await deliver(ingest, name) for _ in range(3)] == ["accepted", "duplicate", "duplicate"]
        await world.add_job(name, request_id=name)
    await world.fan_out()
    for name in ("old", "young"):
        await set_delivery(world, name, "delivered")
        await add_file(world, name, "stored")
    work = [row["id"] for table in (media, deliveries) for row in await world.rows(table)]
    attempt = Attempt(number=1, started_at=datetime.now(UTC), duration_ms=1, outcome="succeeded")
    async with world.database.write() as connection:
        await leases.record_attempts(connection, [(each, attempt) for each in work])
    both = {"events": 2, "receipts": 6, "media": 2, "deliveries": 2, "attempts": 4}
    assert await count_rows(world.database) == both
    await age(world, "old", days=91)
    await age(world, "young", days=89)
    assert (await prune(world)).events == 1
    assert await left(world) == {"young"}
    assert await count_rows(world.database) == {name: count // 2 for name, count in both.items()}
    assert len(await world.rows(jobs)) == 2


async def test_the_line_is_drawn_by_the_database_s_clock(world: World) -> None:
    """C16: the minimum age is exactly 30 days; a shorter one is rejected with the reason."""
    minute = 60.0 / DAY
    for name, days in (("older", 30 + minute), ("younger", 30 - minute)):
        await add_old(world, name, days=days)
    with pytest.raises(RequestError, match=r"at least 30 days: .* it is forwarded a second time"):
        await prune(world, days=30 - minute)
    assert await left(world) == {"older", "younger"}
    done = await prune(world, days=30)
    assert (done.events, done.kept) == (1, 0)
    assert await left(world) == {"younger"}


async def test_a_run_goes_on_at_its_position(world: World) -> None:
    """C13: each call of the API deletes one batch; the next one goes on, and no event is counted twice."""
    for number in range(5):
        await add_old(world, f"r-{number}", days=100)
    first = deliveries.c.event_seq == 1
    await world.change(deliveries, first, state="pending", finished_at=None)
    done = await retention.begin(world.database, older_than=timedelta(days=90))
    counts: list[tuple[int, int]] = []
    # A run that does not go on would find the same events forever.
    while len(counts) < 10:
        async with aclosing(retention.prune(world.database, done, limits=Limits(events=2))) as batches:
            done = await anext(batches)
        counts.append((done.events, done.kept))
        if done.next is None:
            break
        done = await retention.resume(world.database, before=done.before, position=done.next)
    assert counts[:3] == [(1, 1), (2, 0), (1, 0)]
    assert set(counts[3:]) == {(0, 0)}
    assert await left(world) == {"r-0"}


async def test_a_run_cannot_go_on_with_younger_events(world: World) -> None:
    """C16: the moment that a call hands back has the minimum age, too."""
    for days in (29.9, -1.0):
        with pytest.raises(RequestError, match="30 days ago or earlier"):
            await retention.resume(
                world.database, before=datetime.now(UTC) - timedelta(days=days), position="events-0"
            )


async def test_unfinished_events_are_kept(world: World) -> None:
    """C16: unfinished events are kept: on their way, with a pending file or delivery, or a dead letter."""
    of_event = [f"event-{state}" for state in get_args(EventState)]
    of_file = [f"file-{state}" for state in ("pending", "stored", "gone", "blocked")]
    of_delivery = [f"delivery-{state}" for state in get_args(DeliveryState)]
    await add_old(world, *of_event, *of_file, *of_delivery)
    for name in of_event:
        await change(world, name, state=name.split("-")[1])
    for name in of_file:
        await add_file(world, name, name.split("-")[1])
    for name in of_delivery:
        await set_delivery(world, name, name.split("-")[1])
    stay = {"event-received", "event-fetching", "file-pending", "delivery-pending", "delivery-dead"}
    done = await prune(world)
    assert await left(world) == stay
    assert (done.events, done.kept) == (len(of_event + of_file + of_delivery) - len(stay), len(stay))


async def test_dead_letters_go_where_that_is_asked_for(world: World) -> None:
    """C16: with `dead_letters` an event with a dead letter is pruned; one with a pending delivery is kept."""
    world.add_destination("other")
    await add_old(world, "dead", "dead-and-pending", "dead-and-fetching")
    await world.change(deliveries, deliveries.c.destination == "main", state="dead")
    await change(world, "dead-and-fetching", state="fetching")
    seq = select(events.c.seq).where(events.c.request_id == "dead-and-pending").scalar_subquery()
    await world.change(
        deliveries, deliveries.c.event_seq == seq, deliveries.c.destination == "other", state="pending"
    )
    assert (await prune(world)).events == 0
    assert (await prune(world, dead_letters=True)).events == 1
    assert await left(world) == {"dead-and-pending", "dead-and-fetching"}


async def test_what_a_replay_has_yet_to_reach_stays(world: World) -> None:
    """C16: a pending replay keeps the events from its position to its end; an ended one keeps none."""
    names = [f"r-{number}" for number in range(1, 9)]
    await add_old(world, *names)
    seqs = [row["seq"] for row in await world.rows(events)]
    order = await world.order()
    await world.change(replays, after_seq=seqs[2], until_seq=seqs[5])
    ended = await world.order(reason="done")
    await world.change(replays, replays.c.id == ended["id"], state="completed", after_seq=0)
    assert (await prune(world)).kept == 3
    assert await left(world) == {"r-4", "r-5", "r-6"}
    assert await world.replays.cancel(order["id"], by="me")
    await prune(world)
    assert await left(world) == set()


async def test_the_event_of_an_open_job_stays(world: World) -> None:
    """C16: an open job keeps its event, found by request_id or by the callback's path, within its source."""
    states = get_args(JobState)
    names = [f"{way}-{state}" for way in ("request", "path") for state in states]
    await add_old(world, *names, "stranger")
    for name in names:
        way, state = name.split("-")
        job_id = await world.add_job(name, request_id=name if way == "request" else None)
        await world.change(jobs, jobs.c.id == job_id, state=state)
        if way == "path":
            await change(world, name, job_id=job_id)
    await world.add_job("other", request_id="stranger", source="staging")
    await prune(world)
    open_ = ("pending", "submitted", "unsure")
    assert await left(world) == {f"{way}-{state}" for way in ("request", "path") for state in open_}
    assert len(await world.rows(jobs)) == 2 * len(states) + 1


async def test_a_dry_run_has_the_counts_of_a_run(world: World) -> None:
    """`dry_run` has the same counts, over as many batches, and deletes no event."""
    await add_old(world, *(f"r-{number}" for number in range(12)))
    await set_delivery(world, "r-1", "dead")
    await set_delivery(world, "r-2", "pending")
    before = await count_rows(world.database)
    limits = Limits(events=5)
    counted = [await prune(world, limits=limits, dry_run=True, dead_letters=each) for each in (False, True)]
    assert await count_rows(world.database) == before
    assert [(each.events, each.kept) for each in counted] == [(10, 2), (11, 1)]
    done = await prune(world, limits=limits)
    assert (done.events, done.kept) == (10, 2)
    done = await prune(world, limits=limits, dead_letters=True)
    assert (done.events, done.kept) == (1, 1)


# --- batches ---


async def test_it_reads_what_it_deletes_and_a_page(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C13: pages consist of rows, not of numbers with gaps; a page without an old event is the last."""
    await add_old(world, *(f"r-{number:02}" for number in range(20)))
    young = {f"r-{number:02}" for number in (5, 7, *range(9, 15), *range(16, 20))}
    await age(world, *young, days=1)
    # A whole page of kept events is not the end.
    stay = {"r-00", "r-01", "r-02"}
    for name in stay:
        await set_delivery(world, name, "dead")
    async with world.database.write() as connection:
        # Its number is many pages after the others.
        far = make_event("clipia", plain("far"), received_at=time.time())
        await connection.execute(insert(events).values(**far.columns() | {"seq": 10_000, "state": "ready"}))
    limits = Limits(events=3)
    pages: list[int] = []
    find = pruning.find_old

    async def seen(*arguments: Any, **options: Any) -> tuple[list[int], int]:
        old, after = await find(*arguments, **options)
        pages.append(len(old))
        return old, after

    monkeypatch.setattr(pruning, "find_old", seen)
    done = await prune(world, limits=limits)
    assert (done.events, done.kept) == (4, 3)
    assert pages == [3, 2, 2, 0]
    # An old event among young ones, as an import may have added it, is pruned together with them.
    assert await left(world) == {*stay, *young, "r-15", "far"}
    pages.clear()
    await age(world, *young, "far", days=100)
    assert (await prune(world, limits=limits, dead_letters=True)).events == 17
    assert await left(world) == set()
    assert pages == [3, 3, 3, 3, 3, 2, 0]


async def test_live_traffic_has_its_share(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C13: after each batch it sleeps for as long as the batch took."""
    await add_old(world, *(f"r-{number}" for number in range(4)))
    limits = Limits(events=2)
    rests: list[float] = []
    sleep, delete_events = asyncio.sleep, pruning.delete_events

    async def slow(*arguments: Any) -> None:
        await sleep(0.05)
        await delete_events(*arguments)

    async def rest(seconds: float) -> None:
        rests.append(seconds)

    monkeypatch.setattr(pruning, "delete_events", slow)
    monkeypatch.setattr(asyncio, "sleep", rest)
    await prune(world, limits=limits)
    assert len(rests) == 3
    assert min(rests) >= 0.05


async def test_it_reads_no_whole_table(on_postgresql: World, postgres: Postgres) -> None:
    """C13: among 20,000 events each statement uses an index, and so do the checks of the foreign keys."""
    database, name = on_postgresql.database, on_postgresql.database.url.rpartition("/")[2]
    await fill(database, 20_000)
    await fill_jobs(database)
    async with database.write() as connection:
        await connection.execute(update(events).where(events.c.seq > 1200).values(received_at=db_time(0.0)))
    postgres.sql("ANALYZE", database=name)

    async def scans() -> str:
        # PostgreSQL counts the scans of a connection when it ends.
        await database.close()
        tables = ", ".join(f"'{table}'" for table in (*whole(0), "jobs"))
        counted = f"SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN ({tables})"
        return postgres.sql(counted, database=name).stdout

    before = await scans()
    assert (await prune(on_postgresql, dead_letters=True)).events == 1200
    assert await scans() == before


# --- concurrent work ---


async def test_what_comes_again_after_all_is_a_new_event(world: World) -> None:
    """C16: the reason for a minimum age: a repeat of a pruned event is new, and is forwarded again."""
    await add_old(world, "r-1")
    ingest = ingest_of(world)
    assert await deliver(ingest, "r-1") == "duplicate"
    assert (await prune(world)).events == 1
    assert await deliver(ingest, "r-1") == "accepted"
    await world.fan_out()
    assert await world.states(deliveries) == {"pending": 1}


async def test_two_runs_at_once_do_no_harm(world: World) -> None:
    """C13: with two runs each event is deleted and counted once."""
    await fill(world.database, 60)
    limits = Limits(events=7)
    other = Database(world.database.url)
    async with opened(other, world.folder) as elsewhere:
        runs = await asyncio.gather(*(prune(each, limits=limits) for each in (world, elsewhere)))
    await other.close()
    assert sum(run.events for run in runs) == 60
    assert await count_rows(world.database) == whole(0)


async def test_repeats_that_come_meanwhile_are_answered(world: World) -> None:
    """C16: a webhook of an event that is being pruned is a repeat, new, or sent again; it is never lost."""
    names = [f"r-{number}" for number in range(40)]
    await add_old(world, *names)
    limits = Limits(events=5)
    ingest = ingest_of(world)
    answers: Counter[str] = Counter()

    async def keep_sending(name: str) -> None:
        while not pruning_.done():
            answers[await deliver(ingest, name)] += 1
            await asyncio.sleep(0.01)

    pruning_ = asyncio.create_task(prune(world, limits=limits))
    await asyncio.gather(*map(keep_sending, names))
    done = await pruning_
    assert done.events > 0
    assert done.events + done.kept == len(names)
    # The webhooks that were answered 503 come again.
    again = Counter([await deliver(ingest, name) for name in names])
    assert again["accepted"] + again["duplicate"] == len(names)
    assert answers.keys() <= {"accepted", "duplicate", "race"}
    assert answers["accepted"] + again["accepted"] == done.events
    assert await left(world) == set(names)
    assert {row["event_seq"] for row in await world.rows(all_receipts)} == {
        row["seq"] for row in await world.rows(events)
    }


async def test_a_repeat_keeps_its_event(on_postgresql: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C16: once a repeat has found its event, no run deletes the event, and the receipt is recorded."""
    world = on_postgresql
    await add_old(world, "r-1", "r-2")
    load = inbox.record_receipts

    async def pruned_first(*arguments: Any) -> None:
        done = await prune(world)
        assert (done.events, done.kept) == (1, 1)
        await load(*arguments)

    monkeypatch.setattr(inbox, "record_receipts", pruned_first)
    assert await deliver(ingest_of(world), "r-1") == "duplicate"
    assert await left(world) == {"r-1"}
    assert (await prune(world)).events == 1


async def test_what_was_added_before_the_lock_is_seen(
    on_postgresql: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C16: a delivery that is added between the page and the lock is found: the query follows the lock."""
    world = on_postgresql
    await add_old(world, "r-1", "r-2")
    (seq, _) = [row["seq"] for row in await world.rows(events)]
    lock = pruning.lock

    async def added_first(*arguments: Any, **options: Any) -> Sequence[int]:
        async with world.database.write() as connection:
            await outbox.insert_deliveries(connection, [(seq, "other")], due=True)
        return await lock(*arguments, **options)

    monkeypatch.setattr(pruning, "lock", added_first)
    await prune(world)
    assert await left(world) == {"r-1"}


async def test_nothing_is_added_after_the_lock(on_postgresql: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C16: a row that refers to a locked event waits, and then finds no event."""
    world = on_postgresql
    await add_old(world, "r-1")
    (seq,) = [row["seq"] for row in await world.rows(events)]
    delete_events = pruning.delete_events
    adding: list[asyncio.Task[None]] = []

    async def add() -> None:
        async with world.database.write() as connection:
            await outbox.insert_deliveries(connection, [(seq, "other")], due=True)

    async def added_meanwhile(*arguments: Any) -> None:
        if not adding:
            adding.append(asyncio.create_task(add()))
            await asyncio.sleep(0.2)
        await delete_events(*arguments)

    monkeypatch.setattr(pruning, "delete_events", added_meanwhile)
    assert (await prune(world)).events == 1
    with pytest.raises(IntegrityError):
        await adding[0]
    assert await count_rows(world.database) == whole(0)


async def test_a_dead_letter_that_is_restarted_meanwhile_stays(on_postgresql: World) -> None:
    """C16: a run with `dead_letters` waits for a concurrent restart, and then sees a pending delivery."""
    world = on_postgresql
    await add_old(world, "r-1", "r-2")
    for name in ("r-1", "r-2"):
        await set_delivery(world, name, "dead")
    (first, _) = [row["id"] for row in await world.rows(deliveries)]
    async with world.database.write() as connection:
        await outbox.restart(connection, outbox.DeadLetters(ids=[first]), by="me", limit=1)
        pruning_ = asyncio.create_task(prune(world, dead_letters=True))
        await asyncio.sleep(0.2)
        assert not pruning_.done()
    done = await pruning_
    assert (done.events, done.kept) == (1, 1)
    assert await world.states(deliveries) == {"pending": 1}
