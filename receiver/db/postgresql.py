"""PostgreSQL: transactions, and a connection in autocommit mode for the statement that stores webhooks."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from typing import Any, Final, TypeVar

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.pool import NullPool

from receiver.db import arrivals
from receiver.db.connection import SqlConnection, Transaction
from receiver.db.error_texts import cause
from receiver.db.rows import NewEvent
from receiver.db.sessions import ISOLATION, Sessions, opening_session
from receiver.db.transactions import (
    OUR_MISTAKES,
    POOL_WAIT,
    is_condition,
    is_lost,
    sqlstate,
    unavailable,
    unavailable_error,
)
from receiver.db.urls import PostgresqlUrl

POOL_SIZE: Final = 10
T = TypeVar("T")


class Postgresql:
    """A PostgreSQL server, or a pooler in front of it."""

    def __init__(self, url: PostgresqlUrl) -> None:
        """Open no connection yet. Raises SettingsError if the driver is missing."""
        self.sessions: Final = Sessions(url)
        self._engine: Final = self.sessions.engine(
            pool_size=POOL_SIZE, max_overflow=0, pool_timeout=POOL_WAIT
        )
        # A separate pool: webhooks do not wait if the workers use all connections of the first one.
        self.statements: Final = Statements(self.sessions)

    def write(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction that may write."""
        return self.sessions.transaction(self._engine, writes=True)

    def read(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction that only reads."""
        return self.sessions.transaction(self._engine, writes=False)

    async def run_transaction(self, work: Callable[[SqlConnection], Awaitable[T]], *, is_webhook: bool) -> T:
        """Run `work` in one transaction."""
        async with self.write() as connection:
            return await work(connection)

    async def insert_arrivals(self, events: Sequence[NewEvent], new_sources: Sequence[str]) -> set[bytes]:
        """Insert sources, and the events that are new; return the raw ids of the others."""
        if new_sources:
            await self.statements.fetch(arrivals.ADD_SOURCES, (new_sources,))
        rows = await self.statements.fetch(arrivals.INSERT, arrivals.in_columns(events))
        if len(rows) == len(events):
            return set()
        return {event.raw_id for event in events} - {row["id"].bytes for row in rows}

    async def probe(self) -> None:
        """Insert an event and a receipt, roll back, and commit a row of another table."""
        event = arrivals.probe_event()
        arguments = (*arrivals.in_columns([event]), [event.source])
        await self.statements.fetch(arrivals.PROBE, arguments, keep=False)
        await self.statements.fetch(arrivals.COMMIT_PROBE.format("now()"), ())

    @asynccontextmanager
    async def migrate(self) -> AsyncIterator[Transaction]:
        """Open a transaction that may change the schema and has no time limit for a statement."""
        engine = self.sessions.engine(command_timeout=None, poolclass=NullPool)
        try:
            async with self.sessions.transaction(engine, writes=True) as connection:
                yield connection
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Close all connections."""
        await self._engine.dispose()
        await self.statements.close()


class Statements:
    """A connection in autocommit mode, used through its driver for one statement at a time.

    SQLAlchemy opens it; its work for each statement would take longer than the statement itself. One
    connection is enough, because group commit runs one statement at a time.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        # One for statements, and one for `hold`.
        self._engine = sessions.engine(
            pool_size=2, max_overflow=0, pool_timeout=POOL_WAIT, isolation_level="AUTOCOMMIT"
        )
        self._connection: AsyncConnection | None = None
        self._driver: Any = None
        self._is_read_committed = False
        self._lock = asyncio.Lock()
        driver = sessions.driver
        # InternalClientError: raised if the server closes the session while the statement runs.
        self._session_errors = (driver.InterfaceError, driver.InternalClientError)
        self._database_errors = (driver.PostgresError, *self._session_errors, TimeoutError, OSError)

    @property
    def is_pooled(self) -> bool:
        """Whether the connections lead to a pooler such as pgbouncer.

        A pooler assigns a session to each transaction, so LISTEN does not work.
        """
        return bool(self._sessions.is_pooled)

    async def fetch(self, statement: str, arguments: Sequence[object], *, keep: bool = True) -> list[Any]:
        """Run a statement and return its rows; roll it back unless `keep`.

        If the session is lost, it runs again in a new session. It has to be idempotent, because the first run
        may have been committed. Raises DatabaseUnavailable, and asyncpg's errors if the statement is wrong.
        """
        async with self._lock:
            with suppress(_Lost):
                return await self._fetch(statement, arguments, keep=keep)
            try:
                return await self._fetch(statement, arguments, keep=keep)
            except _Lost as lost:
                raise unavailable_error(cause(lost.error)) from lost.error

    async def _fetch(self, statement: str, arguments: Sequence[object], *, keep: bool) -> list[Any]:
        connection = self._connection
        if connection is None or self._driver.is_closed() or not self._sessions.is_current(connection.info):
            connection = await self._reconnect()
        info = connection.info
        try:
            async with self._isolated() if keep else self._rolled_back():
                rows: list[Any] = await self._driver.fetch(statement, *arguments)
        except BaseException as error:
            # The state of the connection is unknown now, so the next statement gets a new one.
            await self._disconnect()
            self._raise_condition(error, info)
            raise
        return rows

    def _raise_condition(self, error: BaseException, info: dict[Any, Any]) -> None:
        """Raise _Lost or DatabaseUnavailable for a condition of the database; return for a wrong statement.

        If `_fetch` raised it from a variable, the error's traceback and the variable would refer to each
        other: the arguments, which hold bodies, would stay in memory until the garbage collector runs.
        """
        is_mistake = sqlstate(error)[:2] in OUR_MISTAKES and not is_condition(error)
        if is_mistake or isinstance(error, ValueError) or not isinstance(error, self._database_errors):
            return
        lost = is_lost(error) or isinstance(error, self._session_errors)
        if lost or isinstance(error, TimeoutError):
            self._sessions.distrust(info)
        raise (_Lost(error) if lost else unavailable_error(cause(error))) from error

    async def _reconnect(self) -> AsyncConnection:
        await self._disconnect()
        with unavailable(), opening_session():
            connection = await self._engine.connect()
            self._driver = (await connection.get_raw_connection()).driver_connection
            self._connection = connection
            level = (await connection.execute(text("SHOW transaction_isolation"))).scalar_one()
            self._is_read_committed = level == ISOLATION.lower()
        return connection

    def _isolated(self) -> AbstractAsyncContextManager[object]:
        """Return a context in which a statement runs at READ COMMITTED.

        In autocommit mode a statement has the session's default level, and behind a pooler a SET would change
        the session of other clients. So if the default is another level, the statement runs in a transaction,
        which costs two more round trips.
        """
        return (
            nullcontext() if self._is_read_committed else self._driver.transaction(isolation="read_committed")
        )

    @asynccontextmanager
    async def _rolled_back(self) -> AsyncIterator[None]:
        transaction = self._driver.transaction(isolation="read_committed")
        await transaction.start()
        try:
            yield
        finally:
            await transaction.rollback()

    async def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with unavailable():
                await connection.invalidate()
                await connection.close()

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Any]:
        """Open a connection for the block and close it afterwards, so that no LISTEN stays in the pool."""
        with unavailable():
            with opening_session():
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


class _Lost(Exception):
    """The session was lost while the statement ran."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error
