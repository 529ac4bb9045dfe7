"""URLs of brokers: their parts, with the checks that all kinds share."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

from receiver.destination_settings import DestinationSettings
from receiver.errors import SettingsError

MAX_PORT: Final = 65_535

_HOST: Final = re.compile(
    r"(?P<host>(?:[a-z0-9_-]{1,63}\.)*[a-z0-9_-]{1,63}\.?|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class BrokerUrl:
    """The parts of a URL, unquoted. `user` and `password` are None if the URL has none."""

    scheme: str
    user: str | None
    password: str | None = field(repr=False)
    hosts: tuple[tuple[str, int], ...]
    """Names or addresses with their ports, in lower case; IPv6 in brackets."""
    path: str
    options: Mapping[str, str]

    @property
    def shown(self) -> str:
        """The hosts, for messages."""
        return ",".join(f"{host}:{port}" for host, port in self.hosts)


def split_url(text: str, *, port: int, options: Collection[str] = ()) -> BrokerUrl:
    """Take a URL apart; `port` is the default. Raises ValueError if it cannot be the URL of a broker."""
    parts = urlsplit(text)
    pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    query = dict(pairs)
    login, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = login.partition(":")
    # If there is an @ after the host, a password was not escaped.
    if parts.fragment or "@" in parts.path or (at and not login):
        raise ValueError("not a broker's URL")
    if len(query) != len(pairs) or not query.keys() <= set(options):
        raise ValueError("an unknown or repeated parameter")
    return BrokerUrl(
        scheme=parts.scheme,
        user=unquote(user) if at else None,
        password=unquote(password) if colon else None,
        hosts=tuple(_read_host(host, port) for host in hosts.split(",")),
        path=unquote(parts.path),
        options=query,
    )


@contextlib.contextmanager
def usable_url(settings: DestinationSettings, example: str) -> Iterator[str]:
    """Yield the URL. If it is invalid, raise SettingsError with an example, and never with the URL."""
    try:
        yield settings.url.get_secret_value()
    except (TypeError, ValueError):
        raise SettingsError(f"destination {settings.name!r}: write {example}") from None


def _read_host(text: str, default: int) -> tuple[str, int]:
    found = _HOST.fullmatch(text)
    port = int((found and found["port"]) or default)
    if found is None or not 0 < port <= MAX_PORT:
        raise ValueError("no host and port")
    return found["host"].lower(), port
