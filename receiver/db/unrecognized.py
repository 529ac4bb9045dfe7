"""SQL for unrecognized events: find them, and recognize those that this release can read."""

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    LargeBinary,
    bindparam,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)

from receiver.core.payload import is_request_id, summarize
from receiver.db.connection import SqlConnection
from receiver.db.receipts import receipts_of
from receiver.db.rows import NewEvent, Origin
from receiver.db.tables import events, in_state, receipts
from receiver.errors import UnrecognizedBody

_UNRECOGNIZED: Final = in_state(events, "unrecognized")
_TAKEN: Final = ("id", "request_id", "state", "status", "model", "cost", "cost_micros")


class Unrecognized(NamedTuple):
    """An event that was not recognized when its request came."""

    seq: int
    id: UUID
    source: str
    request_id: str
    """`sha256:<hex of the body>`, or Clipia's if a worker of an earlier release did not recognize it."""
    origin: Origin
    job_id: UUID | None
    body: bytes
    received_at: datetime


async def list_page(connection: SqlConnection, *, after: int, limit: int) -> Sequence[Unrecognized]:
    """Return the next unrecognized events by `seq`."""
    statement = (
        select(*(events.c[name] for name in Unrecognized._fields))
        .where(_UNRECOGNIZED, events.c.seq > after)
        .order_by(events.c.seq)
        .limit(limit)
    )
    return [Unrecognized(*row) for row in await connection.execute(statement)]


async def list_seqs(connection: SqlConnection, *, limit: int) -> Sequence[int]:
    """Return the `seq`s of unrecognized events, newest first."""
    statement = select(events.c.seq).where(_UNRECOGNIZED).order_by(events.c.seq.desc()).limit(limit)
    return (await connection.execute(statement)).scalars().all()


async def find_seqs(connection: SqlConnection, request_id: str) -> list[int]:
    """Return the `seq`s of unrecognized events if this release reads the `request_id` in their body.

    The database searches the bodies for the text first, because there may be many of them.
    """
    if not is_request_id(request_id):
        return []
    spellings = {request_id.encode(), json.dumps(request_id)[1:-1].encode()}
    contains = or_(*(_contains(connection, spelling) for spelling in spellings))
    rows = await connection.execute(select(events.c.seq, events.c.body).where(_UNRECOGNIZED, contains))
    return [row.seq for row in rows if read_request_id(row.body) == request_id]


def read_request_id(body: bytes) -> str | None:
    """Return the `request_id` of a body; None if this release does not recognize it."""
    try:
        return summarize(body).request_id
    except UnrecognizedBody:
        return None


def _contains(connection: SqlConnection, text: bytes) -> ColumnElement[bool]:
    part = bindparam(None, text, LargeBinary)
    if connection.dialect.name == "sqlite":
        return func.instr(events.c.body, part) > 0
    return func.position(part.op("IN")(events.c.body)) > 0


async def lock(connection: SqlConnection, seq: int) -> bool:
    """Lock an event until the transaction ends; False if it is locked already or was recognized."""
    statement = select(events.c.seq).where(events.c.seq == seq, _UNRECOGNIZED)
    return (await connection.execute(statement.with_for_update(skip_locked=True))).first() is not None


async def recognize(connection: SqlConnection, seq: int, event: NewEvent) -> None:
    """Turn an unrecognized event into the recognized `event`, which waits for its fan-out.

    Raises IntegrityError if `event` was received in the meantime.
    """
    values: dict[str, Any] = {name: getattr(event, name) for name in _TAKEN}
    # Its first receipt keeps the outcome that was answered.
    values |= {"reason": None, "first_outcome": "unrecognized"}
    await connection.execute(update(events).where(events.c.seq == seq).values(values))


async def merge(
    connection: SqlConnection, seq: int, *, into: int, outcome: Literal["duplicate", "conflict"]
) -> None:
    """Move the receipts of an event to another one and delete it; receipts of a conflict get its body."""
    values: dict[str, Any] = {"event_seq": literal(into), "outcome": literal(outcome)}
    if outcome == "conflict":
        values["body"] = select(events.c.body).where(events.c.seq == seq).scalar_subquery()
    taken = [column.name for column in receipts.c if column.name != "seq"]
    found = receipts_of(lambda column: column == seq)
    moved = select(*(values.get(name, found.c[name]) for name in taken)).order_by(found.c.seq)
    await connection.execute(insert(receipts).from_select(taken, moved))
    await connection.execute(delete(receipts).where(receipts.c.event_seq == seq))
    await connection.execute(delete(events).where(events.c.seq == seq))


async def load_bodies(connection: SqlConnection, seqs: Collection[int]) -> dict[int, bytes]:
    """Return the bodies of the events that are still unrecognized."""
    statement = select(events.c.seq, events.c.body).where(events.c.seq.in_(seqs), _UNRECOGNIZED)
    return {row.seq: row.body for row in await connection.execute(statement)}
