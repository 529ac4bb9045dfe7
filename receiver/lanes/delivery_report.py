"""Counts and log records of deliveries, once the transaction that recorded them is committed."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Final

import structlog

from receiver.db.rows import DeliveryClaim, StoredEvent
from receiver.metrics import DELIVERIES, DELIVERY_SECONDS

MAX_LOGGED: Final = 100
"""Ids in one line of the log."""

log = structlog.get_logger()


class DeliveryReport:
    """The metrics and the log of one destination."""

    def __init__(self, destination: str) -> None:
        self._destination = destination
        self._seconds = DELIVERY_SECONDS.labels(destination)
        # From the start, because `increase` does not see the first count of a series that appears with it.
        for outcome in ("delivered", "retry", "dead"):
            DELIVERIES.labels(destination, outcome)

    def tell(
        self, outcomes: Mapping[str, int], delivered: Sequence[tuple[DeliveryClaim, StoredEvent]]
    ) -> None:
        """Count outcomes, observe the time since receipt, and log the `request_id` of delivered events.

        One line has up to `MAX_LOGGED`. A replay has no time: its event may have been received years ago.
        """
        for outcome, count in outcomes.items():
            DELIVERIES.labels(self._destination, outcome).inc(count)
        now = datetime.now(UTC)
        for claim, event in delivered:
            if claim.replay_id is None:
                # Another machine's clock may be ahead of this one.
                self._seconds.observe(max(0.0, (now - event.received_at).total_seconds()))
        for start in range(0, len(delivered), MAX_LOGGED):
            ids = [event.request_id for _, event in delivered[start : start + MAX_LOGGED]]
            log.info("events delivered", destination=self._destination, request_ids=ids)
