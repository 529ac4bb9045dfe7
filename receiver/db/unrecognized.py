"""SQL of events that were not recognized: finding them, and taking up those that this release can read."""

import json
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

from sqlalchemy import ColumnElement, LargeBinary, bindparam, delete, func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.core.payload import is_request_id, summarize
from receiver.db.rows import NewEvent
from receiver.db.tables import events, in_state, receipts
from receiver.errors import UnrecognizedBody

_UNRECOGNIZED: Final = in_state(events, "unrecognized")
_TAKEN: Final = ("id", "request_id", "state", "status", "model", "cost", "cost_micros")


class Unrecognized(NamedTuple):
    """An event that was not recognized when it came."""

    seq: int
    id: UUID
    source: str
    request_id: str
    """`sha256:<hex of the body>`, unless only an older release's worker did not recognize it."""
    origin: Literal["webhook", "poll"]
    job_id: UUID | None
    body: bytes
    received_at: datetime


async def list_page(connection: AsyncConnection, *, after: int, limit: int) -> Sequence[Unrecognized]:
    """Return the next of them by `seq`."""
    statement = (
        select(*(events.c[name] for name in Unrecognized._fields))
        .where(_UNRECOGNIZED, events.c.seq > after)
        .order_by(events.c.seq)
        .limit(limit)
    )
    return [Unrecognized(*row) for row in await connection.execute(statement)]


async def list_seqs(connection: AsyncConnection, *, limit: int) -> Sequence[int]:
    """Return the `seq` of each, the newest first."""
    statement = select(events.c.seq).where(_UNRECOGNIZED).order_by(events.c.seq.desc()).limit(limit)
    return (await connection.execute(statement)).scalars().all()


async def find_seqs(connection: AsyncConnection, request_id: str) -> list[int]:
    """Return the `seq` of those in whose body this release reads a `request_id`.

    The database looks for its characters first, because there may be many bodies.
    """
    if not is_request_id(request_id):
        return []
    spellings = {request_id.encode(), json.dumps(request_id)[1:-1].encode()}
    contains = or_(*(_contains(connection, spelling) for spelling in spellings))
    rows = await connection.execute(select(events.c.seq, events.c.body).where(_UNRECOGNIZED, contains))
    return [row.seq for row in rows if read_request_id(row.body) == request_id]


def read_request_id(body: bytes) -> str | None:
    """Return the `request_id` of a body; None if this release does not recognize it either."""
    try:
        return summarize(body).request_id
    except UnrecognizedBody:
        return None


def _contains(connection: AsyncConnection, text: bytes) -> ColumnElement[bool]:
    part = bindparam(None, text, LargeBinary)
    if connection.dialect.name == "sqlite":
        return func.instr(events.c.body, part) > 0
    return func.position(part.op("IN")(events.c.body)) > 0


async def lock(connection: AsyncConnection, seq: int) -> bool:
    """Lock one until the transaction ends; False if somebody else has it, or has taken it up."""
    statement = select(events.c.seq).where(events.c.seq == seq, _UNRECOGNIZED)
    return (await connection.execute(statement.with_for_update(skip_locked=True))).first() is not None


async def recognize(connection: AsyncConnection, seq: int, event: NewEvent) -> None:
    """Make one the event that it is now read as, which waits for its fan-out.

    Raises IntegrityError if that event has come meanwhile.
    """
    values = {name: getattr(event, name) for name in _TAKEN}
    await connection.execute(update(events).where(events.c.seq == seq).values(**values, reason=None))


async def merge(
    connection: AsyncConnection, seq: int, *, into: int, outcome: Literal["duplicate", "conflict"]
) -> None:
    """Make the deliveries of one those of another event; a conflict keeps its body on its receipts."""
    values: dict[str, Any] = {"event_seq": into, "outcome": outcome}
    if outcome == "conflict":
        values["body"] = select(events.c.body).where(events.c.seq == seq).scalar_subquery()
    await connection.execute(update(receipts).where(receipts.c.event_seq == seq).values(**values))
    await connection.execute(delete(events).where(events.c.seq == seq))


async def load_bodies(connection: AsyncConnection, seqs: Collection[int]) -> dict[int, bytes]:
    """Return the bodies of those that are still unrecognized."""
    statement = select(events.c.seq, events.c.body).where(events.c.seq.in_(seqs), _UNRECOGNIZED)
    return {row.seq: row.body for row in await connection.execute(statement)}
