"""SQL of a promotion: the body of another receipt becomes the body of an event."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import and_, case, func, insert, null, or_, select, update

from receiver.core.output_files import Kind, Variant
from receiver.db import job_events, outbox
from receiver.db.array_parameters import among
from receiver.db.connection import SqlConnection
from receiver.db.leases import ENDED, RESTARTED, is_unclaimed
from receiver.db.receipts import POLLED
from receiver.db.rows import EventState, JobRef, MediaState, NewEvent, NewMedia, Origin, Outcome
from receiver.db.tables import deliveries, events, media, receipts

_OF_BODY: Final = ("body", "body_sha256", "status", "model", "cost", "cost_micros", "origin")


class CurrentEvent(NamedTuple):
    """An event as it is before a promotion."""

    seq: int
    id: UUID
    source: str
    request_id: str
    state: EventState
    status: str
    body: bytes
    body_sha256: bytes
    received_at: datetime
    webhook_id: str | None
    secret_id: str | None
    signed_at: datetime | None


class KeptReceipt(NamedTuple):
    """A receipt that may have a body of its own."""

    seq: int
    outcome: Outcome
    body: bytes | None
    body_sha256: bytes
    received_at: datetime
    secret_id: str

    @property
    def origin(self) -> Origin:
        """How its body came."""
        return "poll" if self.secret_id == POLLED else "webhook"


class KnownFile(NamedTuple):
    """A file of an event."""

    id: UUID
    position: int
    variant: Variant
    kind: Kind
    url: str
    state: MediaState
    storage_key: str | None
    error: str | None


async def lock_event(connection: SqlConnection, seq: int) -> CurrentEvent | None:
    """Lock an event, its files and its deliveries until the transaction ends; None if it is gone.

    Files are locked before the event, as the end of a download does: in another order, both would deadlock.
    The lock waits for a webhook that is being compared with the event, and for a claim of a delivery.
    """
    mine = select(media.c.id).where(media.c.event_seq == seq).order_by(media.c.id)
    await connection.execute(mine.with_for_update())
    columns = [events.c[name] for name in CurrentEvent._fields]
    row = (
        await connection.execute(select(*columns).where(events.c.seq == seq).with_for_update())
    ).one_or_none()
    sent = select(deliveries.c.id).where(deliveries.c.event_seq == seq).order_by(deliveries.c.id)
    await connection.execute(sent.with_for_update())
    return None if row is None else CurrentEvent(*row)


async def find_receipt(connection: SqlConnection, event_seq: int, receipt_seq: int) -> KeptReceipt | None:
    """Return a receipt of an event."""
    columns = [receipts.c[name] for name in KeptReceipt._fields]
    mine = receipts.c.event_seq == event_seq, receipts.c.seq == receipt_seq
    row = (await connection.execute(select(*columns).where(*mine))).one_or_none()
    return None if row is None else KeptReceipt(*row)


async def list_files(connection: SqlConnection, event_seq: int) -> Sequence[KnownFile]:
    """Return all files of an event, those of superseded bodies, too."""
    columns = [media.c[name] for name in KnownFile._fields]
    statement = select(*columns).where(media.c.event_seq == event_seq).order_by(media.c.id)
    return [KnownFile(*row) for row in await connection.execute(statement)]


async def find_under_way(connection: SqlConnection, event_seq: int) -> list[str]:
    """Return the destinations that a worker is sending the event to."""
    statement = select(deliveries.c.destination).where(
        deliveries.c.event_seq == event_seq, deliveries.c.state == "pending", ~is_unclaimed(deliveries)
    )
    return sorted(set((await connection.execute(statement)).scalars()))


async def count_unsent(connection: SqlConnection, event_seq: int) -> int:
    """Count the deliveries of an event that were not confirmed: pending ones and dead letters."""
    statement = select(func.count()).where(deliveries.c.event_seq == event_seq, _IS_UNSENT)
    return int((await connection.execute(statement)).scalar_one())


async def find_job(connection: SqlConnection, event_seq: int) -> JobRef | None:
    """Return the job of an event."""
    return (await job_events.load_refs(connection, [event_seq])).get(event_seq)


async def exchange_bodies(
    connection: SqlConnection, event: CurrentEvent, receipt: KeptReceipt, new: NewEvent
) -> int:
    """Give an event the body of a receipt, and return the `seq` of the receipt that keeps the former body.

    From now on all receipts of the event are in the table of receipts. Its other conflicts are superseded:
    whoever promotes a body has decided against them.
    """
    former = await _keep_body(connection, event)
    mine = receipts.c.event_seq == event.seq
    same = receipts.c.body_sha256 == new.body_sha256
    decided = update(receipts).where(mine, receipts.c.outcome == "conflict", receipts.c.seq != receipt.seq)
    await connection.execute(
        decided.values(
            outcome=case((same, "duplicate"), else_="superseded"),
            body=case((same, null()), else_=receipts.c.body),
        )
    )
    promoted = update(receipts).where(receipts.c.seq == receipt.seq)
    await connection.execute(promoted.values(outcome="promoted", body=None))
    values: dict[str, Any] = {name: getattr(new, name) for name in _OF_BODY}
    values |= {"received_at": receipt.received_at, "first_outcome": "promoted"}
    values |= dict.fromkeys(("webhook_id", "secret_id", "signed_at"))
    await connection.execute(update(events).where(events.c.seq == event.seq).values(values))
    return former


async def _keep_body(connection: SqlConnection, event: CurrentEvent) -> int:
    kept = {"outcome": "superseded", "body": event.body}
    before = (
        update(receipts)
        .where(receipts.c.event_seq == event.seq, receipts.c.outcome == "promoted")
        .values(kept)
        .returning(receipts.c.seq)
    )
    seq: int | None = await connection.scalar(before)
    if seq is None:
        first = insert(receipts).values(
            event_seq=event.seq,
            webhook_id=event.webhook_id,
            secret_id=event.secret_id or POLLED,
            signed_at=event.signed_at or event.received_at,
            received_at=event.received_at,
            body_sha256=event.body_sha256,
            **kept,
        )
        seq = (await connection.execute(first.returning(receipts.c.seq))).scalar_one()
    return seq


async def supersede_deliveries(connection: SqlConnection, event_seq: int, *, text: str) -> None:
    """End the deliveries of an event that were not confirmed, and note on all of them that they are old."""
    mine = deliveries.c.event_seq == event_seq
    rows = await connection.execute(select(deliveries.c.id).where(mine).order_by(deliveries.c.id))
    ids = list(rows.scalars())
    ended = update(deliveries).where(mine, _IS_UNSENT)
    await connection.execute(ended.values(state="canceled", error=text, **ENDED))
    await outbox.record_change(connection, ids, outcome="superseded", error=text)


async def supersede_files(connection: SqlConnection, ids: Collection[UUID]) -> None:
    """Take files out of an event's messages; a download that is under way loses its lease."""
    statement = update(media).where(among(media.c.id, "ids")).values(state="superseded", **ENDED)
    await connection.execute(statement, {"ids": ids})


async def restore_file(connection: SqlConnection, known: KnownFile, file: NewMedia) -> None:
    """Make a superseded file one of the event's again: a stored one as it is, others are downloaded."""
    values: dict[str, Any] = {"state": "stored"}
    if file.skipped is not None:
        values = {"state": "skipped", "error": file.skipped, **ENDED}
    elif known.storage_key is None or known.error is not None:
        values = dict(RESTARTED)
    await connection.execute(update(media).where(media.c.id == known.id).values(values))


async def set_fields(connection: SqlConnection, fields: Collection[tuple[UUID, str | None]]) -> None:
    """Set the places of files in the output of their event."""
    for id_, field in fields:
        changed = or_(media.c.field.is_(None), media.c.field != field)
        await connection.execute(update(media).where(media.c.id == id_, changed).values(field=field))


async def set_state_by_files(connection: SqlConnection, event_seq: int) -> EventState:
    """Set and return the state that an event has by its files."""
    pending = select(func.count()).where(media.c.event_seq == event_seq, media.c.state == "pending")
    state: EventState = "fetching" if (await connection.execute(pending)).scalar_one() else "ready"
    await connection.execute(update(events).where(events.c.seq == event_seq).values(state=state))
    return state


_IS_UNSENT: Final = or_(
    deliveries.c.state == "dead", and_(deliveries.c.state == "pending", is_unclaimed(deliveries))
)
