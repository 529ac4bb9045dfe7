"""The protocol of a destination, and code that several kinds share."""

import abc
import logging
import re
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeVar, runtime_checkable

import orjson
import structlog
from cloudevents.core.base import BaseCloudEvent
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.errors import PublishFailed, PublishRejected
from receiver.masking import mask

Failure = PublishFailed | PublishRejected
AnyFailure = TypeVar("AnyFailure", bound=Failure)

MAX_QUOTED_CHARACTERS: Final = 300
"""How much of the other side's text an error message repeats."""
MAX_ANSWER_CHARACTERS: Final = 1024
"""How much of a consumer's answer is stored."""
MAX_READ_ANSWER: Final = 2 * MAX_ANSWER_CHARACTERS
"""How much of it is masked, so that enough is left if secrets become shorter: masking holds the loop."""
_CUT_CHARACTERS: Final = 256
"""How much is dropped from the end of a cut answer: half of a secret may no longer match."""
TIMEOUT_SECONDS: Final = 15.0
"""Seconds for a whole attempt, unless the destination's `timeout` says otherwise."""

_EVENT: Final = re.compile(r'\{\\*"')
"""The beginning of every event, even if a program has quoted it and escaped the quotes."""

log = structlog.get_logger()


class Destination(Protocol):
    """A place that events are forwarded to."""

    concurrency: int
    """The number of publishes that are worth running at once."""

    async def start(self) -> None:
        """Connect, open or repair. Raises SettingsError if the configuration has to change.

        If the destination is only down for now, this raises no error, and `publish` connects later.
        """

    async def check(self) -> None:
        """Check without an event whether the destination can be reached.

        Raises SettingsError or PublishFailed; the message says how to repair it.
        """

    async def publish(self, event: CloudEvent) -> None:
        """Send an event and return when the destination has confirmed it.

        Many calls may run at once. Raises PublishRejected if another attempt cannot succeed. Raises
        PublishFailed if it may, and after `close`; the event may have arrived even then.
        """

    async def close(self) -> None:
        """Finish the publishes under way and disconnect. A second call does nothing."""


class _Json(JSONFormat):
    """CloudEvents' JSON in ASCII; orjson writes it in a tenth of the time.

    The library's encoder writes the text that orjson would not write in ASCII or not at all.
    """

    def write(self, event: BaseCloudEvent) -> bytes:
        """Return an event in structured mode."""
        data = event.get_data()
        if isinstance(data, dict):
            written = _dump({**event.get_attributes(), "data": data})
            if written is not None:
                return written
        return super().write(event)

    def write_data(self, data: dict[str, Any] | str | bytes | None, datacontenttype: str | None) -> bytes:
        """Return an event's data for binary mode."""
        written = _dump(data) if isinstance(data, dict) else None
        return super().write_data(data, datacontenttype) if written is None else written


JSON: Final = _Json()
_ORJSON_OPTIONS: Final = orjson.OPT_UTC_Z | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_SUBCLASS


def _dump(value: dict[str, Any]) -> bytes | None:
    """Return the JSON text of an object, or None if it is not ASCII or orjson cannot write it."""
    try:
        written = orjson.dumps(value, option=_ORJSON_OPTIONS)
    except orjson.JSONEncodeError:
        return None
    return written if written.isascii() else None


@runtime_checkable
class GroupDestination(Destination, Protocol):
    """A destination that takes many events at once for less than one by one."""

    async def publish_first(self, events: Sequence[CloudEvent]) -> Sequence[Failure | None]:
        """Send the first of the events: as many as it takes at once, and at least one.

        Returns for each of these None if it is confirmed, or else the error of `publish`.
        """


def encode(event: CloudEvent) -> bytes:
    """Return the event in CloudEvents' structured mode: one JSON object without line ends, in ASCII.

    Raises PublishRejected if it holds a value that JSON cannot express.
    """
    try:
        return JSON.write(event)
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as JSON", reason="encoding") from error


def quoted(text: object, limit: int = MAX_QUOTED_CHARACTERS) -> str:
    """Return the other side's text for a message: shortened, and without the secrets and events in it."""
    # Mask before cutting: a cut could leave half of a secret, which no longer matches.
    shown = _EVENT.split(mask(str(text)[: 10 * limit]), maxsplit=1)[0]
    return shown.encode(errors="backslashreplace").decode()[:limit]


def answer_text(content: bytes) -> str:
    """Return the first KiB of the other side's answer, without secrets, and with control characters shown."""
    text = content[:MAX_READ_ANSWER].decode(errors="backslashreplace")
    masked = mask(text[:MAX_READ_ANSWER])
    # Only after the mask, which knows half of a secret if it is long enough.
    shown = masked if len(content) < MAX_READ_ANSWER else masked[:-_CUT_CHARACTERS]
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii")
        for each in shown[:MAX_ANSWER_CHARACTERS]
    )[:MAX_ANSWER_CHARACTERS]


def attempt_timeout(timeout: float | None) -> float:
    """Return the seconds for a whole attempt; `timeout` is the destination's setting."""
    return timeout or TIMEOUT_SECONDS


def step_timeout(seconds: float, timeout: float | None) -> float:
    """Return the seconds for one step of an attempt, more if the setting allows attempts of over 15 s.

    A shorter setting does not shorten the steps: a connection that takes longer to open than an attempt may
    last is finished in the background, for the next attempt.
    """
    return seconds * max(1.0, (timeout or 0.0) / TIMEOUT_SECONDS)


def closed_failure() -> PublishFailed:
    """Return the error that `publish` raises after `close`."""
    return PublishFailed("the destination is closed", reason="closed")


def timeout_failure(shown: str, timeout: float | None) -> PublishFailed:
    """Return the error of an attempt that got no answer in time; `timeout` is the destination's setting."""
    return PublishFailed(f"{shown} did not answer within {attempt_timeout(timeout):g} s", reason="timeout")


def copy_failure(failure: AnyFailure) -> AnyFailure:
    """Return the failure as a new exception, so that callers that share it have tracebacks of their own."""
    return type(failure)(str(failure), reason=failure.reason)


def limit_log(library: str, level: int) -> None:
    """Drop a library's log records below `level`, unless its log is configured."""
    library_log = logging.getLogger(library)
    if library_log.level == logging.NOTSET:
        library_log.setLevel(level)


class CheckedDestination(abc.ABC):
    """Base of the destinations that check themselves at start."""

    def __init__(self, settings: DestinationSettings) -> None:
        self._name = settings.name

    async def start(self) -> None:
        """Check, and only warn if the destination is down for now. Raises SettingsError."""
        try:
            await self.check()
        except PublishFailed as error:
            log.warning("destination is not ready", destination=self._name, error=str(error))

    @abc.abstractmethod
    async def check(self) -> None:
        """Check whether an event would be taken, and warn if the destination may lose it."""

    def _warn_of_losses(self, problem: str) -> None:
        log.warning("the destination may lose events", destination=self._name, problem=problem)
