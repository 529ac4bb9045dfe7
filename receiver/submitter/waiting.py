"""Waits for jobs: all waiters in a process share one query, and none holds a connection while it waits."""

import asyncio
import contextlib
import time
from collections import Counter
from typing import Final
from uuid import UUID

import structlog

from receiver.background import wait_for
from receiver.db import job_events, jobs
from receiver.db.database import Database
from receiver.errors import DatabaseUnavailable

POLL_SECONDS: Final = 0.5
"""Time between two queries for the jobs that callers wait for."""
WATCH_SECONDS: Final = 15.0
"""A job counts as watched for this long; extended while a caller waits for it."""

log = structlog.get_logger()


class JobWaiter:
    """Wakes callers as soon as their jobs are finished."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: Counter[UUID] = Counter()
        self._finished: dict[UUID, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None

    async def wait(self, job_id: UUID, *, seconds: float) -> None:
        """Wait until a job and its files are finished, but at most `seconds`."""
        event = self._finished.setdefault(job_id, asyncio.Event())
        self._waiters[job_id] += 1
        if self._task is None:
            self._task = asyncio.create_task(self._poll(), name="job waiting")
        try:
            await wait_for(event, seconds)
        finally:
            self._waiters[job_id] -= 1
            if not self._waiters[job_id]:
                del self._waiters[job_id], self._finished[job_id]

    async def close(self) -> None:
        """Stop polling."""
        if (task := self._task) is not None:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _poll(self) -> None:
        watched_at: dict[UUID, float] = {}
        try:
            while self._finished:
                try:
                    watched_at = await self._poll_once(watched_at)
                except DatabaseUnavailable as error:
                    log.warning("waiting jobs not polled", error=str(error))
                except Exception:
                    # If the loop ended here, all callers would wait for their whole timeout.
                    log.exception("waiting jobs not polled")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            self._task = None

    async def _poll_once(self, watched_at: dict[UUID, float]) -> dict[UUID, float]:
        """Wake the callers of finished jobs and watch the other jobs; return since when each is watched."""
        now = time.monotonic()
        waited_for = set(self._finished)
        new = {job_id for job_id in waited_for if now - watched_at.get(job_id, -1e9) > WATCH_SECONDS / 2}
        async with self._database.read() as connection:
            finished = await job_events.find_finished(connection, waited_for)
        if unwatched := new - finished:
            async with self._database.write() as connection:
                await jobs.watch(connection, unwatched, seconds=WATCH_SECONDS)
        for job_id in finished & self._finished.keys():
            self._finished[job_id].set()
        return {job_id: now if job_id in new else watched_at[job_id] for job_id in waited_for}
