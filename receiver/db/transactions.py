"""Transactions, and errors by their origin: the database's condition, or a mistake in a statement.

A condition is a lost session, a missing table or right, or a lack of resources; the statement is correct.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from receiver.db.error_texts import cause
from receiver.errors import DatabaseUnavailable

POOL_WAIT: Final = 2.0
"""Seconds to wait for a connection of the pool, or for SQLite's write lock."""
_DATA_EXCEPTION: Final = "22"
OUR_MISTAKES: Final = (_DATA_EXCEPTION, "23", "42")
"""Classes of SQLSTATE (PostgreSQL's documentation, appendix A): invalid values, constraints, syntax and
access rules."""
_CONDITIONS: Final = {
    "42501",  # insufficient privilege
    "42P01",  # undefined table
    "42703",  # undefined column
    "42P05",  # duplicate prepared statement: behind a pooler it belongs to another client
}
"""SQLSTATEs of these classes that are the database's condition: a missing right or table."""
_LOST: Final = (
    "08",  # connection exceptions
    "25006",  # the server is read-only
    "57P",  # the server or an administrator has ended the session, or it was idle for too long
    # A prepared statement is missing or duplicate: there is a pooler now.
    "26000",
    "42P05",
)
_SQLITE_MISTAKES: Final = (sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError)


class SessionLost(Exception):
    """The session leads to a server that no longer takes writes."""


def is_lost(error: BaseException) -> bool:
    """Tell whether an error means that the session is lost; after a timeout it may just be slow."""
    driver_error = getattr(error, "orig", None) or error
    if isinstance(driver_error, TimeoutError):
        return False
    if state := sqlstate(driver_error):
        return state.startswith(_LOST)
    # Without a SQLSTATE, SQLAlchemy's flag tells that the connection is closed.
    return isinstance(error, SessionLost | OSError) or bool(getattr(error, "connection_invalidated", False))


def sqlstate(error: BaseException) -> str:
    """Return the SQLSTATE of an error of PostgreSQL, or an empty text."""
    return str(getattr(error, "sqlstate", None) or "")


@contextmanager
def unavailable() -> Iterator[None]:
    """Raise DatabaseUnavailable for a condition of the database."""
    try:
        yield
    except (IntegrityError, DataError, ProgrammingError, *_SQLITE_MISTAKES) as error:
        if not is_condition(getattr(error, "orig", None)):
            raise  # a mistake in the statement
        raise _failed(error) from error
    except (DBAPIError, sqlite3.Error, SessionLost, PoolTimeoutError, TimeoutError, OSError) as error:
        if sqlstate(getattr(error, "orig", None) or error).startswith(_DATA_EXCEPTION):
            raise  # SQLAlchemy does not map asyncpg's data errors, and another attempt would fail too
        raise _failed(error) from error


def is_condition(driver_error: BaseException | None) -> bool:
    """Tell whether a statement failed because a right or a table is missing."""
    return getattr(driver_error, "sqlstate", None) in _CONDITIONS


def unavailable_error(words: str) -> DatabaseUnavailable:
    """Return the error for a condition of the database."""
    return DatabaseUnavailable(f"the database is unavailable: {words}", reason="database")


def _failed(error: BaseException) -> DatabaseUnavailable:
    if isinstance(error, SessionLost):
        return unavailable_error("its server ends sessions or takes no writes")
    return unavailable_error(cause(getattr(error, "orig", None) or error))
