"""What a destination is, and what several kinds do alike."""

import abc
import re
from typing import Final, Protocol, TypeVar

import structlog
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.errors import PublishFailed, PublishRejected
from receiver.masking import mask

Failure = PublishFailed | PublishRejected
AnyFailure = TypeVar("AnyFailure", bound=Failure)

MAX_QUOTED: Final = 300
"""Characters of the other side's words in a message."""
USUAL_TIMEOUT: Final = 15.0
"""Seconds for a whole try, unless the destination's `timeout` says otherwise."""

_EVENT: Final = re.compile(r'\{\\*"')
"""How every event begins, also in quotes of a program that escapes quotes."""

log = structlog.get_logger()


class Destination(Protocol):
    """A place that events are forwarded to."""

    concurrency: int
    """How many publishes it is worth having under way at once."""

    async def start(self) -> None:
        """Connect, open or repair. Raises SettingsError for what a restart cannot mend.

        A destination that is only away for now starts all the same; `publish` tries again.
        """
        ...

    async def check(self) -> None:
        """See whether the destination can be reached, without an event.

        Raises SettingsError or PublishFailed; the message says what to do.
        """
        ...

    async def publish(self, event: CloudEvent) -> None:
        """Send an event and return when the destination has confirmed it.

        Many calls may run at once. Raises PublishRejected where trying again cannot help and PublishFailed
        where it may; the event may have arrived even then. After `close` it raises PublishFailed.
        """
        ...

    async def close(self) -> None:
        """Finish what is under way and let go. Calling it again does nothing."""
        ...


def encode(event: CloudEvent) -> bytes:
    """Return the event in CloudEvents' structured mode: one JSON object without line ends, in ASCII.

    Raises PublishRejected where it holds what JSON cannot.
    """
    try:
        return JSONFormat().write(event)
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as JSON", reason="encoding") from error


def quoted(words: object, limit: int = MAX_QUOTED) -> str:
    """Return the other side's words for a message: cut, without secrets and events that they may repeat."""
    # Masked before the cuts, which could leave half of a secret.
    text = _EVENT.split(mask(str(words)[: 10 * limit]), maxsplit=1)[0]
    return text.encode(errors="backslashreplace").decode()[:limit]


def stretched(seconds: float, timeout: float | None) -> float:
    """Return the limit of one step of a try, longer if the setting gives a try more than the usual 15 s.

    A shorter timeout leaves the steps as they are: a connection that takes longer to be made than a try may
    last is finished in the background, for the next try.
    """
    return seconds * max(1.0, (timeout or 0.0) / USUAL_TIMEOUT)


def closed() -> PublishFailed:
    """Return what `publish` raises after `close`."""
    return PublishFailed("the destination is closed", reason="closed")


def again(failure: AnyFailure) -> AnyFailure:
    """Return the failure as a new exception: each of those who share it gets a traceback of its own."""
    return type(failure)(str(failure), reason=failure.reason)


class Broker(abc.ABC):
    """What the destinations that are brokers do alike."""

    def __init__(self, settings: DestinationSettings) -> None:
        self._name = settings.name

    async def start(self) -> None:
        """Check, and only warn: the broker may come later."""
        try:
            await self.check()
        except PublishFailed as error:
            log.warning("destination is not ready", destination=self._name, error=str(error))

    @abc.abstractmethod
    async def check(self) -> None:
        """See whether an event would be taken, and warn where the broker may lose it."""

    def _warn_of_losses(self, problem: str) -> None:
        log.warning("the destination may lose events", destination=self._name, problem=problem)
