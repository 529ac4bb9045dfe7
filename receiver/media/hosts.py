"""The allow-list of media hosts and the check of a URL against it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from ipaddress import ip_address
from typing import Self

import httpx

from receiver.core.output_files import Skip
from receiver.errors import MediaBlocked, SettingsError

_PORTS = {"https": 443, "http": 80}
_LAST_PORT = 65535
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_ENTRY = re.compile(
    rf"(?:(?P<scheme>https?)://)?(?:(?P<name>{_LABEL}(?:\.{_LABEL})*)|\[(?P<v6>[0-9a-f:.]+)\])"
    r"(?::(?P<port>[0-9]{1,5}))?/?"
)
# Blanks and letters of other alphabets are percent-encoded; parsers disagree about the rest.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\\ud800-\udfff]")
_AROUND = " \t\r\n\f"
_ORIGIN = re.compile(r"[a-z]+://[^/?#\\\s]+(?=[/?#]|\Z)", re.IGNORECASE)
_BARE_PERCENT = re.compile("%(?![0-9A-Fa-f]{2})")


@dataclass(frozen=True, kw_only=True)
class _Origin:
    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"

    @property
    def is_development(self) -> bool:
        """Plain http or loopback, from which a service in production should not fetch."""
        return self.scheme == "http" or _is_loopback(self.host)


@dataclass(frozen=True, kw_only=True)
class MediaHosts:
    """`RECEIVER_MEDIA_HOSTS`, parsed: the origins that files may come from."""

    origins: frozenset[_Origin]

    @classmethod
    def parse(cls, entries: Iterable[str]) -> Self:
        """Read entries: `media.clipia.ai` is https on port 443, `http://127.0.0.1:9000` exactly that origin.

        Raises SettingsError for any other entry, and if there is none.
        """
        given = [entry.strip() for entry in entries if entry.strip()]
        origins = frozenset(_parse_entry(entry, number) for number, entry in enumerate(given, 1))
        if not origins:
            raise SettingsError(
                "RECEIVER_MEDIA_HOSTS is empty: name at least one host, such as media.clipia.ai"
            )
        return cls(origins=origins)

    @property
    def development_origins(self) -> tuple[str, ...]:
        """Plain-http and loopback origins: their addresses are not checked, so the start warns of them."""
        return tuple(sorted(str(origin) for origin in self.origins if origin.is_development))

    def is_development(self, host: str, port: int) -> bool:
        """Return whether a connection to `host`:`port` goes to a development origin."""
        return any(
            origin.is_development for origin in self.origins if (origin.host, origin.port) == (host, port)
        )

    def needs_no_proxy(self, url: httpx.URL) -> bool:
        """Return whether `url` is on this machine or has plain http; both are requested without the proxy."""
        return self.is_development(url.host, _PORTS[url.scheme] if url.port is None else url.port)

    def vet(self, url: str) -> httpx.URL:
        """Return `url` parsed. The download requests this value, which no second parser can read differently.

        White space around it and its fragment are dropped; blanks, bare percent signs and non-ASCII letters
        behind the host are percent-encoded. Raises MediaBlocked with the reason `url`, `userinfo`, `host`,
        `scheme` or `port`.
        """
        given = _BARE_PERCENT.sub("%25", url.strip(_AROUND))
        if not given or _UNSAFE.search(given):
            raise MediaBlocked("The URL has characters that parsers disagree about", reason="url")
        try:
            parsed = httpx.URL(given).copy_with(fragment=None)
        except httpx.InvalidURL as error:
            raise MediaBlocked("The URL cannot be parsed", reason="url") from error
        if parsed.userinfo:
            raise MediaBlocked("The URL carries credentials", reason="userinfo")
        port = _PORTS.get(parsed.scheme, 0) if parsed.port is None else parsed.port
        origin = _Origin(scheme=parsed.scheme, host=parsed.raw_host.decode("ascii"), port=port)
        if origin not in self.origins:
            raise MediaBlocked(f"{origin} is not in RECEIVER_MEDIA_HOSTS", reason=self._difference(origin))
        # Parsers disagree about other spellings of an allowed origin: an empty user, a port with zeros.
        authority = re.escape(parsed.netloc.decode("ascii"))
        if not re.match(rf"{origin.scheme}://{authority}(:{port})?([/?]|\Z)", given, re.IGNORECASE):
            raise MediaBlocked(f"The URL spells {origin} in an unusual way", reason="url")
        return parsed

    def skip_reason(self, url: str) -> Skip | None:
        """Return why `url` must not be requested; None if it may be.

        An event may have thousands of URLs, and its transaction is open while they are listed. Parsing each
        of them would take too long, so a URL in the usual spelling is matched by one regular expression, and
        the verdict on a foreign origin is cached.
        """
        if self._usual.fullmatch(url):
            return None
        origin = _ORIGIN.match(url)
        foreign = _skip_reason(self, origin[0] + "/") if origin else None
        return foreign or _skip_reason.__wrapped__(self, url)

    @cached_property
    def _usual(self) -> re.Pattern[str]:
        origins = [re.escape(str(origin)) for origin in self.origins]
        origins += [each.removesuffix(f":{_PORTS[each.partition(':')[0]]}") for each in origins]
        return re.compile(rf"(?:{'|'.join(origins)})(?:[/?][!-\"$-\[\]-~]{{0,65000}})?")

    def _difference(self, origin: _Origin) -> str:
        same_host = [allowed for allowed in self.origins if allowed.host == origin.host]
        if not same_host:
            return "host"
        return "port" if any(allowed.scheme == origin.scheme for allowed in same_host) else "scheme"


@lru_cache(maxsize=1024)
def _skip_reason(hosts: MediaHosts, url: str) -> Skip | None:
    try:
        hosts.vet(url)
    except MediaBlocked as error:
        return Skip(error.reason, str(error))
    return None


def _parse_entry(entry: str, number: int) -> _Origin:
    match = _ENTRY.fullmatch(entry.lower())
    # A port needs a scheme: `host:9000` does not say whether it means plain http.
    if match is None or (match["port"] and not match["scheme"]):
        raise _invalid_entry(number)
    scheme = match["scheme"] or "https"
    port = int(match["port"] or _PORTS[scheme])
    if not 0 < port <= _LAST_PORT:
        raise _invalid_entry(number)
    return _Origin(scheme=scheme, host=match["name"] or match["v6"], port=port)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _invalid_entry(number: int) -> SettingsError:
    # The entry itself stays out of the message: it may hold a password.
    return SettingsError(
        f"RECEIVER_MEDIA_HOSTS: entry {number} must be a host name, such as media.clipia.ai, "
        "or an origin, such as http://127.0.0.1:9000, without user and password"
    )
