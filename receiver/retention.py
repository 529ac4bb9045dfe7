"""Retention: events that were settled long ago are deleted, with all that hangs on them.

A run goes through the events by `seq`, a batch at a time, and each batch is a short transaction: a run that
ends in the middle has deleted whole events, and the next one goes on where it has stopped.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from receiver.db import pruning
from receiver.db.engine import Database
from receiver.errors import Refused

SHORTEST: Final = timedelta(days=30)
"""Deduplication reaches as far back as events are kept: Clipia's tries and ours have to fit in."""
BATCH: Final = 500
"""Events that one transaction looks at."""
FILES: Final = 10_000
"""Files of old events that one transaction deletes at most, unless they are of one event.

Each statement has a time limit, and on SQLite every webhook waits for the transaction.
"""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """How far a run has come."""

    before: datetime
    """Events that were received before this moment are old, by the database's clock."""
    events: int = 0
    """Old ones that were deleted, or would be."""
    kept: int = 0
    """Old ones that are not: something is left to do for them, or somebody is at work on them."""


async def begin(database: Database, *, older_than: timedelta) -> Pruned:
    """Return the beginning of a run. Raises Refused for an age below SHORTEST, and DatabaseUnavailable."""
    if older_than < SHORTEST:
        raise Refused(
            f"events are kept for {SHORTEST.days} days at least: a webhook that comes again after its event "
            "was deleted is taken for a new one, and forwarded again",
            code="invalid_request",
            status=400,
        )
    async with database.read() as connection:
        return Pruned(before=await pruning.moment_ago(connection, seconds=older_than.total_seconds()))


async def prune(
    database: Database, done: Pruned, *, dead_letters: bool = False, dry_run: bool = False
) -> AsyncIterator[Pruned]:
    """Delete old events that nothing is left to do for; yield after each batch how far the run has come.

    An event with a dead letter is kept unless `dead_letters`. The run ends with the first batch that has no
    old event in it. Raises DatabaseUnavailable.
    """
    after = 0
    while True:
        began = time.monotonic()
        async with database.read() if dry_run else database.write() as connection:
            old, after = await pruning.find_old(
                connection, after=after, before=done.before, limit=BATCH, files=FILES
            )
            found = old if dry_run else await pruning.lock(connection, old, dead_letters=dead_letters)
            settled = await pruning.select_settled(connection, found, dead_letters=dead_letters)
            if not dry_run:
                await pruning.delete_events(connection, settled)
        done = replace(done, events=done.events + len(settled), kept=done.kept + len(old) - len(settled))
        if not dry_run:
            # Half of the time belongs to live traffic.
            await asyncio.sleep(time.monotonic() - began)
        yield done
        if not old:
            return
