"""A process that works says so in the database, in a row that it renews every few seconds."""

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import structlog

from receiver.db import workers
from receiver.db.database import Database
from receiver.errors import DatabaseUnavailable

STOP_WAIT: Final = 2.0
"""Seconds that the last word to the database may take."""

log = structlog.get_logger()


@asynccontextmanager
async def present(database: Database, lanes: Sequence[str], *, account: str | None) -> AsyncIterator[None]:
    """Say inside the block that this process works on `lanes`, and at its end that it does no more."""
    run = workers.WorkerRun(
        id=uuid.uuid4(),
        host=socket.gethostname()[:255],
        pid=os.getpid(),
        lanes=list(lanes),
        account=account,
    )
    stopping = asyncio.Event()
    task = asyncio.create_task(_renew(database, run, stopping), name="presence")
    try:
        yield
    finally:
        stopping.set()
        # Without this the row is stale in half a minute anyway: no reason to wait for a slow database.
        with contextlib.suppress(DatabaseUnavailable, TimeoutError):
            async with asyncio.timeout(STOP_WAIT):
                await task
                async with database.write() as connection:
                    await workers.leave(connection, run.id)


async def _renew(database: Database, run: workers.WorkerRun, stopping: asyncio.Event) -> None:
    while not stopping.is_set():
        try:
            async with database.write() as connection:
                await workers.sweep(connection)
                await workers.renew(connection, run)
        except Exception as error:
            expected = isinstance(error, DatabaseUnavailable)
            log.warning(
                "presence not recorded", error=type(error).__name__, exc_info=None if expected else error
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(workers.RENEW_SECONDS):
                await stopping.wait()
