"""The environment and `receiver.toml` as text: what is read here is typed by `settings`.

Values are taken without the white space around them, once and here: secrets made with `echo` end in a line
feed. Errors name the setting and never show its value.
"""

import os
import re
import tomllib
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr

from receiver.errors import SettingsError
from receiver.masking import hold, hold_header, hold_url, mask

DEFAULT_CONFIG: Final = "receiver.toml"
PREFIX: Final = "RECEIVER_"
MIN_TOKEN: Final = 16
"""Characters of an API token: 128 bits need at least as many in any alphabet."""

_REFERENCE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_AROUND: Final = "\ufeff\u200b"
"""Invisible characters that copying leaves around a value, and that Python does not call white space."""
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
"""How the variables start that the clients behind a URL's scheme read by themselves."""
_ENVIRONMENT_SECRETS: Final = re.compile(
    r"PGPASSWORD|(?:AWS|AZURE|GOOGLE)_(?:.*_)?"
    r"(?:SECRET|TOKEN|PASSWORD|PASSPHRASE|KEY|KEY_BASE64|SAS|CONNECTION_STRING)"
)
"""Variables that hold a secret. Others of these clients hold a secret's path, URI, name or kind."""
_SECRET_PARTS: Final = re.compile(r"(?:^|[;&?=])(?:AccountKey|SharedAccessKey|sig)=([^;&]+)", re.IGNORECASE)
"""The secrets in connection strings and SAS tokens, which hold dates and host names beside them."""
_SEVERAL_LINES: Final = re.compile(r"\s*([{\[]|-----BEGIN)")
"""How values start that may have several lines: JSON, and keys in PEM."""

Values = dict[str, Any]


def read_environment(
    environ: Mapping[str, str], variables: Mapping[str, str], *, lists: Collection[str]
) -> Values:
    """Return the settings of the environment by field; `variables` tells which field a variable is.

    Fields in `lists` are several values, separated by commas. Raises SettingsError.
    """
    given = {name.upper(): value for name, value in environ.items() if value}
    for table in ("DESTINATIONS", "SOURCES"):
        if f"{PREFIX}{table}" in given:
            raise SettingsError(
                f"{PREFIX}{table} is not read from the environment: write [[{table.lower()}]] tables in "
                f"{DEFAULT_CONFIG}" + (f", or set {PREFIX}DESTINATION_URL" if table == "DESTINATIONS" else "")
            )
    found = {field: name for name, field in variables.items() if name in given}
    for name in found.values():
        hold_setting(name, given[name])
    return {
        field: _cleaned_list(given[name], name) if field in lists else cleaned(given[name], name)
        for field, name in found.items()
    }


def read_file(environ: Mapping[str, str]) -> Values:
    """Return what `receiver.toml` says, or the file that RECEIVER_CONFIG names. Raises SettingsError."""
    variable = f"{PREFIX}CONFIG"
    named = cleaned(environ.get(variable, ""), variable)
    path = Path(named or DEFAULT_CONFIG)
    try:
        raw = path.read_bytes() if path.is_file() else None
    except OSError as error:
        raise SettingsError(f"{_shown(path)} cannot be read: {os.strerror(error.errno or 0)}") from None
    if raw is None:
        if named:
            raise SettingsError(f"{variable} names {_shown(path)}, which is not a file in {Path.cwd()}")
        if path.exists():
            raise SettingsError(
                f"{_shown(path)} is not a file: containers make a folder in place of a file that is to be "
                "mounted and is not there"
            )
        return {}
    try:
        # Some editors put a byte order mark first, which is no part of TOML.
        content = tomllib.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise SettingsError(f"{_shown(path)} cannot be read: it is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        # The parser's text may quote a key.
        where = _POSITION.search(str(error))
        raise SettingsError(
            f"{_shown(path)} cannot be read: it is not TOML"
            + (f", see {where[1]}" if where else ": see whether a key stands there twice")
        ) from None

    def resolve(text: str) -> str:
        def variable_of(match: re.Match[str]) -> str:
            if match[1] not in environ:
                raise SettingsError(
                    f"{_shown(path)} refers to ${{{mask(match[1])}}}, which is not in the environment"
                )
            return environ[match[1]].strip().strip(_AROUND)

        return _REFERENCE.sub(variable_of, text)

    resolved: Values = _cleaned_tree(content, (), resolve)
    return resolved


def hold_secrets(environ: MutableMapping[str, str], tables: Iterable[Iterable[tuple[str, object]]]) -> None:
    """Remember the secrets of settings and their tables, and those that clients take from the environment."""
    strip_cloud_variables(environ)
    for table in tables:
        for field, value in table:
            if isinstance(value, SecretStr):
                hold_setting(field, value.get_secret_value())


def hold_setting(setting: str, value: str) -> None:
    """Remember the secrets in a setting's value, as it was typed and as it is used."""
    key = setting.lower().removeprefix(PREFIX.lower())
    for text in (value, value.strip()):
        if key == "api_tokens":
            for entry in text.split(","):
                name, _, token = entry.strip().partition(":")
                # Without a usable token it may have been written in the place of the name.
                hold(token.partition(":")[0] if len(token) >= MIN_TOKEN else name)
        elif key.endswith(("_key", "secret", "token")):
            for part in (text, *text.split(",")):
                hold(part.strip(_QUOTES + " "))
        else:
            hold_url(text)


def strip_cloud_variables(environ: MutableMapping[str, str]) -> None:
    """Strip the variables of clients that read the environment themselves, and hold their secrets."""
    for name, value in list(environ.items()):
        text = value.strip()
        if name.startswith(tuple(_CLOUD.values())) and text != value:
            environ[name] = text
        if _ENVIRONMENT_SECRETS.fullmatch(name) and not _SEVERAL_LINES.match(text):
            for secret in _SECRET_PARTS.findall(text) or [text]:
                hold(secret)


def check_cloud_variables(environ: Mapping[str, str], url: str) -> None:
    """Raise SettingsError for a variable with a control character that the client for this URL would read."""
    prefix = _CLOUD.get(url.partition(":")[0].lower())
    for name, value in environ.items():
        if prefix and name.startswith(prefix) and not _SEVERAL_LINES.match(value):
            cleaned(value, name)


def aws_endpoint(environ: Mapping[str, str], service: str) -> str | None:
    """Return the endpoint that the environment names for a service, as AWS clients read it."""
    if environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    return environ.get(f"AWS_ENDPOINT_URL_{service}") or environ.get("AWS_ENDPOINT_URL") or None


def aws_region(environ: Mapping[str, str]) -> str:
    """Return the region that the environment names, empty if it names none."""
    return environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""


def cleaned(value: str, name: str) -> str:
    """Return a value without the white space around it. Raises SettingsError for what cannot be meant."""
    text = value.strip().strip(_AROUND).strip()
    for character in text:
        kind = unicodedata.category(character)
        if kind == "Cs":
            raise SettingsError(f"{name}: is not UTF-8 text")
        if kind in {"Cc", "Zl", "Zp"} or character in _AROUND:
            what = _NAMES.get(character, f"the invisible character U+{ord(character):04X}")
            raise SettingsError(f"{name}: holds {what} inside, which cannot be meant: copy the value again")
    _refuse_quotes(text, name)
    return text


def variable_name(field: str) -> str:
    """Return the name of a setting's environment variable."""
    return field.upper() if field.startswith("clipia_") else f"{PREFIX}{field.upper()}"


def split_list(value: Any) -> Any:
    """Return the entries of a text that separates them by commas; leave any other value as it is."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def one_or_more(value: Any) -> Any:
    """Return one text as a list of its own; leave any other value as it is."""
    return (value,) if isinstance(value, str) else value


def parse_budget(entry: str) -> tuple[str, float]:
    """Return the caller and the credits of one entry. Raises ValueError."""
    name, _, credits_ = entry.partition(":")
    if not name or re.fullmatch(r"[0-9]{1,13}(\.[0-9]+)?", credits_) is None:
        raise ValueError("write caller:credits, several separated by commas; the caller * is every other one")
    return name, float(credits_)


def _refuse_quotes(text: str, name: str) -> None:
    if len(text) > 1 and text[0] == text[-1] and text[0] in _QUOTES:
        raise SettingsError(
            f"{name}: stands in quotes, which became a part of the value: write it without them "
            "(`docker --env-file` keeps quotes)"
        )


def refuse_mistyped(secret: str) -> None:
    """Raise ValueError for text that is none of Clipia's secrets, nor several of them separated by commas."""
    if not secret.isascii():
        raise ValueError("holds a character that is not ASCII: copy the value again")
    for part in (part.strip() for part in secret.split(",")):
        if " " in part or not part.isprintable():
            raise ValueError("holds a space: copy the value again, and separate several secrets by commas")
        if set(part[:1] + part[-1:]) & set(_QUOTES):
            raise ValueError("has a quote at an end: copy the value again")


def refuse_doubles(what: str, names: list[str]) -> None:
    """Raise ValueError for a name that is given more than once."""
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"{what} names must be unique; used more than once: {', '.join(doubles)}")


def is_web_url(text: str) -> bool:
    """Return whether a URL is https, or http on this machine, with no more than a host, a port and a path."""
    try:
        parts = urlsplit(text)
        has_port = parts.port != 0
    except ValueError:
        return False
    host = parts.hostname or ""
    is_safe = parts.scheme == "https" or (parts.scheme == "http" and host in _LOCAL)
    is_plain = text.isprintable() and not set(text) & _NO_WEB_URL
    return is_safe and is_plain and has_port and _HOST.fullmatch(host) is not None


def _require_proxy(value: SecretStr) -> SecretStr:
    wrong = (
        "write http://host:port or https://host:port, with user:password@ before the host if it asks for them"
    )
    try:
        parts = urlsplit(value.get_secret_value())
        is_right = parts.port != 0 and _HOST.fullmatch(parts.hostname or "") is not None
    except ValueError:
        raise ValueError(wrong) from None
    if (
        parts.scheme not in {"http", "https"}
        or parts.path.strip("/")
        or parts.query
        or parts.fragment
        or not is_right
    ):
        raise ValueError(wrong)
    return value


ProxyUrl = Annotated[SecretStr, AfterValidator(_require_proxy)]
"""Where a proxy is; masked in output, because it may carry a password."""


def shown_key(key: str | int) -> str:
    """Return a key of the file for a message; what has not the form of a setting's name may be a secret."""
    text = str(key)
    return text if text.isdigit() or (_PLAIN_KEY.fullmatch(text) and mask(text) == text) else "(a key)"


def _cleaned_list(value: str, name: str) -> str:
    # Each entry has white space of its own: in a YAML block every one stands in a line.
    _refuse_quotes(value.strip(), name)
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
        hold_header(str(path[-1]), text.strip(), is_given=text != value)
    hold_setting(str(path[-1]) if isinstance(path[-1], str) else str(path[0]), text)
    is_list = path[-1] in {"secret", "api_tokens", "media_hosts", "budgets", "clipia_webhook_secret"}
    return _cleaned_list(text, name) if is_list else cleaned(text, name)


def _shown(path: Path) -> str:
    """Return a path for a message, unless it may be something else that was pasted in its place."""
    text = str(path)
    return mask(text) if text.endswith(".toml") and text.isprintable() else "the file"
