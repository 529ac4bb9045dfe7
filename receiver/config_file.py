"""The environment and `receiver.toml` as text; `settings` gives the values their types.

White space around a value is removed here and only here: secrets made with `echo` end with a line feed.
Errors name the setting and never show its value.
"""

import os
import re
import tomllib
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final
from urllib.parse import SplitResult, unquote, urlsplit

from pydantic import AfterValidator, SecretStr

from receiver.errors import SettingsError
from receiver.masking import mask, register_header, register_secret, register_url

DEFAULT_CONFIG: Final = "receiver.toml"
PREFIX: Final = "RECEIVER_"
URL_VARIABLE: Final = "RECEIVER_URL"
TOKEN_VARIABLE: Final = "RECEIVER_TOKEN"  # noqa: S105 - a name
MIN_TOKEN: Final = 16
"""The fewest characters of an API token: a shorter one could not hold 128 random bits."""

_REFERENCE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_AROUND: Final = "\ufeff\u200b"
"""Invisible characters that copying leaves around a value; `str.strip` does not remove them."""
_QUOTES: Final = "\"'`"
_NAMES: Final = {"\n": "a line feed", "\r": "a carriage return", "\t": "a tab", "\0": "NUL"}
_PLAIN_KEY: Final = re.compile(r"[A-Za-z_-]{1,32}")
_HOST: Final = re.compile(r"[\w.-]+|[0-9a-f:.]+", re.IGNORECASE)
_LOCAL: Final = frozenset({"localhost", "127.0.0.1"})
_NO_WEB_URL: Final = frozenset(" ?#@\\\"'`<>")
_POSITION: Final = re.compile(r"\(at ([^()]*)\)$")
_CLOUD: Final[Mapping[str, str]] = MappingProxyType(
    {"s3": "AWS_", "sqs": "AWS_", "az": "AZURE_", "gs": "GOOGLE_"}
)
"""The prefix of the variables that the client for each URL scheme reads itself."""
_ENVIRONMENT_SECRETS: Final = re.compile(
    r"PGPASSWORD|(?:AWS|AZURE|GOOGLE)_(?:.*_)?"
    r"(?:SECRET|TOKEN|PASSWORD|PASSPHRASE|KEY|KEY_BASE64|SAS|CONNECTION_STRING)"
)
"""Variables with a secret. Other variables of these clients hold a secret's path, URI, name or kind."""
_COLLECTOR: Final = re.compile(r"OTEL_EXPORTER_OTLP_(?:TRACES_)?(?:ENDPOINT|HEADERS)")
_SECRET_PARTS: Final = re.compile(r"(?:^|[;&?=])(?:AccountKey|SharedAccessKey|sig)=([^;&]+)", re.IGNORECASE)
"""The secrets in connection strings and SAS tokens; dates and host names around them are not secret."""
_SEVERAL_LINES: Final = re.compile(r"\s*([{\[]|-----BEGIN)")
"""The start of values that may have several lines: JSON, and keys in PEM."""

Values = dict[str, Any]


def read_environment(
    environ: Mapping[str, str], variables: Mapping[str, str], *, lists: Collection[str]
) -> Values:
    """Return the settings of the environment by field; `variables` maps the name of a variable to its field.

    Fields in `lists` are lists separated by commas. Raises SettingsError.
    """
    given = {name.upper(): value for name, value in environ.items() if value}
    for table, advice in (("DESTINATIONS", f", or set {PREFIX}DESTINATION_URL"), ("SOURCES", "")):
        if f"{PREFIX}{table}" in given:
            raise SettingsError(
                f"{PREFIX}{table} is not read from the environment: write [[{table.lower()}]] tables in "
                f"{DEFAULT_CONFIG}{advice}"
            )
    found = {field: name for name, field in variables.items() if name in given}
    for name in found.values():
        register_setting(name, given[name])
    return {
        field: _cleaned_list(given[name], name) if field in lists else cleaned(given[name], name)
        for field, name in found.items()
    }


def read_remote(
    environ: Mapping[str, str], *, url: str | None = None, token: str | None = None
) -> tuple[str, str] | None:
    """Return the URL and the token of a receiver elsewhere; None if no URL is given.

    A value that is given takes the place of its variable. Raises SettingsError.
    """
    given = {URL_VARIABLE: url, TOKEN_VARIABLE: token}
    values = {name: environ.get(name, "") if text is None else text for name, text in given.items()}
    for name, text in values.items():
        register_setting(name, text)
    address, secret = (cleaned(text, name) for name, text in values.items())
    if not address:
        return None
    if not secret:
        raise SettingsError(
            f"{TOKEN_VARIABLE} is not set: write one of the receiver's RECEIVER_API_TOKENS, without its name"
        )
    return address, secret


def read_file(environ: Mapping[str, str]) -> Values:
    """Return the content of `receiver.toml`, or of the file that RECEIVER_CONFIG names.

    Raises SettingsError.
    """
    variable = f"{PREFIX}CONFIG"
    named = cleaned(environ.get(variable, ""), variable)
    path = Path(named or DEFAULT_CONFIG)
    try:
        raw = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise SettingsError(f"{_shown(path)} cannot be read: {os.strerror(error.errno or 0)}") from None
    if raw is not None:
        try:
            resolved: Values = _cleaned_tree(_parse(raw, path), (), partial(_resolve, environ, path))
        except RecursionError as error:
            # Dotted keys are parsed without recursion, however deep they are.
            raise SettingsError(
                f"{_shown(path)} cannot be read ({type(error).__name__}): it is nested too deeply"
            ) from None
        return resolved
    if named:
        raise SettingsError(f"{variable} names {_shown(path)}, which is not a file in {Path.cwd()}")
    if path.exists():
        raise SettingsError(
            f"{_shown(path)} is not a file: if a file to be mounted is missing, containers make a folder in "
            "its place; check the mount"
        )
    return {}


def _parse(raw: bytes, path: Path) -> Values:
    try:
        # Some editors write a byte order mark at the start; TOML does not allow it.
        return tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise SettingsError(f"{_shown(path)} cannot be read: it is not UTF-8; save it as UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        # Only the position is repeated: the parser's text may quote a key.
        position = _POSITION.search(str(error))
        raise SettingsError(
            f"{_shown(path)} cannot be read: it is not TOML"
            + (f", see {position[1]}" if position else ": check for a key that is given twice")
        ) from None
    except ValueError as error:
        raise SettingsError(
            f"{_shown(path)} cannot be read ({type(error).__name__}): check for a number with thousands of "
            "digits"
        ) from None


def _resolve(environ: Mapping[str, str], path: Path, text: str) -> str:
    """Replace each `${NAME}` in a string of the file by the variable's value. Raises SettingsError."""

    def variable_of(match: re.Match[str]) -> str:
        if match[1] not in environ:
            raise SettingsError(
                f"{_shown(path)} refers to ${{{mask(match[1])}}}, which is not in the environment: set it"
            )
        return environ[match[1]].strip().strip(_AROUND)

    return _REFERENCE.sub(variable_of, text)


def register_secrets(
    environ: MutableMapping[str, str], tables: Iterable[Iterable[tuple[str, object]]]
) -> None:
    """Register the secrets of settings, of their tables, and of variables that clients read themselves."""
    strip_cloud_variables(environ)
    for table in tables:
        for field, value in table:
            if isinstance(value, SecretStr):
                register_setting(field, value.get_secret_value())


def register_setting(setting: str, value: str) -> None:
    """Register the secrets in a setting's value, with and without the white space around it."""
    key = setting.lower().removeprefix(PREFIX.lower())
    for text in (value, value.strip()):
        if key == "api_tokens":
            for entry in text.split(","):
                name, _, token = entry.strip().partition(":")
                # If the token is too short, the secret may have been typed as the name.
                register_secret(token.partition(":")[0] if len(token) >= MIN_TOKEN else name)
        elif key.endswith(("_key", "secret", "token")):
            for part in (text, *text.split(",")):
                register_secret(part.strip(_QUOTES + " "))
        else:
            register_url(text)


def strip_cloud_variables(environ: MutableMapping[str, str]) -> None:
    """Strip the variables that clients read themselves, and register their secrets."""
    for name, value in list(environ.items()):
        text = value.strip()
        if name.startswith(tuple(_CLOUD.values())) and text != value:
            environ[name] = text
        if _ENVIRONMENT_SECRETS.fullmatch(name) and not _SEVERAL_LINES.match(text):
            for secret in _SECRET_PARTS.findall(text) or [text]:
                register_secret(secret)
        if _COLLECTOR.fullmatch(name):
            # In HEADERS: key=value, separated by commas and percent-encoded.
            for part in [text, *text.split(",")] if name.endswith("HEADERS") else ():
                register_secret(part.partition("=")[2])
                register_secret(unquote(part.partition("=")[2]))
            register_url(text)


def check_cloud_variables(environ: Mapping[str, str], url: str) -> None:
    """Raise SettingsError if the client for this URL would read a variable with a control character."""
    prefix = _CLOUD.get(url.partition(":")[0].lower())
    for name, value in environ.items():
        if prefix and name.startswith(prefix) and not _SEVERAL_LINES.match(value):
            cleaned(value, name)


def aws_endpoint(environ: Mapping[str, str], service: str) -> str | None:
    """Return the endpoint of a service from the variables of AWS clients, or None."""
    if environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    return environ.get(f"AWS_ENDPOINT_URL_{service}") or environ.get("AWS_ENDPOINT_URL") or None


def aws_region(environ: Mapping[str, str]) -> str:
    """Return the region from the variables of AWS clients; empty if none is set."""
    return environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""


def otlp_endpoint(environ: Mapping[str, str] = os.environ) -> str | None:
    """Return the URL that spans are sent to by OpenTelemetry's own variables; None if tracing is off."""
    is_off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    if is_off or environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() not in {"", "otlp"}:
        return None
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    return next((value for name in names if (value := environ.get(name, "").strip())), None)


def cleaned(value: str, name: str) -> str:
    """Return a value without the white space around it.

    Raises SettingsError if it contains a control character or stands in quotes.
    """
    text = value.strip().strip(_AROUND).strip()
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            raise SettingsError(f"{name}: is not UTF-8 text: copy the value again")
        if kind in {"Cc", "Zl", "Zp"} or character in _AROUND:
            shown = _NAMES.get(character, f"the invisible character U+{ord(character):04X}")
            raise SettingsError(f"{name}: contains {shown}: copy the value again")
    _require_unquoted(text, name)
    return text


def variable_name(field: str) -> str:
    """Return the name of a setting's environment variable."""
    return field.upper() if field.startswith("clipia_") else f"{PREFIX}{field.upper()}"


def split_list(value: Any) -> Any:
    """Split a text at its commas; return any other value as it is."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def one_or_more(value: Any) -> Any:
    """Wrap a text in a tuple; return any other value as it is."""
    return (value,) if isinstance(value, str) else value


def parse_budget(entry: str) -> tuple[str, float]:
    """Return the caller and the credits of one entry. Raises ValueError."""
    name, _, credits_ = entry.partition(":")
    if not name or re.fullmatch(r"[0-9]{1,13}(\.[0-9]+)?", credits_) is None:
        raise ValueError("write caller:credits, separated by commas; the caller * stands for all others")
    return name, float(credits_)


def parse_token(entry: Any, scopes: Iterable[str]) -> Any:
    """Return the name, the token and the scopes of one entry; without a scope it has all `scopes`."""
    if not isinstance(entry, str):
        return entry
    name, _, rest = entry.partition(":")
    token, colon, given = rest.partition(":")
    # `name:token` has all scopes. `name:token:` has the empty scope "", which is invalid.
    return {"name": name, "token": token, "scopes": frozenset(given.split("+") if colon else scopes)}


def _require_unquoted(text: str, name: str) -> None:
    if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
        raise SettingsError(
            f"{name}: the quotes around the value are part of it: remove them "
            "(`docker --env-file` keeps quotes)"
        )


def require_well_formed(secret: str) -> None:
    """Raise ValueError for a character that no secret of Clipia's has; commas separate several secrets."""
    if not secret.isascii():
        raise ValueError("contains a character that is not ASCII: copy the value again")
    for part in (part.strip() for part in secret.split(",")):
        if " " in part or not part.isprintable():
            raise ValueError(
                "contains a space: copy the value again, and separate several secrets with commas"
            )
        if set(part[:1] + part[-1:]) & set(_QUOTES):
            raise ValueError("starts or ends with a quote: copy the value again")


def require_unique(kind: str, names: list[str]) -> None:
    """Raise ValueError for a name that is given more than once."""
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"{kind} names must be unique; used more than once: {', '.join(doubles)}")


def is_web_url(text: str, *, plain: bool = False) -> bool:
    """Return whether a URL is https, or http on this machine, and has only a host, a port and a path.

    With `plain`, http on another machine will do, too.
    """
    parts = _split_url(text)
    if parts is None or not text.isprintable() or set(text) & _NO_WEB_URL:
        return False
    return parts.scheme == "https" or (parts.scheme == "http" and (plain or parts.hostname in _LOCAL))


def _split_url(text: str) -> SplitResult | None:
    """Return the parts of a URL; None if its host or port is invalid."""
    try:
        parts = urlsplit(text)
        return parts if parts.port != 0 and _HOST.fullmatch(parts.hostname or "") else None
    except ValueError:
        return None


def _require_proxy(value: SecretStr) -> SecretStr:
    parts = _split_url(value.get_secret_value())
    if (
        parts is None
        or parts.scheme not in {"http", "https"}
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
    ):
        raise ValueError(
            "write http://host:port or https://host:port, with user:password@ if it needs a login"
        )
    return value


ProxyUrl = Annotated[SecretStr, AfterValidator(_require_proxy)]
"""The URL of a proxy; masked in output, because it may contain a password."""


def shown_key(key: str | int) -> str:
    """Return a key of the file for a message, if it looks like a setting's name: it may be a secret."""
    text = str(key)
    return text if text.isdigit() or (_PLAIN_KEY.fullmatch(text) and mask(text) == text) else "(a key)"


def _cleaned_list(value: str, name: str) -> str:
    # Each entry may have white space around it: a YAML block has one entry per line.
    _require_unquoted(value.strip(), name)
    parts = value.split(",")
    return ",".join(
        cleaned(part, f"{name}: entry {number}" if len(parts) > 1 else name)
        for number, part in enumerate(parts, 1)
    )


def _cleaned_tree(value: Any, path: tuple[str | int, ...], resolve: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _cleaned_tree(item, (*path, key), resolve) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned_tree(item, (*path, number), resolve) for number, item in enumerate(value)]
    if not isinstance(value, str):
        return value
    name = f"{DEFAULT_CONFIG}: " + ".".join(shown_key(part) for part in path)
    text = resolve(value)
    if "headers" in path:
        register_header(str(path[-1]), text.strip(), is_given=text != value)
    register_setting(str(path[-1]) if isinstance(path[-1], str) else str(path[0]), text)
    is_list = path[-1] in {"secret", "api_tokens", "media_hosts", "budgets", "clipia_webhook_secret"}
    return _cleaned_list(text, name) if is_list else cleaned(text, name)


def _shown(path: Path) -> str:
    """Return a path for a message, if it looks like one: another value may have been pasted in its place."""
    text = str(path)
    return mask(text) if text.endswith(".toml") and text.isprintable() else "the file"
