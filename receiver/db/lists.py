"""Lists in statements: one parameter whatever their length, so that a statement is made and planned once."""

import json
from collections.abc import Collection
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Boolean, Column, FromClause, Text, bindparam, func
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine


class _ListOf(TypeDecorator[Collection[Any]]):
    """Values of a column's type: an array on PostgreSQL, and text that is JSON on SQLite."""

    impl = Text
    cache_ok = True

    def __init__(self, item: TypeEngine[Any]) -> None:
        super().__init__()
        self.item: Final = item

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the type that the driver is given."""
        kind: TypeEngine[Any] = ARRAY(self.item) if dialect.name == "postgresql" else Text()
        return dialect.type_descriptor(kind)

    def process_bind_param(self, value: Collection[Any] | None, dialect: Dialect) -> Any:
        """Write the values; SQLite has UUIDs as their hexadecimal digits."""
        values = list(value or ())
        if dialect.name == "postgresql":
            return values
        return json.dumps([each.hex if isinstance(each, UUID) else each for each in values])


class among(FunctionElement[bool]):  # noqa: N801 - written like an SQL function
    """Whether a column's value is one of a list, which is the parameter `name`."""

    type = Boolean()
    inherit_cache = True

    def __init__(self, column: Column[Any], name: str) -> None:
        super().__init__(column, bindparam(name, type_=_ListOf(column.type)))

    def self_group(self, against: Any = None) -> "among":  # noqa: ARG002 - a signature of SQLAlchemy's
        """Stand in a condition as it is; SQLite uses no index for what is compared with 1 to be true."""
        return self


@compiles(among, "postgresql")
def _postgresql(element: among, compiler: SQLCompiler, **kw: Any) -> str:
    column, values = (compiler.process(each, **kw) for each in element.clauses)
    return f"{column} = ANY ({values})"


@compiles(among, "sqlite")
def _sqlite(element: among, compiler: SQLCompiler, **kw: Any) -> str:
    column, values = (compiler.process(each, **kw) for each in element.clauses)
    return f"{column} IN (SELECT value FROM json_each({values}))"  # noqa: S608 - a column and a parameter


def unnested(*columns: Column[Any]) -> FromClause:
    """Return PostgreSQL's rows of parameters: a list for each column, named as the column."""
    arrays = [bindparam(column.name, type_=ARRAY(column.type)) for column in columns]
    return func.unnest(*arrays).table_valued(*(column.name for column in columns)).render_derived()
