"""SQL for deliveries to a destination that was removed from the settings: find, give up, move, discard."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    FromClause,
    Row,
    Select,
    and_,
    case,
    exists,
    func,
    not_,
    or_,
    select,
    update,
)

from receiver.db.array_parameters import among
from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.leases import ENDED, RESTARTED, is_unclaimed
from receiver.db.outbox import record_change
from receiver.db.statements import count_rows
from receiver.db.tables import deliveries, in_state, is_live, is_replayed, replays

NOT_CONFIGURED: Final = "destination not configured"

_CHOSEN: Final = among(deliveries.c.id, "ids")
_HALVES: Final = (is_live, is_replayed)
"""Live and replayed deliveries, which have their own partial indexes."""

_SERVES: Final = ("pending", "delivered")
"""If a delivery is in one of these states, the event needs no other one to the same destination."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """How many deliveries were moved and discarded."""

    moved: int = 0
    discarded: int = 0

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(moved=self.moved + other.moved, discarded=self.discarded + other.discarded)


async def find_destinations(connection: SqlConnection) -> set[str]:
    """Return the destinations of pending deliveries, with one index lookup for each destination."""
    found: set[str] = set()
    for half in _HALVES:
        last = ""
        while True:
            first = select(func.min(deliveries.c.destination)).where(
                in_state(deliveries, "pending"), half, deliveries.c.destination > last
            )
            name = (await connection.execute(first)).scalar_one()
            if name is None:
                break
            found.add(name)
            last = name
    return found


async def count_waiting(connection: SqlConnection, destination: str) -> int:
    """Count the pending deliveries to a destination."""
    mine = deliveries.c.destination == destination
    return await count_rows(connection, deliveries, mine, in_state(deliveries, "pending"))


async def count_free(
    connection: SqlConnection, destination: str, *, dead: bool, had_by: str | None = None
) -> int:
    """Count the deliveries that `move` and `discard` would change.

    With `had_by`, count only events that already have a pending or successful delivery to that destination.
    """
    statement = _free(destination, dead=dead)
    if had_by is not None:
        twin, is_twin = _twin(had_by)
        statement = statement.where(exists().where(is_twin, twin.c.state.in_(_SERVES)))
    return await count_rows(connection, statement.subquery())


async def count_under_way(connection: SqlConnection, destination: str) -> tuple[int, float]:
    """Count the deliveries that workers have claimed; return also the seconds until the last lease ends.

    The leases of a killed worker last until then.
    """
    statement = select(func.count(), seconds_since(func.max(deliveries.c.next_attempt_at))).where(
        deliveries.c.destination == destination,
        in_state(deliveries, "pending"),
        not_(is_unclaimed(deliveries)),
    )
    row = (await connection.execute(statement)).one()
    return row[0], -(row[1] or 0.0)


async def mark_missing(connection: SqlConnection, destination: str, *, limit: int) -> int:
    """Record that the destination of up to `limit` deliveries is missing, and since when; return how many.

    Their age does not count, because the removed destination may have had more time. A delivery that waits
    for media is left out; its time starts when the media is stored.
    """
    unnoticed = _free(destination, dead=False).where(
        deliveries.c.error.is_distinct_from(NOT_CONFIGURED), deliveries.c.next_attempt_at.is_not(None)
    )
    return await _change(connection, unnoticed, limit=limit, error=NOT_CONFIGURED, restarted_at=db_time(0.0))


async def clear_missing(connection: SqlConnection, destination: str, *, limit: int) -> int:
    """Undo `mark_missing` for up to `limit` deliveries of a destination that is back; return how many."""
    noticed = select(deliveries.c.id).where(
        deliveries.c.destination == destination,
        in_state(deliveries, "pending"),
        deliveries.c.error == NOT_CONFIGURED,
    )
    return await _change(connection, noticed, limit=limit, error=None)


async def give_up(connection: SqlConnection, destination: str, *, age: float, limit: int) -> int:
    """Make dead letters of up to `limit` deliveries that were marked `age` seconds ago; return how many."""
    late = _free(destination, dead=False).where(
        deliveries.c.error == NOT_CONFIGURED,
        deliveries.c.restarted_at <= db_time(-age),
        deliveries.c.next_attempt_at.is_not(None),
    )
    ids = await _lock(connection, late, limit=limit)
    await _end(connection, ids, state="dead", error=NOT_CONFIGURED)
    return len(ids)


async def discard(connection: SqlConnection, destination: str, *, dead: bool, by: str, limit: int) -> Taken:
    """Cancel up to `limit` deliveries, and with `dead` also dead letters."""
    ids = await _lock(connection, _free(destination, dead=dead), limit=limit)
    await _end(connection, ids, state="canceled", error=f"discarded by {by}")
    return Taken(discarded=len(ids))


async def move(
    connection: SqlConnection, destination: str, *, to: str, waits: bool, dead: bool, by: str, limit: int
) -> Taken:
    """Move up to `limit` deliveries to another destination; they get its full attempts and time.

    If `to` has a pending or successful delivery of the event, this one is discarded instead. Live deliveries
    and those of each replay are separate. `waits` tells whether `to` waits for media. Raises
    IntegrityError if a replay adds a delivery of the event at the same time.
    """
    ids = await _lock(connection, _free(destination, dead=dead), limit=limit)
    twins = await _lock_twins(connection, ids, to=to)
    served = [row.id for row in twins if row.state in _SERVES]
    await _end(connection, served, state="canceled", error=f"{to} has this event already; moved by {by}")
    moved = list(set(ids) - set(served))
    # An event has one delivery to a destination, and `outbox.release_held` finds it by the destination. So
    # the twin that failed is renamed, the moved delivery takes its place, and the twin takes the old place.
    ended = [row.twin_id for row in twins if row.state not in _SERVES]
    await _update(connection, ended, destination="")
    held = and_(in_state(deliveries, "pending"), deliveries.c.next_attempt_at.is_(None))
    due = db_time(0.0)
    values = {
        **RESTARTED,
        "destination": to,
        "next_attempt_at": case((held, None), else_=due) if waits else due,
    }
    await _update(connection, moved, **values)
    await record_change(connection, moved, outcome="restarted", error=f"moved from {destination} by {by}")
    await _update(connection, ended, destination=destination)
    replaced = f"the delivery from {destination} took its place; moved by {by}"
    await _end(connection, ended, state="canceled", error=replaced)
    return Taken(moved=len(moved), discarded=len(served))


async def _lock_twins(
    connection: SqlConnection, ids: Collection[UUID], *, to: str
) -> Sequence[Row[Any, Any, Any]]:
    """Lock the deliveries of the same events to `to`, because `deliveries retry` may restart a dead one."""
    twin, is_twin = _twin(to)
    pairs = (
        select(deliveries.c.id, twin.c.id.label("twin_id"), twin.c.state)
        .where(_CHOSEN, is_twin)
        .order_by(twin.c.id)
        .with_for_update(of=twin)
    )
    return (await connection.execute(pairs, {"ids": ids})).all()


async def redirect_replays(connection: SqlConnection, destination: str, *, to: str | None) -> int:
    """Replace a destination in unfinished replays by `to`, or remove it; return how many replays.

    A replay without a destination is canceled.
    """
    rows = await connection.execute(
        select(replays.c.id, replays.c.destinations).where(in_state(replays, "pending")).with_for_update()
    )
    changed = [row for row in rows if destination in row.destinations]
    for row in changed:
        names = (to if name == destination else name for name in row.destinations)
        left = list(dict.fromkeys(name for name in names if name is not None))
        values = {"destinations": left} if left else {"state": "canceled", **ENDED}
        # Without the lease a step that is under way cannot record its result for the old list.
        await connection.execute(
            update(replays).where(replays.c.id == row.id).values({"lease": None, **values})
        )
    return len(changed)


def _free(destination: str, *, dead: bool) -> Select[Any]:
    """Select deliveries that no worker has claimed."""
    is_free: ColumnElement[bool] = and_(in_state(deliveries, "pending"), is_unclaimed(deliveries))
    if dead:
        is_free = or_(is_free, in_state(deliveries, "dead"))
    return select(deliveries.c.id).where(deliveries.c.destination == destination, is_free)


async def _lock(connection: SqlConnection, which: Select[Any], *, limit: int) -> Sequence[UUID]:
    statement = which.order_by(deliveries.c.id).limit(limit).with_for_update(skip_locked=True)
    ids: Sequence[UUID] = (await connection.execute(statement)).scalars().all()
    return ids


async def _change(connection: SqlConnection, which: Select[Any], *, limit: int, **values: Any) -> int:
    ids = await _lock(connection, which, limit=limit)
    await _update(connection, ids, **values)
    return len(ids)


async def _update(connection: SqlConnection, ids: Collection[UUID], **values: Any) -> None:
    await connection.execute(update(deliveries).where(_CHOSEN).values(values), {"ids": ids})


def _twin(to: str) -> tuple[FromClause, ColumnElement[bool]]:
    """Return an alias of deliveries, and the condition that a row is to `to` and of the same event."""
    twin = deliveries.alias()
    same_replay = or_(twin.c.replay_id == deliveries.c.replay_id, and_(twin.c.replay_id.is_(None), is_live))
    is_twin = and_(twin.c.event_seq == deliveries.c.event_seq, twin.c.destination == to, same_replay)
    return twin, is_twin


async def _end(connection: SqlConnection, ids: Collection[UUID], *, state: str, error: str) -> None:
    await _update(connection, ids, state=state, error=error, **ENDED)
    await record_change(connection, ids, outcome="failed", error=error)
