"""One class for SQLite and PostgreSQL; a commit is durable on both."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from operator import itemgetter
from pathlib import Path
from typing import Final, TypeVar

from sqlalchemy import URL

from receiver.db.connection import SqlConnection, Transaction
from receiver.db.postgresql import Postgresql, Statements
from receiver.db.rows import NewEvent
from receiver.db.sqlite import Sqlite
from receiver.db.urls import parse_url

T = TypeVar("T")


class Database:
    """Connections to one database.

    All methods raise DatabaseUnavailable if the database does not answer in time, rejects the session, or
    takes no writes.
    """

    def __init__(self, url: str) -> None:
        """Open no connection yet. Raises SettingsError if the URL cannot be used."""
        self.url: Final = url
        parsed = parse_url(url)
        self._backend: Final = Sqlite(parsed) if isinstance(parsed, URL) else Postgresql(parsed)
        self._sources: set[str] = set()  # names that are known to be stored

    @property
    def is_sqlite(self) -> bool:
        """Whether it is SQLite; otherwise it is PostgreSQL."""
        return isinstance(self._backend, Sqlite)

    @property
    def file(self) -> Path | None:
        """SQLite's file; None on PostgreSQL, and for a database in memory."""
        return self._backend.file if isinstance(self._backend, Sqlite) else None

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        return "sqlite" if self.is_sqlite else "postgresql"

    @property
    def statements(self) -> Statements | None:
        """PostgreSQL's connection for single statements and for signals; None on SQLite."""
        return self._backend.statements if isinstance(self._backend, Postgresql) else None

    def write(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction that may write; it is committed durably when the block ends."""
        return self._backend.write()

    def read(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction that only reads; on SQLite all statements read one snapshot."""
        return self._backend.read()

    async def run_transaction(
        self, work: Callable[[SqlConnection], Awaitable[T]], *, is_webhook: bool = False
    ) -> T:
        """Run `work` in one transaction, as `write()` does; it should await its connection only.

        On SQLite it runs in the event loop of a thread, so it must not touch objects of the caller's loop.
        With `write()` each statement returns to the caller's loop, which takes twice the time; and if that
        loop is busy, all other writers wait for the write lock meanwhile.
        """
        return await self._backend.run_transaction(work, is_webhook=is_webhook)

    async def insert_arrivals(self, events: Sequence[NewEvent]) -> set[bytes]:
        """Insert the events that are new, with their first receipts; return the raw ids of the others.

        No two may have the same id. They are sorted, because two processes that insert the same events in
        different orders would deadlock.

        The INSERT itself finds the duplicates: with a SELECT before it, two transactions could both find no
        row. An INSERT that meets the uncommitted row of another transaction waits for it. After a commit the
        event is known, and after a rollback it is new.
        """
        ordered = sorted(events, key=itemgetter(0))
        new_sources = sorted({event.source for event in ordered} - self._sources)
        known = await self._backend.insert_arrivals(ordered, new_sources)
        self._sources.update(new_sources)
        return known

    async def probe(self) -> None:
        """Insert an event as `insert_arrivals` does and a receipt, roll back, and commit another row.

        The INSERTs test whether webhooks can be stored now, and the other row tests the commit.
        """
        await self._backend.probe()

    def migrate(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction that may change the schema and has no time limit for a statement."""
        return self._backend.migrate()

    async def close(self) -> None:
        """Close all connections."""
        await self._backend.close()
