"""The destinations that events are forwarded to: one small module per kind."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Final, Protocol

import structlog
from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import Destination
from receiver.error_texts import error_text
from receiver.errors import PublishFailed, SettingsError, UnusableFileError

__all__ = ["Destination", "open_destination", "open_for_work", "started"]

START_SECONDS: Final = 5.0
"""Seconds that a process waits for its destinations before it takes webhooks."""

_KINDS: Final[Mapping[str, tuple[str, str]]] = {
    "file": ("file", "FileDestination"),
    "http": ("http", "HttpDestination"),
    "https": ("http", "HttpDestination"),
    "amqp": ("rabbitmq", "RabbitmqDestination"),
    "amqps": ("rabbitmq", "RabbitmqDestination"),
    "redis": ("redis", "RedisDestination"),
    "rediss": ("redis", "RedisDestination"),
    "nats": ("nats", "NatsDestination"),
    "tls": ("nats", "NatsDestination"),
    "kafka": ("kafka", "KafkaDestination"),
    "sqs": ("sqs", "SqsDestination"),
    "memory": ("memory", "MemoryDestination"),
}
"""For each scheme a module of this package and its class."""
_EXTRAS: Final = frozenset({"rabbitmq", "redis", "nats", "kafka", "sqs"})
"""Modules that need a client library; the package's extra of the same name installs it."""

log = structlog.get_logger()


class _Opened(Destination, Protocol):
    """The constructor of a class of destinations."""

    def __init__(self, settings: DestinationSettings) -> None: ...


def open_destination(settings: DestinationSettings) -> Destination:
    """Return the destination that the URL's scheme names; it connects in `start` or later.

    Raises SettingsError, which never quotes the URL: it may hold a password.
    """
    return load_kind(settings)(settings)


def load_kind(settings: DestinationSettings) -> type[_Opened]:
    """Return the class of the kind of destination that the URL's scheme names. Raises SettingsError."""
    scheme, colon, _ = settings.url.get_secret_value().partition(":")
    if not colon or scheme.lower() not in _KINDS:
        known = ", ".join(f"{name}:" for name in _KINDS)
        raise SettingsError(
            f"destination {settings.name!r}: the scheme of the URL is unknown; use one of {known}"
        )
    module_name, class_name = _KINDS[scheme.lower()]
    try:
        # Import it only now: the client libraries of all brokers together take seconds.
        module = import_module(f"receiver.destinations.{module_name}")
    except ModuleNotFoundError as error:
        if module_name not in _EXTRAS:
            raise
        raise SettingsError(
            f"destination {settings.name!r}: {scheme}: needs the package {error.name}; "
            f"install it with: pip install 'clipia-receiver[{module_name}]'"
        ) from None
    found: type[_Opened] = getattr(module, class_name)
    return found


class DeferredDestination:
    """A destination with a file that cannot be used yet, such as a certificate: each attempt tries again."""

    def __init__(self, settings: DestinationSettings) -> None:
        self._settings = settings
        # The value of its class: a lane reads it only once, possibly before the files are usable.
        self.concurrency = load_kind(settings).concurrency
        self._opened: Destination | None = None

    async def start(self) -> None:
        """Open and start it. Raises SettingsError."""
        await self._open().start()

    async def check(self) -> None:
        """Check that it can be opened and reached. Raises SettingsError or PublishFailed."""
        await self._open().check()

    async def publish(self, event: CloudEvent) -> None:
        """Open it if necessary and publish an event. Raises PublishFailed or PublishRejected."""
        try:
            destination = self._open()
        except SettingsError as error:
            raise PublishFailed(str(error), reason="settings") from error
        await destination.publish(event)

    async def close(self) -> None:
        """Close it, if it was opened."""
        if self._opened is not None:
            await self._opened.close()

    def _open(self) -> Destination:
        self._opened = self._opened or open_destination(self._settings)
        return self._opened


def open_for_work(settings: DestinationSettings) -> Destination:
    """Open a destination; if one of its files cannot be used yet, its attempts fail until it can.

    Raises SettingsError for any other mistake.
    """
    try:
        return open_destination(settings)
    except UnusableFileError:
        return DeferredDestination(settings)


@asynccontextmanager
async def started(destinations: Mapping[str, Destination]) -> AsyncIterator[set[str]]:
    """Start destinations, and close them after the block; yield the names of those that are not ready.

    If one cannot be opened, webhooks are still acknowledged: its deliveries wait, as in any outage.
    """
    tasks = {name: asyncio.create_task(_start(name, each)) for name, each in destinations.items()}
    try:
        yield await _find_unready(tasks)
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
        await asyncio.gather(*(each.close() for each in destinations.values()))


async def _find_unready(tasks: Mapping[str, asyncio.Task[bool]]) -> set[str]:
    if tasks:
        # A late task is not cancelled: it may be a thread that opens a file.
        await asyncio.wait(tasks.values(), timeout=START_SECONDS)
    late = {name for name, task in tasks.items() if not task.done()}
    for name in late:
        log.warning("destination is not ready yet", destination=name, seconds=START_SECONDS)
    return late | {name for name, task in tasks.items() if task.done() and not task.result()}


async def _start(name: str, destination: Destination) -> bool:
    try:
        await destination.start()
    except Exception as error:  # noqa: BLE001 - one destination must not stop the others
        log.error("destination is down", destination=name, error=error_text(error))
        return False
    return True
