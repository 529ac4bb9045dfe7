"""SQLite: connections with durable settings, each in a thread of its own.

The calls of a thread run in their order. So if a task is cancelled during a statement, its transaction is
rolled back before the next one begins.
"""

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, closing
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    CursorResult,
    Engine,
    Executable,
    PoolProxiedConnection,
    create_engine,
    event,
)
from sqlalchemy.engine.cursor import FullyBufferedCursorFetchStrategy

from receiver.db import arrivals
from receiver.db.connection import SqlConnection, Transaction
from receiver.db.rows import NewEvent
from receiver.db.sqlite_process import WriterLost, WriterProcess
from receiver.db.sqlite_writer import Statement, set_up
from receiver.db.transactions import POOL_WAIT, unavailable, unavailable_error
from receiver.error_texts import cause
from receiver.errors import DatabaseUnavailable, SettingsError
from receiver.private_files import MODE, make_folder, open_private

T = TypeVar("T")
Call = Callable[..., Awaitable[Any]]


def make_file(url: URL) -> None:
    """Create the file of a database with its folder, so that only its owner and its group can read it."""
    if not url.database:
        return
    try:
        make_folder(Path(url.database).parent)
    except OSError as error:
        raise SettingsError(
            f"RECEIVER_DATABASE_URL: cannot create the folder of the file: {cause(error)}; "
            "use a folder that this user can write to"
        ) from error
    # SQLite would create a file that all users can read. The -wal and -shm files get its mode.
    with contextlib.suppress(OSError):
        descriptor = open_private(url.database, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        try:
            # A umask such as 077 would keep the group's backup out.
            os.fchmod(descriptor, MODE)
        finally:
            os.close(descriptor)


def _inode(file: Path) -> tuple[int, int] | None:
    """Return the device and the number of a file; None if it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class Sqlite:
    """A database in a file: a thread for all writes, and threads for transactions that only read."""

    def __init__(self, url: URL) -> None:
        """Create the file. Raises SettingsError if its folder cannot be created."""
        make_file(url)
        self.file: Final = Path(url.database) if url.database else None
        self._inode: Final = None if self.file is None else _inode(self.file)
        self._url = url
        self._writer: Final = SqliteThread(url, begin="BEGIN IMMEDIATE")
        self._readers: Final = SqliteReaders(url, number=4)
        path, options = self._writer.connect_arguments()
        self._process: Final = WriterProcess(path, options, self._writer.executor)
        # SQLite has one write lock, and its busy handler polls for it in no order, so writers queue here
        # instead. Writers other than webhooks pass the gate first, one at a time: a webhook waits for one of
        # their transactions at most, and they get the write lock at least every second time.
        self._write_lock, self._gate = asyncio.Lock(), asyncio.Lock()

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        """Open a transaction that may write. Each statement switches to the thread and back."""
        with unavailable():
            async with self._turn(), self._writer.transaction() as connection:
                yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """Open a transaction whose statements all read one snapshot."""
        with unavailable():
            async with self._readers.transaction() as connection:
                yield connection

    async def run_transaction(self, work: Callable[[SqlConnection], Awaitable[T]], *, is_webhook: bool) -> T:
        """Run `work` in one transaction that stays in the thread."""
        with unavailable():
            async with self._turn(is_webhook=is_webhook):
                return await self._writer.run(work)

    async def insert_arrivals(self, events: Sequence[NewEvent], new_sources: Sequence[str]) -> set[bytes]:
        """Insert sources, and the events that are new; return the raw ids of the others."""
        statements = arrivals.insert_statements(events, new_sources)
        with unavailable():
            async with self._turn(is_webhook=True):
                known = await self._insert(statements, events)
        return set(map(bytes.fromhex, known))

    async def _insert(self, statements: Sequence[Statement], events: Sequence[NewEvent]) -> list[str]:
        if not self._process.takes(len(events)):
            return await self._writer.run_with_driver(partial(arrivals.run, statements))
        try:
            return await self._process.run(statements)
        except WriterLost:
            return await self._writer.run_with_driver(partial(arrivals.run_again, statements, events))

    async def probe(self) -> None:
        """Insert an event and a receipt, roll back, and commit a row of another table."""
        work = partial(arrivals.try_rows, arrivals.probe_event())
        with unavailable():
            async with self._turn(is_webhook=True):
                await self._writer.run_with_driver(work)

    @asynccontextmanager
    async def migrate(self) -> AsyncIterator[Transaction]:
        """Open a transaction that may change the schema.

        A migration changes a table by copying it, which foreign keys to the table forbid.
        """
        thread = SqliteThread(self._url, begin="BEGIN IMMEDIATE", foreign_keys=False)
        try:
            with unavailable():
                async with thread.transaction() as connection:
                    yield connection
        finally:
            await thread.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._process.close()
        await self._readers.close()
        await self._writer.close()

    @asynccontextmanager
    async def _turn(self, *, is_webhook: bool = False) -> AsyncIterator[None]:
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(POOL_WAIT):
                    if not is_webhook:
                        await held.enter_async_context(self._gate)
                    await held.enter_async_context(self._write_lock)
            except TimeoutError:
                raise DatabaseUnavailable(
                    "the database is busy with another transaction", reason="database"
                ) from None
            yield
            # After the commit: SQLite goes on in a file that was deleted, and it is gone with the process.
            if self.file is not None and _inode(self.file) != self._inode:
                raise DatabaseUnavailable(
                    "the file of the database was deleted or replaced while it was open: put the file back, "
                    "or stop the receiver and restore a backup",
                    reason="database",
                )


class SqliteThread:
    """A thread with a connection that runs one transaction at a time."""

    def __init__(self, url: URL, *, begin: str, foreign_keys: bool = True) -> None:
        """`begin` is the statement that opens a transaction."""
        self.engine: Final = create_engine(
            url,
            pool_size=1,
            max_overflow=0,
            # The event loop closes cursors whose rows were read.
            connect_args={"timeout": POOL_WAIT, "check_same_thread": False},
            hide_parameters=True,
        )
        _set_up(self.engine, begin, foreign_keys=foreign_keys)
        self.executor: Final = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._runner: asyncio.Runner | None = None

    def connect_arguments(self) -> tuple[str, dict[str, Any]]:
        """Return the arguments of `sqlite3.connect`."""
        (path,), options = self.engine.dialect.create_connect_args(self.engine.url)
        return path, {**options, "timeout": POOL_WAIT}

    async def call(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, work, *arguments)

    async def run(self, work: Callable[[SqlConnection], Awaitable[T]]) -> T:
        """Run `work` in one transaction, in an event loop of the thread.

        It switches threads once, not once a statement.
        """
        return await self.call(self._run, work)

    def _run(self, work: Callable[[SqlConnection], Awaitable[T]]) -> T:
        if self._runner is None:
            self._runner = asyncio.Runner(loop_factory=asyncio.SelectorEventLoop)
        with self.engine.begin() as connection:
            return self._runner.run(_await(work, _SqliteConnection(connection, _call_here)))

    async def run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        """Run `work` in autocommit mode."""
        return await self.call(self._run_with_driver, work)

    def _run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        with closing(self.engine.raw_connection()) as connection:
            driver: Any = connection.driver_connection
            if driver.in_transaction:
                # The statement would be rolled back with it, after the ack.
                raise unavailable_error("an earlier transaction is open")
            return work(connection)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Open a transaction for the block; each statement switches to the thread and back."""
        begun: list[Connection] = []
        try:
            # SQLite itself gives up after `POOL_WAIT`, unless the disk is frozen.
            async with asyncio.timeout(2 * POOL_WAIT):
                connection = await self.call(_begin, self.engine, begun)
            yield _SqliteConnection(connection, self.call)
            # A cancelled call never runs if the thread has not taken it up, so this one is in the `try`, too.
            await self.call(_end, begun, Connection.commit)
        except BaseException:
            # Nothing waits for it: the disk may be frozen, and the next call of the thread comes after it.
            self.executor.submit(_end, begun)
            raise

    async def close(self) -> None:
        """Close the connection if it is idle.

        The executor is not shut down, because a transaction that is open could not end then. Its thread ends
        with the last reference to the executor.
        """
        await self.call(self._close)

    def _close(self) -> None:
        self.engine.dispose()
        if self._runner is not None:
            self._runner.close()
            self._runner = None


class SqliteReaders:
    """Threads for transactions that only read."""

    def __init__(self, url: URL, *, number: int) -> None:
        self._all: Final = [SqliteThread(url, begin="BEGIN") for _ in range(number)]
        self._idle = deque(self._all)
        self._places = asyncio.Semaphore(number)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Open a transaction in an idle thread. Raises TimeoutError if none is idle for too long."""
        async with asyncio.timeout(POOL_WAIT):
            await self._places.acquire()
        thread = self._idle.pop()
        try:
            async with thread.transaction() as connection:
                yield connection
        except BaseException:
            # It may still be busy.
            self._idle.appendleft(thread)
            raise
        else:
            self._idle.append(thread)
        finally:
            self._places.release()

    async def close(self) -> None:
        """Close all connections."""
        for thread in self._all:
            await thread.close()


def _set_up(engine: Engine, begin: str, *, foreign_keys: bool) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        set_up(connection, foreign_keys=foreign_keys)

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)


def _begin(engine: Engine, begun: list[Connection]) -> Connection:
    """Begin a transaction, and note its connection before anything can fail."""
    connection = engine.connect()
    begun.append(connection)
    connection.begin()
    return connection


def _end(begun: list[Connection], how: Callable[[Connection], None] = Connection.rollback) -> None:
    """End the transaction, unless an earlier call has."""
    while begun:
        with closing(begun.pop()) as connection:
            try:
                how(connection)
            except BaseException:
                # A failed commit may leave it open, and only after this does `close` reset the connection.
                connection.rollback()
                raise


class _SqliteConnection:
    """A synchronous connection; `call` runs a function in its thread."""

    def __init__(self, connection: Connection, call: Call) -> None:
        self._connection = connection
        self._call = call
        self.dialect: Final = connection.dialect

    async def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        result: CursorResult[Any] = await self._call(_execute, self._connection, statement, parameters)
        return result

    async def scalar(self, statement: Executable, parameters: Any = None) -> Any:
        return await self._call(self._connection.scalar, statement, parameters)

    async def exec_driver_sql(self, statement: str, parameters: Any = None) -> CursorResult[Any]:
        result: CursorResult[Any] = await self._call(
            _exec_driver_sql, self._connection, statement, parameters
        )
        return result

    async def run_sync(self, fn: Callable[[Connection], T]) -> T:
        result: T = await self._call(fn, self._connection)
        return result

    async def rollback(self) -> None:
        await self._call(self._connection.rollback)

    @asynccontextmanager
    async def _nested(self) -> AsyncIterator[None]:
        savepoint = await self._call(self._connection.begin_nested)
        try:
            yield
        except BaseException:
            await self._call(savepoint.rollback)
            raise
        await self._call(savepoint.commit)

    def begin_nested(self) -> AbstractAsyncContextManager[object]:
        return self._nested()


def _execute(connection: Connection, statement: Executable, parameters: Any) -> CursorResult[Any]:
    return _read(connection.execute(statement, parameters))


def _exec_driver_sql(connection: Connection, statement: str, parameters: Any) -> CursorResult[Any]:
    return _read(connection.exec_driver_sql(statement, parameters))


def _read(result: CursorResult[Any]) -> CursorResult[Any]:
    """Read all rows, because SQLite finds each row only when it is read, and that may wait for the disk."""
    # SQLAlchemy has read those of an INSERT of many rows already.
    is_read = isinstance(result.cursor_strategy, FullyBufferedCursorFetchStrategy)
    if result.returns_rows and not is_read and result.cursor is not None:
        result.cursor_strategy = FullyBufferedCursorFetchStrategy(result.cursor)
    return result


async def _call_here(work: Callable[..., T], *arguments: Any) -> T:
    return work(*arguments)


async def _await(work: Callable[[SqlConnection], Awaitable[T]], connection: SqlConnection) -> T:
    return await work(connection)
