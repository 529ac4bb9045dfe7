"""A transaction as the SQL of this package sees it, on both databases."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar, TypeVarTuple, overload

from sqlalchemy import Connection, CursorResult, Executable
from sqlalchemy.engine import Dialect
from sqlalchemy.sql.selectable import TypedReturnsRows

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SqlConnection(Protocol):
    """A connection in a transaction that the caller ends; results are read completely."""

    @property
    def dialect(self) -> Dialect:
        """The dialect; its `name` is `sqlite` or `postgresql`."""

    @overload
    async def execute(
        self, statement: TypedReturnsRows[*Ts], parameters: Any = None
    ) -> CursorResult[*Ts]: ...

    @overload
    async def execute(
        self, statement: Executable, parameters: Any = None
    ) -> CursorResult[*tuple[Any, ...]]: ...

    @overload
    async def scalar(self, statement: TypedReturnsRows[T], parameters: Any = None) -> T | None: ...

    @overload
    async def scalar(self, statement: Executable, parameters: Any = None) -> Any: ...

    def begin_nested(self) -> AbstractAsyncContextManager[object]:
        """Open a savepoint for the block; an error rolls back to it."""


class Transaction(SqlConnection, Protocol):
    """A transaction that `Database.write` or `Database.read` has opened."""

    async def exec_driver_sql(self, statement: str, parameters: Any = None) -> CursorResult[*tuple[Any, ...]]:
        """Run a statement as it is."""

    async def run_sync(self, fn: Callable[[Connection], T]) -> T:
        """Call a function with SQLAlchemy's synchronous connection."""

    async def rollback(self) -> None:
        """Roll back."""
