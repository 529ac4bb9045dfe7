"""SQL of retention: finding what is old and settled, and deleting it with all that hangs on it."""

from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import accumulate
from typing import Any, Final

from sqlalchemy import Column, ColumnElement, and_, bindparam, delete, exists, func, select, union_all
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.clock import db_time
from receiver.db.lists import among
from receiver.db.tables import attempts, deliveries, events, jobs, media, receipts, replays


async def moment_ago(connection: AsyncConnection, *, seconds: float) -> datetime:
    """Return the moment that is so many seconds ago, by the database's clock."""
    found: datetime = (await connection.execute(select(db_time(-seconds)))).scalar_one()
    return found


async def find_old(
    connection: AsyncConnection, *, after: int, before: datetime, limit: int, files: int
) -> tuple[list[int], int]:
    """Return which of the next events by `seq` were received before a moment, and the last `seq` of them all.

    A page is of rows and not of numbers, which have gaps: a stretch that was pruned costs nothing. It ends
    before an old event with which its old ones would have more than `files` files, unless that is the first.
    """
    is_old = (events.c.received_at < before).label("is_old")
    statement = select(events.c.seq, is_old).where(events.c.seq > after).order_by(events.c.seq).limit(limit)
    rows = (await connection.execute(statement)).all()
    old = [row.seq for row in rows if row.is_old]
    counted = await connection.execute(_COUNT_FILES, _list(old))
    numbers: dict[int, int] = {row[0]: row[1] for row in counted}
    last = rows[-1].seq if rows else after
    for index, total in enumerate(accumulate(numbers.get(seq, 0) for seq in old)):
        if index and total > files:
            return old[:index], old[index] - 1
    return old, last


async def lock(connection: AsyncConnection, seqs: Collection[int], *, dead_letters: bool) -> Sequence[int]:
    """Lock events until the transaction ends, and return which; what somebody else is at work on is skipped.

    Nothing can be added to a locked event: whatever refers to it has to lock it, too.
    """
    locked = (await connection.execute(_LOCK, _list(seqs))).scalars().all()
    if dead_letters:
        # These by themselves: somebody may restart one, and that does not touch its event.
        await connection.execute(_LOCK_DEAD, _list(locked))
    return locked


async def select_settled(
    connection: AsyncConnection, seqs: Collection[int], *, dead_letters: bool
) -> Sequence[int]:
    """Return those events that nothing is left to do for; with `dead_letters` a delivery may be given up.

    To be asked once they are locked, as a statement of its own: it sees what was committed until then.
    """
    ended = ("delivered", "canceled", "dead") if dead_letters else ("delivered", "canceled")
    open_job = jobs.c.source == events.c.source, jobs.c.state.not_in(("completed", "failed", "canceled"))
    statement = select(events.c.seq).where(
        _among(events.c.seq),
        events.c.state.in_(("ready", "unrecognized")),
        ~exists().where(media.c.event_seq == events.c.seq, media.c.state == "pending"),
        ~exists().where(deliveries.c.event_seq == events.c.seq, deliveries.c.state.not_in(ended)),
        ~exists().where(jobs.c.request_id == events.c.request_id, *open_job),
        ~exists().where(jobs.c.id == events.c.job_id, *open_job),
        ~exists().where(
            replays.c.state == "pending",
            replays.c.after_seq < events.c.seq,
            replays.c.until_seq >= events.c.seq,
        ),
    )
    return (await connection.execute(statement, _list(seqs))).scalars().all()


async def delete_events(connection: AsyncConnection, seqs: Collection[int]) -> None:
    """Delete events with their receipts, files, deliveries and every try at those."""
    for statement in _DELETE:
        await connection.execute(statement, _list(seqs))


def _among(column: Column[Any]) -> ColumnElement[bool]:
    """Return whether a `seq` is one of a list.

    The range adds nothing but what PostgreSQL's planner goes by: one stretch of an index. A list alone may be
    reckoned to cost more than reading the whole table.
    """
    return and_(column.between(bindparam("first"), bindparam("last")), among(column, "seqs"))


def _list(seqs: Collection[int]) -> dict[str, Any]:
    return {"seqs": seqs, "first": min(seqs, default=0), "last": max(seqs, default=0)}


_COUNT_FILES: Final = (
    select(media.c.event_seq, func.count()).where(_among(media.c.event_seq)).group_by(media.c.event_seq)
)
_LOCK: Final = (
    select(events.c.seq).where(_among(events.c.seq)).order_by(events.c.seq).with_for_update(skip_locked=True)
)
_LOCK_DEAD: Final = (
    select(deliveries.c.id)
    .where(_among(deliveries.c.event_seq), deliveries.c.state == "dead")
    .order_by(deliveries.c.id)
    .with_for_update()
)
_WORK: Final = union_all(
    *(select(table.c.id).where(_among(table.c.event_seq)) for table in (media, deliveries))
)
_DELETE: Final = (
    delete(attempts).where(attempts.c.work_id.in_(_WORK)),
    *(delete(table).where(_among(table.c.event_seq)) for table in (deliveries, media, receipts)),
    delete(events).where(_among(events.c.seq)),
)
