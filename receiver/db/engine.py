"""Engines for SQLite and PostgreSQL behind one small class, set up so that a commit is durable."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    closing,
    contextmanager,
)
from importlib import import_module
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
    make_url,
    text,
)
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from receiver.errors import DatabaseUnavailable, SettingsError

POOL_WAIT: Final = 2.0
"""Seconds to wait for a connection of the pool, or for SQLite's write lock."""
COMMAND_WAIT: Final = 4.0
"""Seconds that the client waits for one statement.

It is the client that counts: `statement_timeout` never fires in a server process that is frozen.
"""
POOL_SIZE: Final = 10
T = TypeVar("T")

_DURABLE: Final = ("fsync", "full_page_writes", "synchronous_commit")


class Database:
    """Connections to one database.

    `write()` and `read()` open one transaction each and raise DatabaseUnavailable when the database does not
    answer in time, refuses, or cannot write. `run_at_once()` is `write()` for what is done for every event,
    and `fetch_at_once()` and `run_with_driver()` are the short ways of the inbox on PostgreSQL and on SQLite.
    """

    def __init__(self, url: str) -> None:
        """Raise SettingsError for a URL that cannot be used; connect to nothing yet."""
        self.url: Final = parse_url(url)
        self.is_sqlite: Final = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self._writer = sqlite_engine(self.url, pool_size=1, begin="BEGIN IMMEDIATE")
            self._reader = sqlite_engine(self.url, pool_size=4, begin="BEGIN")
            self._thread: Final = _SqliteThread(self.url)
            # Writers queue here, and not in SQLite's busy handler. All but webhooks pass the gate first, one
            # by one: a webhook waits for one other transaction, and the others have every second turn.
            self._turn, self._gate = asyncio.Lock(), asyncio.Lock()
        else:
            self._writer = self._reader = _postgresql_engine(self.url, pool_size=POOL_SIZE)
            # Of its own: those who find the other pool empty must not keep webhooks waiting.
            self._statements: Final = _PostgresqlStatements(self.url)

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._writer.dialect.name

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that may write; it is committed durably when the block ends."""
        async with self._in_turn(), transaction(self._writer) as connection:
            yield connection

    async def run_at_once(
        self, work: Callable[[AsyncConnection], Awaitable[T]], *, is_webhook: bool = False
    ) -> T:
        """Run `work` in one transaction as `write()` does; it awaits nothing but its connection.

        On SQLite it runs in a thread and does not leave it meanwhile, so it may wake nobody who waits on the
        event loop. Where each statement comes back to the loop, a busy loop has everybody wait for the lock.
        """
        if not self.is_sqlite:
            async with self.write() as connection:
                return await work(connection)
        with _unavailable():
            async with self._in_turn(is_webhook=is_webhook):
                return await self._thread.run(work)

    async def run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        """Run `work` on SQLite with a connection of its driver's, where each statement is a transaction.

        It has a webhook's turn, and raises as `write` does.
        """
        with _unavailable():
            async with self._in_turn(is_webhook=True):
                return await self._thread.run_with_driver(work)

    async def fetch_at_once(self, statement: str, arguments: Sequence[object]) -> list[Any]:
        """Run a statement that is a durable transaction by itself on PostgreSQL; return its rows.

        Raises DatabaseUnavailable as `write` does, and for other errors asyncpg's own.
        """
        return await self._statements.fetch(statement, arguments)

    def hold_driver(self) -> AbstractAsyncContextManager[Any]:
        """Open a connection of asyncpg's for the block, on PostgreSQL; raises as `write` does."""
        return self._statements.hold()

    @asynccontextmanager
    async def _in_turn(self, *, is_webhook: bool = False) -> AsyncIterator[None]:
        if not self.is_sqlite:
            yield
            return
        async with AsyncExitStack() as held:
            try:
                async with asyncio.timeout(POOL_WAIT):
                    if not is_webhook:
                        await held.enter_async_context(self._gate)
                    await held.enter_async_context(self._turn)
            except TimeoutError:
                raise DatabaseUnavailable(
                    "the database is busy with another transaction", reason="database"
                ) from None
            yield

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that only reads, from one snapshot on SQLite."""
        return transaction(self._reader)

    async def close(self) -> None:
        """Close all connections."""
        await self._writer.dispose()
        if self.is_sqlite:
            await self._reader.dispose()
            await self._thread.close()
        else:
            await self._statements.close()

    async def require_durability(self) -> None:
        """Raise SettingsError where the database would lose commits that it has confirmed."""
        async with self.read() as connection:
            if self.is_sqlite:
                await _require_durable_sqlite(connection)
            else:
                await _require_durable_postgresql(connection)


def parse_url(url: str) -> URL:
    """Return the async URL of a plain `sqlite:///…` or `postgresql://…`; raise SettingsError for another."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = URL.create("unreadable")
    backend = parsed.get_backend_name()
    if backend == "sqlite":
        if not parsed.database or ":memory:" in parsed.database or "mode=memory" in url:
            raise SettingsError("RECEIVER_DATABASE_URL: an in-memory SQLite database would lose acked events")
        return parsed.set(drivername="sqlite+aiosqlite")
    if backend in {"postgresql", "postgres"}:
        query: dict[str, Any] = dict(parsed.query)
        # libpq's spelling, which every provider's copy button gives; asyncpg takes the same values as `ssl`.
        if "sslmode" in query:
            query["ssl"] = query.pop("sslmode")
        return parsed.set(drivername="postgresql+asyncpg", query=query)
    raise SettingsError(
        "RECEIVER_DATABASE_URL: write sqlite:///path/to/file.db or postgresql://user:password@host:5432/name"
    )


_DATA_EXCEPTION: Final = "22"
_OUR_MISTAKES: Final = (_DATA_EXCEPTION, "23", "42")
"""Classes of SQLSTATE (PostgreSQL's documentation, appendix A): values that it cannot take, constraints, and
statements that it does not understand."""
_SQLITE_MISTAKES: Final = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError)


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open one transaction; raise DatabaseUnavailable for what is the database's condition."""
    with _unavailable():
        async with engine.begin() as connection:
            yield connection


@contextmanager
def _unavailable() -> Iterator[None]:
    """Raise DatabaseUnavailable for what is the database's condition."""
    try:
        yield
    except (IntegrityError, DataError, ProgrammingError, *_SQLITE_MISTAKES):
        raise  # our own mistake, not the database's condition
    except (DBAPIError, sqlite3.Error, PoolTimeoutError, TimeoutError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        if str(getattr(cause, "sqlstate", None) or "").startswith(_DATA_EXCEPTION):
            raise  # asyncpg's data errors come as the driver's own kind, and another try meets them again
        raise DatabaseUnavailable(
            f"the database is unavailable ({type(cause).__name__}: {cause})", reason="database"
        ) from error


def sqlite_engine(url: URL, *, pool_size: int, begin: str, foreign_keys: bool = True) -> AsyncEngine:
    """Return an engine with our settings; `begin` is the statement that opens a transaction."""
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_WAIT,
        connect_args={"timeout": POOL_WAIT},
    )
    _set_up_sqlite(engine.sync_engine, begin, foreign_keys=foreign_keys)
    return engine


def _set_up_sqlite(engine: Engine, begin: str, *, foreign_keys: bool = True) -> None:
    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        # Without this pysqlite opens transactions on its own terms and updates get lost without an error.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", f"foreign_keys={foreign_keys:d}"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)


class _SqliteThread:
    """A connection in a thread of its own: a transaction goes there once, and not for every statement."""

    def __init__(self, url: URL) -> None:
        self._engine = create_engine(
            url.set(drivername="sqlite+pysqlite"),
            pool_size=1,
            max_overflow=0,
            connect_args={"timeout": POOL_WAIT},
        )
        _set_up_sqlite(self._engine, "BEGIN IMMEDIATE")
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="sqlite")

    async def run(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Run `work` in a transaction of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run, work)

    def _run(self, work: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        with self._engine.begin() as connection:
            return _result(work(cast("AsyncConnection", _AwaitedConnection(connection))))

    async def run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        """Run `work` in no transaction."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._run_with_driver, work)

    def _run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        with closing(self._engine.raw_connection()) as connection:
            return work(connection)

    async def close(self) -> None:
        """Close the connection, in the thread that has opened it, and end the thread."""
        await asyncio.get_running_loop().run_in_executor(self._executor, self._engine.dispose)
        self._executor.shutdown(wait=False)


class _AwaitedConnection:
    """A connection that is used like an AsyncConnection, and has the answer when it is asked."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.dialect: Final = connection.dialect

    async def execute(self, statement: Executable, parameters: Any = None) -> CursorResult[Any]:
        return self._connection.execute(statement, parameters)

    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        with self._connection.begin_nested():
            yield


def _result(awaited: Awaitable[T]) -> T:
    """Return what comes of awaiting something that never has to wait."""
    steps = awaited.__await__()
    try:
        next(steps)
    except StopIteration as stop:
        result: T = stop.value
        return result
    raise RuntimeError("the work waits for something else than its connection")


def _postgresql_engine(url: URL, *, pool_size: int, **options: Any) -> AsyncEngine:
    settings = {
        "application_name": "clipia-receiver",
        "lock_timeout": "2s",
        "idle_in_transaction_session_timeout": "10s",
    }
    try:
        return create_async_engine(
            url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=POOL_WAIT,
            **options,
            connect_args={"timeout": POOL_WAIT, "command_timeout": COMMAND_WAIT, "server_settings": settings},
        )
    except ModuleNotFoundError:
        raise SettingsError(
            "PostgreSQL needs the driver asyncpg: pip install 'clipia-receiver[postgres]'"
        ) from None


class _PostgresqlStatements:
    """A connection for statements that need no transaction around them, spoken to by its driver.

    SQLAlchemy opens it and knows how; what it does for each statement beyond that takes longer than the
    statement. One at a time is all that a group commit asks for.
    """

    def __init__(self, url: URL) -> None:
        # One for statements, and one for who holds one.
        self._engine = _postgresql_engine(url, pool_size=2, isolation_level="AUTOCOMMIT")
        self._connection: AsyncConnection | None = None
        self._driver: Any = None
        self._turn = asyncio.Lock()
        # An extra, which is there once the engine could be made.
        asyncpg = import_module("asyncpg")
        self._refusals = (
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            # What a statement meets between the server's word that it ends the connection and the end.
            asyncpg.InternalClientError,
            TimeoutError,
            OSError,
        )

    async def fetch(self, statement: str, arguments: Sequence[object]) -> list[Any]:
        """Run a statement and return its rows."""
        async with self._turn:
            if self._connection is None or self._driver.is_closed():
                await self._reconnect()
            try:
                rows: list[Any] = await self._driver.fetch(statement, *arguments)
            except BaseException as error:
                # Whatever happened: the next statement runs on a connection of which nothing is in doubt.
                await self._disconnect()
                sqlstate = str(getattr(error, "sqlstate", None) or "")
                ours = isinstance(error, ValueError) or sqlstate[:2] in _OUR_MISTAKES
                if ours or not isinstance(error, self._refusals):
                    raise
                raise DatabaseUnavailable(
                    f"the database is unavailable ({type(error).__name__}: {error})", reason="database"
                ) from error
            return rows

    async def _reconnect(self) -> None:
        await self._disconnect()
        with _unavailable():
            connection = await self._engine.connect()
            self._driver = (await connection.get_raw_connection()).driver_connection
            self._connection = connection

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with _unavailable():
                await connection.invalidate()
                await connection.close()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Any]:
        """Open a connection for the block; nobody else gets it afterwards."""
        with _unavailable():
            connection = await self._engine.connect()
            try:
                yield (await connection.get_raw_connection()).driver_connection
            finally:
                await connection.invalidate()
                await connection.close()

    async def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            await self._connection.close()
        await self._engine.dispose()


async def _require_durable_postgresql(connection: AsyncConnection) -> None:
    for name in _DURABLE:
        # Every value of synchronous_commit but `off` flushes here before it confirms.
        if (await connection.execute(text(f"SHOW {name}"))).scalar_one() == "off":
            raise SettingsError(
                f"PostgreSQL runs with {name} = off: it would confirm events that a crash then loses. "
                f"Set {name} = on (postgresql.conf, ALTER DATABASE or ALTER ROLE) and reload."
            )


async def _require_durable_sqlite(connection: AsyncConnection) -> None:
    checks: tuple[tuple[str, Callable[[Any], bool]], ...] = (
        ("journal_mode", lambda value: value == "wal"),
        ("synchronous", lambda value: value >= 2),  # noqa: PLR2004 - 2 is FULL, 3 is EXTRA
    )
    for name, holds in checks:
        value = (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
        if not holds(value):
            raise SettingsError(
                f"SQLite refuses the durable setting for {name} (it reports {value!r}); "
                "is the database on a network filesystem? Use a local disk, or PostgreSQL."
            )
