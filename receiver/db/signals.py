"""Wake-ups between processes with PostgreSQL's LISTEN and NOTIFY.

Workers find work by polling, and a signal only shortens the wait. Behind a pooler there are no signals: the
pooler assigns a session to each transaction, so a LISTEN succeeds, but in a session that other clients use.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import structlog

from receiver.background import wait_for
from receiver.db.error_texts import cause
from receiver.db.postgresql import Statements
from receiver.errors import DatabaseUnavailable

CHANNEL: Final = "clipia_receiver"
SEND_INTERVAL_SECONDS: Final = 0.02
"""The shortest time between two signals: under load one stands for many commits."""
RECONNECT_SECONDS: Final = 5.0
CHECK_SECONDS: Final = 5.0
"""The time between checks of a connection: after a failover its server gets no more signals."""
IS_READ_ONLY: Final = "SELECT current_setting('transaction_read_only')::bool"

log = structlog.get_logger()


class Signals:
    """Tells the workers of other processes that a lane has work."""

    def __init__(self, statements: Statements) -> None:
        self._statements = statements
        self._lanes: set[str] = set()
        self._sending: asyncio.Task[None] | None = None

    def send(self, lane: str) -> None:
        """Signal a lane soon, together with other lanes."""
        self._lanes.add(lane)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(), name="signals")

    async def _send(self) -> None:
        try:
            while self._lanes:
                lanes = list(self._lanes)
                self._lanes.clear()
                statement = "SELECT pg_notify($1, lane) FROM unnest($2::text[]) AS lane"
                await self._statements.fetch(statement, (CHANNEL, lanes))
                await asyncio.sleep(SEND_INTERVAL_SECONDS)
        except DatabaseUnavailable as error:
            log.debug("workers not signalled", error=str(error))
        finally:
            self._sending = None

    async def close(self) -> None:
        """Wait for signals that are not sent yet."""
        if self._sending is not None:
            await self._sending


async def listen(
    statements: Statements,
    heard: Callable[[str], None],
    *,
    reconnect: float = RECONNECT_SECONDS,
    check: float = CHECK_SECONDS,
) -> None:
    """Call `heard` with the name of each signalled lane until cancelled; return if there is a pooler."""
    while True:
        try:
            async with statements.hold() as driver:
                if statements.is_pooled:
                    log.info(
                        "no signals between processes behind a connection pooler: work is found by polling"
                    )
                    return
                await _listen(driver, heard, check)
        except Exception as error:  # noqa: BLE001 - polling does not need signals
            log.debug("not listening for signals", error=cause(error))
        await asyncio.sleep(reconnect)


async def _listen(driver: Any, heard: Callable[[str], None], check: float) -> None:
    """Listen on a connection until it is lost or its server takes no writes."""

    def hear(_connection: object, _pid: object, _channel: object, lane: object) -> None:
        heard(str(lane))

    lost = asyncio.Event()
    driver.add_termination_listener(lambda _connection: lost.set())
    await driver.add_listener(CHANNEL, hear)
    while not lost.is_set() and not await driver.fetchval(IS_READ_ONLY):
        await wait_for(lost, check)
