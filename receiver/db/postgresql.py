"""PostgreSQL: engines with our settings, and a connection for single statements."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from importlib import import_module
from typing import Any, Final

from sqlalchemy import URL, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from receiver.db.causes import cause
from receiver.db.transactions import OUR_MISTAKES, POOL_WAIT, is_condition, unavailable
from receiver.errors import DatabaseUnavailable, SettingsError

COMMAND_WAIT: Final = 4.0
"""Seconds that the client waits for one statement.

It is the client that counts: `statement_timeout` never fires in a server process that is frozen.
"""
ISOLATION: Final = "READ COMMITTED"
"""Every transaction begins with it: a role or a database may have another default.

At a stricter level a statement sees nothing that was committed after the transaction's first one. An insert
that waited for another delivery of its event would fail, and a transaction that waited for a lock would then
read what was there before the wait.
"""


def postgresql_engine(
    url: URL, *, pool_size: int, isolation_level: str = ISOLATION, **options: Any
) -> AsyncEngine:
    """Return an engine with our settings."""
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
            hide_parameters=True,
            pool_timeout=POOL_WAIT,
            isolation_level=isolation_level,
            **options,
            connect_args={"timeout": POOL_WAIT, "command_timeout": COMMAND_WAIT, "server_settings": settings},
        )
    except ModuleNotFoundError:
        raise SettingsError(
            "PostgreSQL needs the driver asyncpg: pip install 'clipia-receiver[postgres]'"
        ) from None


class Statements:
    """A connection for statements that need no transaction around them, spoken to by its driver.

    SQLAlchemy opens it and knows how; what it does for each statement beyond that takes longer than the
    statement. One at a time is all that a group commit asks for.
    """

    def __init__(self, url: URL) -> None:
        # One for statements, and one for who holds one.
        self._engine = postgresql_engine(url, pool_size=2, isolation_level="AUTOCOMMIT")
        self._connection: AsyncConnection | None = None
        self._driver: Any = None
        self._is_read_committed = False
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

    async def fetch(self, statement: str, arguments: Sequence[object], *, keep: bool = True) -> list[Any]:
        """Run a statement and return its rows; unless `keep`, roll it back."""
        async with self._turn:
            if self._connection is None or self._driver.is_closed():
                await self._reconnect()
            try:
                async with self._isolated() if keep else self._rolled_back():
                    rows: list[Any] = await self._driver.fetch(statement, *arguments)
            except BaseException as error:
                # Whatever happened: the next statement runs on a connection of which nothing is in doubt.
                await self._disconnect()
                sqlstate = str(getattr(error, "sqlstate", None) or "")
                ours = isinstance(error, ValueError) or (
                    sqlstate[:2] in OUR_MISTAKES and not is_condition(error)
                )
                if ours or not isinstance(error, self._refusals):
                    raise
                raise DatabaseUnavailable(
                    f"the database is unavailable: {cause(error)}", reason="database"
                ) from error
            return rows

    async def _reconnect(self) -> None:
        await self._disconnect()
        with unavailable():
            connection = await self._engine.connect()
            self._driver = (await connection.get_raw_connection()).driver_connection
            self._connection = connection
            level = (await connection.execute(text("SHOW transaction_isolation"))).scalar_one()
            self._is_read_committed = level == ISOLATION.lower()

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
