"""Error texts for database failures. A driver's own text is never used: it may quote a password or values."""

import sqlite3
from collections.abc import Mapping
from typing import Final

from receiver import error_texts

# PostgreSQL's documentation, appendix A.
_STATES: Final[Mapping[str, str]] = {
    "28P01": "PostgreSQL rejects the user or the password of RECEIVER_DATABASE_URL",
    "28000": "PostgreSQL rejects the login: see pg_hba.conf and sslmode",
    "3D000": "the database does not exist",
    "42501": "the user lacks a right: `receiver check` names it",
    "42P01": "a table is missing: run `receiver migrate`",
    "42703": "a column is missing: run `receiver migrate`",
    "25006": "the server is read-only: is it a standby?",
    "53100": "the server's disk is full",
    "53200": "the server is out of memory",
    "53300": "the server has too many connections",
    "55P03": "a lock was not granted in time",
    "57014": "the server canceled the statement",
    "57P01": "the server ended the session",
    "57P02": "the server crashed",
    "57P03": "the server is starting or shutting down",
    "57P05": "the server closed the idle session",
    "08P01": "the server or the pooler rejects the connection: does the pooler know this user and database?",
    "40001": "the transaction conflicted with another one",
    "40P01": "the transaction was part of a deadlock",
}
# https://sqlite.org/rescode.html; the name is the symbol of the primary code.
_SQLITE: Final[Mapping[str, str]] = {
    "SQLITE_BUSY": "another process holds its lock",
    "SQLITE_LOCKED": "another connection holds its lock",
    "SQLITE_CANTOPEN": "cannot open its file: check the folder and its permissions",
    "SQLITE_READONLY": "its file is read-only",
    "SQLITE_PERM": "access to its file is denied",
    "SQLITE_FULL": "the disk is full",
    "SQLITE_IOERR": "the disk reports an error",
    "SQLITE_CORRUPT": "its file is damaged",
    "SQLITE_NOTADB": "the file is not an SQLite database",
    "SQLITE_TOOBIG": "a value is too large",
}


def cause(error: BaseException) -> str:
    """Return an error text with the class of the exception."""
    # SQLAlchemy wraps the driver's exception, and that class is more precise.
    driver_error = error.__cause__ if getattr(error.__cause__, "sqlstate", None) else error
    name = type(driver_error).__name__
    state = str(getattr(error, "sqlstate", None) or "")
    if state.isalnum():
        return f"{_STATES.get(state, 'PostgreSQL reports an error')} ({name}, SQLSTATE {state})"
    if isinstance(error, sqlite3.Error):
        # An extended code starts with the primary one: SQLITE_IOERR_WRITE.
        symbol = str(getattr(error, "sqlite_errorname", "") or "")
        words = _SQLITE.get("_".join(symbol.split("_")[:2]))
        return f"{words} ({symbol})" if words else f"{name} {symbol}".strip()
    return error_texts.cause(error)
