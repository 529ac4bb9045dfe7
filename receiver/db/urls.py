"""Reads RECEIVER_DATABASE_URL: the path of an SQLite file, or a URL of libpq for PostgreSQL.

Hosted databases show their URL with parameters of libpq (PostgreSQL's documentation, section 34.1.2), which
are translated to arguments of asyncpg. A parameter without a counterpart is an error: asyncpg would send it
to the server as a setting, and without it the connection might be less safe than the user asked for.
"""

import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlencode

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from receiver.config_file import shown_key
from receiver.errors import SettingsError

APPLICATION: Final = "clipia-receiver"
_NAME: Final = "RECEIVER_DATABASE_URL"
_HOW: Final = f"{_NAME}: write sqlite:///path/to/file.db or postgresql://user:password@host:5432/name"
_POSTGRESQL: Final = re.compile(
    r"(?:(?P<user>[^:/?@]*)(?::(?P<password>[^@]*))?@)?(?P<hosts>[^/?@]*)(?:/(?P<database>[^?]*))?(?:\?(?P<query>.*))?",
    re.DOTALL,
)

_ALIASES: Final = {"ssl": "sslmode", "database": "dbname"}
"""Spellings of asyncpg that earlier releases took."""
_PLACE: Final = ("host", "port", "user", "password", "dbname")
_FILES: Final = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
_KEPT: Final = (
    *(*_FILES, "passfile", "service", "sslmode", "sslnegotiation", "sslpassword"),
    *("ssl_max_protocol_version", "ssl_min_protocol_version", "target_session_attrs"),
)
"""Parameters that asyncpg has under the same name, but only in a URL."""
_WITHOUT_EFFECT: Final = {
    *("fallback_application_name", "gssdelegation", "load_balance_hosts", "sslcompression", "sslsni"),
    *("keepalives", "keepalives_count", "keepalives_idle", "keepalives_interval", "tcp_user_timeout"),
}
_VALUES: Final[Mapping[str, tuple[str, ...]]] = {
    "channel_binding": ("disable", "prefer", "require"),
    "client_encoding": ("auto", "utf8", "utf-8", "unicode"),
    "gssencmode": ("disable", "prefer"),
    "sslcertmode": ("allow",),
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslnegotiation": ("postgres", "direct"),
    "ssl_max_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
    "ssl_min_protocol_version": ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3"),
    "target_session_attrs": ("any", "read-write", "read-only", "primary", "standby", "prefer-standby"),
}
_SERVER_SETTINGS: Final = ("application_name", "options")


@dataclass(frozen=True, kw_only=True)
class PostgresqlUrl:
    """The arguments of asyncpg's `connect`."""

    arguments: dict[str, Any]
    server_settings: dict[str, str]
    connect_timeout: float | None
    """Seconds; None if the URL does not set it."""


def parse_url(url: str) -> URL | PostgresqlUrl:
    """Return a URL for an SQLite engine, or the arguments for a PostgreSQL session.

    Raises SettingsError, which names a parameter and never shows its value.
    """
    scheme, separator, rest = url.partition("://")
    backend = scheme.partition("+")[0].lower()
    if not separator or backend not in {"sqlite", "postgresql", "postgres"}:
        raise SettingsError(_HOW)
    return _parse_sqlite(url) if backend == "sqlite" else _parse_postgresql(rest)


def _parse_sqlite(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise SettingsError(_HOW) from None
    if not parsed.database or ":memory:" in parsed.database or "mode=memory" in url:
        raise SettingsError(f"{_NAME}: an in-memory SQLite database would lose accepted events: name a file")
    return parsed.set(drivername="sqlite+pysqlite")


def _parse_postgresql(rest: str) -> PostgresqlUrl:
    match = _POSTGRESQL.fullmatch(rest)
    if match is None:
        raise SettingsError(f"{_HOW}; in a user name or password write @ as %40, : as %3A and / as %2F")
    parameters = _read_query(match["query"] or "")
    _check_safety(parameters)
    hosts, ports = _read_hosts(match["hosts"], parameters)
    arguments: dict[str, Any] = {"host": hosts or None, "port": ports, **_login(match, parameters)}
    # One of several servers is a standby, which takes no writes.
    defaults = {"target_session_attrs": "read-write"} if len(hosts) > 1 else {}
    arguments |= _url_arguments(defaults | _pick(parameters, _KEPT))
    timeout = float(_number("connect_timeout", parameters.get("connect_timeout", "0")))
    return PostgresqlUrl(
        arguments={name: value for name, value in arguments.items() if value is not None},
        server_settings={"application_name": APPLICATION} | _pick(parameters, _SERVER_SETTINGS),
        connect_timeout=max(timeout, 0) or None,
    )


def _login(match: re.Match[str], parameters: Mapping[str, str]) -> dict[str, str | None]:
    names = (("user", "user"), ("password", "password"), ("database", "dbname"))
    return {name: unquote(match[name] or "") or parameters.get(parameter) for name, parameter in names}


def _url_arguments(parameters: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments for parameters that asyncpg reads from a URL."""
    tls = {}
    if parameters.get("sslrootcert") == "system":
        # asyncpg does not know "system"; with a context it ignores the other parameters of TLS.
        tls = {"ssl": _system_context(parameters)}
        parameters = {name: value for name, value in parameters.items() if not name.startswith("ssl")}
    return {"dsn": f"postgresql://?{urlencode(parameters)}".removesuffix("?"), **tls}


def _pick(parameters: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    return {name: parameters[name] for name in names if name in parameters}


def _read_query(query: str) -> dict[str, str]:
    # Like libpq, this ignores a parameter with an empty value.
    parameters = {_ALIASES.get(name, name): value for name, value in parse_qsl(query)}
    known = {*_PLACE, *_KEPT, *_VALUES, *_SERVER_SETTINGS, *_WITHOUT_EFFECT, "connect_timeout"}
    if unknown := sorted(parameters.keys() - known):
        # The name may be a piece of a password with an unquoted character.
        names = ", ".join(repr(shown_key(name)) for name in unknown)
        raise SettingsError(
            f"{_NAME}: cannot use the parameter {names}; leave it out "
            "(docs/database.md lists those that can be used)"
        )
    for name, allowed in _VALUES.items():
        if parameters.get(name, allowed[0]).lower() not in {each.lower() for each in allowed}:
            raise SettingsError(f"{_NAME}: {name} has to be {' or '.join(allowed)}")
    for name in _FILES:
        if name in parameters and (name, parameters[name]) != ("sslrootcert", "system"):
            _require_file(name, parameters[name])
    return parameters


def _read_hosts(text: str, parameters: Mapping[str, str]) -> tuple[list[str], list[int] | None]:
    """Return hosts and ports of the URL or, if it has none, of the parameters."""
    hosts, ports = _split_hosts(text)
    if not hosts:
        hosts = [host.strip() for host in parameters.get("host", "").split(",") if host.strip()]
    if ports is None and "port" in parameters:
        ports = [_port(port) for port in parameters["port"].split(",")]
    if ports is not None and len(ports) not in {1, len(hosts) or 1}:
        raise SettingsError(f"{_NAME}: write one port, or one for each host")
    return hosts, ports


def _split_hosts(text: str) -> tuple[list[str], list[int] | None]:
    """Return hosts and their ports; None if no host has a port."""
    hosts, ports = [], []
    for part in text.split(",") if text else ():
        # An IPv6 address has colons, so it is in brackets.
        match = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::([^:]*))?", part)
        if match is None:
            raise SettingsError(_HOW)
        hosts.append(unquote(match[1].strip("[]")) or "localhost")
        ports.append(_port(match[2]) if match[2] else None)
    if not any(ports):
        return hosts, None
    return hosts, [port or 5432 for port in ports]


def _port(text: str) -> int:
    number = _number("port", text)
    if not 0 < number < 65536:
        raise SettingsError(f"{_NAME}: port has to be from 1 to 65535")
    return number


def _number(name: str, text: str) -> int:
    if not re.fullmatch(r"-?[0-9]{1,5}", text.strip()):
        raise SettingsError(f"{_NAME}: {name} has to be a number")
    return int(text)


def _require_file(name: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise SettingsError(f"{_NAME}: cannot read the file of {name} ({type(error).__name__})") from None


def _check_safety(parameters: Mapping[str, str]) -> None:
    mode = parameters.get("sslmode")
    system = parameters.get("sslrootcert") == "system"
    if system and mode not in {None, "verify-full"}:
        raise SettingsError(f"{_NAME}: sslrootcert=system needs sslmode=verify-full")
    # asyncpg has no channel binding. A certificate that is verified for the host also stops an impostor.
    if parameters.get("channel_binding") == "require" and not (system or mode == "verify-full"):
        raise SettingsError(
            f"{_NAME}: the driver does not support channel_binding=require; write "
            "sslmode=verify-full&sslrootcert=system instead (or the provider's certificate as sslrootcert), "
            "which protects against another server as well"
        )


def _system_context(parameters: Mapping[str, str]) -> ssl.SSLContext:
    context = ssl.create_default_context()
    for name, attribute in (
        ("ssl_min_protocol_version", "minimum_version"),
        ("ssl_max_protocol_version", "maximum_version"),
    ):
        if name in parameters:
            setattr(context, attribute, ssl.TLSVersion[parameters[name].replace(".", "_")])
    if "sslcert" in parameters:
        try:
            context.load_cert_chain(
                parameters["sslcert"], parameters.get("sslkey"), parameters.get("sslpassword")
            )
        except (OSError, ValueError) as error:
            raise SettingsError(
                f"{_NAME}: cannot load sslcert and sslkey ({type(error).__name__}): both must be PEM files"
            ) from None
    return context
