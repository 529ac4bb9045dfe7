"""SQL of deliveries to a destination that is not configured any more: found, given up, moved or discarded."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import ColumnElement, FromClause, Select, and_, case, exists, func, not_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.arrays import among
from receiver.db.clock import db_time, seconds_since, statement_time
from receiver.db.outbox import note
from receiver.db.tables import deliveries, in_state, is_live, is_replayed, replays

NOT_CONFIGURED: Final = "destination not configured"

_HALVES: Final = (is_live, is_replayed)
"""Live and replayed deliveries have an index each."""

_SERVES: Final = ("pending", "delivered")
"""States of a delivery that needs no other one beside it."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What became of deliveries to a destination."""

    moved: int = 0
    discarded: int = 0

    def __add__(self, other: "Taken") -> "Taken":
        return Taken(moved=self.moved + other.moved, discarded=self.discarded + other.discarded)


async def find_destinations(connection: AsyncConnection) -> set[str]:
    """Return the destinations that deliveries wait for; the cost does not grow with how many wait."""
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


async def count_waiting(connection: AsyncConnection, destination: str) -> int:
    """Return how many deliveries wait for a destination."""
    statement = select(func.count()).where(
        deliveries.c.destination == destination, in_state(deliveries, "pending")
    )
    return int((await connection.execute(statement)).scalar_one())


async def count_free(
    connection: AsyncConnection, destination: str, *, dead: bool, had_by: str | None = None
) -> int:
    """Return how many deliveries `move` and `discard` would take.

    With `had_by`, only those of events that this other destination has got already, or is still tried with.
    """
    statement = _free(destination, dead=dead)
    if had_by is not None:
        twin, is_twin = _twin(had_by)
        statement = statement.where(exists().where(is_twin, twin.c.state.in_(_SERVES)))
    counted = select(func.count()).select_from(statement.subquery())
    return int((await connection.execute(counted)).scalar_one())


async def count_under_way(connection: AsyncConnection, destination: str) -> tuple[int, float]:
    """Return how many deliveries workers have claimed, and the seconds until the last claim ends.

    A worker that was killed has its claims until then.
    """
    statement = select(func.count(), seconds_since(func.max(deliveries.c.next_attempt_at))).where(
        deliveries.c.destination == destination, in_state(deliveries, "pending"), not_(_is_unclaimed())
    )
    row = (await connection.execute(statement)).one()
    return row[0], -(row[1] or 0.0)


async def mark_missing(connection: AsyncConnection, destination: str, *, limit: int) -> int:
    """Begin the time of up to `limit` deliveries whose destination was not missed before; return how many.

    It is a time of its own: they may be older than it, because their destination's own time was longer. What
    waits for its media is left: its time begins after that.
    """
    unnoticed = _free(destination, dead=False).where(
        deliveries.c.error.is_distinct_from(NOT_CONFIGURED), deliveries.c.next_attempt_at.is_not(None)
    )
    return await _change(connection, unnoticed, limit=limit, error=NOT_CONFIGURED, restarted_at=db_time(0.0))


async def clear_missing(connection: AsyncConnection, destination: str, *, limit: int) -> int:
    """Undo `miss` for up to `limit` deliveries, because the destination is back; return how many."""
    noticed = select(deliveries.c.id).where(
        deliveries.c.destination == destination,
        in_state(deliveries, "pending"),
        deliveries.c.error == NOT_CONFIGURED,
    )
    return await _change(connection, noticed, limit=limit, error=None)


async def give_up(connection: AsyncConnection, destination: str, *, age: float, limit: int) -> int:
    """End up to `limit` deliveries that were missed `age` seconds ago as dead letters; return how many."""
    late = _free(destination, dead=False).where(
        deliveries.c.error == NOT_CONFIGURED,
        deliveries.c.restarted_at <= db_time(-age),
        deliveries.c.next_attempt_at.is_not(None),
    )
    ids = await _lock(connection, late, limit=limit)
    await _end(connection, ids, state="dead", error=NOT_CONFIGURED)
    return len(ids)


async def discard(connection: AsyncConnection, destination: str, *, dead: bool, by: str, limit: int) -> Taken:
    """End up to `limit` deliveries as canceled; with `dead` dead letters, too."""
    ids = await _lock(connection, _free(destination, dead=dead), limit=limit)
    await _end(connection, ids, state="canceled", error=f"discarded by {by}")
    return Taken(discarded=len(ids))


async def move(
    connection: AsyncConnection, destination: str, *, to: str, waits: bool, dead: bool, by: str, limit: int
) -> Taken:
    """Give up to `limit` deliveries to another destination, which has all the time for them that it gives.

    Those of events that it has got already, or is still tried with, are discarded; live deliveries and those
    of each replay are apart. `waits` is whether it waits for media. Raises IntegrityError if a replay has
    given it one meanwhile.
    """
    ids = await _lock(connection, _free(destination, dead=dead), limit=limit)
    twin, is_twin = _twin(to)
    # Locked, because `deliveries retry` may take up a dead one at this moment.
    pairs = (
        select(deliveries.c.id, twin.c.id.label("twin_id"), twin.c.state)
        .where(_chosen(), is_twin)
        .order_by(twin.c.id)
        .with_for_update(of=twin)
    )
    twins = (await connection.execute(pairs, {"ids": ids})).all()
    served = [row.id for row in twins if row.state in _SERVES]
    await _end(connection, served, state="canceled", error=f"{to} has this event already; moved by {by}")
    moved = list(set(ids) - set(served))
    # An event has one delivery to a destination. The one that sent nothing changes places with the moved one,
    # which is the one that `outbox.release_held` finds if it is held.
    ended = [row.twin_id for row in twins if row.state not in _SERVES]
    await connection.execute(update(deliveries).where(_chosen()).values(destination=""), {"ids": ended})
    held = and_(in_state(deliveries, "pending"), deliveries.c.next_attempt_at.is_(None))
    due = db_time(0.0)
    await connection.execute(
        update(deliveries)
        .where(_chosen())
        .values(
            destination=to,
            state="pending",
            attempts=0,
            lost=0,
            lease=None,
            error=None,
            finished_at=None,
            next_attempt_at=case((held, None), else_=due) if waits else due,
            restarted_at=due,
        ),
        {"ids": moved},
    )
    await note(connection, moved, outcome="restarted", error=f"moved from {destination} by {by}")
    await connection.execute(
        update(deliveries).where(_chosen()).values(destination=destination), {"ids": ended}
    )
    replaced = f"the delivery from {destination} took its place; moved by {by}"
    await _end(connection, ended, state="canceled", error=replaced)
    return Taken(moved=len(moved), discarded=len(served))


async def redirect_replays(connection: AsyncConnection, destination: str, *, to: str | None) -> int:
    """Let replays that are not through send to `to` in place of a destination, or nothing; return how many.

    One that has no destination left is canceled.
    """
    rows = await connection.execute(
        select(replays.c.id, replays.c.destinations).where(in_state(replays, "pending")).with_for_update()
    )
    changed = [row for row in rows if destination in row.destinations]
    for row in changed:
        names = (to if name == destination else name for name in row.destinations)
        left = list(dict.fromkeys(name for name in names if name is not None))
        ended: dict[str, Any] = {"state": "canceled", "next_attempt_at": None, "finished_at": db_time(0.0)}
        values = {"destinations": left} if left else ended
        # Without its lease a step that is under way cannot record what it has done for the old list.
        await connection.execute(update(replays).where(replays.c.id == row.id).values(lease=None, **values))
    return len(changed)


def _free(destination: str, *, dead: bool) -> Select[Any]:
    """Select deliveries that no worker is at work on."""
    is_free: ColumnElement[bool] = and_(in_state(deliveries, "pending"), _is_unclaimed())
    if dead:
        is_free = or_(is_free, in_state(deliveries, "dead"))
    return select(deliveries.c.id).where(deliveries.c.destination == destination, is_free)


def _is_unclaimed() -> ColumnElement[bool]:
    return or_(deliveries.c.lease.is_(None), deliveries.c.next_attempt_at <= statement_time())


async def _lock(connection: AsyncConnection, which: Select[Any], *, limit: int) -> Sequence[UUID]:
    statement = which.order_by(deliveries.c.id).limit(limit).with_for_update(skip_locked=True)
    ids: Sequence[UUID] = (await connection.execute(statement)).scalars().all()
    return ids


async def _change(connection: AsyncConnection, which: Select[Any], *, limit: int, **values: Any) -> int:
    ids = await _lock(connection, which, limit=limit)
    await connection.execute(update(deliveries).where(_chosen()).values(values), {"ids": ids})
    return len(ids)


def _chosen() -> ColumnElement[bool]:
    return among(deliveries.c.id, "ids")


def _twin(to: str) -> tuple[FromClause, ColumnElement[bool]]:
    """Return deliveries once more, and the condition that one is to `to` and of the same event."""
    twin = deliveries.alias()
    same_replay = or_(twin.c.replay_id == deliveries.c.replay_id, and_(twin.c.replay_id.is_(None), is_live))
    is_twin = and_(twin.c.event_seq == deliveries.c.event_seq, twin.c.destination == to, same_replay)
    return twin, is_twin


async def _end(connection: AsyncConnection, ids: Collection[UUID], *, state: str, error: str) -> None:
    await connection.execute(
        update(deliveries)
        .where(_chosen())
        .values(state=state, error=error, lease=None, next_attempt_at=None, finished_at=db_time(0.0)),
        {"ids": ids},
    )
    await note(connection, ids, outcome="failed", error=error)
