"""Deliveries to a destination that was removed or renamed: told at start, and given up after three days.

No lane takes them, so without this they would wait for ever, and keep their events from being pruned. The
three days begin when a worker first misses the destination, so that there is time to move them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Final

import structlog

from receiver.background import running
from receiver.core.retry import GIVE_UP_SECONDS
from receiver.db import unserved, workers
from receiver.db.database import Database
from receiver.errors import DatabaseUnavailable
from receiver.lanes.base import describe, destination_lane
from receiver.metrics import DELIVERIES

LOOK: Final = 30.0
"""Seconds between two looks."""
BATCH: Final = 1000
"""Deliveries that one transaction changes at most."""
FATE: Final = "each is a dead letter three days after a worker first missed the destination"
"""How such a delivery ends unless a person moves or discards it, for messages."""

log = structlog.get_logger()


def giving_up(database: Database, configured: Collection[str]) -> AbstractAsyncContextManager[None]:
    """Look after such deliveries inside the block."""
    return running(_look_again_and_again(database, configured), name="unserved")


async def _look_again_and_again(database: Database, configured: Collection[str]) -> None:
    seen: set[str] = set()
    while True:
        try:
            await look(database, configured, seen=seen)
        except Exception as error:
            expected = isinstance(error, DatabaseUnavailable)
            log.warning(
                "deliveries without a destination not looked for",
                error=describe(error),
                exc_info=None if expected else error,
            )
        await asyncio.sleep(LOOK)


async def look(database: Database, configured: Collection[str], *, seen: set[str]) -> None:
    """Warn of destinations that deliveries wait for in vain, and give up what has waited too long.

    `seen` remembers the names that deliveries wait for, so that each is told once.
    """
    async with database.read() as connection:
        names = await unserved.find_destinations(connection)
        missing = names - set(configured)
        waiting = {name: await unserved.count_waiting(connection, name) for name in sorted(missing - seen)}
        lanes = {lane for each in await workers.seen(connection) if each.is_running for lane in each.lanes}
    for name, count in waiting.items():
        log.warning(
            "deliveries wait for a destination that is not configured",
            destination=name,
            count=count,
            help=f"receiver deliveries move or discard; else {FATE}",
        )
    for name in sorted(names - missing - seen):
        await _all(database, partial(unserved.clear_missing, destination=name))
    seen |= names
    # Another process may have newer settings, and deliver them.
    for name in sorted(name for name in missing if destination_lane(name) not in lanes):
        await _all(database, partial(unserved.mark_missing, destination=name))
        count = await _all(database, partial(unserved.give_up, destination=name, age=GIVE_UP_SECONDS))
        if count:
            DELIVERIES.labels(name, "dead").inc(count)
            log.error("dead letters", destination=name, count=count, error=unserved.NOT_CONFIGURED)


async def _all(database: Database, change: Callable[..., Awaitable[int]]) -> int:
    """Make a change, a batch at a time; return how many deliveries it changed."""
    total = 0
    while True:
        async with database.write() as connection:
            count = await change(connection, limit=BATCH)
        total += count
        if count < BATCH:
            return total
