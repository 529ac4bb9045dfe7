"""SQL of the hot path: a group of inbound deliveries becomes events and receipts in one short transaction.

The values of a group go to the driver as they are: on SQLite SQLAlchemy's handling of each of them takes as
long as SQLite itself, and on PostgreSQL one statement with an array for each column is parsed and planned
once, whatever the size of the group.
"""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from typing import Any, Final
from uuid import UUID

from sqlalchemy import String, bindparam, func, select
from sqlalchemy.dialects import postgresql
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db import sources
from receiver.db.engine import Database
from receiver.db.rows import Arrival, NewEvent
from receiver.db.tables import events, receipts

_OF_EVENT: Final = NewEvent._fields
_OF_RECEIPT: Final = Arrival._fields[1:]
_IN_RECEIPT: Final = (*_OF_RECEIPT, "outcome", "received_at", "body_sha256")


async def insert_new(database: Database, arrivals: Sequence[Arrival]) -> set[UUID]:
    """Insert the events that are new, each with its first receipt; return the ids of the others.

    The arrivals are of different events. They are inserted in one order by every process: two that insert the
    same events at once would else wait for each other in a circle.

    One statement decides who was first, because a SELECT before it would let two deliveries both find
    nothing. An insert that meets the uncommitted row of another transaction waits for it: the event is not
    new after that commit, and new after its rollback.

    Raises DatabaseUnavailable.
    """
    arrivals = sorted(arrivals, key=lambda arrival: arrival.event.id.int)
    if database.is_sqlite:
        return await database.run_at_once(partial(_insert_rows, arrivals), is_webhook=True)
    of_event = zip(*(arrival.event for arrival in arrivals), strict=True)
    _, *of_receipt = zip(*arrivals, strict=True)
    outcomes = tuple(arrival.event.first_outcome for arrival in arrivals)
    rows = await database.fetch_at_once(_INSERT, (*of_event, *of_receipt, outcomes))
    return {row["id"] for row in rows}


def _insert_columns() -> str:
    """Return PostgreSQL's statement; its parameters are an array for each field, in their order."""
    fields = {name: events.c[name] for name in _OF_EVENT}
    fields |= {name: receipts.c[name] for name in (*_OF_RECEIPT, "outcome")}
    # SQLAlchemy gives the constructors of its dialects no types.
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    arrays = [
        # A cast to a text of limited length would cut what is longer, where an insert refuses it.
        f"${number}::{'text' if isinstance(column.type, String) else column.type.compile(dialect)}[]"
        for number, column in enumerate(fields.values(), 1)
    ]
    return f"""
        WITH arrived AS (SELECT * FROM unnest({", ".join(arrays)}) AS arrays ({", ".join(fields)})),
        new AS (
            INSERT INTO events ({", ".join(_OF_EVENT)}) SELECT {", ".join(_OF_EVENT)} FROM arrived
            ON CONFLICT DO NOTHING RETURNING seq, id
        ),
        on_record AS (
            INSERT INTO receipts (event_seq, {", ".join(_IN_RECEIPT)})
            SELECT new.seq, {", ".join(_IN_RECEIPT)} FROM new JOIN arrived USING (id)
        ),
        remembered AS (
            INSERT INTO sources (name) SELECT DISTINCT source FROM arrived ORDER BY 1 ON CONFLICT DO NOTHING
        )
        SELECT id FROM arrived WHERE id NOT IN (SELECT id FROM new)
    """  # noqa: S608 - our own names only


_INSERT: Final = _insert_columns()


async def _insert_rows(arrivals: Sequence[Arrival], connection: AsyncConnection) -> set[UUID]:
    """Insert on SQLite, where nobody else can write meanwhile: what is above the last `seq` is ours."""
    last = (await connection.execute(_LAST_SEQ)).scalar_one() or 0
    new = 0
    for lot in _lots(arrivals):
        values = [_sqlite_value(value) for arrival in lot for value in arrival.event]
        await connection.exec_driver_sql(_insert_events(len(lot)), tuple(values))
        values = [value for arrival in lot for value in _receipt_values(arrival)]
        inserted = await connection.exec_driver_sql(_insert_receipts(len(lot)), (*values, last))
        new += inserted.rowcount
    for source in {arrival.event.source for arrival in arrivals}:
        await sources.remember(connection, source)
    if new == len(arrivals):
        return set()
    ours = set((await connection.execute(_ABOVE, {"last": last})).scalars())
    return {arrival.event.id for arrival in arrivals} - ours


_LAST_SEQ: Final = select(func.max(events.c.seq))
_ABOVE: Final = select(events.c.id).where(events.c.seq > bindparam("last"))


def _lots(arrivals: Sequence[Arrival]) -> Iterator[Sequence[Arrival]]:
    """Cut a group into powers of two, so that SQLite has to parse few different statements."""
    start = 0
    while rest := len(arrivals) - start:
        size = 1 << (rest.bit_length() - 1)
        yield arrivals[start : start + size]
        start += size


# For many rows at once: the thread leaves the interpreter to the event loop once for a statement and not for
# each row, and has to wait as often to get it back.
@cache
def _insert_events(rows: int) -> str:
    return (
        f"INSERT INTO events ({', '.join(_OF_EVENT)}) VALUES {_places(rows, len(_OF_EVENT))} "  # noqa: S608
        "ON CONFLICT DO NOTHING"
    )


@cache
def _insert_receipts(rows: int) -> str:
    arrived = ("id", *_OF_RECEIPT, "outcome")
    return f"""
        INSERT INTO receipts (event_seq, {", ".join(_IN_RECEIPT)})
        WITH arrived ({", ".join(arrived)}) AS (VALUES {_places(rows, len(arrived))})
        SELECT seq, {", ".join(_IN_RECEIPT)} FROM arrived CROSS JOIN events USING (id) WHERE seq > ?
    """  # noqa: S608 - our own names only


def _places(rows: int, columns: int) -> str:
    return ", ".join([f"({', '.join('?' * columns)})"] * rows)


def _receipt_values(arrival: Arrival) -> Iterator[Any]:
    event, *of_receipt = arrival
    return map(_sqlite_value, (event.id, *of_receipt, event.first_outcome))


def _sqlite_value(value: Any) -> Any:
    """Return a value in the form in which the tables' types write it to SQLite."""
    if isinstance(value, UUID):
        return value.hex
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    return value
