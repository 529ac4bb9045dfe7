"""How commands that go on running tell `receiver healthcheck` that they do."""

import asyncio
import atexit
import contextlib
from collections.abc import AsyncIterator

import structlog

from receiver.heartbeat import BEAT_SECONDS, Heartbeat

log = structlog.get_logger()


def announce(command: str, address: tuple[str, int], *, path: str = "/livez") -> None:
    """Write down, until the process ends, where this one answers."""
    if heartbeat := _open(command, address=address, path=path):
        atexit.register(heartbeat.close)


@contextlib.asynccontextmanager
async def beating(command: str) -> AsyncIterator[None]:
    """Keep a heartbeat fresh inside the block, as long as the event loop turns."""
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
        # The service itself needs no such file.
        log.warning(
            "`receiver healthcheck` will not see this process: no heartbeat file", error=error.strerror
        )
        return None
