"""`memory:`, for tests: keeps events in a list."""

import structlog
from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import closed_failure, encode
from receiver.errors import PublishFailed, PublishRejected

log = structlog.get_logger()


class MemoryDestination:
    """Keeps what is published, in order; nothing outlives the process."""

    concurrency = 128

    failure: PublishFailed | PublishRejected | None = None
    """Raised by every `publish` and `check` while it is set."""

    def __init__(self, settings: DestinationSettings) -> None:
        self.events: list[CloudEvent] = []
        self._name = settings.name
        self._closed = False

    async def start(self) -> None:
        """Warn: whatever is forwarded here is lost with the process."""
        log.warning("a memory destination is for tests: it keeps nothing", destination=self._name)

    async def check(self) -> None:
        """Raise the failure that was asked for, if any."""
        if self.failure is not None:
            raise self.failure

    async def publish(self, event: CloudEvent) -> None:
        """Keep the event."""
        if self._closed:
            raise closed_failure()
        await self.check()
        encode(event)
        self.events.append(event)

    async def close(self) -> None:
        """Take no more events; keep those that are there."""
        self._closed = True
