"""The database's clock in SQL.

The database sets and compares leases and due times, so that a machine with a wrong clock neither steals work
of others nor delays it.
"""

from typing import Any

from sqlalchemy import Float
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from receiver.db.tables import UtcDateTime


class db_time(FunctionElement[Any]):
    """The database's current time plus a number of seconds: `db_time(0.0)`, `db_time(bindparam(...))`."""

    type = UtcDateTime()
    name = "db_time"
    inherit_cache = True


@compiles(db_time, "postgresql")
def _postgresql(element: db_time, compiler: SQLCompiler, **kw: Any) -> str:
    # now() is the start of the transaction: if it waited for a lock, a lease would start in the past.
    return f"clock_timestamp() + make_interval(secs => {compiler.process(element.clauses, **kw)})"


@compiles(db_time, "sqlite")
def _sqlite(element: db_time, compiler: SQLCompiler, **kw: Any) -> str:
    # The text form of the driver's datetimes, with six digits of fraction: values are compared as text.
    seconds = compiler.process(element.clauses, **kw)
    return f"strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', {seconds}))"


class statement_time(FunctionElement[Any]):
    """The database's time at the start of the statement: `statement_time()`.

    It is constant, so PostgreSQL can use it for an index scan. `db_time` changes while the statement runs, so
    PostgreSQL would compare it with each row.
    """

    type = UtcDateTime()
    name = "statement_time"
    inherit_cache = True


@compiles(statement_time, "postgresql")
def _postgresql_statement(_element: statement_time, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "statement_timestamp()"


@compiles(statement_time, "sqlite")
def _sqlite_statement(_element: statement_time, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


class seconds_since(FunctionElement[float]):
    """Seconds from a column's time until now, by the database's clock."""

    type = Float()
    name = "seconds_since"
    inherit_cache = True


@compiles(seconds_since, "postgresql")
def _postgresql_since(element: seconds_since, compiler: SQLCompiler, **kw: Any) -> str:
    return f"extract(epoch FROM clock_timestamp() - {compiler.process(element.clauses, **kw)})::float8"


@compiles(seconds_since, "sqlite")
def _sqlite_since(element: seconds_since, compiler: SQLCompiler, **kw: Any) -> str:
    return f"((julianday('now') - julianday({compiler.process(element.clauses, **kw)})) * 86400.0)"


class unix_time(FunctionElement[float]):
    """Unix seconds of the database's clock."""

    type = Float()
    name = "unix_time"
    inherit_cache = True


@compiles(unix_time, "postgresql")
def _postgresql_unix(_element: unix_time, _compiler: SQLCompiler, **_kw: Any) -> str:
    return "extract(epoch FROM clock_timestamp())::float8"


@compiles(unix_time, "sqlite")
def _sqlite_unix(_element: unix_time, _compiler: SQLCompiler, **_kw: Any) -> str:
    # julianday counts days from noon, and 1970 began at 2440587.5.
    return "((julianday('now') - 2440587.5) * 86400.0)"
