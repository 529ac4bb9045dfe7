"""The work for each event, the pages and the metrics cost the same if the tables are large."""

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from support.events import World, opened, plain, with_files
from support.history import fill, fill_jobs
from support.payloads import SECRET, failure, signed
from support.servers import Postgres

from receiver.alerts import find_conditions, read_conditions
from receiver.core.output_files import FileRules
from receiver.core.signature import Secret
from receiver.db import deliveries as failing
from receiver.db import forward, jobs, reads, replays, status, tail
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.event_filter import EventFilter
from receiver.db.rows import event_id
from receiver.db.sqlite import Sqlite
from receiver.db.tables import deliveries
from receiver.explain import explain_key
from receiver.ingest import Ingest, SignedRequest
from receiver.lanes.backlog import count_dead_letters, read_backlog
from receiver.promotions import Promotions
from receiver.settings import Settings

HISTORY = 20_000
ROWS_AT_MOST = 2_000
"""Rows that PostgreSQL may read for a few events or pages."""
STEPS = 100
STEPS_AT_MOST = 40_000
"""Steps of SQLite's virtual machine that they may take; a row of a table takes two or more."""


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """All parts without HTTP, one destination, and a long history."""
    await fill(database, HISTORY)
    await fill_jobs(database)
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        yield made


@asynccontextmanager
async def little_read(database: Database, postgres: Postgres) -> AsyncIterator[None]:
    """Check how many rows the database reads for the work in the block."""
    backend = database._backend
    if isinstance(backend, Sqlite):
        steps = 0

        def count() -> None:
            nonlocal steps
            steps += STEPS

        def watch(connection: Any, _record: Any) -> None:
            connection.set_progress_handler(count, STEPS)

        for thread in (backend._writer, *backend._readers._all):
            await thread.call(thread.engine.dispose)
            event.listen(thread.engine, "connect", watch)
        yield
        assert 0 < steps < STEPS_AT_MOST
        return
    name = database.url.rpartition("/")[2]
    postgres.sql("ANALYZE", database=name)

    async def rows_read() -> int:
        # A session reports its statistics at its end at the latest. A pooler keeps sessions open.
        await database.close()
        postgres.sql(f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = '{name}'")
        counted = "SELECT sum(seq_tup_read + coalesce(idx_tup_fetch, 0))::bigint FROM pg_stat_user_tables"
        return int(postgres.sql(counted, database=name).stdout)

    before = await rows_read()
    yield
    assert 0 < await rows_read() - before < ROWS_AT_MOST


async def receive(world: World, contents: Sequence[bytes]) -> list[str]:
    """Send webhooks and return their outcomes."""
    ingest = Ingest(
        world.database,
        secrets={"clipia": [Secret.from_text(SECRET)]},
        tolerance=300,
        clock=time.time,
        on_accepted=lambda: None,
    )
    return [
        (
            await ingest.receive(
                SignedRequest("clipia", [signed(content)["X-Clipia-Signature"].encode()], content)
            )
        ).outcome
        for content in contents
    ]


async def test_an_event_on_its_way(world: World, postgres: Postgres) -> None:
    """C13: the way from a webhook to its delivery, downloads, jobs and replays reads few rows."""
    async with little_read(world.database, postgres):
        contents = [
            plain("new-1"),
            plain("new-2"),
            plain("r-7"),
            with_files("https://media.clipia.ai", "new-3"),
        ]
        contents.append(with_files("https://media.clipia.ai", "new-4", "/a.png"))
        outcomes = await receive(world, contents)
        assert outcomes == ["accepted", "accepted", "conflict", "accepted", "accepted"]
        await world.fan_out()
        lane = world.delivery_lane()
        for work in await lane.claim(10):
            await lane.renew([work.claim])
            await work.run()
        assert sorted(world.recorders["main"].subjects) == ["new-1", "new-2", "new-3"]
        downloads = world.media_lane()
        works = await downloads.claim(10)
        assert len(works) == 1
        await downloads.release([work.claim for work in works])
        async with world.database.write() as connection:
            assert not await jobs.is_due(connection, "live-1", "pending")
            assert not (await jobs.in_flight(connection, "live-1")).total
            assert not await jobs.claim_to_submit(connection, "live-1", limit=10, lease=60.0)
            assert not await jobs.claim_to_poll(connection, "live-1", limit=10, lease=60.0)
            assert not await replays.claim(connection, limit=1, lease=60.0)


async def test_a_promotion(world: World, postgres: Postgres) -> None:
    """C9, C13: a promotion, and a late webhook with the former body, read few rows."""
    promotions = Promotions(world.database, world.replays, rules=FileRules)
    async with little_read(world.database, postgres):
        assert await receive(world, [plain("new-1"), failure("new-1")]) == ["accepted", "conflict"]
        await world.fan_out()
        async with world.database.read() as connection:
            shown = await reads.show_event(connection, "new-1")
        assert shown is not None
        assert await promotions.promote("new-1", shown["receipts"][1]["seq"], by="ops", reason=None)
        assert await receive(world, [plain("new-1")]) == ["duplicate"]


async def test_rows_that_wait_for_another_attempt(world: World, postgres: Postgres) -> None:
    """C13: if one destination was away for long, claims of due rows still read few rows."""
    await world.change(deliveries, destination="main", state="pending", next_attempt_at=db_time(3600.0))
    async with little_read(world.database, postgres):
        await receive(world, [plain("new-1")])
        await world.fan_out()
        for work in await world.delivery_lane().claim(10):
            await work.run()
    assert world.recorders["main"].subjects == ["new-1"]


async def test_pages_and_metrics(world: World, postgres: Postgres) -> None:
    """C13: pages of lists, one event by either id, and the values of `/metrics` and alerts read few rows."""
    just_now, long_ago = datetime.now(UTC), datetime.now(UTC) - timedelta(days=200)
    settings = Settings.load(database_url=world.database.url, clipia_webhook_secret=SECRET)
    async with little_read(world.database, postgres):
        async with world.database.read() as connection:
            for before in (None, HISTORY // 2):
                page = await reads.list_events(connection, limit=50, before=before)
                assert len(page) == 50
            (middle,) = await reads.list_events(connection, limit=1, before=HISTORY // 2)
            assert await reads.show_event(connection, middle["request_id"])
            assert await reads.show_event(connection, str(middle["id"]))
            for which in (EventFilter(since=just_now), EventFilter(until=long_ago)):
                assert not await reads.list_events(connection, limit=50, which=which)
            assert len(await reads.list_deliveries(connection, limit=50)) == 50
            for state in ("pending", "dead"):
                assert not await reads.list_deliveries(connection, limit=50, state=state)
            assert not await reads.list_deliveries(connection, limit=50, since=just_now)
            assert not await reads.list_deliveries(connection, limit=50, until=long_ago)
            assert sum(await status.count_events(connection, just_now)) == 0
        backlog = await read_backlog(world.database, [])
        assert not any(each.rows for each in backlog.values())
        assert not await count_dead_letters(world.database, [])
        conditions = await read_conditions(settings, world.database)
        assert not list(find_conditions(conditions))


async def test_events_by_their_jobs_and_deliveries(world: World, postgres: Postgres) -> None:
    """C13: events by caller, key, ids and open deliveries read few rows, however many jobs a caller has."""
    for caller in ("blog", "zine"):
        await world.add_job(f"{caller}-1", caller=caller, request_id=f"{caller}-1")
    await world.add(plain("blog-1"))
    await world.add(plain("zine-1"))
    job_id = await world.add_job("late", caller="blog", request_id="r-7-again")
    async with little_read(world.database, postgres), world.database.read() as connection:

        async def found(**values: Any) -> int:
            return len(await reads.list_events(connection, limit=50, which=EventFilter(**values)))

        assert await found(caller="zine") == 1
        assert await found(caller="nobody") == 0
        assert await found(idempotency_key="r-7") == 1
        assert await found(idempotency_key="blog-1", caller="blog") == 1
        assert await found(request_id="r-9") == 1
        assert await found(job_id=job_id) == 0
        assert await found(event_id=event_id("clipia", "r-11")) == 1
        assert await found(delivery_id=job_id) == 0
        assert await found(delivery_state="dead") == 0
        assert await found(delivery_state="pending", destination="main") == 0
    async with little_read(world.database, postgres), world.database.read() as connection:
        which = EventFilter(caller="shop", delivery_state="delivered", destination="main")
        assert len(await reads.list_events(connection, limit=50, which=which)) == 50


async def test_events_read_forward_and_explained(world: World, postgres: Postgres) -> None:
    """C13: the next page of a consumer or of a stream, explanations and groups of failures read few rows."""
    await world.add(plain("new-1"))
    await world.add_job("late", caller="blog", request_id="r-unseen")
    async with little_read(world.database, postgres):
        start, until = await forward.settle(world.database, HISTORY - 10)
        async with world.database.read() as connection:
            page = await reads.read_events(connection, limit=50, after=start, until=until)
        assert [row["request_id"] for row in page][-2:] == [f"r-{HISTORY}", "new-1"]
        assert await forward.settle(world.database, until) == (until, until)
    async with little_read(world.database, postgres):
        for key in ("r-7", str(event_id("clipia", "r-9")), "late", "r-unseen", "absent"):
            found = await explain_key(world.database, key, tuple)
            assert (found["state"] == "unknown") == (key == "absent"), key
        async with world.database.read() as connection:
            assert not await failing.list_failures(connection)
        end = await tail.find_end(world.database)
        rows = await tail.read(world.database, end._replace(event=end.event - 10), tail.Wanted())
        assert len(rows.items) == 10
