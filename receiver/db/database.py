"""Engines for SQLite and PostgreSQL behind one small class, set up so that a commit is durable."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Final, TypeVar

from sqlalchemy import URL, PoolProxiedConnection
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import NullPool

from receiver.db.postgresql import Statements
from receiver.db.sessions import Sessions
from receiver.db.sqlite import SqliteThread, sqlite_engine
from receiver.db.transactions import POOL_WAIT, transaction, unavailable
from receiver.db.urls import parse_url
from receiver.errors import DatabaseUnavailable

POOL_SIZE: Final = 10
T = TypeVar("T")


class Database:
    """Connections to one database.

    `write()` and `read()` open one transaction each and raise DatabaseUnavailable when the database does not
    answer in time, refuses, or cannot write. `run_at_once()` is `write()` for what is done for every event,
    and `fetch_at_once()` and `run_with_driver()` are the short ways of the inbox on PostgreSQL and on SQLite.
    """

    def __init__(self, url: str) -> None:
        """Raise SettingsError for a URL that cannot be used; connect to nothing yet."""
        self.url: Final = url
        parsed = parse_url(url)
        self.is_sqlite: Final = isinstance(parsed, URL)
        if isinstance(parsed, URL):
            self._writer = sqlite_engine(parsed, pool_size=1, begin="BEGIN IMMEDIATE")
            self._reader = sqlite_engine(parsed, pool_size=4, begin="BEGIN")
            self._thread: Final = SqliteThread(parsed)
            # Writers queue here, and not in SQLite's busy handler. All but webhooks pass the gate first, one
            # by one: a webhook waits for one other transaction, and the others have every second turn.
            self._turn, self._gate = asyncio.Lock(), asyncio.Lock()
        else:
            self._sessions: Final = Sessions(parsed)
            self._writer = self._reader = self._sessions.engine(
                pool_size=POOL_SIZE, max_overflow=0, pool_timeout=POOL_WAIT
            )
            # Of its own: those who find the other pool empty must not keep webhooks waiting.
            self._statements: Final = Statements(self._sessions)

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._writer.dialect.name

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that may write; it is committed durably when the block ends."""
        async with self._in_turn(), self._transaction(self._writer, writes=True) as connection:
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
        with unavailable():
            async with self._in_turn(is_webhook=is_webhook):
                return await self._thread.run(work)

    async def run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        """Run `work` on SQLite with a connection of its driver's, where each statement is a transaction.

        It has a webhook's turn, and raises as `write` does.
        """
        with unavailable():
            async with self._in_turn(is_webhook=True):
                return await self._thread.run_with_driver(work)

    async def fetch_at_once(
        self, statement: str, arguments: Sequence[object], *, keep: bool = True
    ) -> list[Any]:
        """Run a statement that is a durable transaction by itself on PostgreSQL; return its rows.

        It may run twice: the second time in a new session if the first was lost with it. Unless `keep`, it is
        rolled back. Raises DatabaseUnavailable as `write` does, and for other errors asyncpg's own.
        """
        return await self._statements.fetch(statement, arguments, keep=keep)

    def hold_driver(self) -> AbstractAsyncContextManager[Any]:
        """Open a connection of asyncpg's for the block, on PostgreSQL; raises as `write` does."""
        return self._statements.hold()

    @property
    def is_pooled(self) -> bool:
        """Whether a pooler such as pgbouncer is known to stand before PostgreSQL.

        Then a session lasts for a transaction only, and cannot LISTEN.
        """
        return not self.is_sqlite and bool(self._sessions.is_pooled)

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
        return self._transaction(self._reader, writes=False)

    def _transaction(
        self, engine: AsyncEngine, *, writes: bool
    ) -> AbstractAsyncContextManager[AsyncConnection]:
        if self.is_sqlite:
            return transaction(engine)
        return self._sessions.transaction(engine, writes=writes)

    @asynccontextmanager
    async def migrate(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction that may change the schema, and may take longer than any of the service."""
        parsed = parse_url(self.url)
        if isinstance(parsed, URL):
            # SQLite changes a table by copying it, which the references of others to its rows would forbid.
            engine = sqlite_engine(parsed, pool_size=1, begin="BEGIN IMMEDIATE", foreign_keys=False)
        else:
            engine = self._sessions.engine(command_timeout=None, poolclass=NullPool)
        try:
            async with self._transaction(engine, writes=True) as connection:
                yield connection
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Close all connections."""
        await self._writer.dispose()
        if self.is_sqlite:
            await self._reader.dispose()
            await self._thread.close()
        else:
            await self._statements.close()
