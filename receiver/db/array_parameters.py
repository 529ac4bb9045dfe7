"""Lists as one parameter: a statement is built and planned once for lists of any length."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    Boolean,
    Column,
    ColumnElement,
    Select,
    Text,
    bindparam,
    func,
    literal_column,
    select,
    true,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

DIALECTS: Final = ("sqlite", "postgresql")


class _ListOf(TypeDecorator[Collection[Any]]):
    """A list of values of a column's type: an array on PostgreSQL, and JSON text on SQLite."""

    impl = Text
    cache_ok = True

    def __init__(self, item: TypeEngine[Any]) -> None:
        super().__init__()
        self.item: Final = item

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type of the parameter for the driver."""
        kind: TypeEngine[Any] = ARRAY(self.item) if dialect.name == "postgresql" else Text()
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: Collection[Any] | None, dialect: Dialect) -> Any:
        """Return the values for the driver; in SQLite a UUID is stored as hexadecimal digits."""
        values = list(value or ())
        if dialect.name == "postgresql":
            return values
        return json.dumps([each.hex if isinstance(each, UUID) else each for each in values])


class among(FunctionElement[bool]):
    """Whether a column's value is in the list that the parameter `name` passes."""

    type = Boolean()
    inherit_cache = True

    def __init__(self, column: ColumnElement[Any], name: str) -> None:
        super().__init__(column, bindparam(name, type_=_ListOf(column.type)))

    def self_group(self, against: Any = None) -> "among":
        """Return the element itself: SQLAlchemy would write `… = 1`, for which SQLite uses no index."""
        return self


@compiles(among)
def _compile(element: among, compiler: SQLCompiler, **kw: Any) -> str:
    column, values = (compiler.process(each, **kw) for each in element.clauses)
    is_postgresql = compiler.dialect.name == "postgresql"
    return (
        f"{column} = ANY ({values})"
        if is_postgresql
        else f"{column} IN (SELECT value FROM json_each({values}))"
    )


class Rows:
    """Any number of rows as parameters of one statement."""

    def __init__(self, *columns: Column[Any]) -> None:
        """`columns` of a table give the names and types of the values."""
        self.columns: Final = columns
        self._writers: Final[list[tuple[str, Callable[[Any], Any]]]] = [
            (column.name, column.type.dialect_impl(_SQLITE).bind_processor(_SQLITE) or (lambda value: value))
            for column in columns
        ]

    def select(self, dialect_name: str, *others: ColumnElement[Any]) -> Select[Any]:
        """Return a SELECT of the rows, with `others` as last columns."""
        if dialect_name == "postgresql":
            arrays = [bindparam(column.name, type_=ARRAY(column.type)) for column in self.columns]
            rows = func.unnest(*arrays).table_valued(*(column.name for column in self.columns))
            return select(rows.render_derived(), *others)
        each = func.json_each(bindparam("rows", type_=Text)).table_valued("value")
        values = (
            func.json_extract(each.c.value, literal_column(f"'$[{number}]'"))
            for number in range(len(self.columns))
        )
        # Without a WHERE SQLite would parse ON CONFLICT as a join condition.
        return select(*values, *others).select_from(each).where(true())

    def parameters(self, dialect_name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the parameters of a statement with `select`; each of `rows` has all columns."""
        if dialect_name == "postgresql":
            return {column.name: [row[column.name] for row in rows] for column in self.columns}
        return {"rows": json.dumps([[write(row[name]) for name, write in self._writers] for row in rows])}


_SQLITE: Final = sqlite.dialect()
