"""Where events are forwarded to: one small module per kind."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from receiver.destinations.base import Destination
from receiver.destinations.file import FileDestination
from receiver.destinations.http import HttpDestination
from receiver.destinations.memory import MemoryDestination
from receiver.errors import SettingsError
from receiver.settings import DestinationSettings

__all__ = ["Destination", "open_destination"]

_KINDS: Final[Mapping[str, Callable[[DestinationSettings], Destination]]] = MappingProxyType(
    {
        "file": FileDestination,
        "http": HttpDestination,
        "https": HttpDestination,
        "memory": MemoryDestination,
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
    return kind(settings)
