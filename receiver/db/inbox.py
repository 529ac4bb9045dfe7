"""SQL of the inbox: events and receipts."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from sqlalchemy import case, func, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.clock import db_time, seconds_since
from receiver.db.rows import Backlog, EventState, NewEvent, NewReceipt, StoredEvent
from receiver.db.tables import events, probes, receipts


@dataclass(frozen=True, kw_only=True)
class KnownEvent:
    """The event that was there first."""

    seq: int
    origin: str
    status: str | None
    body: bytes | None
    """Its raw body; None where the digest asked about is the same."""


async def insert_event(connection: AsyncConnection, event: NewEvent) -> int | None:
    """Insert an event and return its `seq`, or None where (source, request_id) is taken.

    One statement, because a SELECT first would let two deliveries both find nothing. An insert that meets the
    uncommitted row of another transaction waits for it: it returns None after that commit, and wins after its
    rollback.
    """
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = (
        dialect.insert(events).values(**asdict(event)).on_conflict_do_nothing().returning(events.c.seq)
    )
    return (await connection.execute(statement)).scalar_one_or_none()


async def find_event(
    connection: AsyncConnection, *, source: str, request_id: str, sha256: str
) -> KnownEvent | None:
    """Return the event of (source, request_id), with its body where that has another digest than `sha256`."""
    body = case((events.c.body_sha256 != sha256, events.c.body), else_=None).label("body")
    row = (
        (
            await connection.execute(
                select(events.c.seq, events.c.origin, events.c.status, body).where(
                    events.c.source == source, events.c.request_id == request_id
                )
            )
        )
        .mappings()
        .one_or_none()
    )
    return None if row is None else KnownEvent(**row)


async def insert_receipt(connection: AsyncConnection, event_seq: int, receipt: NewReceipt) -> None:
    """Put one inbound delivery of an event on record."""
    await connection.execute(insert(receipts).values(event_seq=event_seq, **asdict(receipt)))


_STORED = (
    events.c.seq,
    events.c.id,
    events.c.source,
    events.c.request_id,
    events.c.status,
    events.c.body,
    events.c.received_at,
    events.c.job_id,
)


async def lock_received(connection: AsyncConnection, *, limit: int) -> Sequence[StoredEvent]:
    """Return the oldest events in `received`, locked until the transaction ends; others skip them."""
    statement = (
        select(*_STORED)
        .where(events.c.state == "received")
        .order_by(events.c.seq)
        .limit(limit)
        # Not against those who only refer to the event, such as the receipt of a duplicate.
        .with_for_update(skip_locked=True, key_share=True)
    )
    return [StoredEvent(**row) for row in (await connection.execute(statement)).mappings()]


async def load_events(connection: AsyncConnection, seqs: Collection[int]) -> dict[int, StoredEvent]:
    """Return events by `seq`."""
    rows = (await connection.execute(select(*_STORED).where(events.c.seq.in_(seqs)))).mappings()
    return {row["seq"]: StoredEvent(**row) for row in rows}


async def set_state(
    connection: AsyncConnection, seqs: Collection[int], state: EventState, *, reason: str | None = None
) -> None:
    """Move events to another state."""
    await connection.execute(update(events).where(events.c.seq.in_(seqs)).values(state=state, reason=reason))


async def backlog(connection: AsyncConnection) -> Backlog:
    """Return how many events wait for their fan-out."""
    oldest = seconds_since(func.min(events.c.received_at))
    row = (await connection.execute(select(func.count(), oldest).where(events.c.state == "received"))).one()
    return Backlog(rows=row[0], oldest=row[1] or 0.0)


async def probe(connection: AsyncConnection) -> None:
    """Write one row, so that the commit shows whether the database can store anything now."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(probes).values(name="write", at=db_time(0.0))
    await connection.execute(
        statement.on_conflict_do_update(index_elements=["name"], set_={"at": statement.excluded.at})
    )
