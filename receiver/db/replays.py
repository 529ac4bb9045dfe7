"""SQL for replays: orders to send stored events again."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, cast

from sqlalchemy import ColumnElement, and_, exists, func, or_, select, update

from receiver.db import leases, outbox
from receiver.db.array_parameters import among
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.rows import Claim, NewMedia, NewReplay, ReplayedEvent, ReplayOrder
from receiver.db.selection import Selection
from receiver.db.statements import count_rows, insert_unless_taken
from receiver.db.tables import deliveries, events, in_state, media, replays
from receiver.db.views import ReplayDetails, ReplayHead

PAGE: Final = 1000
SPAN: Final = 20_000
"""The most events that one statement reads: a long history takes more statements, not longer ones."""

# An event before its fan-out is forwarded anyway, and an unrecognized one has no message.
_ELIGIBLE = events.c.state.in_(("fetching", "ready"))


@dataclass(frozen=True, kw_only=True)
class Scope:
    """The events from one `seq` (exclusive) to another (inclusive)."""

    after_seq: int
    until_seq: int


async def insert_order(connection: SqlConnection, order: NewReplay, scope: Scope, *, matched: int) -> bool:
    """Insert a replay, due at once; False if (caller, idempotency_key) is taken."""
    values = leases.work_values() | asdict(order) | asdict(scope) | {"matched": matched}
    return await insert_unless_taken(connection, replays, values) is not None


async def find_scope(connection: SqlConnection, selection: Selection) -> Scope:
    """Return the range of the stored events that may match a selection."""
    if not selection.ids:
        last = await connection.scalar(select(func.max(events.c.seq)))
        return Scope(after_seq=0, until_seq=last or 0)
    seqs = [seq for found in (await selection.find_seqs(connection)).values() for seq in found]
    return Scope(after_seq=min(seqs, default=1) - 1, until_seq=max(seqs, default=0))


async def find_unknown(connection: SqlConnection, selection: Selection) -> list[str]:
    """Return the ids of a selection that have no event."""
    return [key for key, seqs in (await selection.find_seqs(connection)).items() if not seqs]


async def count(connection: SqlConnection, selection: Selection, scope: Scope) -> int:
    """Count the events of a replay."""
    total = 0
    conditions = await selection.conditions(connection)
    for start in range(scope.after_seq, scope.until_seq, SPAN):
        span = events.c.seq > start, events.c.seq <= min(start + SPAN, scope.until_seq)
        total += await count_rows(connection, events, _ELIGIBLE, *span, *conditions)
    return total


async def select_events(
    connection: SqlConnection,
    selection: Selection,
    scope: Scope,
    *,
    ordered_at: datetime | None = None,
    limit: int = PAGE,
) -> tuple[Sequence[ReplayedEvent], int]:
    """Return the next events of a selection by `seq`, and the `seq` up to which the table was read.

    Events with a fan-out after `ordered_at` are left out, because they were forwarded then.
    """
    until = min(scope.after_seq + SPAN, scope.until_seq)
    where: list[ColumnElement[bool]] = [
        _ELIGIBLE,
        events.c.seq > scope.after_seq,
        events.c.seq <= until,
        *await selection.conditions(connection),
    ]
    if ordered_at is not None:
        fanned_out_later = exists().where(
            deliveries.c.event_seq == events.c.seq,
            deliveries.c.replay_id.is_(None),
            deliveries.c.created_at > ordered_at,
        )
        where.append(~fanned_out_later)
    columns = [events.c[name] for name in ReplayedEvent.__dataclass_fields__]
    rows = await connection.execute(select(*columns).where(*where).order_by(events.c.seq).limit(limit))
    found = [ReplayedEvent(**row) for row in rows.mappings()]
    return found, found[-1].seq if len(found) == limit else until


async def claim(connection: SqlConnection, *, limit: int, lease: float) -> list[tuple[Claim, ReplayOrder]]:
    """Claim replays that are due for their next step."""
    claims = await leases.claim(connection, replays, limit=limit, lease=lease)
    columns = [replays.c[name] for name in ReplayOrder.__dataclass_fields__]
    statement = select(*columns).where(replays.c.id.in_([claim.id for claim in claims]))
    found = {row["id"]: ReplayOrder(**row) for row in (await connection.execute(statement)).mappings()}
    return [(claim, found[claim.id]) for claim in claims]


_OF_FILE: Final = ("size", "sha256", "content_type", "storage_key", "uri", "warning", "seen_sha256")


async def restart_media(
    connection: SqlConnection, media_ids: Collection[uuid.UUID], *, intact: Collection[uuid.UUID] = ()
) -> list[int]:
    """Make files pending again, and their events `fetching`; return the event's `seq` of each file.

    An `intact` file keeps its record until a download succeeds, and for good if none does.
    """
    seqs = await _restart_media(connection, media_ids, **dict.fromkeys(_OF_FILE))
    if intact:
        # If the server sends the stored body again, it is accepted in spite of a doubt.
        seqs += await _restart_media(connection, intact, seen_sha256=media.c.sha256)
    await connection.execute(
        update(events).where(events.c.seq.in_(set(seqs)), events.c.state == "ready").values(state="fetching")
    )
    return seqs


async def add_media(connection: SqlConnection, files: Sequence[tuple[int, NewMedia]]) -> list[int]:
    """Add files, each with its event's `seq`; return the `seq` of each that has to be downloaded."""
    if not files:
        return []
    # An event may have been erased since its files were listed.
    there = select(events.c.seq).where(events.c.seq.in_({seq for seq, _ in files}), _ELIGIBLE)
    found = await connection.execute(there.order_by(events.c.seq).with_for_update())
    seqs = set(found.scalars())
    added = [(seq, file) for seq, file in files if seq in seqs]
    await outbox.insert_media(connection, added)
    fetching = [seq for seq, file in added if file.skipped is None]
    await connection.execute(update(events).where(events.c.seq.in_(set(fetching))).values(state="fetching"))
    return fetching


async def change_urls(connection: SqlConnection, urls: Mapping[uuid.UUID, str]) -> None:
    """Change the URLs of files, by their ids."""
    for media_id, url in urls.items():
        await connection.execute(update(media).where(media.c.id == media_id).values(url=url))


async def _restart_media(
    connection: SqlConnection, media_ids: Collection[uuid.UUID], **values: Any
) -> list[int]:
    # An array is one parameter: 100 events may have more files than a statement may have parameters.
    restarted = await connection.execute(
        update(media)
        .where(among(media.c.id, "ids"), media.c.state != "pending")
        .values(**leases.RESTARTED, **values)
        .returning(media.c.event_seq),
        {"ids": media_ids},
    )
    return list(restarted.scalars())


async def advance(
    connection: SqlConnection, held: Claim, *, after_seq: int, handled: int, delay: float
) -> bool:
    """Record that a step has handled the events up to `after_seq`; False if the lease is lost."""
    return await leases.retry(
        connection,
        replays,
        held,
        delay=delay,
        error=None,
        attempts=0,
        after_seq=after_seq,
        handled=replays.c.handled + handled,
    )


async def add_counts(
    connection: SqlConnection, replay_id: uuid.UUID, *, ordered: int, downloads: int
) -> None:
    """Add the deliveries and downloads of a step to the counts of a replay."""
    await connection.execute(
        update(replays)
        .where(replays.c.id == replay_id)
        .values(ordered=replays.c.ordered + ordered, downloads=replays.c.downloads + downloads)
    )


async def count_waiting(
    connection: SqlConnection, replay_id: uuid.UUID, destinations: Collection[str]
) -> int:
    """Return the number of pending deliveries of a replay at its fastest destination."""
    counts = []
    for name in destinations:
        mine = and_(deliveries.c.replay_id == replay_id, deliveries.c.destination == name)
        pending = await count_rows(connection, deliveries, mine, in_state(deliveries, "pending"))
        # A destination without deliveries so far, because of its filter, does not count.
        if pending or (await connection.execute(select(exists().where(mine)))).scalar_one():
            counts.append(pending)
    return min(counts, default=0)


async def cancel(connection: SqlConnection, replay_id: uuid.UUID) -> bool:
    """Cancel a replay that is pending or has pending deliveries. Return False if it has ended."""
    waits = exists().where(deliveries.c.replay_id == replay_id, deliveries.c.state == "pending")
    unfinished = or_(replays.c.state == "pending", and_(replays.c.state == "completed", waits))
    stopped = await connection.execute(
        update(replays).where(replays.c.id == replay_id, unfinished).values(state="canceled", **leases.ENDED)
    )
    return bool(stopped.rowcount)


async def cancel_deliveries(connection: SqlConnection, replay_id: uuid.UUID, *, limit: int) -> int:
    """Cancel up to `limit` deliveries of a replay that no worker has claimed; return how many."""
    waits = select(deliveries.c.id).where(
        deliveries.c.replay_id == replay_id,
        deliveries.c.state == "pending",
        or_(deliveries.c.lease.is_(None), deliveries.c.next_attempt_at <= db_time(0.0)),
    )
    dropped = await connection.execute(
        update(deliveries)
        .where(deliveries.c.id.in_(waits.limit(limit).with_for_update(skip_locked=True)))
        .values(state="canceled", **leases.ENDED)
    )
    return dropped.rowcount


async def find_canceled(connection: SqlConnection, replay_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
    """Return those of the replays that are canceled."""
    if not replay_ids:
        return set()
    statement = select(replays.c.id).where(replays.c.id.in_(replay_ids), replays.c.state == "canceled")
    return set((await connection.execute(statement)).scalars())


async def show(connection: SqlConnection, replay_id: uuid.UUID) -> ReplayDetails | None:
    """Return a replay and the number of its deliveries in each state."""
    statement = select(replays).where(replays.c.id == replay_id)
    row = (await connection.execute(statement)).mappings().one_or_none()
    if row is None:
        return None
    states = (
        select(deliveries.c.destination, deliveries.c.state, func.count())
        .where(deliveries.c.replay_id == replay_id)
        .group_by(deliveries.c.destination, deliveries.c.state)
    )
    counts: dict[str, dict[str, int]] = {}
    for destination, state, number in await connection.execute(states):
        counts.setdefault(destination, {})[state] = number
    return cast("ReplayDetails", {name: row[name] for name in _SHOWN} | {"deliveries": counts})


async def list_orders(connection: SqlConnection, *, limit: int, before: int | None) -> list[ReplayHead]:
    """Return replays, newest first; `before` is the `seq` of the last one of the previous page."""
    statement = select(*(replays.c[name] for name in _SHOWN)).order_by(replays.c.seq.desc()).limit(limit)
    if before is not None:
        statement = statement.where(replays.c.seq < before)
    rows = [dict(row) for row in (await connection.execute(statement)).mappings()]
    return cast("list[ReplayHead]", rows)


_SHOWN: Final = tuple(ReplayHead.__annotations__)
