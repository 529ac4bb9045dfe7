"""Compare the cost of a webhook, a claim and a page after millions of events with that after ten thousand.

Two databases of each kind are filled with finished events, each with its receipt, its delivery and an
attempt, and every tenth with its job; a few deliveries are dead or wait for another attempt. The two are
measured alternately, and a ratio is of one round. wrk sends the load through `receiver serve`, and every
acked webhook must be stored; the other figures come from the functions of the worker, the API and `/metrics`.
The plans at the end are those of the statements that these functions sent.

    python benchmarks/growth.py --events 10_000_000 --sqlite-events 2_000_000 --rounds 3 --seconds 8

Needs the development dependencies, the Debian packages postgresql and wrk, and 40 GB of disk for ten million
events; it starts its servers.
"""

import argparse
import asyncio
import contextlib
import platform
import random
import sqlite3
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
from sqlalchemy import Engine, event, update

from receiver.db.connection import SqlConnection, Transaction

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fill import DESTINATION, fill_postgresql, fill_sqlite, request_of, tell
from ingest import CONNECTIONS, MOST, spread
from load import family, result, run_wrk, served
from support.servers import Postgres

from receiver.core.lane_names import wake_no_lane
from receiver.core.retry import RetryPolicy
from receiver.db import leases, migrate, outbox, reads, tables
from receiver.db.database import Database
from receiver.db.event_filter import EventFilter
from receiver.db.rows import NewEvent
from receiver.db.tables import deliveries, events
from receiver.destination_settings import DestinationSettings
from receiver.destinations.memory import MemoryDestination
from receiver.errors import DatabaseUnavailable
from receiver.ingest import make_event
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.fan_out import FanOut
from receiver.lanes.targets import Target

FORWARDED = 1000
"""Events of a round that go on to their delivery."""
GROUP, BATCH, PAGE = 200, 64, 50
"""Events of a fan-out, deliveries of a claim, rows of a page."""
REPEATED, ENOUGH = 20, 5000.0
"""Reads of the same page in a round; if they take more milliseconds, the round stops earlier."""
INGEST = "ingest, webhooks/s"
WIDTH = 150
"""Characters of a line of a plan."""

Found = dict[str, list[float]]
Statements = list[tuple[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Store:
    """One database, and the number of events of its history."""

    url: str
    count: int

    @property
    def is_sqlite(self) -> bool:
        """The other kind is PostgreSQL."""
        return self.url.startswith("sqlite")

    @property
    def name(self) -> str:
        """The kind, and the database's name on PostgreSQL or its file on SQLite."""
        return self.url.removeprefix("sqlite:///") if self.is_sqlite else self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return f"{'SQLite' if self.is_sqlite else 'PostgreSQL'}, {self.count:,} events"


class Bench:
    """A PostgreSQL server, a folder, and the stores on them."""

    def __init__(self, postgres: Postgres, folder: Path) -> None:
        self._postgres = postgres
        self._folder = folder

    def store(self, kind: str, count: int) -> Store:
        """Make a database and fill it."""
        url = self._postgres.url() if kind == "postgresql" else f"sqlite:///{self._folder / f'{count}.db'}"
        store = Store(url=url, count=count)
        asyncio.run(_migrate(store))
        if store.is_sqlite:
            fill_sqlite(store.name, count)
        else:
            fill_postgresql(self._postgres, store.name, count)
        return store

    def ingest(self, store: Store, *, seconds: float) -> dict[str, float]:
        """Load a receiver on a store; return its rate, CPU time and memory."""
        last = int(self.query(store, "SELECT max(seq) FROM events"))
        if not store.is_sqlite:
            # PostgreSQL logs a page whole if it changes first after a checkpoint: begin each load with one.
            self.query(store, "CHECKPOINT")
        settings = {"RECEIVER_DATABASE_URL": store.url}
        arguments = ("-m", "receiver", "serve", "--no-worker")
        database = list if store.is_sqlite else self._postgres.processes
        with served(self._folder, *arguments, settings=settings) as (port, process):
            web = psutil.Process(process.pid)
            memory, logged = web.memory_info().rss, self._logged(store)
            measured = run_wrk(
                port,
                self._folder,
                connections=CONNECTIONS,
                seconds=seconds,
                most=MOST / 2,
                servers=lambda: [*family(process), *database()],
            )
            logged, grown = self._logged(store) - logged, web.memory_info().rss
        stored = int(self.query(store, f"SELECT count(*) FROM events WHERE seq > {last}"))
        # wrk leaves up to a request of each connection behind: stored, and its answer not counted.
        if measured.failed or not measured.acked <= stored <= measured.acked + CONNECTIONS:
            sys.exit(f"{store}: {measured.acked} acked, {measured.failed} failed, {stored} stored")
        done = last + max(0, stored - FORWARDED)
        self.query(store, f"UPDATE events SET state = 'ready' WHERE state = 'received' AND seq <= {done}")
        found = {
            INGEST: measured.rate,
            "ack p50, ms": measured.p50,
            "ack p99, ms": measured.p99,
            "CPU of receiver and database for each, µs": measured.server_cpu / measured.rate * 1e6,
        }
        if not store.is_sqlite:
            found["written ahead for each, bytes"] = logged / stored
        return found | {
            "web process before, MiB": memory / 2**20,
            "web process after, MiB": grown / 2**20,
        }

    def _logged(self, store: Store) -> float:
        """Return the number of bytes that PostgreSQL has written to its log."""
        return 0.0 if store.is_sqlite else float(self.query(store, "SELECT pg_current_wal_lsn() - '0/0'"))

    def sizes(self, store: Store) -> str:
        """Return the size of a database."""
        if store.is_sqlite:
            return f"{Path(store.name).stat().st_size / 2**20:,.0f} MiB"
        found = self.query(
            store,
            "SELECT relname, pg_table_size(relid) / 1048576, pg_indexes_size(relid) / 1048576 "
            "FROM pg_stat_user_tables WHERE n_live_tup > 0 ORDER BY pg_table_size(relid) DESC LIMIT 5",
        )
        rows = [line.split("|") for line in found.splitlines()]
        return ", ".join(
            f"{name} {int(table):,} and indexes {int(indexes):,} MiB" for name, table, indexes in rows
        )

    def query(self, store: Store, statement: str) -> str:
        """Run a statement beside the receiver; return its rows as psql prints them."""
        if not store.is_sqlite:
            return self._postgres.sql(statement, database=store.name).stdout
        with closing(sqlite3.connect(store.name)) as connection, connection:
            return "\n".join("|".join(map(str, row)) for row in connection.execute(statement))


@asynccontextmanager
async def opened(store: Store) -> AsyncIterator[Database]:
    """Open a store for the block."""
    database = Database(store.url)
    try:
        yield database
    finally:
        await database.close()


async def _migrate(store: Store) -> None:
    async with opened(store) as database:
        await migrate.upgrade(database)


def worker(database: Database) -> tuple[FanOut, DeliveryLane]:
    """Return the lanes of a worker, with a destination in memory."""
    settings = DestinationSettings.model_validate({"name": DESTINATION, "url": "memory:"})
    target = Target(
        name=DESTINATION,
        destination=MemoryDestination(settings),
        waits_for_media=True,
        retry=RetryPolicy(),
    )
    fan_out = FanOut(database, [target], wake=wake_no_lane)
    return fan_out, DeliveryLane(database, target, wake=wake_no_lane, concurrency=BATCH)


async def work(store: Store) -> dict[str, float]:
    """Forward the newest events; return the median time of each step."""
    found: Found = defaultdict(list)
    async with opened(store) as database:
        fan_out, lane = worker(database)
        while await timed(found[f"fan-out of {GROUP} events, ms"], fan_out.run(limit=GROUP)):
            pass
        while works := await timed(found[f"claim of {BATCH} deliveries, ms"], lane.claim(BATCH)):
            runs = asyncio.gather(*(each.run() for each in works))
            await timed(found[f"record of {BATCH} deliveries, ms"], runs)
    return _medians(found)


async def timed(times: list[float], step: Awaitable[Any]) -> Any:
    """Wait for a step and add the milliseconds that it took."""
    began = time.perf_counter()
    try:
        return await step
    finally:
        times.append((time.perf_counter() - began) * 1000)


async def _show(connection: SqlConnection, request_id: str) -> object:
    shown = await reads.show_event(connection, request_id)
    assert shown is not None
    return shown


Query = Callable[[SqlConnection, int], Awaitable[object]]
QUERIES: dict[str, Query] = {
    "newest page of events, ms": lambda connection, _: reads.list_events(connection, limit=PAGE),
    "page of events somewhere, ms": lambda connection, count: reads.list_events(
        connection, limit=PAGE, before=random.randint(1, count)
    ),
    "page of events since just now, ms": lambda connection, _: reads.list_events(
        connection, limit=PAGE, which=EventFilter(since=datetime.now(UTC))
    ),
    "an event by its request_id, ms": lambda connection, count: _show(
        connection, request_of(random.randint(1, count))
    ),
    "newest page of deliveries, ms": lambda connection, _: reads.list_deliveries(connection, limit=PAGE),
    "newest page of pending deliveries, ms": lambda connection, _: reads.list_deliveries(
        connection, limit=PAGE, state="pending"
    ),
    "newest page of dead deliveries, ms": lambda connection, _: reads.list_deliveries(
        connection, limit=PAGE, state="dead"
    ),
    "/metrics: events to fan out, ms": lambda connection, _: leases.read_backlog(
        connection, events.c.received_at, "received"
    ),
    "/metrics: deliveries to do, ms": lambda connection, _: outbox.delivery_backlog(connection),
    "/metrics: dead letters, ms": lambda connection, _: outbox.count_dead(connection),
    "/metrics: jobs to do, ms": lambda connection, _: leases.read_backlog(
        connection, tables.jobs.c.created_at, "pending"
    ),
}


async def read(stores: Sequence[Store]) -> dict[Store, dict[str, float]]:
    """Return the median time of each query; if one times out, the wait counts."""
    found: dict[Store, Found] = {store: defaultdict(list) for store in stores}
    async with contextlib.AsyncExitStack() as stack:
        databases = {store: await stack.enter_async_context(opened(store)) for store in stores}
        for what, query in QUERIES.items():
            for _ in range(REPEATED):
                for store, database in databases.items():
                    with contextlib.suppress(DatabaseUnavailable):
                        async with database.read() as connection:
                            await timed(found[store][what], query(connection, store.count))
                if max(sum(times[what]) for times in found.values()) > ENOUGH:
                    break
    return {store: _medians(times) for store, times in found.items()}


def _medians(found: Found) -> dict[str, float]:
    return {what: statistics.median(times) for what, times in found.items()}


def measure(bench: Bench, stores: Sequence[Store], *, rounds: int, seconds: float) -> dict[Store, Found]:
    """Measure stores alternately; return the figures of every round for each."""
    found: dict[Store, Found] = {store: defaultdict(list) for store in stores}
    for number in range(rounds):
        order = stores if number % 2 == 0 else stores[::-1]
        shown = {store: bench.ingest(store, seconds=seconds) for store in order}
        for store in order:
            shown[store] |= asyncio.run(work(store))
        for store, values in asyncio.run(read(order)).items():
            tell(f"round {number + 1}: {store}: {shown[store][INGEST]:,.0f}/s")
            for what, value in (shown[store] | values).items():
                found[store][what].append(value)
    return found


def table(found: dict[Store, Found]) -> list[str]:
    """Return the lines of the table of two stores."""
    (small, few), (large, many) = found.items()
    lines = [f"| | {small} | {large.count:,} events | ratio |", "|---|---|---|---|"]
    for what, values in many.items():
        form = ".1f" if what.endswith("ms") else ",.0f"
        ratios = [ours / before for ours, before in zip(values, few[what], strict=True)]
        cells = (what, spread(few[what], form), spread(values, form), spread(ratios, ".2f"))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


# The plans.


async def plans(store: Store) -> list[str]:
    """Return the plans of the statements that ingest, a worker and pages send to a database."""
    found: dict[str, Statements] = {}
    async with opened(store) as database:
        fan_out, lane = worker(database)
        async with database.write() as connection:
            waiting = update(deliveries).where(deliveries.c.state == "pending")
            await connection.execute(waiting.values(next_attempt_at=deliveries.c.created_at))
        await database.insert_arrivals(_arrived())
        with sent(database) as found["insert"]:
            await database.insert_arrivals(_arrived())
        with sent(database) as found["fan-out"]:
            await fan_out.run()
        with sent(database) as found["claim"]:
            works = await lane.claim(BATCH)
        with sent(database) as found["record"]:
            await asyncio.gather(*(each.run() for each in works))
        async with database.write() as connection:
            with sent(database) as found["page of events"]:
                await reads.list_events(connection, limit=PAGE, before=store.count // 2)
            with sent(database) as found["page of deliveries"]:
                await reads.list_deliveries(connection, limit=PAGE)
            lines: list[str] = []
            for what, statements in found.items():
                for statement, arguments in statements:
                    lines += await _explained(connection, f"{store}: {what}", statement, arguments)
    return lines


def _arrived() -> list[NewEvent]:
    now = time.time()
    bodies = (result(str(uuid.uuid4())) for _ in range(CONNECTIONS // 2))
    return [
        make_event("clipia", each, received_at=now, secret_id="default", signed_at=now) for each in bodies
    ]


@contextmanager
def sent(database: Database) -> Iterator[Statements]:
    """Note the statements of the block, except those with many sets of arguments.

    Statements that go to the driver directly are noted and not run: if they ran, the plan would be that of a
    repeated webhook.
    """
    found: Statements = []

    def note(_connection: object, _cursor: object, statement: str, arguments: Any, *context: Any) -> None:
        if not context[-1]:
            found.append((statement, arguments))

    async def note_only(statement: str, arguments: Sequence[object]) -> list[Any]:
        found.append((statement.strip(), arguments))
        return []

    event.listen(Engine, "before_cursor_execute", note)
    try:
        direct = database.statements
        with mock.patch.object(direct, "fetch", note_only) if direct else nullcontext():
            yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)


class _RolledBack(Exception):
    """Rolls a savepoint back."""


async def _explained(connection: Transaction, what: str, statement: str, arguments: Any) -> list[str]:
    """Return the plan of a statement that reads or changes rows; the transaction is rolled back."""
    if not statement.startswith(("SELECT", "UPDATE", "WITH")) or "current_setting" in statement:
        return []
    explain = "EXPLAIN QUERY PLAN" if connection.dialect.name == "sqlite" else "EXPLAIN (ANALYZE, BUFFERS)"
    rows: Sequence[Sequence[Any]] = ()
    with suppress(_RolledBack):
        async with connection.begin_nested():
            rows = (await connection.exec_driver_sql(f"{explain} {statement}", arguments)).all()
            raise _RolledBack
    return [f"-- {what}: {_cut(' '.join(statement.split()))}", *_plan(rows)]


def _plan(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a plan: PostgreSQL indents them, and SQLite's name their parents."""
    depths = {0: -1}
    lines = []
    for *ids, line in rows:
        depth = 0
        if ids:
            depth = depths[ids[0]] = depths[ids[1]] + 1
        lines.append(_cut("  " * depth + line))
    return lines


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[:WIDTH]}…"


def main() -> None:
    """Fill, measure and print the tables and plans."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--events", type=int, default=10_000_000, help="of the large history on PostgreSQL")
    parser.add_argument("--sqlite-events", type=int, default=2_000_000, help="likewise on SQLite")
    parser.add_argument("--small", type=int, default=10_000, help="events of the small histories")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8, help="of each load")
    options = parser.parse_args()
    print(
        f"{options.rounds} rounds, loads of {options.seconds:.0f} s, {psutil.cpu_count()} cores for "
        f"everything, Python {platform.python_version()}; medians, in brackets the least and the greatest "
        "round."
    )
    explained: list[str] = []
    # A log record for every delivery would be part of the measured time.
    with (
        Postgres() as postgres,
        tempfile.TemporaryDirectory() as folder,
        mock.patch("receiver.lanes.delivery.log"),
    ):
        bench = Bench(postgres, Path(folder))
        for kind, count in (("postgresql", options.events), ("sqlite", options.sqlite_events)):
            stores = [bench.store(kind, size) for size in (options.small, count)]
            found = measure(bench, stores, rounds=options.rounds, seconds=options.seconds)
            sizes = [f"- {store}: {bench.sizes(store)}" for store in stores]
            print("\n".join(["", *table(found), "", *sizes]), flush=True)
            explained += asyncio.run(plans(stores[-1]))
    print("\n".join(["", *explained]))


if __name__ == "__main__":
    main()
