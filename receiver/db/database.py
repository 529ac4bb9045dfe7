"""One class for SQLite and PostgreSQL, with engines that make a commit durable."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Final, TypeVar

from sqlalchemy import URL, PoolProxiedConnection
from sqlalchemy.pool import NullPool

from receiver.db.connection import SqlConnection, Transaction
from receiver.db.postgresql import Statements
from receiver.db.sessions import Sessions
from receiver.db.sqlite import SqliteReaders, SqliteThread, make_file
from receiver.db.transactions import POOL_WAIT, unavailable
from receiver.db.urls import parse_url
from receiver.errors import DatabaseUnavailable

POOL_SIZE: Final = 10
T = TypeVar("T")


class Database:
    """Connections to one database.

    `write()` and `read()` open one transaction each. They raise DatabaseUnavailable if the database does not
    answer in time, rejects the session, or takes no writes. The other methods do the same with less overhead
    for each event: `run_transaction()` on both databases, `fetch()` on PostgreSQL, `run_with_driver()` on
    SQLite.
    """

    def __init__(self, url: str) -> None:
        """Open no connection yet. Raises SettingsError if the URL cannot be used."""
        self.url: Final = url
        self.sources: Final[set[str]] = set()
        """Names of sources that are known to be stored."""
        parsed = parse_url(url)
        self.is_sqlite: Final = isinstance(parsed, URL)
        if isinstance(parsed, URL):
            make_file(parsed)
            self._thread: Final = SqliteThread(parsed, begin="BEGIN IMMEDIATE")
            self._readers: Final = SqliteReaders(parsed, number=4)
            # SQLite has one write lock, and its busy handler polls for it in no order, so writers queue here
            # instead. Writers other than webhooks pass the gate first, one at a time: a webhook waits for
            # one of their transactions at most, and they get the write lock at least every second time.
            self._write_lock, self._gate = asyncio.Lock(), asyncio.Lock()
        else:
            self._sessions: Final = Sessions(parsed)
            self._engine: Final = self._sessions.engine(
                pool_size=POOL_SIZE, max_overflow=0, pool_timeout=POOL_WAIT
            )
            # A separate pool: webhooks do not wait if the workers use all connections of the first one.
            self._statements: Final = Statements(self._sessions)

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        return "sqlite" if self.is_sqlite else "postgresql"

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Transaction]:
        """Open a transaction that may write; it is committed durably when the block ends."""
        if self.is_sqlite:
            with unavailable():
                async with self._writing(), self._thread.transaction() as connection:
                    yield connection
        else:
            async with self._sessions.transaction(self._engine, writes=True) as connection:
                yield connection

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Transaction]:
        """Open a transaction that only reads; on SQLite all statements read one snapshot."""
        if self.is_sqlite:
            with unavailable():
                async with self._readers.transaction() as connection:
                    yield connection
        else:
            async with self._sessions.transaction(self._engine, writes=False) as connection:
                yield connection

    async def run_transaction(
        self, work: Callable[[SqlConnection], Awaitable[T]], *, is_webhook: bool = False
    ) -> T:
        """Run `work` in one transaction, as `write()` does; it may only await its connection.

        On SQLite the whole transaction runs in a thread, so `work` must not touch objects of the event loop.
        With `write()` each statement returns to the event loop, and if that is busy, all other writers wait
        for the write lock meanwhile.
        """
        if not self.is_sqlite:
            async with self.write() as connection:
                return await work(connection)
        with unavailable():
            async with self._writing(is_webhook=is_webhook):
                return await self._thread.run(work)

    async def run_with_driver(self, work: Callable[[PoolProxiedConnection], T]) -> T:
        """Run `work` on SQLite with a driver connection in autocommit mode.

        It queues as a webhook does, and raises the errors of `write`.
        """
        with unavailable():
            async with self._writing(is_webhook=True):
                return await self._thread.run_with_driver(work)

    async def fetch(self, statement: str, arguments: Sequence[object], *, keep: bool = True) -> list[Any]:
        """Run one statement on PostgreSQL in autocommit mode and return its rows; roll it back unless `keep`.

        The statement has to be idempotent: if the session is lost it runs again in a new one. Raises
        DatabaseUnavailable as `write` does, and asyncpg's errors if the statement itself is wrong.
        """
        return await self._statements.fetch(statement, arguments, keep=keep)

    def hold_driver(self) -> AbstractAsyncContextManager[Any]:
        """Open an asyncpg connection for the block; raises the errors of `write`."""
        return self._statements.hold()

    @property
    def is_pooled(self) -> bool:
        """Whether the connections lead to a pooler such as pgbouncer.

        A pooler assigns a session to each transaction, so LISTEN does not work.
        """
        return not self.is_sqlite and bool(self._sessions.is_pooled)

    @asynccontextmanager
    async def _writing(self, *, is_webhook: bool = False) -> AsyncIterator[None]:
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

    @asynccontextmanager
    async def migrate(self) -> AsyncIterator[Transaction]:
        """Open a transaction that may change the schema and has no time limit for a statement."""
        parsed = parse_url(self.url)
        if isinstance(parsed, URL):
            # A migration changes an SQLite table by copying it, which foreign keys to the table forbid.
            thread = SqliteThread(parsed, begin="BEGIN IMMEDIATE", foreign_keys=False)
            try:
                with unavailable():
                    async with thread.transaction() as connection:
                        yield connection
            finally:
                await thread.close()
            return
        engine = self._sessions.engine(command_timeout=None, poolclass=NullPool)
        try:
            async with self._sessions.transaction(engine, writes=True) as connection:
                yield connection
        finally:
            await engine.dispose()

    async def close(self) -> None:
        """Close all connections."""
        if self.is_sqlite:
            await self._readers.close()
            await self._thread.close()
        else:
            await self._engine.dispose()
            await self._statements.close()
