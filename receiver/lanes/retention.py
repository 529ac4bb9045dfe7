"""The lane of retention: it adds a run each day, and takes a batch of it at a time.

Between two batches the run is a row that any worker may claim. So a shutdown waits for one batch at most, and
if a worker is killed, another one goes on behind its last batch.
"""

import socket
import time
from contextlib import aclosing
from dataclasses import asdict
from functools import partial
from typing import Any, Final

import structlog

from receiver import retention
from receiver.core.lane_names import RETENTION_LANE, Wake
from receiver.db import leases, retention_runs
from receiver.db.database import Database
from receiver.db.operation_tables import retention_runs as table
from receiver.db.retention_runs import Plan, counts_of
from receiver.db.rows import Claim
from receiver.errors import TransientError
from receiver.lanes.attempts import crash_error, log_failure, stored_text
from receiver.lanes.base import Lane, Work
from receiver.media import Storage
from receiver.retention import LIMITS, Limits, Pruned

CHECK_SECONDS: Final = 30.0
"""How often a worker looks for a run that is due."""
FAILURE_PAUSE_SECONDS: Final = 300.0
"""Pause of a run after a failure: the storage or the database is away."""

log = structlog.get_logger()


class RetentionLane(Lane):
    """Prunes old events each day."""

    def __init__(
        self,
        database: Database,
        plan: Plan,
        storage: Storage,
        *,
        wake: Wake,
        limits: Limits = LIMITS,
        check_seconds: float = CHECK_SECONDS,
        failure_pause_seconds: float = FAILURE_PAUSE_SECONDS,
    ) -> None:
        super().__init__(database, table, name=RETENTION_LANE, concurrency=1, wake=wake)
        self._plan = plan
        self._storage = storage
        self._limits = limits
        self._check_seconds = check_seconds
        self._failure_pause_seconds = failure_pause_seconds
        self._looks_at = 0.0
        self._host: Final = socket.gethostname()[:255]

    async def claim(self, limit: int) -> list[Work]:
        """Add the run of the day, and claim one that is due. Raises DatabaseUnavailable."""
        if time.monotonic() < self._looks_at:
            return []
        async with self._database.write() as connection:
            await retention_runs.schedule(connection, self._plan)
            claimed = await retention_runs.claim(connection, limit=limit, lease=self.lease_seconds)
        self._looks_at = time.monotonic() + self._check_seconds
        return [Work(claim=claim, run=partial(self._run, claim, row)) for claim, row in claimed]

    async def _run(self, claim: Claim, row: dict[str, Any]) -> None:
        if crashed := crash_error(claim, "pruning"):
            finish = partial(leases.finish, table=table, held=claim, state="failed", error=crashed)
            await self._record(claim, finish)
            log.error("retention failed", error=crashed)
            return
        try:
            done = await self._take_batch(row)
        except Exception as error:  # noqa: BLE001 - any error belongs to this run, not to its lane
            log_failure("retention failed for now", error, expected=TransientError)
            again = partial(
                leases.retry,
                table=table,
                held=claim,
                delay=self._failure_pause_seconds,
                error=stored_text(error),
            )
            await self._record(claim, again)
            return
        counts = counts_of(asdict(done))
        advance = partial(
            retention_runs.advance, held=claim, host=self._host, position=done.next, counts=counts
        )
        await self._record(claim, advance)
        self._looks_at = 0.0
        if done.next is None:
            log.info("retention ended", before=str(done.before), **counts)

    async def _take_batch(self, row: dict[str, Any]) -> Pruned:
        """Delete the next batch, and return the sums of the run. It rests for as long as the batch took."""
        counts: dict[str, Any] = counts_of(row)
        done = Pruned(before=row["before"], next=row["position"], **counts)
        batches = retention.prune(
            self._database,
            done,
            dead_letters=row["dead_letters"],
            storage=self._storage if row["media"] else None,
            limits=self._limits,
        )
        async with aclosing(batches):
            return await anext(batches)
