"""Presence: a process that runs a worker has a row in the database, and renews it every few seconds."""

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Final

from receiver.background import wait_for
from receiver.db import workers
from receiver.db.database import Database
from receiver.errors import DatabaseUnavailable
from receiver.lanes.attempts import logged_failures

STOP_SECONDS: Final = 2.0
"""How long the deletion of the row may take at shutdown."""


@asynccontextmanager
async def present(database: Database, lanes: Sequence[str], *, account: str | None) -> AsyncIterator[None]:
    """Record inside the block that this process works on `lanes`; changes of the list are followed."""
    run = workers.WorkerRun(
        id=uuid.uuid4(), host=socket.gethostname()[:255], pid=os.getpid(), lanes=list(lanes), account=account
    )
    stopping = asyncio.Event()
    task = asyncio.create_task(_renew(database, run, lanes, stopping), name="presence")
    try:
        yield
    finally:
        stopping.set()
        # The row is stale in half a minute anyway, so a slow database does not delay the shutdown.
        with contextlib.suppress(DatabaseUnavailable, TimeoutError):
            async with asyncio.timeout(STOP_SECONDS):
                await task
                async with database.write() as connection:
                    await workers.remove(connection, run.id)


async def _renew(
    database: Database, run: workers.WorkerRun, lanes: Sequence[str], stopping: asyncio.Event
) -> None:
    while not stopping.is_set():
        with logged_failures("presence not recorded"):
            async with database.write() as connection:
                await workers.delete_stale(connection)
                await workers.renew(connection, replace(run, lanes=list(lanes)))
        await wait_for(stopping, workers.RENEW_SECONDS)
