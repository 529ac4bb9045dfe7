"""Waiting for jobs: any number of waiters of a process share one query, and hold no connection meanwhile."""

import asyncio
import contextlib
from collections import Counter
from typing import Final
from uuid import UUID

import structlog

from receiver.db import jobs
from receiver.db.engine import Database
from receiver.errors import DatabaseUnavailable

LOOK: Final = 0.5
"""Seconds between looks at the jobs that are waited for."""
ATTENTION: Final = 15.0
"""Seconds for which a job counts as watched; renewed while somebody waits."""

log = structlog.get_logger()


class Waiting:
    """Tells its waiters when their jobs have ended."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiters: Counter[UUID] = Counter()
        self._ended: dict[UUID, asyncio.Event] = {}
        self._task: asyncio.Task[None] | None = None

    async def wait(self, job_id: UUID, *, seconds: float) -> bool:
        """Wait until a job has ended and its files are settled; False where the time was over first."""
        event = self._ended.setdefault(job_id, asyncio.Event())
        self._waiters[job_id] += 1
        if self._task is None:
            self._task = asyncio.create_task(self._look(), name="job waiting")
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
        finally:
            self._waiters[job_id] -= 1
            if not self._waiters[job_id]:
                del self._waiters[job_id], self._ended[job_id]
        return True

    async def close(self) -> None:
        """Stop looking."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _look(self) -> None:
        watched_at: dict[UUID, float] = {}
        loop = asyncio.get_running_loop()
        while self._ended:
            waited_for = set(self._ended)
            new = {
                job_id for job_id in waited_for if loop.time() - watched_at.get(job_id, -1e9) > ATTENTION / 2
            }
            try:
                async with self._database.read() as connection:
                    ended = await jobs.settled(connection, waited_for)
                if unwatched := new - ended:
                    async with self._database.write() as connection:
                        await jobs.watch(connection, unwatched, seconds=ATTENTION)
            except DatabaseUnavailable as error:
                log.warning("jobs not looked at", error=str(error))
            else:
                watched_at = {
                    job_id: loop.time() if job_id in new else watched_at[job_id] for job_id in waited_for
                }
                for job_id in ended & self._ended.keys():
                    self._ended[job_id].set()
            await asyncio.sleep(LOOK)
        self._task = None
