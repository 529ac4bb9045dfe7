"""Engines for SQLite and PostgreSQL behind one small class, set up so that a commit is durable."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, event, make_url, text
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
_DURABLE: Final = ("fsync", "full_page_writes", "synchronous_commit")


class Database:
    """Connections to one database.

    `write()` and `read()` open one transaction each and raise DatabaseUnavailable when the database does not
    answer in time, refuses, or cannot write.
    """

    def __init__(self, url: str) -> None:
        """Raise SettingsError for a URL that cannot be used; connect to nothing yet."""
        self.url: Final = parse_url(url)
        self.is_sqlite: Final = self.url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            # One writing connection: transactions queue here, fairly, and not in SQLite's busy handler.
            self._writer = _sqlite_engine(self.url, pool_size=1, begin="BEGIN IMMEDIATE")
            self._reader = _sqlite_engine(self.url, pool_size=4, begin="BEGIN")
        else:
            self._writer = self._reader = _postgresql_engine(self.url)

    @property
    def dialect_name(self) -> str:
        """`sqlite` or `postgresql`."""
        return self._writer.dialect.name

    def write(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that may write; it is committed durably when the block ends."""
        return transaction(self._writer)

    def read(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """Open a transaction that only reads, from one snapshot on SQLite."""
        return transaction(self._reader)

    async def close(self) -> None:
        """Close all connections."""
        await self._writer.dispose()
        if self._reader is not self._writer:
            await self._reader.dispose()

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
"""The class of SQLSTATE for values that PostgreSQL cannot take (its documentation, appendix A)."""


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open one transaction; raise DatabaseUnavailable for what is the database's condition."""
    try:
        async with engine.begin() as connection:
            yield connection
    except (IntegrityError, DataError, ProgrammingError):
        raise  # our own mistake, not the database's condition
    except (DBAPIError, PoolTimeoutError, TimeoutError, OSError) as error:
        cause = getattr(error, "orig", None) or error
        if str(getattr(cause, "sqlstate", None) or "").startswith(_DATA_EXCEPTION):
            raise  # asyncpg's data errors come as the driver's own kind, and another try meets them again
        raise DatabaseUnavailable(
            f"the database is unavailable ({type(cause).__name__}: {cause})", reason="database"
        ) from error


def _sqlite_engine(url: URL, *, pool_size: int, begin: str) -> AsyncEngine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_async_engine(
        url,
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=POOL_WAIT,
        connect_args={"timeout": POOL_WAIT},
    )

    @event.listens_for(engine.sync_engine, "connect")
    def _connect(connection: Any, _record: Any) -> None:
        # Without this pysqlite opens transactions on its own terms and updates get lost without an error.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def _begin(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _postgresql_engine(url: URL) -> AsyncEngine:
    settings = {
        "application_name": "clipia-receiver",
        "lock_timeout": "2s",
        "idle_in_transaction_session_timeout": "10s",
    }
    try:
        return create_async_engine(
            url,
            pool_size=POOL_SIZE,
            max_overflow=0,
            pool_timeout=POOL_WAIT,
            connect_args={"timeout": POOL_WAIT, "command_timeout": COMMAND_WAIT, "server_settings": settings},
        )
    except ModuleNotFoundError:
        raise SettingsError(
            "PostgreSQL needs the driver asyncpg: pip install 'clipia-receiver[postgres]'"
        ) from None


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
