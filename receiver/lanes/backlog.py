"""Numbers of unfinished and failed rows, for `/metrics`."""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import literal, select

from receiver.core.lane_names import FAN_OUT_LANE, MEDIA_LANE, POLL_LANE, SUBMIT_LANE, destination_lane
from receiver.db import destinations, leases, outbox, refused_jobs, retention_runs
from receiver.db.database import Database
from receiver.db.rows import Backlog
from receiver.db.tables import events, jobs, media
from receiver.destination_settings import DestinationSettings

_ROWS: Final = {
    FAN_OUT_LANE: (events.c.received_at, "received"),
    MEDIA_LANE: (media.c.created_at, "pending"),
    SUBMIT_LANE: (jobs.c.created_at, "pending"),
    POLL_LANE: (jobs.c.created_at, "submitted"),
}
"""The rows of each lane: the column with their time, and their state."""
_PING: Final = select(literal(1))


async def read_backlog(database: Database, configured: Sequence[DestinationSettings]) -> dict[str, Backlog]:
    """Return the unfinished rows of every lane. Raises DatabaseUnavailable."""
    async with database.read() as connection:
        by_destination = await outbox.delivery_backlog(connection)
        lanes = {lane: await leases.read_backlog(connection, *rows) for lane, rows in _ROWS.items()}
    empty = Backlog(rows=0, oldest=0.0)
    names = by_destination.keys() | {each.name for each in configured}
    return lanes | {destination_lane(name): by_destination.get(name, empty) for name in names}


async def count_dead_letters(database: Database, configured: Sequence[DestinationSettings]) -> dict[str, int]:
    """Return the number of dead letters by destination. Raises DatabaseUnavailable."""
    async with database.read() as connection:
        return {each.name: 0 for each in configured} | await outbox.count_dead(connection)


async def find_paused(database: Database) -> set[str]:
    """Return the names of the destinations that are paused. Raises DatabaseUnavailable."""
    async with database.read() as connection:
        found = await destinations.read_pauses(connection)
    return {name for name, state in found.items() if state.pause is not None}


async def count_refused_jobs(database: Database) -> int:
    """Return the number of jobs that Clipia refuses for now (402, 403). Raises DatabaseUnavailable."""
    async with database.read() as connection:
        return await refused_jobs.count(connection)


async def read_retention_age(database: Database) -> float:
    """Return the seconds since a run of retention succeeded. Raises DatabaseUnavailable."""
    async with database.read() as connection:
        return await retention_runs.success_age(connection)


async def ping(database: Database) -> None:
    """Read nothing. Raises DatabaseUnavailable."""
    async with database.read() as connection:
        await connection.execute(_PING)
