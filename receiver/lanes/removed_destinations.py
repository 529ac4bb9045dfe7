"""Deliveries to a destination that was removed or renamed: reported at start, given up after three days.

They have no lane, so without this they would wait forever, and retention would keep their events. The three
days begin when a worker first misses the destination, so that the operator has time to move the deliveries.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final

import structlog

from receiver.background import running
from receiver.core.lane_names import destination_lane
from receiver.core.retry import GIVE_UP_SECONDS
from receiver.db import removed_destinations, workers
from receiver.db.database import Database
from receiver.lanes.attempts import logged_failures
from receiver.metrics import DELIVERIES

CHECK_SECONDS: Final = 30.0
"""Pause between two checks."""
BATCH: Final = 1000
"""Deliveries that one transaction changes."""
FATE: Final = "each becomes a dead letter three days after a worker first missed the destination"
"""The end of a delivery that the operator neither moves nor discards, for messages."""

log = structlog.get_logger()


def giving_up(database: Database, configured: Collection[str]) -> AbstractAsyncContextManager[None]:
    """Check inside the block for deliveries to destinations that are not `configured`; it may change."""
    return running(_check_regularly(database, configured), name="removed destinations")


async def _check_regularly(database: Database, configured: Collection[str]) -> None:
    seen: set[str] = set()
    known: set[str] = set()
    while True:
        if known != set(configured):
            # A destination that is back after a reload is looked at again, and so is one that is gone.
            known = set(configured)
            seen.clear()
        with logged_failures("deliveries without a destination not checked"):
            await check(database, configured, seen=seen)
        await asyncio.sleep(CHECK_SECONDS)


async def check(database: Database, configured: Collection[str], *, seen: set[str]) -> None:
    """Warn of deliveries to missing destinations, and give up those that have waited too long.

    `seen` has the destinations that were reported before, and is updated.
    """
    async with database.read() as connection:
        names = await removed_destinations.find_destinations(connection)
        missing = names - set(configured)
        waiting = {
            name: await removed_destinations.count_waiting(connection, name)
            for name in sorted(missing - seen)
        }
        served = {
            lane for each in await workers.find_runs(connection) if each.is_running for lane in each.lanes
        }
    for name, count in waiting.items():
        message = "deliveries wait for a destination that is not configured"
        advice = f"run `receiver deliveries move` or `discard`; otherwise {FATE}"
        log.warning(message, destination=name, count=count, help=advice)
    for name in sorted(names - missing - seen):
        await _change_all(database, partial(removed_destinations.clear_missing, destination=name))
    seen |= names
    # If another process has such a lane, it has newer settings and delivers them.
    for name in sorted(name for name in missing if destination_lane(name) not in served):
        await _give_up(database, name)


async def _give_up(database: Database, name: str) -> None:
    await _change_all(database, partial(removed_destinations.mark_missing, destination=name))
    count = await _change_all(
        database, partial(removed_destinations.give_up, destination=name, age=GIVE_UP_SECONDS)
    )
    if count:
        DELIVERIES.labels(name, "dead").inc(count)
        log.error("dead letters", destination=name, count=count, error=removed_destinations.NOT_CONFIGURED)


async def _change_all(database: Database, change: Callable[..., Awaitable[int]]) -> int:
    """Make a change in batches; return the number of deliveries that it changed."""
    total, count = 0, BATCH
    while count == BATCH:
        async with database.write() as connection:
            count = await change(connection, limit=BATCH)
        total += count
    return total
