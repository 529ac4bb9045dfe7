"""Wake-ups that cross processes, by PostgreSQL's LISTEN and NOTIFY.

Nothing depends on them: work is found by polling, and a signal only shortens the wait for that. There are no
signals behind a pooler. It lends a session to each transaction, so a LISTEN stays behind in a session of
another client: it seems to succeed, and no signal ever arrives.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Final

import structlog

from receiver.db.causes import cause
from receiver.db.database import Database
from receiver.errors import DatabaseUnavailable

CHANNEL: Final = "clipia_receiver"
REST: Final = 0.02
"""Seconds between signals at least: under load one does for many commits."""
RECONNECT: Final = 5.0
"""Seconds until a lost connection is opened anew."""
CHECK: Final = 5.0
"""Seconds between checks of a silent connection: after a failover its server gets no more signals."""
IS_READ_ONLY: Final = "SELECT current_setting('transaction_read_only')::bool"

log = structlog.get_logger()


class Signals:
    """Tells the workers of other processes that a lane has work."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lanes: set[str] = set()
        self._sending: asyncio.Task[None] | None = None

    def send(self, lane: str) -> None:
        """Signal soon; those of a moment go together."""
        self._lanes.add(lane)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(), name="signals")

    async def _send(self) -> None:
        try:
            while self._lanes:
                lanes = list(self._lanes)
                self._lanes.clear()
                statement = "SELECT pg_notify($1, lane) FROM unnest($2::text[]) AS lane"
                await self._database.fetch(statement, (CHANNEL, lanes))
                await asyncio.sleep(REST)
        except DatabaseUnavailable as error:
            log.debug("workers not signalled", error=str(error))
        finally:
            self._sending = None

    async def close(self) -> None:
        """Send what has not been sent."""
        if self._sending is not None:
            await self._sending


async def listen(database: Database, heard: Callable[[str], None]) -> None:
    """Call `heard` with the name of each lane that is signalled, until canceled; return behind a pooler."""
    while True:
        try:
            async with database.hold_driver() as driver:
                if database.is_pooled:
                    log.info(
                        "no signals between processes behind a connection pooler: work is found by polling"
                    )
                    return
                await _listen(driver, heard)
        except Exception as error:  # noqa: BLE001 - polling goes on without
            log.debug("not listening for signals", error=cause(error))
        await asyncio.sleep(RECONNECT)


async def _listen(driver: Any, heard: Callable[[str], None]) -> None:
    """Listen on a connection until it is lost or its server takes no writes."""

    def hear(_connection: object, _pid: object, _channel: object, lane: object) -> None:
        heard(str(lane))

    lost = asyncio.Event()
    driver.add_termination_listener(lambda _connection: lost.set())
    await driver.add_listener(CHANNEL, hear)
    while not lost.is_set() and not await driver.fetchval(IS_READ_ONLY):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CHECK):
                await lost.wait()
