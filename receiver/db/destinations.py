"""SQL for the state of destinations that all processes share: pauses, and open circuits."""

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import delete, select, update

from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.operation_tables import circuits, destinations
from receiver.db.statements import insert_for

FRESH_SECONDS: Final = 30.0
"""A circuit counts as open for this time after its process has reported it."""

_PAUSES: Final = select(destinations, seconds_since(destinations.c.resumed_at).label("resumed"))
_CIRCUITS: Final = (
    select(*(circuits.c[name] for name in ("destination", "process", "owner", "open_since", "error")))
    .where(circuits.c.reported_at > db_time(-FRESH_SECONDS))
    .order_by(circuits.c.open_since, circuits.c.destination)
)


@dataclass(frozen=True, kw_only=True)
class Pause:
    """The pause of a destination: its time, author and reason."""

    at: datetime
    by: str
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class PauseState:
    """The pauses of a destination."""

    pause: Pause | None
    """None if it was resumed."""
    resumed: float | None
    """Seconds since the last pause ended; None if none has."""


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """A circuit that a process has opened."""

    destination: str
    process: uuid.UUID
    owner: str
    """Host and process id, for people."""
    open_since: datetime
    error: str | None
    """The last error of the destination, in the receiver's words."""


async def read_pauses(connection: SqlConnection) -> dict[str, PauseState]:
    """Return the destinations that are paused or were paused, by name."""
    return {
        row.name: PauseState(
            pause=row.paused_at and Pause(at=row.paused_at, by=row.paused_by, reason=row.pause_reason),
            resumed=row.resumed,
        )
        for row in await connection.execute(_PAUSES)
    }


async def read_circuits(connection: SqlConnection) -> list[Circuit]:
    """Return the circuits that are open, the oldest first."""
    return [Circuit(**row) for row in (await connection.execute(_CIRCUITS)).mappings()]


async def pause(connection: SqlConnection, name: str, *, by: str, reason: str | None) -> None:
    """Pause a destination; if it is paused, its time, author and reason stay."""
    new = insert_for(connection.dialect.name, destinations).values(
        name=name, paused_at=db_time(0.0), paused_by=by, pause_reason=reason
    )
    columns = ("paused_at", "paused_by", "pause_reason")
    statement = new.on_conflict_do_update(
        index_elements=["name"],
        set_={column: new.excluded[column] for column in columns},
        where=destinations.c.paused_at.is_(None),
    )
    await connection.execute(statement)


async def resume(connection: SqlConnection, name: str) -> bool:
    """End the pause of a destination; False if it is not paused."""
    statement = (
        update(destinations)
        .where(destinations.c.name == name, destinations.c.paused_at.is_not(None))
        .values(paused_at=None, paused_by=None, pause_reason=None, resumed_at=db_time(0.0))
    )
    return (await connection.execute(statement)).rowcount == 1


async def report(connection: SqlConnection, opened: Sequence[Circuit]) -> None:
    """Record the open circuits of a process, or renew them; their times are the process's."""
    for each in opened:
        new = insert_for(connection.dialect.name, circuits).values(**vars(each), reported_at=db_time(0.0))
        columns = ("open_since", "error", "reported_at")
        statement = new.on_conflict_do_update(
            index_elements=["destination", "process"],
            set_={column: new.excluded[column] for column in columns},
        )
        await connection.execute(statement)


async def withdraw(connection: SqlConnection, process: uuid.UUID, names: Collection[str]) -> None:
    """Record that a process has closed its circuits to destinations; forget those of dead processes."""
    mine = (circuits.c.process == process) & circuits.c.destination.in_(names)
    await connection.execute(
        delete(circuits).where(mine | (circuits.c.reported_at < db_time(-FRESH_SECONDS)))
    )
