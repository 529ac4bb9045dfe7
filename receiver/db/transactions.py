"""Transactions of either database, and the errors that are the database's condition and not our mistake."""

import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from receiver.db.causes import cause
from receiver.errors import DatabaseUnavailable

POOL_WAIT: Final = 2.0
"""Seconds to wait for a connection of the pool, or for SQLite's write lock."""
_DATA_EXCEPTION: Final = "22"
OUR_MISTAKES: Final = (_DATA_EXCEPTION, "23", "42")
"""Classes of SQLSTATE (PostgreSQL's documentation, appendix A): values that it cannot take, constraints, and
statements that it does not understand."""
_CONDITIONS: Final = {
    "42501",  # insufficient privilege
    "42P01",  # undefined table
    "42703",  # undefined column
    "42P05",  # a prepared statement is there already: another client's, behind a pooler
}
"""SQLSTATEs of those classes that come from the database: rights or tables that are not there."""
_LOST: Final = (
    "08",  # connection exceptions
    "25006",  # the server is read-only
    "57P",  # the server or an administrator has ended the session, or it was idle for too long
    # A prepared statement is missing, or there already: a pooler that was not there before.
    "26000",
    "42P05",
)
_SQLITE_MISTAKES: Final = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError)


class SessionLost(Exception):
    """The session leads to a server that takes no writes any more."""


def is_lost(error: BaseException) -> bool:
    """Tell whether an error means that the session is of no use any more.

    A timeout does not say so: the session may be slow.
    """
    driver_error = getattr(error, "orig", None) or error
    if isinstance(driver_error, TimeoutError):
        return False
    if state := sqlstate(driver_error):
        return state.startswith(_LOST)
    # Without a SQLSTATE: SQLAlchemy's own word for a connection that is closed.
    return isinstance(error, SessionLost | OSError) or bool(getattr(error, "connection_invalidated", False))


def sqlstate(error: BaseException) -> str:
    """Return the SQLSTATE of an error of PostgreSQL's, or nothing."""
    return str(getattr(error, "sqlstate", None) or "")


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """Open one transaction; raise DatabaseUnavailable for what is the database's condition."""
    with unavailable():
        async with engine.begin() as connection:
            yield connection


@contextmanager
def unavailable() -> Iterator[None]:
    """Raise DatabaseUnavailable for what is the database's condition."""
    try:
        yield
    except (IntegrityError, DataError, ProgrammingError, *_SQLITE_MISTAKES) as error:
        if not is_condition(getattr(error, "orig", None)):
            raise  # our own mistake, not the database's condition
        raise _failed(error) from error
    except (DBAPIError, sqlite3.Error, SessionLost, PoolTimeoutError, TimeoutError, OSError) as error:
        driver_error = getattr(error, "orig", None) or error
        if str(getattr(driver_error, "sqlstate", None) or "").startswith(_DATA_EXCEPTION):
            raise  # asyncpg's data errors come as the driver's own kind, and another try meets them again
        raise _failed(error) from error


def is_condition(driver_error: BaseException | None) -> bool:
    """Tell whether PostgreSQL refuses a statement for want of a right or a table."""
    return getattr(driver_error, "sqlstate", None) in _CONDITIONS


def _failed(error: BaseException) -> DatabaseUnavailable:
    driver_error = getattr(error, "orig", None) or error
    words = (
        "its server ends sessions or takes no writes"
        if isinstance(error, SessionLost)
        else cause(driver_error)
    )
    return DatabaseUnavailable(f"the database is unavailable: {words}", reason="database")
