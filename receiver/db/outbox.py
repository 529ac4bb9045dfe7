"""SQL for the work that an event causes: its files and its deliveries."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Insert,
    case,
    exists,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)

from receiver.db.array_parameters import DIALECTS, Rows, among
from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.leases import ENDED, RESTARTED, record_attempts, work_values
from receiver.db.rows import Attempt, AttemptOutcome, Backlog, MediaRow, NewMedia, new_id
from receiver.db.statements import between, count_rows, equal, insert_for
from receiver.db.tables import deliveries, events, in_state, is_live, is_replayed, media

T = TypeVar("T")

ROWS_AT_ONCE: Final = 2000
"""The most files that one statement inserts: each statement has a time limit."""
EVENTS_AT_ONCE: Final = 32
"""The most events in one query for their files: each statement has a time limit."""


async def insert_media(connection: SqlConnection, files: Collection[tuple[int, NewMedia]]) -> None:
    """Add files, each with the `seq` of its event. They are due at once, or skipped."""
    wanted: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    for seq, file in files:
        row = {"id": new_id(), "event_seq": seq, **vars(file)}
        reason = row.pop("skipped")
        if reason is None:
            wanted.append(row)
        else:
            skipped.append(row | {"error": reason})
    for rows in _slices(wanted, ROWS_AT_ONCE):
        await connection.execute(insert(media).values(**_pending(due=True)), rows)
    for rows in _slices(skipped, ROWS_AT_ONCE):
        values = _pending(due=False) | {"state": "skipped", "finished_at": db_time(0.0)}
        await connection.execute(insert(media).values(**values), rows)


async def insert_deliveries(
    connection: SqlConnection,
    wanted: Collection[tuple[int, str]],
    *,
    due: bool,
    replay_id: UUID | None = None,
) -> int:
    """Add deliveries (event's `seq`, destination), due at once or held until the media is finished.

    A pair that already has a delivery, live or of the same replay, is skipped. Returns the number of new
    ones.
    """
    if not wanted:
        return 0
    rows = [
        {"id": new_id(), "event_seq": seq, "destination": name, "replay_id": replay_id}
        for seq, name in wanted
    ]
    dialect_name = connection.dialect.name
    parameters = _WANTED.parameters(dialect_name, rows)
    return (await connection.execute(_DELIVERIES[dialect_name, due], parameters)).rowcount


def _pending(*, due: bool) -> dict[str, Any]:
    values = work_values(due=due)
    # Each row has its own id.
    del values["id"]
    return values


_WANTED: Final = Rows(*(deliveries.c[name] for name in ("id", "event_seq", "destination", "replay_id")))


def _insert_wanted(dialect_name: str, *, due: bool) -> Insert:
    rest = {name: value for name, value in _pending(due=due).items() if value is not None}
    values = (literal(value) if isinstance(value, str) else value for value in rest.values())
    rows = _WANTED.select(dialect_name, *values)
    new = insert_for(dialect_name, deliveries)
    return new.from_select([*_WANTED.columns, *rest], rows).on_conflict_do_nothing()


# Built once: building a statement takes as long as running it.
_DELIVERIES: Final = {
    (name, due): _insert_wanted(name, due=due) for name in DIALECTS for due in (True, False)
}
_FILE: Final = [media.c[name] for name in MediaRow.__dataclass_fields__]
_FILES_BY_ID: Final = select(*_FILE).where(among(media.c.id, "ids"))
_FILES: Final = (
    select(media.c.event_seq, *_FILE)
    .where(among(media.c.event_seq, "seqs"), media.c.state != "superseded")
    .order_by(media.c.event_seq, media.c.position, media.c.variant.desc())
)

_WITH_FILES: Final = select(media.c.event_seq).where(among(media.c.event_seq, "seqs")).distinct()


async def load_media(
    connection: SqlConnection, event_seqs: Collection[int], *, at_once: int = EVENTS_AT_ONCE
) -> dict[int, list[MediaRow]]:
    """Return the files of events, by the event's `seq`, in their order; not those of superseded bodies."""
    found: dict[int, list[MediaRow]] = defaultdict(list)
    # Most claims have many events and few files: one short query finds the events that have any.
    with_files = (await connection.execute(_WITH_FILES, {"seqs": list(event_seqs)})).scalars()
    for seqs in _slices(sorted(with_files), at_once):
        for row in (await connection.execute(_FILES, {"seqs": seqs})).mappings():
            values = dict(row)
            found[values.pop("event_seq")].append(MediaRow(**values))
    return found


async def load_files(connection: SqlConnection, ids: Collection[UUID]) -> dict[UUID, MediaRow]:
    """Return files by their ids."""
    rows = (await connection.execute(_FILES_BY_ID, {"ids": list(ids)})).mappings()
    return {row["id"]: MediaRow(**row) for row in rows}


def _slices(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


async def release_held(connection: SqlConnection, event_seq: int) -> Sequence[str]:
    """If no file of the event is pending, make it `ready` and its held deliveries due.

    Returns the destinations of these deliveries. The row of the event is locked first: without the lock, the
    transactions of the last two files could each see the other file pending, and the deliveries would be held
    forever.
    """
    # FOR NO KEY UPDATE does not conflict with new rows that refer to the event.
    await connection.execute(
        select(events.c.seq).where(events.c.seq == event_seq).with_for_update(key_share=True)
    )
    pending = exists().where(media.c.event_seq == event_seq, media.c.state == "pending")
    if (await connection.execute(select(pending))).scalar_one():
        return ()
    await connection.execute(
        update(events).where(events.c.seq == event_seq, events.c.state == "fetching").values(state="ready")
    )
    rows = await connection.execute(
        update(deliveries)
        .where(
            deliveries.c.event_seq == event_seq,
            deliveries.c.state == "pending",
            deliveries.c.next_attempt_at.is_(None),
        )
        # Its age counts from now on: until now it waited for files, and not for its destination.
        .values(next_attempt_at=db_time(0.0), restarted_at=db_time(0.0))
        .returning(deliveries.c.destination)
    )
    return list(rows.scalars())


@dataclass(frozen=True, kw_only=True)
class DeadLetters:
    """A choice of dead letters; without values all of them."""

    ids: Collection[UUID] = ()
    destination: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    """They became dead at or after `since` and before `until`."""
    errors: Collection[str] | None = None
    """Those whose last error is one of these."""
    not_restarted_since: datetime | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        """Return the conditions on `deliveries`."""
        found = [in_state(deliveries, "dead"), *between(deliveries.c.finished_at, self.since, self.until)]
        found += equal(deliveries, {"destination": self.destination})
        if self.ids:
            found.append(deliveries.c.id.in_(self.ids))
        if self.errors is not None:
            found.append(deliveries.c.error.in_(self.errors))
        if self.not_restarted_since is not None:
            restarted = deliveries.c.restarted_at
            found.append(or_(restarted.is_(None), restarted < self.not_restarted_since))
        return found


async def restart(connection: SqlConnection, which: DeadLetters, *, by: str, limit: int) -> dict[str, int]:
    """Make up to `limit` dead letters pending again; return their number by destination.

    `by` is recorded among the attempts.
    """
    chosen = select(deliveries.c.id).where(*which.conditions()).order_by(deliveries.c.id).limit(limit)
    statement = (
        update(deliveries)
        .where(deliveries.c.id.in_(chosen), deliveries.c.state == "dead")
        .values(RESTARTED)
        .returning(deliveries.c.id, deliveries.c.destination)
    )
    rows = (await connection.execute(statement)).all()
    await record_change(connection, [row.id for row in rows], outcome="restarted", error=f"by {by}")
    return Counter(row.destination for row in rows)


async def give_up_media(connection: SqlConnection, event_seq: int, *, by: str) -> int:
    """End the pending downloads of an event as `gone` and release its held deliveries; return how many.

    A download that is under way loses its lease, so its result is dropped.
    """
    reason = f"given up by {by}"
    rows = await connection.execute(
        update(media)
        .where(media.c.event_seq == event_seq, media.c.state == "pending")
        .values(
            # A file that was to be downloaded again still has its stored object.
            state=case((media.c.storage_key.is_not(None), "stored"), else_="gone"),
            error=case((media.c.storage_key.is_(None), reason)),
            **ENDED,
        )
        .returning(media.c.id)
    )
    ids = list(rows.scalars())
    await record_change(connection, ids, outcome="failed", error=reason)
    await release_held(connection, event_seq)
    return len(ids)


async def count_pending_media(connection: SqlConnection, event_seq: int) -> int:
    """Count the files of an event that are still to be downloaded."""
    return await count_rows(connection, media, media.c.event_seq == event_seq, media.c.state == "pending")


async def record_change(
    connection: SqlConnection, work_ids: Collection[UUID], *, outcome: AttemptOutcome, error: str
) -> None:
    """Record among the attempts that rows were changed without an attempt, and why."""
    change = Attempt(number=0, started_at=datetime.now(UTC), duration_ms=0, outcome=outcome, error=error)
    await record_attempts(connection, [(work_id, change) for work_id in work_ids])


async def delivery_backlog(connection: SqlConnection) -> dict[str, Backlog]:
    """Return the backlog of each destination, including held deliveries."""
    # Two queries, because live and replayed deliveries have their own partial indexes.
    pending = union_all(
        *(
            select(deliveries.c.destination, deliveries.c.created_at).where(
                in_state(deliveries, "pending"), half
            )
            for half in (is_live, is_replayed)
        )
    ).subquery()
    statement = select(
        pending.c.destination, func.count(), seconds_since(func.min(pending.c.created_at))
    ).group_by(pending.c.destination)
    return {row[0]: Backlog(rows=row[1], oldest=row[2] or 0.0) for row in await connection.execute(statement)}


async def hold(connection: SqlConnection, event_seqs: Collection[int], destinations: Collection[str]) -> None:
    """Hold pending deliveries of events, unless a worker has claimed them, until the media is finished."""
    await connection.execute(
        update(deliveries)
        .where(
            deliveries.c.event_seq.in_(event_seqs),
            deliveries.c.destination.in_(destinations),
            deliveries.c.state == "pending",
            deliveries.c.lease.is_(None),
        )
        .values(next_attempt_at=None)
    )


async def count_dead(connection: SqlConnection) -> dict[str, int]:
    """Count the dead letters, by destination."""
    statement = (
        select(deliveries.c.destination, func.count())
        .where(in_state(deliveries, "dead"))
        .group_by(deliveries.c.destination)
    )
    return {row[0]: row[1] for row in await connection.execute(statement)}
