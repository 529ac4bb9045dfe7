"""`memory:`, for tests: keeps events in a list."""

import structlog
from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import closed_failure, encode
from receiver.errors import PublishFailed, PublishRejected

log = structlog.get_logger()


class MemoryDestination:
    """Keeps published events in order, as long as the process lives."""

    concurrency = 128

    failure: PublishFailed | PublishRejected | None = None
    """If it is set, every `publish` and `check` raises it."""

    def __init__(self, settings: DestinationSettings) -> None:
        self.events: list[CloudEvent] = []
        self._name = settings.name
        self._closed = False

    async def start(self) -> None:
        """Warn: the events are lost with the process."""
        log.warning(
            "a memory destination is for tests: its events are lost when the process ends",
            destination=self._name,
        )

    async def check(self) -> None:
        """Raise `failure`, if it is set."""
        if self.failure is not None:
            raise self.failure

    async def publish(self, event: CloudEvent) -> None:
        """Append the event to the list."""
        if self._closed:
            raise closed_failure()
        await self.check()
        encode(event)
        self.events.append(event)

    async def close(self) -> None:
        """Take no more events, and keep the list."""
        self._closed = True
