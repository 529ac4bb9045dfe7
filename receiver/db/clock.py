"""The database's clock in SQL.

The database sets and compares leases and due times, so that a machine with a wrong clock neither claims rows
that another worker still holds nor leaves due rows waiting.
"""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy import Float
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from receiver.db.tables import UtcDateTime


class db_time(FunctionElement[Any]):
    """The database's current time plus a number of seconds: `db_time(0.0)`, `db_time(bindparam(...))`."""

    type = UtcDateTime()
    inherit_cache = True


class statement_time(FunctionElement[Any]):
    """The database's time at the start of the statement: `statement_time()`.

    It is constant, so PostgreSQL can use it for an index scan. `db_time` changes while the statement runs, so
    PostgreSQL would compare it with each row.
    """

    type = UtcDateTime()
    inherit_cache = True


class seconds_since(FunctionElement[float]):
    """Seconds from a column's time until now, by the database's clock."""

    type = Float()
    inherit_cache = True


class unix_time(FunctionElement[float]):
    """Unix seconds of the database's clock."""

    type = Float()
    inherit_cache = True


# PostgreSQL's now() is the start of the transaction: a lease made after a wait would start in the past.
# SQLite compares times as text, so they have the form of the driver's datetimes, with six digits of fraction.
# Its julianday counts days from noon, and 1970 began at 2440587.5.
_SQL: Final[Mapping[type[FunctionElement[Any]], Mapping[str, str]]] = {
    db_time: {
        "postgresql": "clock_timestamp() + make_interval(secs => {})",
        "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now', printf('%+.3f seconds', {}))",
    },
    statement_time: {
        "postgresql": "statement_timestamp()",
        "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 'now')",
    },
    seconds_since: {
        "postgresql": "extract(epoch FROM clock_timestamp() - {})::float8",
        "sqlite": "((julianday('now') - julianday({})) * 86400.0)",
    },
    unix_time: {
        "postgresql": "extract(epoch FROM clock_timestamp())::float8",
        "sqlite": "((julianday('now') - 2440587.5) * 86400.0)",
    },
}
"""Each function in each dialect; `{}` is its argument."""


def _compile(element: FunctionElement[Any], compiler: SQLCompiler, **kw: Any) -> str:
    argument = compiler.process(element.clauses, **kw)
    return _SQL[type(element)][compiler.dialect.name].format(argument)


for _function in _SQL:
    compiles(_function)(_compile)
