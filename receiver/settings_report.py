"""The settings in force, without a secret: `receiver settings` and the dashboard show them."""

import re
from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import SecretStr

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.config_file import variable_name
from receiver.core.signature import Secret
from receiver.destination_control import content_text
from receiver.destination_settings import DestinationSettings
from receiver.masking import MASK, mask
from receiver.settings import Settings

Origin = Literal["environment", "file", "default"]

_TABLES: Final = frozenset({"destinations", "sources", "api_tokens"})
"""Fields that have a list of their own."""
_URLS: Final = frozenset({"database_url", "storage_url", "destination_url", "clipia_proxy", "media_proxy"})
"""Fields that may contain a password among harmless parts."""
_KEY: Final = re.compile(r"clipia_(?:live|test)_")
_LOCAL: Final = frozenset({"file", "sqlite", "memory"})
"""Schemes without a user; an @ is part of the path."""
_WEB: Final = frozenset({"http", "https"})
_SCHEMES: Final = _WEB | {
    *("postgresql", "postgres", "amqp", "amqps", "redis", "rediss", "nats", "tls", "kafka", "sqs"),
    *("s3", "gs", "az"),
}
"""With another scheme the text is no URL that we know, and may be a secret that was typed in its place."""
_ENDS: Final = frozenset("?#")
_PLACE: Final = re.compile(r"([^/?#]*)([^?#]*)([?#].*)?", re.DOTALL)
_HOST: Final = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[\w.-]*)(?::[0-9]{1,5})?")
"""A host, and a port in digits: if the host was left out, its place has the user and the password."""
_NEXT_URL: Final = re.compile(r",\s*(?=[a-z][a-z0-9+.-]*://)", re.IGNORECASE)


class ShownSetting(TypedDict):
    """A setting."""

    name: str
    """Its variable."""
    value: str | None
    """Without secrets; null if it is not set."""
    origin: Origin
    is_secret: bool


class SettingsDestination(TypedDict):
    """A destination as it is configured."""

    name: str
    url: str
    """Without user, password, query, and the path of an HTTP destination."""
    when: str
    gets: str
    """Its filter in words, and whether it gets alerts."""
    options: str
    """The other options in words; headers without values."""


class SettingsSource(TypedDict):
    """A source of webhooks."""

    name: str
    environment: str | None
    secret_ids: list[str]
    """Of the secrets that are accepted, as `receiver check` prints them."""
    retired_secret_ids: list[str]


class SettingsToken(TypedDict):
    """A token of the API, without the token."""

    name: str
    scopes: list[str]


class SettingsReport(TypedDict):
    """The settings of the process that answers."""

    settings: list[ShownSetting]
    destinations: list[SettingsDestination]
    sources: list[SettingsSource]
    tokens: list[SettingsToken]


def report(settings: Settings, environ: Mapping[str, str]) -> SettingsReport:
    """Return the settings in force, with the place that each value comes from."""
    given = {name.upper() for name, value in environ.items() if value}
    return SettingsReport(
        settings=[
            _shown(settings, field, given)
            for field in sorted(type(settings).model_fields.keys() - _TABLES, key=variable_name)
        ],
        destinations=[_destination(each) for each in settings.every_destination],
        sources=[
            SettingsSource(
                name=each.name,
                environment=each.environment,
                secret_ids=[Secret.from_text(text).id for text in each.secrets],
                retired_secret_ids=[Secret.from_text(text).id for text in each.retired_secrets],
            )
            for each in settings.all_sources
        ],
        tokens=[SettingsToken(name=each.name, scopes=sorted(each.scopes)) for each in settings.api_tokens],
    )


def _shown(settings: Settings, field: str, given: set[str]) -> ShownSetting:
    name, value = variable_name(field), getattr(settings, field)
    is_given = field in settings.model_fields_set
    return ShownSetting(
        name=name,
        value=_text(field, value),
        origin="environment" if name in given else "file" if is_given else "default",
        is_secret=isinstance(value, SecretStr) and field not in _URLS,
    )


def _text(field: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        return shown_url(secret) if field in _URLS else _secret(secret)
    if isinstance(value, Mapping):
        return mask(", ".join(f"{name}:{each}" for name, each in value.items()))
    if isinstance(value, tuple):
        return mask(", ".join(map(str, value)))
    return mask(str(value))


def _secret(text: str) -> str:
    """Return the public start of a key, which says whether it is live, and nothing of a secret."""
    start = _KEY.match(text)
    return f"{start[0]}{MASK}" if start else MASK


def _destination(each: DestinationSettings) -> SettingsDestination:
    return SettingsDestination(
        name=each.name,
        url=shown_url(each.url.get_secret_value()),
        when=each.when,
        gets=content_text(each),
        options=each.summary,
    )


def shown_url(text: str) -> str:
    """Return a URL, or several, with the parts that are never secret: scheme, host, port and place.

    A user, a password and the query are left out, and the path of a web hook, which may hold a token.
    """
    return mask(", ".join(_one_url(url) for url in _NEXT_URL.split(text)))


def _one_url(url: str) -> str:
    scheme, colon, rest = url.partition(":")
    if not colon:
        return MASK
    login, at, place = rest.rpartition("@")
    if scheme.lower() in _LOCAL:
        login, at, place = "", "", rest
    if scheme.lower() not in _SCHEMES | _LOCAL:
        return MASK
    parts = _PLACE.fullmatch(place.removeprefix("//"))
    host, path, query = parts.groups() if parts else (MASK, "", "")
    is_remote = scheme.lower() not in _LOCAL
    if set(login) & _ENDS or (is_remote and not (rest.startswith("//") and _are_hosts(host))):
        # A password with one of these signs, or a query with an @: nothing of it is surely harmless.
        return f"{scheme}:{MASK}"
    if path.strip("/") and scheme.lower() in _WEB:
        path = "/…"
    slashes = "//" if rest.startswith("//") else ""
    return f"{scheme}:{slashes}{f'{MASK}@' if at else ''}{host}{path}{'?…' if query else ''}"


def _are_hosts(text: str) -> bool:
    return all(_HOST.fullmatch(each) for each in text.split(","))
