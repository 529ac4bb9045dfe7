"""Deliveries to a destination that was removed or renamed: told at start, and given up after three days.

No lane takes them, so without this they would wait for ever, and keep their events from being pruned.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Final

import structlog

from receiver.db import unserved, workers
from receiver.db.engine import Database
from receiver.errors import DatabaseUnavailable
from receiver.lanes import describe, destination_lane
from receiver.observability import DELIVERIES
from receiver.retry import GIVE_UP_AFTER

LOOK: Final = 30.0
"""Seconds between two looks."""
BATCH: Final = 1000
"""Deliveries that one transaction gives up at most."""

log = structlog.get_logger()


@asynccontextmanager
async def giving_up(database: Database, configured: Collection[str]) -> AsyncIterator[None]:
    """Look after such deliveries inside the block."""
    task = asyncio.create_task(_look_again_and_again(database, configured), name="unserved")
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _look_again_and_again(database: Database, configured: Collection[str]) -> None:
    warned: set[str] = set()
    while True:
        try:
            await look(database, configured, warned=warned)
        except Exception as error:
            expected = isinstance(error, DatabaseUnavailable)
            log.warning(
                "deliveries without a destination not looked for",
                error=describe(error),
                exc_info=None if expected else error,
            )
        await asyncio.sleep(LOOK)


async def look(database: Database, configured: Collection[str], *, warned: set[str]) -> None:
    """Warn of destinations that deliveries wait for in vain, once for each, and give up what is too old."""
    async with database.read() as connection:
        names = await unserved.find_destinations(connection) - set(configured)
        new = sorted(names - warned)
        waiting = {name: await unserved.count(connection, name, dead=False) for name in new}
        lanes = {lane for each in await workers.seen(connection) if each.is_running for lane in each.lanes}
    for name, counts in waiting.items():
        log.warning(
            "deliveries wait for a destination that is not configured",
            destination=name,
            count=counts.get("pending", 0),
            help="receiver deliveries move or discard; else each is a dead letter after three days",
        )
    warned |= names
    # Another process may have newer settings, and deliver them.
    for name in sorted(name for name in names if destination_lane(name) not in lanes):
        await _give_up(database, name)


async def _give_up(database: Database, name: str) -> None:
    while True:
        async with database.write() as connection:
            count = await unserved.give_up(connection, name, age=GIVE_UP_AFTER, limit=BATCH)
        if count:
            DELIVERIES.labels(name, "dead").inc(count)
            log.error("dead letters", destination=name, count=count, error=unserved.NOT_CONFIGURED)
        if count < BATCH:
            return
