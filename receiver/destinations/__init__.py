"""Where events are forwarded to: one small module per kind."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Final

from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import Destination
from receiver.errors import SettingsError

__all__ = ["Destination", "open_destination"]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """A module of this package and the class in it; `extra` installs the client that it needs."""

    module: str
    name: str
    extra: str | None = None


_AMQP: Final = _Kind(module="rabbitmq", name="RabbitmqDestination", extra="rabbitmq")
_REDIS: Final = _Kind(module="redis", name="RedisDestination", extra="redis")
_HTTP: Final = _Kind(module="http", name="HttpDestination")
_KINDS: Final[Mapping[str, _Kind]] = MappingProxyType(
    {
        "file": _Kind(module="file", name="FileDestination"),
        "http": _HTTP,
        "https": _HTTP,
        "amqp": _AMQP,
        "amqps": _AMQP,
        "redis": _REDIS,
        "rediss": _REDIS,
        "nats": _Kind(module="nats", name="NatsDestination", extra="nats"),
        "kafka": _Kind(module="kafka", name="KafkaDestination", extra="kafka"),
        "sqs": _Kind(module="sqs", name="SqsDestination", extra="sqs"),
        "memory": _Kind(module="memory", name="MemoryDestination"),
    }
)


def open_destination(settings: DestinationSettings) -> Destination:
    """Return the destination that the URL's scheme names; nothing is touched before `start`.

    Raises SettingsError, which never quotes the URL: it may hold a password.
    """
    scheme, colon, _ = settings.url.get_secret_value().partition(":")
    kind = _KINDS.get(scheme.lower()) if colon else None
    if kind is None:
        known = ", ".join(f"{name}:" for name in _KINDS)
        raise SettingsError(
            f"destination {settings.name!r}: the URL starts with no known scheme; known are {known}"
        )
    try:
        # Only now: the clients of all brokers together take seconds to import.
        module = import_module(f"receiver.destinations.{kind.module}")
    except ModuleNotFoundError as error:
        if kind.extra is None:
            raise
        raise SettingsError(
            f"destination {settings.name!r}: {scheme}: needs the package {error.name}; "
            f"install it with: pip install 'clipia-receiver[{kind.extra}]'"
        ) from None
    destination: Destination = getattr(module, kind.name)(settings)
    return destination
