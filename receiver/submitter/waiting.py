"""Wait for jobs: any number of waiters in a process share one query and hold no connection meanwhile."""

import asyncio
import contextlib
import time
from collections import Counter
from typing import Final
from uuid import UUID

import structlog

from receiver.db import job_events, jobs
from receiver.db.database import Database
from receiver.errors import DatabaseUnavailable

POLL_SECONDS: Final = 0.5
"""Seconds between looks at the jobs that are waited for."""
WATCH_SECONDS: Final = 15.0
"""Seconds for which a job counts as watched; renewed while somebody waits."""

log = structlog.get_logger()


class JobWaiter:
    """Tells its waiters when their jobs have ended."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: Counter[UUID] = Counter()
        self._ended: dict[UUID, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None

    async def wait(self, job_id: UUID, *, seconds: float) -> None:
        """Wait until a job has ended and its files are settled, or until the time is over."""
        event = self._ended.setdefault(job_id, asyncio.Event())
        self._waiters[job_id] += 1
        if self._task is None:
            self._task = asyncio.create_task(self._look(), name="job waiting")
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await event.wait()
        finally:
            self._waiters[job_id] -= 1
            if not self._waiters[job_id]:
                del self._waiters[job_id], self._ended[job_id]

    async def close(self) -> None:
        """Stop looking."""
        if (task := self._task) is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _look(self) -> None:
        watched_at: dict[UUID, float] = {}
        try:
            while self._ended:
                try:
                    watched_at = await self._look_once(watched_at)
                except DatabaseUnavailable as error:
                    log.warning("jobs not looked at", error=str(error))
                except Exception:
                    # A loop that ended would leave everybody waiting for the whole of their time.
                    log.exception("jobs not looked at")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            self._task = None

    async def _look_once(self, watched_at: dict[UUID, float]) -> dict[UUID, float]:
        """Wake those whose job has ended, and keep the others watched; return since when they are."""
        now = time.monotonic()
        waited_for = set(self._ended)
        new = {job_id for job_id in waited_for if now - watched_at.get(job_id, -1e9) > WATCH_SECONDS / 2}
        async with self._database.read() as connection:
            ended = await job_events.find_finished(connection, waited_for)
        if unwatched := new - ended:
            async with self._database.write() as connection:
                await jobs.watch(connection, unwatched, seconds=WATCH_SECONDS)
        for job_id in ended & self._ended.keys():
            self._ended[job_id].set()
        return {job_id: now if job_id in new else watched_at[job_id] for job_id in waited_for}
