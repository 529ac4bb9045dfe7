"""Heartbeat files: `receiver healthcheck` reads them to find running commands."""

import asyncio
import atexit
import contextlib
from collections.abc import AsyncIterator

import structlog

from receiver.heartbeat import BEAT_SECONDS, Heartbeat

log = structlog.get_logger()


def announce(command: str, address: tuple[str, int], *, path: str = "/livez") -> None:
    """Record the address of this process for `receiver healthcheck` until the process ends."""
    if heartbeat := _open(command, address=address, path=path):
        atexit.register(heartbeat.close)


@contextlib.asynccontextmanager
async def beating(command: str) -> AsyncIterator[None]:
    """Update the heartbeat inside the block, as long as the event loop is not blocked."""
    heartbeat = _open(command)
    if heartbeat is None:
        yield
        return

    async def beat() -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            heartbeat.touch()

    task = asyncio.create_task(beat(), name="heartbeat")
    try:
        yield
    finally:
        task.cancel()
        heartbeat.close()


def _open(command: str, *, address: tuple[str, int] | None = None, path: str = "") -> Heartbeat | None:
    try:
        return Heartbeat(command, address=address, path=path)
    except OSError as error:
        # The service can run without the file.
        log.warning(
            "no heartbeat file: `receiver healthcheck` cannot find this process", error=error.strerror
        )
        return None
