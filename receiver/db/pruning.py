"""SQL of retention: finding what is old and settled, and deleting it with all that hangs on it."""

from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import accumulate
from typing import Any, Final, NamedTuple
from uuid import UUID

from sqlalchemy import (
    Column,
    ColumnElement,
    and_,
    bindparam,
    delete,
    exists,
    func,
    select,
    tuple_,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db import unrecognized
from receiver.db.arrays import among
from receiver.db.clock import db_time
from receiver.db.rows import NO_INPUT
from receiver.db.sources import find_event_ids
from receiver.db.tables import attempts, deliveries, events, jobs, media, receipts, replays

_ENDED: Final = ("completed", "failed", "canceled")
"""States of a job for which nothing is left to do."""


class FoundEvent(NamedTuple):
    """An event that somebody means."""

    seq: int
    id: UUID
    request_id: str


class StoredFile(NamedTuple):
    """A file in a storage."""

    key: str
    uri: str


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


async def select_finished(
    connection: AsyncConnection, seqs: Collection[int], *, dead_letters: bool
) -> Sequence[int]:
    """Return those events that nothing is left to do for; with `dead_letters` a delivery may be given up.

    To be asked once they are locked, as a statement of its own: it sees what was committed until then.
    """
    left = _left_to_do(dead_letters=dead_letters).values()
    statement = select(events.c.seq).where(_among(events.c.seq), *(~each for each in left))
    return (await connection.execute(statement, _list(seqs))).scalars().all()


async def list_unfinished(connection: AsyncConnection, seq: int) -> list[str]:
    """Return why an event is not settled, in words; with dead letters it may be."""
    left = _left_to_do(dead_letters=True)
    statement = select(*(each.label(f"c{number}") for number, each in enumerate(left.values())))
    rows = (await connection.execute(statement.where(events.c.seq == seq))).all()
    return [words for row in rows for words, is_left in zip(left, row, strict=True) if is_left]


def _left_to_do(*, dead_letters: bool) -> dict[str, ColumnElement[bool]]:
    """Return the conditions under which something is left to do for an event, each with its words."""
    ended = ("delivered", "canceled", "dead") if dead_letters else ("delivered", "canceled")
    open_job = jobs.c.source == events.c.source, jobs.c.state.not_in(_ENDED)
    return {
        "it waits for its fan-out or its files": events.c.state.not_in(("ready", "unrecognized", "erased")),
        "a file is pending": exists().where(media.c.event_seq == events.c.seq, media.c.state == "pending"),
        "a delivery is pending": exists().where(
            deliveries.c.event_seq == events.c.seq, deliveries.c.state.not_in(ended)
        ),
        "its job is open": exists().where(jobs.c.request_id == events.c.request_id, *open_job),
        "the job whose callback it came on is open": exists().where(jobs.c.id == events.c.job_id, *open_job),
        "a replay has yet to reach it": exists().where(
            replays.c.state == "pending",
            replays.c.after_seq < events.c.seq,
            replays.c.until_seq >= events.c.seq,
        ),
    }


async def delete_events(connection: AsyncConnection, seqs: Collection[int]) -> None:
    """Delete events with their receipts, files' records, deliveries and every try at those."""
    for statement in _DELETE:
        await connection.execute(statement, _list(seqs))


async def find_events(connection: AsyncConnection, key: str) -> Sequence[FoundEvent]:
    """Return the events of an id or a `request_id`: one of each source that has it."""
    ids = (await find_event_ids(connection, [key]))[key]
    columns = (events.c.seq, events.c.id, events.c.request_id)
    rows = (await connection.execute(select(*columns).where(events.c.id.in_(ids)))).all()
    if not rows:
        seqs = await unrecognized.find_seqs(connection, key)
        rows = (await connection.execute(select(*columns).where(events.c.seq.in_(seqs)))).all()
    return [FoundEvent(*row) for row in rows]


async def erase_events(connection: AsyncConnection, seqs: Collection[int]) -> None:
    """Leave of events what a late delivery is compared with, and which files are still to be deleted."""
    for statement in _ERASE:
        await connection.execute(statement, _list(seqs))


async def erase_jobs(connection: AsyncConnection, seqs: Collection[int]) -> None:
    """Delete what the caller and Clipia said of the jobs of events; the jobs have ended."""
    of_events = select(events.c.source, events.c.request_id).where(_among(events.c.seq))
    statement = (
        update(jobs)
        .where(tuple_(jobs.c.source, jobs.c.request_id).in_(of_events))
        # Clipia's words may quote the input.
        .values(request=NO_INPUT, metadata={}, error=None, warnings=None)
        .returning(jobs.c.id)
    )
    ids = (await connection.execute(statement, _list(seqs))).scalars().all()
    tries = update(attempts).where(among(attempts.c.work_id, "ids"), attempts.c.outcome != "resubmitted")
    await connection.execute(tries.values(error=None), {"ids": ids})


async def list_files(connection: AsyncConnection, seqs: Collection[int]) -> Sequence[StoredFile]:
    """Return the files of events that are, or may be, in a storage."""
    rows = await connection.execute(_FILES, _list(seqs))
    return [StoredFile(*row) for row in rows]


async def delete_records(connection: AsyncConnection, seqs: Collection[int]) -> None:
    """Delete the records of events' files."""
    await connection.execute(delete(media).where(_among(media.c.event_seq)), _list(seqs))


async def last_job(connection: AsyncConnection) -> int:
    """Return the highest `seq` of a job."""
    return (await connection.execute(select(func.max(jobs.c.seq)))).scalar_one() or 0


async def find_inputs(
    connection: AsyncConnection, *, after: int, until: int, before: datetime, limit: int
) -> Sequence[int]:
    """Return the `seq` of the next jobs that have their input and ended before a moment."""
    statement = (
        select(jobs.c.seq)
        .where(jobs.c.seq > after, jobs.c.seq <= until, *_has_old_input(before))
        .order_by(jobs.c.seq)
        .limit(limit)
    )
    return (await connection.execute(statement)).scalars().all()


async def delete_inputs(connection: AsyncConnection, seqs: Collection[int], *, before: datetime) -> None:
    """Delete the inputs of jobs, unless one was submitted again meanwhile."""
    statement = update(jobs).where(among(jobs.c.seq, "seqs"), *_has_old_input(before))
    await connection.execute(statement.values(request=NO_INPUT), {"seqs": seqs})


def _has_old_input(before: datetime) -> tuple[ColumnElement[bool], ...]:
    ended_at = func.coalesce(jobs.c.finished_at, jobs.c.updated_at)
    return jobs.c.state.in_(_ENDED), ended_at < before, jobs.c.request != NO_INPUT


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
# What a file's record names is kept until the file is deleted: a run that is killed in between goes on there.
_OF_STORED: Final = and_(_among(media.c.event_seq), media.c.storage_key.is_not(None))
_FILES: Final = select(media.c.storage_key, media.c.uri).where(_OF_STORED)
_ERASE: Final = (
    delete(attempts).where(attempts.c.work_id.in_(_WORK)),
    delete(deliveries).where(_among(deliveries.c.event_seq)),
    delete(media).where(_among(media.c.event_seq), media.c.storage_key.is_(None)),
    update(media)
    .where(_OF_STORED)
    .values(state="gone", url="", **dict.fromkeys(("field", "error", "warning", "sha256", "seen_sha256"))),
    update(receipts).where(_among(receipts.c.event_seq)).values(body=None),
    update(events).where(_among(events.c.seq)).values(state="erased", reason=None, body=b""),
)
