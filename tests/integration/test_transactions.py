"""`write` and `run_transaction` do the same on both databases."""

import asyncio
import contextlib
import gc
import sqlite3
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, insert, select, text
from sqlalchemy.exc import IntegrityError
from support.events import driver_of
from support.servers import Postgres

from receiver.db import arrivals, migrate
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.sqlite import Sqlite
from receiver.db.tables import probes, receipts
from receiver.errors import DatabaseUnavailable


@pytest.fixture
async def on_sqlite(tmp_path: Path) -> AsyncIterator[Database]:
    """A database for the tests of SQLite alone."""
    database = Database(f"sqlite:///{tmp_path / 'receiver.db'}")
    await migrate.upgrade(database)
    yield database
    await database.close()


class Pause:
    """Blocks the thread that calls it until `free` is set."""

    def __init__(self) -> None:
        self.blocked, self.free = threading.Event(), threading.Event()

    def __call__(self, *_arguments: object) -> None:
        """Block."""
        self.blocked.set()
        self.free.wait(10)

    async def begun(self) -> None:
        """Return when a thread is blocked."""
        assert await asyncio.to_thread(self.blocked.wait, 10)


async def count(database: Database) -> int:
    """Count the committed rows."""
    async with database.read() as connection:
        return int((await connection.execute(select(func.count()).select_from(probes))).scalar_one())


async def add(connection: SqlConnection, name: str = "one") -> str:
    """Add a row; its name is unique."""
    await connection.execute(insert(probes).values(name=name, at=db_time(0.0)))
    return name


async def test_a_transaction_is_committed(database: Database) -> None:
    """The transaction is committed before the result is returned."""
    assert await database.run_transaction(add) == "one"
    assert await count(database) == 1


async def test_a_failed_transaction_is_rolled_back(database: Database) -> None:
    """If the work raises, the transaction is rolled back and the error is raised unchanged."""

    async def twice(connection: SqlConnection) -> None:
        await add(connection, "two")
        await add(connection, "two")

    with pytest.raises(IntegrityError):
        await database.run_transaction(twice)
    assert await count(database) == 0
    await database.run_transaction(add)
    assert await count(database) == 1


async def test_a_part_may_fail(database: Database) -> None:
    """If the work in a savepoint fails, only that is rolled back."""

    async def work(connection: SqlConnection) -> None:
        await add(connection, "kept")
        with contextlib.suppress(ZeroDivisionError):
            async with connection.begin_nested():
                await add(connection, "undone")
                raise ZeroDivisionError

    await database.run_transaction(work)
    assert await count(database) == 1


async def test_both_ways_keep_out_of_each_other_on_sqlite(on_sqlite: Database) -> None:
    """C14: if many of both run at once, each sees the commits before it, and none fails."""
    database = on_sqlite

    async def add_next(connection: SqlConnection) -> None:
        number = (await connection.execute(select(func.count()).select_from(probes))).scalar_one()
        await add(connection, str(number))

    async def at_once() -> None:
        await database.run_transaction(add_next)

    async def step_by_step() -> None:
        async with database.write() as connection:
            await add_next(connection)

    await asyncio.gather(*(way() for _ in range(50) for way in (at_once, step_by_step)))
    assert await count(database) == 100


async def test_an_insert_of_many_rows_returns_them_all(database: Database) -> None:
    """If an INSERT of many rows has a RETURNING, the result has all of them."""
    names = [str(number) for number in range(3)]
    async with database.write() as connection:
        statement = insert(probes).returning(probes.c.name)
        rows = await connection.execute(
            statement, [{"name": name, "at": datetime.now(UTC)} for name in names]
        )
        assert sorted(rows.scalars()) == names


async def test_only_the_connection_is_awaited_on_sqlite(on_sqlite: Database) -> None:
    """If the work awaits an object of the event loop in SQLite's thread, it fails and is rolled back."""
    database = on_sqlite
    future = asyncio.get_running_loop().create_future()

    async def wait(connection: SqlConnection) -> None:
        await add(connection)
        await future

    with pytest.raises(RuntimeError, match="attached to a different loop"):
        await database.run_transaction(wait)
    assert await count(database) == 0
    await database.run_transaction(add)


async def test_a_close_leaves_no_descriptor_on_sqlite(on_sqlite: Database) -> None:
    """If the database is closed, its files and the event loop of its thread are closed, too."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        await on_sqlite.run_transaction(count_in)
        await on_sqlite.close()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


async def count_in(connection: SqlConnection) -> int:
    """Count the rows."""
    return int((await connection.execute(select(func.count()).select_from(probes))).scalar_one())


@pytest.mark.parametrize("moment", ["begin", "statement"])
async def test_a_cancelled_transaction_is_rolled_back_on_sqlite(on_sqlite: Database, moment: str) -> None:
    """C14: if a task is cancelled while its thread is busy, its transaction blocks no later one."""
    database = on_sqlite
    pause = Pause()

    async def change() -> None:
        async with database.write() as connection:
            await add(connection, "undone")
            await connection.run_sync(pause)

    with contextlib.closing(sqlite3.connect(database.url.removeprefix("sqlite:///"))) as other_process:
        if moment == "begin":
            other_process.execute("BEGIN IMMEDIATE")
            pause.blocked.set()
        task = asyncio.create_task(change())
        await pause.begun()
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        pause.free.set()
        other_process.rollback()
        await asyncio.sleep(0.5)
        # Another process would wait for the write lock of a transaction that no task ends.
        other_process.execute("PRAGMA busy_timeout = 100")
        other_process.execute("BEGIN IMMEDIATE")
        other_process.rollback()
    await database.run_transaction(add)
    assert await count(database) == 1


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Stop the garbage collector, which would close a connection that no object refers to, at any time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("way", ["write", "read"])
async def test_a_transaction_cancelled_at_its_commit_is_rolled_back_on_sqlite(
    on_sqlite: Database, way: str
) -> None:
    """C14: if a task is cancelled before its thread has taken up the commit, it blocks no later one."""
    database = on_sqlite
    pause = Pause()

    async def change() -> None:
        async with getattr(database, way)() as connection:
            if way == "write":
                await add(connection, "undone")
            before_commit = asyncio.create_task(connection.run_sync(pause))
            await pause.begun()
        await before_commit

    task = asyncio.create_task(change())
    await pause.begun()
    await asyncio.sleep(0.2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    pause.free.set()
    await asyncio.gather(*(count(database) for _ in range(8)))
    await others_can_write(database)
    await database.run_transaction(add)
    assert await count(database) == 1


async def others_can_write(database: Database) -> None:
    """See that no transaction of this process holds the write lock."""
    await asyncio.sleep(0.2)
    with contextlib.closing(sqlite3.connect(database.url.removeprefix("sqlite:///"))) as other_process:
        other_process.execute("PRAGMA busy_timeout = 100")
        other_process.execute("BEGIN IMMEDIATE")
        other_process.rollback()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("way", ["write", "run_transaction"])
async def test_a_failed_commit_is_rolled_back_on_sqlite(on_sqlite: Database, way: str) -> None:
    """C14: if the commit fails, the transaction does not stay open, and the next webhook is stored."""
    database = on_sqlite

    async def refer_to_no_event(connection: SqlConnection) -> None:
        await connection.execute(text("PRAGMA defer_foreign_keys = 1"))
        values = {"event_seq": 99, "secret_id": "one", "outcome": "duplicate", "body_sha256": bytes(32)}
        await connection.execute(
            insert(receipts).values(values | {"signed_at": db_time(0.0), "received_at": db_time(0.0)})
        )

    async def step_by_step() -> None:
        async with database.write() as connection:
            await refer_to_no_event(connection)

    with pytest.raises(IntegrityError):
        await (step_by_step() if way == "write" else database.run_transaction(refer_to_no_event))
    await others_can_write(database)
    assert await database.insert_arrivals([arrivals.probe_event()]) == set()
    assert await database.insert_arrivals([arrivals.probe_event()]) == set()
    assert await count_in_other_process(database, "events") == 2


async def test_no_webhook_joins_an_open_transaction_on_sqlite(database: Database) -> None:
    """C14: if a transaction was left open by mistake, a webhook's INSERT fails instead of joining it."""
    if not isinstance(database._backend, Sqlite):
        return
    writer = database._backend._writer
    driver: Any = await writer.run_with_driver(lambda connection: connection.driver_connection)
    driver.execute("BEGIN IMMEDIATE")
    with pytest.raises(DatabaseUnavailable, match="an earlier transaction is open"):
        await database.insert_arrivals([arrivals.probe_event()])
    assert await database.insert_arrivals([arrivals.probe_event()]) == set()
    assert await count_in_other_process(database, "events") == 1


@pytest.mark.parametrize("end", ["commit", "cancel"])
async def test_a_transaction_may_end_after_close_on_sqlite(on_sqlite: Database, end: str) -> None:
    """C14: if the database is closed within a transaction, that is still committed or rolled back."""
    database = on_sqlite
    begun, closed = asyncio.Event(), asyncio.Event()

    async def change() -> None:
        async with database.write() as connection:
            await add(connection)
            begun.set()
            await closed.wait()

    task = asyncio.create_task(change())
    await asyncio.wait_for(begun.wait(), 10)
    await database.close()
    closed.set() if end == "commit" else task.cancel()
    with contextlib.nullcontext() if end == "commit" else pytest.raises(asyncio.CancelledError):
        await task
    await others_can_write(database)
    assert await count_in_other_process(database, "probes") == (end == "commit")


async def count_in_other_process(database: Database, table: str) -> int:
    """Count the rows that another process sees."""
    with contextlib.closing(sqlite3.connect(database.url.removeprefix("sqlite:///"))) as other_process:
        return int(other_process.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


async def test_readers_wait_for_a_place_on_sqlite(on_sqlite: Database) -> None:
    """C13: more reads at once than threads wait for each other; if none ends, they fail after two seconds."""
    database = on_sqlite
    await asyncio.gather(*(count(database) for _ in range(50)))
    async with contextlib.AsyncExitStack() as held:
        for _ in range(4):
            await held.enter_async_context(database.read())
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable):
            await count(database)
        assert 1.5 < time.monotonic() - began < 4
    assert await count(database) == 0


async def test_a_webhook_waits_for_one_other_on_sqlite(on_sqlite: Database) -> None:
    """C13: a webhook waits for one transaction of a worker, and webhooks do not lock the worker out."""
    database = on_sqlite
    order: list[str] = []

    async def work(connection: SqlConnection, name: str) -> None:
        await connection.execute(select(1))
        order.append(name)

    async def others() -> None:
        await asyncio.gather(*(database.run_transaction(partial(work, name="other")) for _ in range(5)))

    async def webhooks() -> None:
        for _ in range(5):
            await database.run_transaction(partial(work, name="webhook"), is_webhook=True)

    await asyncio.gather(others(), webhooks())
    assert len(order) == 10
    assert all(one != other for one, other in pairwise(order))


class Arguments(list[object]):
    """A statement's arguments, to which weak references are possible."""


async def fail_without_cycle(url: str, statement: str) -> None:
    """Run a statement that fails, and see that its arguments are freed without the garbage collector."""
    database, arguments = Database(url), Arguments()
    known = weakref.ref(arguments)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(DatabaseUnavailable) as caught:
            await driver_of(database).fetch(statement, arguments)
        del arguments, caught
        await asyncio.sleep(0)
        assert known() is None
    finally:
        gc.enable()
        await database.close()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT pg_terminate_backend(pg_backend_pid())",
        "SELECT 1 FROM pg_sleep(1)",
        "INSERT INTO probes DEFAULT VALUES",
    ],
)
async def test_a_failed_statement_leaves_no_cycle_behind(postgres: Postgres, statement: str) -> None:
    """C3: the arguments of a failed statement, which hold bodies, are freed without the garbage collector."""
    url = postgres.url(template="migrated")
    name = url.rsplit("/", 1)[1]
    postgres.sql(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    postgres.sql(f"ALTER DATABASE {name} SET statement_timeout = '100ms'")
    await fail_without_cycle(url, statement)
