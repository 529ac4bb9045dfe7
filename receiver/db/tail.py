"""SQL of the tail: new events, attempts at deliveries and rejected requests, from a position on."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from heapq import merge
from typing import Any, Final, Literal, NamedTuple, NotRequired, cast
from uuid import UUID

from sqlalchemy import Select, Table, func, select
from typing_extensions import TypedDict

from receiver.db import forward
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.tables import attempts, deliveries, events, rejections

MAX_ROWS: Final = 200
"""The most rows of a table that one page has."""

Kind = Literal["event", "delivered", "failed", "dead", "canceled", "restarted", "superseded", "rejected"]
FAILURES: Final[Sequence[Kind]] = ("failed", "dead", "rejected")

_TABLES: Final[Sequence[Table]] = (events, attempts, rejections)
_KINDS: Final = {"succeeded": "delivered", "retry": "failed", "failed": "dead"}


class TailItem(TypedDict):
    """One thing that happened."""

    kind: Kind
    at: datetime
    event_id: NotRequired[UUID]
    request_id: NotRequired[str]
    source: NotRequired[str]
    status: NotRequired[str]
    model: NotRequired[str]
    delivery_id: NotRequired[UUID]
    destination: NotRequired[str]
    attempt: NotRequired[int]
    text: NotRequired[str]
    """The error of an attempt, or the diagnosis of a rejected request."""
    rejection_id: NotRequired[int]


class Position(NamedTuple):
    """The last rows that were read of events, attempts and rejected requests."""

    event: int
    attempt: int
    rejection: int

    def __str__(self) -> str:
        return "-".join(map(str, self))

    @classmethod
    def read(cls, text: str) -> "Position | None":
        """Return the position of a cursor; None if it is none."""
        parts = text.split("-")
        is_valid = all(part.isascii() and part.isdigit() and len(part) <= 18 for part in parts)
        return cls(*map(int, parts)) if is_valid and len(parts) == len(cls._fields) else None


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The filters of a tail."""

    destination: str | None = None
    """Only attempts at deliveries to it."""
    failures: bool = False
    """Only failed attempts, dead letters and rejected requests."""

    def has(self, item: TailItem) -> bool:
        """Return whether an item is wanted; attempts at files and jobs are not."""
        if item["kind"] not in ("event", "rejected") and item.get("delivery_id") is None:
            return False
        if self.destination is not None and item.get("destination") != self.destination:
            return False
        return not self.failures or item["kind"] in FAILURES


@dataclass(frozen=True, kw_only=True)
class TailPage:
    """Items in the order of time, each with the position after it, and the position after all of them."""

    items: list[tuple[TailItem, Position]]
    position: Position


async def find_end(database: Database) -> Position:
    """Return the position after all present rows."""
    async with database.read() as connection:
        ends = [await connection.scalar(select(func.max(table.c[0]))) or 0 for table in _TABLES]
    return Position(*ends)


async def read(database: Database, after: Position, wanted: Wanted, *, limit: int = MAX_ROWS) -> TailPage:
    """Return the next page; it has rows that are older than all later ones (`forward.settle`)."""
    found: list[list[tuple[int, int, TailItem]]] = []
    ends, starts = list[int](), list[int]()
    for index, table in enumerate(_TABLES):
        start, until = await forward.settle(database, after[index], table, restarts=False)
        rows: list[tuple[int, TailItem]] = []
        if until > start:
            async with database.read() as connection:
                rows = await _READERS[index](connection, start, until, limit)
        starts.append(start)
        ends.append(rows[-1][0] if len(rows) == limit else until)
        found.append([(index, number, item) for number, item in rows])
    return TailPage(items=list(_in_order(found, Position(*starts), wanted)), position=Position(*ends))


def _in_order(
    found: Sequence[Sequence[tuple[int, int, TailItem]]], start: Position, wanted: Wanted
) -> Iterator[tuple[TailItem, Position]]:
    """Return items by time. Those of a table stay in its order: a position must not go back."""
    position = list(start)
    for index, number, item in merge(*found, key=lambda each: each[2]["at"]):
        position[index] = number
        if wanted.has(item):
            yield item, Position(*position)


async def _read_events(
    connection: SqlConnection, start: int, until: int, limit: int
) -> list[tuple[int, TailItem]]:
    names = ("request_id", "source", "status", "model")
    columns = (events.c.seq, events.c.received_at, events.c.id, *(events.c[name] for name in names))
    rows = await _page(connection, select(*columns), events, start, until, limit)
    return [
        (seq, _item("event", at, event_id=id_, **dict(zip(names, values, strict=True))))
        for seq, at, id_, *values in rows
    ]


async def _read_attempts(
    connection: SqlConnection, start: int, until: int, limit: int
) -> list[tuple[int, TailItem]]:
    made = (attempts.c.seq, attempts.c.started_at, attempts.c.outcome, attempts.c.number, attempts.c.error)
    names = ("request_id", "source", "status", "model")
    of_event = (events.c.id, *(events.c[name] for name in names))
    # Attempts at files and jobs have other rows; the page counts them, so it is read whole.
    statement = (
        select(*made, deliveries.c.id, deliveries.c.destination, deliveries.c.state, *of_event)
        .select_from(attempts)
        .outerjoin(deliveries, deliveries.c.id == attempts.c.work_id)
        .outerjoin(events, events.c.seq == deliveries.c.event_seq)
    )
    found = []
    for row in await _page(connection, statement, attempts, start, until, limit):
        seq, at, outcome, number, error, delivery_id, destination, state, event_id, *values = row
        kind = "canceled" if state == "canceled" and outcome == "failed" else _KINDS.get(outcome, outcome)
        item = _item(
            kind,
            at,
            event_id=event_id,
            delivery_id=delivery_id,
            destination=destination,
            attempt=number,
            text=error,
            **dict(zip(names, values, strict=True)),
        )
        found.append((seq, item))
    return found


async def _read_rejections(
    connection: SqlConnection, start: int, until: int, limit: int
) -> list[tuple[int, TailItem]]:
    columns = (rejections.c.id, rejections.c.received_at, rejections.c.source, rejections.c.diagnosis)
    rows = await _page(connection, select(*columns), rejections, start, until, limit)
    return [
        (id_, _item("rejected", at, source=source, text=diagnosis, rejection_id=id_))
        for id_, at, source, diagnosis in rows
    ]


_READERS: Final = (_read_events, _read_attempts, _read_rejections)


async def _page(
    connection: SqlConnection, statement: Select[Any], table: Table, start: int, until: int, limit: int
) -> Sequence[Any]:
    number = table.c[0]
    within = statement.where(number > start, number <= until).order_by(number).limit(limit)
    found: Sequence[Any] = (await connection.execute(within)).all()
    return found


def _item(kind: str, at: datetime, **values: Any) -> TailItem:
    known = {name: value for name, value in values.items() if value is not None}
    return cast("TailItem", {"kind": kind, "at": at, **known})
