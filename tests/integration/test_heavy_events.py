"""Events with large bodies and thousands of files: each transaction stays within its time limit."""

import contextlib
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event
from support.events import World, opened, plain, with_files

from receiver import retention
from receiver.core.lane_names import wake_no_lane
from receiver.core.output_files import FileRules
from receiver.db import inbox, outbox, replays
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.tables import deliveries, events, media
from receiver.errors import DatabaseUnavailable
from receiver.lanes.fan_out import FanOut
from receiver.retention import Limits

CDN = "https://media.clipia.ai"


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server, with one destination."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        yield made


@contextmanager
def statements(start: str) -> Iterator[list[Any]]:
    """Collect the parameters of the statements in the block that have this beginning."""
    found: list[Any] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if statement.startswith(start):
            found.append(parameters)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def fan_out_of(world: World, **options: Any) -> FanOut:
    """Return a fan-out that the test runs by itself."""
    return FanOut(world.database, world.targets, wake=wake_no_lane, rules=world.rules, **options)


def files(request_id: str, count: int) -> bytes:
    """Return the body of an event with `count` files."""
    return with_files(CDN, request_id, *(f"/{request_id}-{number}.png" for number in range(count)))


async def received(world: World) -> list[str]:
    """Return the events that are still to be fanned out, oldest first."""
    return [row["request_id"] for row in await world.rows(events, events.c.state == "received")]


async def test_a_batch_is_limited_by_the_bytes_of_its_bodies(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C13: the bytes of a batch are limited, as its transaction stays open; a large event goes alone."""
    names = ["r-0", "r-1", "r-2", "large", "r-3"]
    contents = [files(name, 40 if name == "large" else 4) for name in names]
    for content in contents:
        await world.add(content)
    monkeypatch.setattr(inbox, "SMALL_BODY_BYTES", 0)
    fan_out = fan_out_of(world, max_batch_bytes=2 * len(contents[0]))
    batches = []
    for _ in range(len(names)):
        before = await received(world)
        count = await fan_out.run()
        assert before[count:] == await received(world)
        batches.append((count, fan_out.may_have_more))
    assert batches == [(2, True), (1, True), (1, True), (1, False), (0, False)]
    assert await world.states(media) == {"pending": 56}
    assert await world.states(deliveries) == {"pending": 5}


async def test_small_bodies_are_read_with_their_events(world: World) -> None:
    """C13: a batch of ordinary events needs one statement; a large body needs one more, and is complete."""
    for number in range(3):
        await world.add(plain(f"r-{number}"))
    with statements("SELECT events.seq, events.body") as bodies:
        assert await fan_out_of(world).run() == 3
    assert not bodies
    await world.add(plain("r-3"))
    await world.add(files("large", 300))
    with statements("SELECT events.seq, events.body") as bodies:
        assert await fan_out_of(world).run() == 2
    assert len(bodies) == 1
    assert await world.states(media) == {"pending": 300}


async def test_a_batch_that_is_too_slow_is_halved(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C13: if the database is too slow for a batch, the next one has half as many events."""
    insert = outbox.insert_deliveries
    sizes: list[int] = []

    async def slow(connection: SqlConnection, wanted: Collection[Any], **options: Any) -> int:
        if options["due"]:
            sizes.append(len(wanted))
            if len(wanted) > most:
                raise DatabaseUnavailable("took too long", reason="database")
        return await insert(connection, wanted, **options)

    monkeypatch.setattr(outbox, "insert_deliveries", slow)
    for number in range(6):
        await world.add(plain(f"r-{number}"))
    fan_out, most = fan_out_of(world), 1
    for _ in range(20):
        with contextlib.suppress(DatabaseUnavailable):
            if not await fan_out.run():
                break
    assert not await received(world)
    assert sizes[:4] == [6, 3, 1, 5]
    for number in range(6, 10):
        await world.add(plain(f"r-{number}"))
    most = 10
    assert await fan_out.run() == 4
    assert await world.states(deliveries) == {"pending": 10}


async def test_files_are_added_in_slices(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C13: one statement adds a limited number of files, in any state."""
    monkeypatch.setattr(outbox, "ROWS_AT_ONCE", 10)
    world.rules = FileRules(max_files=12)
    for name in ("r-1", "r-2"):
        await world.add(files(name, 25))
    with statements("INSERT INTO media") as added:
        assert await fan_out_of(world).run() == 2
    assert [len(rows) for rows in added] == [10, 10, 4, 10, 10, 6]
    assert await world.states(media) == {"pending": 24, "skipped": 26}


async def test_files_are_read_in_slices(world: World) -> None:
    """C13: a claim reads the files of a few events at a time."""
    world.rules = FileRules(max_files=2)
    for number in range(5):
        await world.add(files(f"r-{number}", 4))
    await world.fan_out()
    with statements("SELECT media.event_seq") as queries:
        async with world.database.read() as connection:
            found = await outbox.load_media(connection, [5, 3, 1, 2, 4], at_once=2)
    assert len(queries) == 3
    assert {seq: [row.position for row in rows] for seq, rows in found.items()} == {
        seq: [0, 1, 2, 3] for seq in range(1, 6)
    }


async def test_a_claim_that_is_too_slow_is_halved(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C13: if the database is too slow for a claim, the next one has half as many rows."""
    load = outbox.load_media
    sizes: list[int] = []

    async def slow(connection: SqlConnection, seqs: Collection[int]) -> Any:
        sizes.append(len(seqs))
        if len(seqs) > 2:
            raise DatabaseUnavailable("took too long", reason="database")
        return await load(connection, seqs)

    monkeypatch.setattr(outbox, "load_media", slow)
    for number in range(10):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    lane, claimed = world.delivery_lane(concurrency=8), 0
    for _ in range(20):
        with contextlib.suppress(DatabaseUnavailable):
            claimed += len(await lane.claim(8))
        if claimed == 10:
            break
    assert sizes == [8, 4, 2, 8, 4, 2, 6, 4, 2, 4, 4, 2, 2]


async def test_more_files_than_a_statement_may_have_parameters(world: World) -> None:
    """D15: a step of a replay may restart the files of 100 events, 512 each."""
    await world.add(plain("r-1"))
    await world.add(files("r-2", 1))
    await world.fan_out()
    await world.change(media, state="gone")
    await world.change(events, state="ready")
    (file,) = await world.rows(media)
    ids = [file["id"], *(uuid.uuid4() for _ in range(33_000))]
    async with world.database.write() as connection:
        assert await replays.restart_media(connection, ids) == [2]
    assert await world.states(media) == {"pending": 1}
    assert await world.states(events) == {"ready": 1, "fetching": 1}


async def test_pruning_is_bounded_by_files(world: World) -> None:
    """C13: events with many files are deleted a few at a time, and no event is left out."""
    for number, count in enumerate((3, 3, 9, 0, 1, 1)):
        await world.add(files(f"r-{number}", count))
    await world.fan_out()
    await world.change(media, state="stored")
    await world.change(deliveries, state="delivered")
    await world.change(events, events.c.request_id != "r-3", received_at=db_time(-100 * 86_400.0))
    await world.change(events, state="ready")
    limits = Limits(files=6)
    begun = await retention.begin(world.database, older_than=timedelta(days=90))
    counts = [done.events async for done in retention.prune(world.database, begun, limits=limits)]
    # The last one is after the batch of rejected requests.
    assert counts == [2, 3, 5, 5, 5]
    assert [row["request_id"] for row in await world.rows(events)] == ["r-3"]
    assert not await world.rows(media)
