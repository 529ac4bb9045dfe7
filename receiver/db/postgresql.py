"""PostgreSQL: a connection for single statements."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.causes import cause
from receiver.db.sessions import ISOLATION, Sessions, opening_session
from receiver.db.transactions import OUR_MISTAKES, POOL_WAIT, is_condition, is_lost, sqlstate, unavailable
from receiver.errors import DatabaseUnavailable


class Statements:
    """A connection for statements that need no transaction around them, spoken to by its driver.

    SQLAlchemy opens it and knows how; what it does for each statement beyond that takes longer than the
    statement. One at a time is all that a group commit asks for.
    """

    def __init__(self, sessions: Sessions) -> None:
        self._sessions = sessions
        # One for statements, and one for who holds one.
        self._engine = sessions.engine(
            pool_size=2, max_overflow=0, pool_timeout=POOL_WAIT, isolation_level="AUTOCOMMIT"
        )
        self._connection: AsyncConnection | None = None
        self._driver: Any = None
        self._is_read_committed = False
        self._turn = asyncio.Lock()
        driver = sessions.driver
        # InternalClientError: raised if the server closes the session while the statement runs.
        self._closed = (driver.InterfaceError, driver.InternalClientError)
        self._refusals = (driver.PostgresError, *self._closed, TimeoutError, OSError)

    async def fetch(self, statement: str, arguments: Sequence[object], *, keep: bool = True) -> list[Any]:
        """Run a statement and return its rows; unless `keep`, roll it back.

        It runs a second time in a new session if the first session was lost. So it has to be one that may run
        twice: whether the first run was committed is not known.
        """
        async with self._turn:
            try:
                return await self._fetch(statement, arguments, keep=keep)
            except _Lost:
                pass
            try:
                return await self._fetch(statement, arguments, keep=keep)
            except _Lost as lost:
                raise _unavailable(lost.error) from lost.error

    async def _fetch(self, statement: str, arguments: Sequence[object], *, keep: bool) -> list[Any]:
        connection = self._connection
        if connection is None or self._driver.is_closed() or not self._sessions.is_current(connection.info):
            connection = await self._reconnect()
        info = connection.info
        try:
            async with self._isolated() if keep else self._rolled_back():
                rows: list[Any] = await self._driver.fetch(statement, *arguments)
        except BaseException as error:
            # Whatever happened: the next statement runs on a connection of which nothing is in doubt.
            await self._disconnect()
            lost = is_lost(error) or isinstance(error, self._closed)
            ours = isinstance(error, ValueError) or (
                sqlstate(error)[:2] in OUR_MISTAKES and not is_condition(error)
            )
            if ours or not isinstance(error, self._refusals):
                raise
            if lost or isinstance(error, TimeoutError):
                self._sessions.distrust(info)
            if lost:
                raise _Lost(error) from error
            raise _unavailable(error) from error
        return rows

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
        """Return what pins the isolation level of a statement.

        A statement that is a transaction by itself has the session's default, and a SET would leak to others
        behind a pooler. So it gets a transaction around it, which costs two more round trips, if it has to.
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
        """Open a connection for the block; nobody else gets it afterwards."""
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
    """The session was lost with the statement."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error


def _unavailable(error: BaseException) -> DatabaseUnavailable:
    return DatabaseUnavailable(f"the database is unavailable: {cause(error)}", reason="database")
