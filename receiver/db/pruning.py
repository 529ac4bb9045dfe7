"""SQL for retention: find old, finished events and delete them with the rows that refer to them."""

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

from receiver.db import unrecognized
from receiver.db.array_parameters import among
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.rows import NO_INPUT
from receiver.db.sources import find_event_ids
from receiver.db.tables import attempts, deliveries, events, jobs, media, receipts, replays

_ENDED: Final = ("completed", "failed", "canceled")
"""Final states of a job."""


class FoundEvent(NamedTuple):
    """An event that was found by its id or `request_id`."""

    seq: int
    id: UUID
    request_id: str


class StoredFile(NamedTuple):
    """A file in a storage."""

    key: str
    uri: str


async def moment_ago(connection: SqlConnection, *, seconds: float) -> datetime:
    """Return a past time by the database's clock."""
    found: datetime = (await connection.execute(select(db_time(-seconds)))).scalar_one()
    return found


async def find_old(
    connection: SqlConnection, *, after: int, before: datetime, limit: int, files: int
) -> tuple[list[int], int]:
    """Read a page of events by `seq`; return those received before a time, and the last `seq` of the page.

    The page has `limit` rows and not a range of numbers, because pruning leaves large gaps. It ends earlier
    if its old events would have more than `files` files, but it has at least one old event.
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


async def lock(connection: SqlConnection, seqs: Collection[int], *, dead_letters: bool) -> Sequence[int]:
    """Lock events until the transaction ends and return them; events that are locked already are skipped.

    No row that refers to a locked event can be added, because its foreign key has to lock the event too.
    """
    locked = (await connection.execute(_LOCK, _list(seqs))).scalars().all()
    if dead_letters:
        # `deliveries retry` may restart a dead letter, and does not lock its event.
        await connection.execute(_LOCK_DEAD, _list(locked))
    return locked


async def select_finished(
    connection: SqlConnection, seqs: Collection[int], *, dead_letters: bool
) -> Sequence[int]:
    """Return the finished events; with `dead_letters` an event with a dead letter is finished too.

    It is a separate statement after the lock, so that it sees all rows that were committed before the lock.
    """
    open_work = _open_work(dead_letters=dead_letters).values()
    statement = select(events.c.seq).where(_among(events.c.seq), *(~each for each in open_work))
    return (await connection.execute(statement, _list(seqs))).scalars().all()


async def list_unfinished(connection: SqlConnection, seq: int) -> list[str]:
    """Return the reasons why an event is not finished; dead letters do not count."""
    open_work = _open_work(dead_letters=True)
    statement = select(*(each.label(f"c{number}") for number, each in enumerate(open_work.values())))
    rows = (await connection.execute(statement.where(events.c.seq == seq))).all()
    return [reason for row in rows for reason, is_open in zip(open_work, row, strict=True) if is_open]


def _open_work(*, dead_letters: bool) -> dict[str, ColumnElement[bool]]:
    """Return the reasons why an event is not finished, and their conditions."""
    ended = ("delivered", "canceled", "dead") if dead_letters else ("delivered", "canceled")
    open_job = jobs.c.source == events.c.source, jobs.c.state.not_in(_ENDED)
    return {
        "it waits for its fan-out or its files": events.c.state.not_in(("ready", "unrecognized", "erased")),
        "a file is pending": exists().where(media.c.event_seq == events.c.seq, media.c.state == "pending"),
        "a delivery is pending": exists().where(
            deliveries.c.event_seq == events.c.seq, deliveries.c.state.not_in(ended)
        ),
        "its job is open": exists().where(jobs.c.request_id == events.c.request_id, *open_job),
        "the job of its callback path is open": exists().where(jobs.c.id == events.c.job_id, *open_job),
        "a replay has yet to reach it": exists().where(
            replays.c.state == "pending",
            replays.c.after_seq < events.c.seq,
            replays.c.until_seq >= events.c.seq,
        ),
    }


async def delete_events(connection: SqlConnection, seqs: Collection[int]) -> None:
    """Delete events with their receipts, deliveries, records of files, and attempts."""
    for statement in _DELETE:
        await connection.execute(statement, _list(seqs))


async def find_events(connection: SqlConnection, key: str) -> Sequence[FoundEvent]:
    """Return the events with an id or `request_id`; a `request_id` may have one event in each source."""
    ids = (await find_event_ids(connection, [key]))[key]
    columns = (events.c.seq, events.c.id, events.c.request_id)
    rows = (await connection.execute(select(*columns).where(events.c.id.in_(ids)))).all()
    if not rows:
        seqs = await unrecognized.find_seqs(connection, key)
        rows = (await connection.execute(select(*columns).where(events.c.seq.in_(seqs)))).all()
    return [FoundEvent(*row) for row in rows]


async def erase_events(connection: SqlConnection, seqs: Collection[int]) -> None:
    """Erase events, except the body's hash (for late webhooks) and the records of files yet to be deleted."""
    for statement in _ERASE:
        await connection.execute(statement, _list(seqs))


async def erase_jobs(connection: SqlConnection, seqs: Collection[int]) -> None:
    """Delete the texts of the caller and of Clipia from the jobs of events; the jobs have ended."""
    of_events = select(events.c.source, events.c.request_id).where(_among(events.c.seq))
    statement = (
        update(jobs)
        .where(tuple_(jobs.c.source, jobs.c.request_id).in_(of_events))
        # Clipia's messages may quote the input.
        .values(request=NO_INPUT, metadata={}, error=None, warnings=None)
        .returning(jobs.c.id)
    )
    ids = (await connection.execute(statement, _list(seqs))).scalars().all()
    texts = update(attempts).where(among(attempts.c.work_id, "ids"), attempts.c.outcome != "resubmitted")
    await connection.execute(texts.values(error=None), {"ids": ids})


async def list_files(connection: SqlConnection, seqs: Collection[int]) -> Sequence[StoredFile]:
    """Return the files of events that may have an object in a storage."""
    rows = await connection.execute(_FILES, _list(seqs))
    return [StoredFile(*row) for row in rows]


async def delete_records(connection: SqlConnection, seqs: Collection[int]) -> None:
    """Delete the records of events' files."""
    await connection.execute(delete(media).where(_among(media.c.event_seq)), _list(seqs))


async def last_job(connection: SqlConnection) -> int:
    """Return the highest `seq` of a job."""
    return await connection.scalar(select(func.max(jobs.c.seq))) or 0


async def find_inputs(
    connection: SqlConnection, *, after: int, until: int, before: datetime, limit: int
) -> Sequence[int]:
    """Return the `seq` of the next jobs that have an input and ended before a time."""
    statement = (
        select(jobs.c.seq)
        .where(jobs.c.seq > after, jobs.c.seq <= until, *_has_old_input(before))
        .order_by(jobs.c.seq)
        .limit(limit)
    )
    return (await connection.execute(statement)).scalars().all()


async def delete_inputs(connection: SqlConnection, seqs: Collection[int], *, before: datetime) -> None:
    """Delete the inputs of jobs, except those that were submitted again since the query."""
    statement = update(jobs).where(among(jobs.c.seq, "seqs"), *_has_old_input(before))
    await connection.execute(statement.values(request=NO_INPUT), {"seqs": seqs})


def _has_old_input(before: datetime) -> tuple[ColumnElement[bool], ...]:
    ended_at = func.coalesce(jobs.c.finished_at, jobs.c.updated_at)
    return jobs.c.state.in_(_ENDED), ended_at < before, jobs.c.request != NO_INPUT


def _among(column: Column[Any]) -> ColumnElement[bool]:
    """Return the condition that a `seq` is in a list.

    The range is redundant. Without it, PostgreSQL's planner may estimate that the list costs more than a
    sequential scan.
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
# The key of an object is kept until the object is deleted, so that a run after a crash can delete it.
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
