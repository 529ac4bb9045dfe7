"""Parts that many statements have in common."""

from collections.abc import Mapping
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, FromClause, LargeBinary, Table, func, select, type_coerce
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator

from receiver.db.connection import SqlConnection
from receiver.db.tables import Sha256


def insert_for(dialect_name: str, table: Table) -> sqlite.Insert | postgresql.Insert:
    """Return the dialect's own INSERT, which has ON CONFLICT."""
    return sqlite.insert(table) if dialect_name == "sqlite" else postgresql.insert(table)


class _Hex(TypeDecorator[str]):
    """A digest in hexadecimal digits."""

    impl = LargeBinary
    cache_ok = True

    def process_result_value(self, value: bytes | None, dialect: Dialect) -> str | None:
        """Read a digest."""
        return None if value is None else value.hex()


def readable(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return a column with its public value: a digest is hexadecimal."""
    return type_coerce(column, _Hex).label(column.name) if isinstance(column.type, Sha256) else column


def equal(table: FromClause, values: Mapping[str, Any]) -> list[ColumnElement[bool]]:
    """Return a condition for each column that has a value; None adds no condition."""
    return [table.c[name] == value for name, value in values.items() if value is not None]


def between(column: ColumnElement[Any], since: object, until: object) -> list[ColumnElement[bool]]:
    """Return the conditions for a value at or above `since` and below `until`; None means no bound."""
    bounds = (None if since is None else column >= since, None if until is None else column < until)
    return [bound for bound in bounds if bound is not None]


async def count_rows(connection: SqlConnection, table: FromClause, *where: ColumnElement[bool]) -> int:
    """Count the rows of a table under conditions."""
    statement = select(func.count()).select_from(table).where(*where)
    return int((await connection.execute(statement)).scalar_one())


class Known(NamedTuple):
    """A job or a replay on record that a new one is compared with."""

    id: UUID
    fingerprint: str


async def find_known(
    connection: SqlConnection, table: Table, caller: str, idempotency_key: str
) -> Known | None:
    """Return the job or the replay of an Idempotency-Key of a caller."""
    same = equal(table, {"caller": caller, "idempotency_key": idempotency_key})
    row = (await connection.execute(select(table.c.id, table.c.fingerprint).where(*same))).one_or_none()
    return None if row is None else Known(*row)


async def insert_unless_taken(
    connection: SqlConnection, table: Table, values: Mapping[str, Any]
) -> int | None:
    """Insert a row and return its `seq`, or None if another row has one of its unique keys.

    A SELECT before the INSERT would let two transactions both find no row. An INSERT that meets the
    uncommitted row of another transaction waits for it: it returns None after a commit, and inserts after a
    rollback.
    """
    new = insert_for(connection.dialect.name, table).values(**values)
    statement = new.on_conflict_do_nothing().returning(table.c.seq)
    seq: int | None = await connection.scalar(statement)
    return seq
