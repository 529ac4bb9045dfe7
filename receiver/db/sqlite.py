"""SQLite: engines with durable settings, and a thread that runs whole transactions."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Final, TypeVar, cast

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
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from receiver.db.transactions import POOL_WAIT
from receiver.error_texts import cause
from receiver.errors import SettingsError
from receiver.private_files import open_private

T = TypeVar("T")


def sqlite_engine(url: URL, *, pool_size: int, begin: str, foreign_keys: bool = True) -> AsyncEngine:
    """Return an engine with durable commits; `begin` is the statement that opens a transaction."""
    if url.database:
        try:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"RECEIVER_DATABASE_URL: cannot create the folder of the file: {cause(error)}; "
                "use a folder that this user can write to"
            ) from error
        # SQLite would create a file that all users can read. The -wal and -shm files get its mode.
        with contextlib.suppress(OSError):
            os.close(open_private(url.database, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_WAIT,
        connect_args={"timeout": POOL_WAIT},
        hide_parameters=True,
    )
    _set_up_sqlite(engine.sync_engine, begin, foreign_keys=foreign_keys)
    return engine


def _set_up_sqlite(engine: Engine, begin: str, *, foreign_keys: bool = True) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        # Otherwise pysqlite issues its own BEGIN, which takes no write lock, and updates get lost silently.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"foreign_keys={foreign_keys:d}"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)


class SqliteThread:
    """A connection in its own thread. A transaction switches threads once, not once for each statement."""

    def __init__(self, url: URL) -> None:
        self._engine = create_engine(
            url.set(drivername="sqlite+pysqlite"),
            pool_size=1,
            max_overflow=0,
            connect_args={"timeout": POOL_WAIT},
            hide_parameters=True,
        )
        _set_up_sqlite(self._engine, "BEGIN IMMEDIATE")
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sqlite")

    async def run(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work` in one transaction."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, work)

    def _run(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        with self._engine.begin() as connection:
            return _result(work(cast("AsyncConnection", _AwaitedConnection(connection))))

    async def run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        """Run `work` in autocommit mode."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run_with_driver, work)

    def _run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        with closing(self._engine.raw_connection()) as connection:
            return work(connection)

    async def close(self) -> None:
        """Close the connection in the thread that opened it, and end the thread."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._engine.dispose)
        self._executor.shutdown(wait=False)


class _AwaitedConnection:
    """A synchronous connection with the interface of AsyncConnection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.dialect: Final = connection.dialect

    async def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        return self._connection.execute(statement, parameters)

    async def scalar(self, statement: Executable, parameters: Any = None) -> Any:
        return self._connection.scalar(statement, parameters)

    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        with self._connection.begin_nested():
            yield


def _result(awaited: Awaitable[T]) -> T:
    """Return the result of an awaitable that never suspends."""
    steps = awaited.__await__()
    try:
        next(steps)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise RuntimeError("the work awaits an object other than its connection")
