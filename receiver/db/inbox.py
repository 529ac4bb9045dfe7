"""SQL for the inbox: events and receipts."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import accumulate
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import Float, Integer, String, bindparam, case, func, insert, or_, select, update

from receiver.db import job_events
from receiver.db.array_parameters import among
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.receipts import receipts_of
from receiver.db.rows import EventState, NewEvent, Outcome, StoredEvent, to_datetime
from receiver.db.tables import events, in_state, receipts

SMALL_BODY_BYTES: Final = 8192
"""The first query reads bodies up to this size; larger ones are read once it is known how many fit."""


class KnownEvent(NamedTuple):
    """A stored event that a request is compared with."""

    seq: int
    origin: str
    status: str | None
    body_sha256: bytes
    state: str


async def find_events(connection: SqlConnection, ids: Collection[UUID]) -> dict[UUID, KnownEvent]:
    """Return events by `id` and keep them from being pruned until the transaction ends."""
    rows = await connection.execute(_KNOWN, {"ids": ids})
    return {id_: KnownEvent(*values) for id_, *values in rows}


async def load_bodies(connection: SqlConnection, seqs: Collection[int]) -> dict[int, bytes]:
    """Return the raw bodies of events, by `seq`."""
    rows = await connection.execute(_BODIES, {"seqs": seqs})
    return {row.seq: row.body for row in rows}


async def find_superseded(connection: SqlConnection, seqs: Collection[int]) -> set[tuple[int, bytes]]:
    """Return the digests of the bodies of events that a person has decided against, each with the `seq`."""
    return {(seq, sha256) for seq, sha256 in await connection.execute(_SUPERSEDED, {"seqs": seqs})}


KEPT_RECEIPTS: Final = 20
"""An event keeps this many receipts of each outcome; the last one counts the later requests."""


async def record_receipts(connection: SqlConnection, found: Sequence[tuple[int, NewEvent, Outcome]]) -> None:
    """Record requests for stored events, each with the event's `seq`; a receipt of a conflict keeps the body.

    Concurrent transactions do not see each other's new rows, so each of them may add `KEPT_RECEIPTS`. The
    count is exact nevertheless, because an UPDATE waits for an earlier one of the same row.
    """
    kept: Counter[tuple[int, Outcome]] = Counter()
    for seq, outcome, number in await connection.execute(_KEPT, {"seqs": {seq for seq, *_ in found}}):
        kept[seq, outcome] += number
    repeated: Counter[tuple[int, Outcome]] = Counter()
    rows = []
    for seq, event, outcome in found:
        if kept[seq, outcome] >= KEPT_RECEIPTS:
            repeated[seq, outcome] += 1
            continue
        kept[seq, outcome] += 1
        rows.append(
            {
                "event_seq": seq,
                "webhook_id": event.webhook_id,
                "secret_id": event.secret_id,
                "signed_at": None if event.signed_at is None else to_datetime(event.signed_at),
                "received_at": to_datetime(event.received_at),
                "body_sha256": event.body_sha256,
                "outcome": outcome,
                "body": event.body if outcome == "conflict" else None,
            }
        )
    if rows:
        await connection.execute(insert(receipts), rows)
    # All processes update in this order: in different orders two of them would deadlock.
    for (seq, outcome), number in sorted(repeated.items()):
        await connection.execute(_COUNT_REPEATED, {"event": seq, "of": outcome, "number": number})


# Built once: building a statement takes as long as running it.
_KNOWN = (
    select(events.c.id, *(events.c[name] for name in KnownEvent._fields))
    .where(among(events.c.id, "ids"))
    # The foreign key of a receipt takes the same lock. Without it here, an event could be pruned before its
    # receipt is inserted, and the violation would roll back the whole group.
    .with_for_update(read=True, key_share=True)
)
_RECEIPTS = receipts_of(lambda seq: among(seq, "seqs"))
_KEPT = select(_RECEIPTS.c.event_seq, _RECEIPTS.c.outcome, func.count()).group_by(
    _RECEIPTS.c.event_seq, _RECEIPTS.c.outcome
)
_COUNT_REPEATED = (
    update(receipts)
    .where(
        receipts.c.seq
        == select(func.max(receipts.c.seq))
        .where(receipts.c.event_seq == bindparam("event"), receipts.c.outcome == bindparam("of"))
        .correlate(None)
        .scalar_subquery()
    )
    .values(repeated=receipts.c.repeated + bindparam("number", type_=Integer))
)
_SUPERSEDED = select(receipts.c.event_seq, receipts.c.body_sha256).where(
    among(receipts.c.event_seq, "seqs"), receipts.c.outcome == "superseded"
)
_BODIES = select(events.c.seq, events.c.body).where(among(events.c.seq, "seqs"))
_STORED = [events.c[name] for name in StoredEvent._fields]
_SIZE = func.length(events.c.body)
_WITHOUT_LARGE_BODIES = [
    case((_SIZE <= SMALL_BODY_BYTES, each)) if each is events.c.body else each for each in _STORED
]
_RECEIVED = (
    select(*_WITHOUT_LARGE_BODIES, _SIZE.label("size"))
    .where(
        in_state(events, "received"),
        ~among(events.c.seq, "without"),
        # The cheap condition is first: most events have no job in their callback path.
        or_(
            events.c.job_id.is_(None),
            events.c.received_at < db_time(bindparam("answered_by", type_=Float)),
            ~job_events.ANSWER_IS_DUE,
        ),
    )
    .order_by(events.c.seq)
    .limit(bindparam("most", type_=Integer))
    # FOR NO KEY UPDATE: it does not conflict with rows that refer to the event, such as a new receipt.
    .with_for_update(skip_locked=True, key_share=True)
)
_BY_SEQ = select(*_STORED).where(among(events.c.seq, "seqs"))
_BY_SEQ_AND_SIZE = select(*_WITHOUT_LARGE_BODIES, _SIZE.label("size")).where(among(events.c.seq, "seqs"))
_SET_STATE = (
    update(events)
    .where(among(events.c.seq, "seqs"))
    .values(state=bindparam("new_state"), reason=bindparam("new_reason", type_=String))
)


async def lock_received(
    connection: SqlConnection, *, limit: int, size: int, without: Collection[int] = ()
) -> tuple[list[StoredEvent], bool]:
    """Lock and return the oldest events in `received`, and whether there may be more of them.

    Returns up to `limit` events with at most `size` bytes of bodies in total, or a single larger one. Other
    workers skip all rows that the query locked until the transaction ends. It leaves out the events `without`
    and, for a while, an event with a job in its callback path: the answer to the job's submission will tell
    whether the event belongs to it.
    """
    values = {"most": limit, "answered_by": -job_events.ANSWER_WAIT_SECONDS, "without": without}
    rows = (await connection.execute(_RECEIVED, values)).all()
    found = await _complete(connection, rows, size)
    return list(found.values()), len(rows) == limit or len(found) < len(rows)


async def _complete(connection: SqlConnection, rows: Sequence[Any], size: int) -> dict[int, StoredEvent]:
    """Return the first of the events that have at most `size` bytes in total, with their large bodies."""
    taken = rows[: bisect_right(list(accumulate(row[-1] for row in rows)), size) or 1]
    found = {row[0]: StoredEvent(*row[:-1]) for row in taken}
    large = [row[0] for row in taken if row[-1] > SMALL_BODY_BYTES]
    for seq, body in (await load_bodies(connection, large) if large else {}).items():
        found[seq] = found[seq]._replace(body=body)
    return found


async def load_first_events(
    connection: SqlConnection, seqs: Collection[int], *, size: int
) -> dict[int, StoredEvent]:
    """Return events by `seq`, the first ones of `seqs` that have at most `size` bytes in total.

    If the first one is larger, it is returned alone.
    """
    rows = {row[0]: row for row in await connection.execute(_BY_SEQ_AND_SIZE, {"seqs": seqs})}
    return await _complete(connection, [rows[seq] for seq in dict.fromkeys(seqs)], size)


async def load_events(connection: SqlConnection, seqs: Collection[int]) -> dict[int, StoredEvent]:
    """Return events by `seq`."""
    rows = await connection.execute(_BY_SEQ, {"seqs": seqs})
    return {row.seq: StoredEvent(*row) for row in rows}


async def set_state(
    connection: SqlConnection, seqs: Collection[int], state: EventState, *, reason: str | None = None
) -> None:
    """Set the state of events and, for an unrecognized one, its reason."""
    await connection.execute(_SET_STATE, {"seqs": seqs, "new_state": state, "new_reason": reason})
