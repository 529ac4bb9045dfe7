"""The lane of an alert destination: it sends the messages about alerts, each until it is confirmed."""

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final

import structlog
from cloudevents.core.v1.event import CloudEvent

from receiver.core.lane_names import Wake, alert_lane
from receiver.core.retry import RetryPolicy
from receiver.db import alerts, leases
from receiver.db.database import Database
from receiver.db.operation_tables import alert_messages
from receiver.db.rows import Claim
from receiver.destinations import Destination
from receiver.errors import TransientError
from receiver.lanes.attempts import crash_error, jitter, log_failure, stored_text
from receiver.lanes.base import Lane, Work

RETRY: Final = RetryPolicy(initial=2.0, cap=60.0)
"""Short delays: messages are few, and an operator waits for them."""
CONCURRENCY: Final = 4

log = structlog.get_logger()


class AlertLane(Lane):
    """Sends the messages for one destination; those about one alert in their order.

    If `resolved` came before `raised`, the receiver of both would keep the alert open.
    """

    def __init__(
        self,
        database: Database,
        name: str,
        destination: Destination,
        *,
        wake: Wake,
        retry: RetryPolicy = RETRY,
    ) -> None:
        super().__init__(database, alert_messages, name=alert_lane(name), concurrency=CONCURRENCY, wake=wake)
        self._to = name
        self._destination = destination
        self._retry = retry

    async def claim(self, limit: int) -> Sequence[Work]:
        """Claim messages that are due."""
        mine = [alert_messages.c.destination == self._to, alerts.is_next()]
        async with self._database.write() as connection:
            claims = await leases.claim(
                connection, alert_messages, limit=limit, lease=self.lease_seconds, where=mine
            )
            messages = await alerts.load_messages(connection, [each.id for each in claims])
        return [Work(claim=each, run=partial(self._send, each, messages[each.id])) for each in claims]

    async def _send(self, claim: Claim, message: dict[str, Any]) -> None:
        ids = {"destination": self._to, "message_id": message["id"], "alert": message["subject"]}
        if crashed := crash_error(claim, "sending this message"):
            log.error("alert not sent", error=crashed, **ids)
            await self._remove(claim)
            return
        try:
            await self._destination.publish(_event(message))
        except Exception as error:  # noqa: BLE001 - any error belongs to this row, not to its lane
            await self._failed(claim, error, ids)
            return
        await self._remove(claim)
        log.info("alert sent", **ids)

    async def _failed(self, claim: Claim, error: Exception, ids: dict[str, Any]) -> None:
        # A rejected message is retried, too: the operator may repair the destination, and wants the alert.
        cause = error if isinstance(error, TransientError) else Exception()
        delay = self._retry.next_delay(cause, attempt=claim.attempt, age=claim.age, jitter=jitter())
        if delay is None:
            log.error("alert not sent", error=stored_text(error), **ids)
            await self._remove(claim)
            return
        log_failure("alert not sent yet", error, retry_in=delay, **ids)
        again = partial(leases.retry, table=alert_messages, held=claim, delay=delay, error=stored_text(error))
        await self._record(claim, again)

    async def _remove(self, claim: Claim) -> None:
        await self._record(claim, partial(alerts.remove_message, held=claim))


def _event(message: dict[str, Any]) -> CloudEvent:
    attributes = {name: value for name, value in message.items() if name != "data"}
    return CloudEvent(attributes | {"time": datetime.fromisoformat(message["time"])}, message["data"])
