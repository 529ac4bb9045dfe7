"""Typed settings: environment first, then `receiver.toml`, then defaults.

This module and `config_file`, which reads both as text, are the only readers of the environment and of
`receiver.toml`. Strings in the file may refer to environment variables as `${NAME}`, so secrets can stay out
of the file.
"""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Final, Literal, Self

from pydantic import (
    PrivateAttr,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from receiver.config_file import (
    DEFAULT_CONFIG,
    TOKEN_VARIABLE,
    URL_VARIABLE,
    check_cloud_variables,
    is_web_url,
    parse_budget,
    parse_token,
    read_environment,
    read_file,
    register_secrets,
    require_unique,
    require_well_formed,
    shown_key,
    split_list,
    variable_name,
)
from receiver.destination_settings import DestinationSettings
from receiver.errors import SettingsError
from receiver.plain_words import in_our_words
from receiver.price import MAX_CREDITS, Credits, read_credits
from receiver.setting_fields import SCOPES, SettingFields
from receiver.source_settings import SourceSettings

DEFAULT_SOURCE: Final = "clipia"
CALLBACK_PATH: Final = "/clipia/webhook"
"""The path of the default source's webhooks; `/<source>` is appended for other sources."""

_LISTS: Final = frozenset(
    {"clipia_webhook_secret", "clipia_retired_webhook_secret", "api_tokens", "media_hosts", "budgets"}
)
"""Settings that are lists separated by commas."""


class Settings(SettingFields):
    """All settings. `Settings.load()` reads them; docs/configuration.md has a table of them."""

    model_config = SettingsConfigDict(
        env_prefix="RECEIVER_",
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        populate_by_name=True,
        env_ignore_empty=True,
    )

    _reloaded: tuple[DestinationSettings, ...] | None = PrivateAttr(default=None)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: arguments, environment, `receiver.toml`."""
        # pydantic's own source for the environment is not used: its errors quote values that are not JSON.
        variables = {
            variable_name(field): field for field in cls.model_fields.keys() - {"destinations", "sources"}
        }
        environment = read_environment(os.environ, variables, lists=_LISTS)
        return (
            init_settings,
            InitSettingsSource(settings_cls, init_kwargs=environment),
            InitSettingsSource(settings_cls, init_kwargs=read_file(os.environ)),
        )

    @field_validator("media_hosts", "durable_without", "retention_also", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return split_list(value)

    @field_validator("budgets", mode="before")
    @classmethod
    def _split_budgets(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return dict(parse_budget(entry) for entry in split_list(value))

    @field_validator("budgets")
    @classmethod
    def _valid_budgets(cls, value: dict[str, Credits]) -> dict[str, Credits]:
        budgets = {name: price for name, given in value.items() if (price := read_credits(given)) is not None}
        if len(budgets) < len(value):
            raise ValueError(f"a budget is a number of credits from 0 to {MAX_CREDITS}")
        return budgets

    @field_validator("public_url", "clipia_base_url")
    @classmethod
    def _web_url(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if not is_web_url(value):
            host = "hooks.example.com" if info.field_name == "public_url" else "api.clipia.ai"
            raise ValueError(
                f"write an https URL such as https://{host} (http is for localhost and 127.0.0.1 only), "
                "without user, password, query and fragment"
            )
        return value.rstrip("/")

    @field_validator("internal_url")
    @classmethod
    def _any_web_url(cls, value: str | None) -> str | None:
        if value is not None and not is_web_url(value, plain=True):
            raise ValueError(
                "write the internal listener's URL such as https://receiver.internal, without user, "
                "password, query and fragment"
            )
        return None if value is None else value.rstrip("/")

    @field_validator("clipia_key", "clipia_webhook_secret", "clipia_retired_webhook_secret")
    @classmethod
    def _well_formed(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        text = value.get_secret_value() if value else ""
        if info.field_name == "clipia_key" and value is not None and not text:
            raise ValueError("is empty: unset it, or set it to the key from the Clipia developer console")
        require_well_formed(text)
        return value

    @field_validator("api_tokens", mode="before")
    @classmethod
    def _split_tokens(cls, value: Any) -> Any:
        return [parse_token(entry, SCOPES) for entry in split_list(value)]

    @model_validator(mode="after")
    def _check_buffer(self) -> Self:
        if self.max_buffered_bytes < 4 * self.max_body_bytes:
            raise ValueError(
                "RECEIVER_MAX_BUFFERED_BYTES must be at least four times RECEIVER_MAX_BODY_BYTES: "
                "large bodies may use three quarters of it, and the rest is for small ones"
            )
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        require_unique("destination", [destination.name for destination in self.every_destination])
        require_unique("source", [source.name for source in self.all_sources])
        names = [token.name for token in self.api_tokens]
        if doubles := [number for number, name in enumerate(names, 1) if names.count(name) > 1]:
            entries = " and ".join(str(number) for number in doubles)
            raise ValueError(f"RECEIVER_API_TOKENS: entries {entries} have the same name: give each its own")
        return self

    @model_validator(mode="after")
    def _check_job_source(self) -> Self:
        names = {source.name for source in self.all_sources}
        if self._key and self.public_url and names and DEFAULT_SOURCE not in names:
            raise ValueError(
                f"the webhooks of jobs that CLIPIA_KEY submits are sent to source {DEFAULT_SOURCE!r}, which "
                "has no secret: set CLIPIA_WEBHOOK_SECRET"
            )
        return self

    @model_validator(mode="after")
    def _check_environment(self) -> Self:
        environment = self._environment
        if environment is None:
            return self
        wrong = "clipia_test_" if environment == "live" else "clipia_live_"
        if self._key.startswith(wrong):
            raise ValueError(
                f"CLIPIA_KEY starts with {wrong} but the source {DEFAULT_SOURCE!r} is declared as "
                f"environment = {environment!r}: sandbox and live events must not mix"
            )
        return self

    @property
    def _key(self) -> str:
        return self.clipia_key.get_secret_value() if self.clipia_key else ""

    @property
    def _environment(self) -> Literal["live", "test"] | None:
        """The declared environment of the source `clipia`."""
        return next((source.environment for source in self.sources if source.name == DEFAULT_SOURCE), None)

    @property
    def all_destinations(self) -> tuple[DestinationSettings, ...]:
        """The destinations of events."""
        return tuple(each for each in self.every_destination if each.alerts != "only")

    @property
    def alert_destinations(self) -> tuple[DestinationSettings, ...]:
        """The destinations of alerts."""
        return tuple(each for each in self.every_destination if each.alerts)

    @property
    def every_destination(self) -> tuple[DestinationSettings, ...]:
        """The tables of the file, and `RECEIVER_DESTINATION_URL` as `default`. A reload changes them."""
        if self._reloaded is not None or self.destination_url is None:
            return self.destinations if self._reloaded is None else self._reloaded
        return (*self.destinations, DestinationSettings(name="default", url=self.destination_url))

    def take_destinations(self, loaded: "Settings") -> None:
        """Use the destinations of settings that were read again."""
        self._reloaded = loaded.every_destination

    @property
    def _retired_secret(self) -> SecretStr | None:
        """The earlier secrets of the source `clipia`."""
        named = (each.retired_secret for each in self.sources if each.name == DEFAULT_SOURCE)
        return self.clipia_retired_webhook_secret or next(named, None)

    @property
    def all_sources(self) -> tuple[SourceSettings, ...]:
        """The tables of `receiver.toml`, and `CLIPIA_WEBHOOK_SECRET` as the source `clipia`."""
        if self.clipia_webhook_secret is None:
            return self.sources
        others = tuple(source for source in self.sources if source.name != DEFAULT_SOURCE)
        secret = self.clipia_webhook_secret
        return (
            SourceSettings(
                name=DEFAULT_SOURCE,
                secret=secret,
                retired_secret=self._retired_secret,
                environment=self._environment,
            ),
            *others,
        )

    def require_sources(self) -> tuple[SourceSettings, ...]:
        """Return the sources; raise SettingsError if there is none, or if one has no secret."""
        if not self.all_sources:
            raise SettingsError(
                "no webhook secret: set CLIPIA_WEBHOOK_SECRET to the signing secret from the Clipia "
                "developer console (during a rotation, to several secrets separated by commas)"
            )
        for source in self.all_sources:
            if not source.secrets:
                name = "CLIPIA_WEBHOOK_SECRET" if source.name == DEFAULT_SOURCE else f"source {source.name!r}"
                raise SettingsError(
                    f"{name}: the webhook secret is empty: copy it from the Clipia developer console"
                )
        return self.all_sources

    @classmethod
    def load(cls, **overrides: Any) -> Self:
        """Read the environment and `receiver.toml`.

        Raises SettingsError, which names the setting and never quotes its value.
        """
        try:
            settings = cls(**overrides)
        except ValidationError as error:
            problems = "\n".join(
                f"  {_spelling(e['loc'])}: {_reason(e)}" for e in error.errors(include_input=False)
            )
            raise SettingsError(f"invalid settings:\n{problems}") from None
        settings.register_secrets()
        for url in (settings.storage_url, *(each.url for each in settings.every_destination)):
            check_cloud_variables(os.environ, url.get_secret_value())
        return settings

    def register_secrets(self) -> None:
        """Register all secrets with `masking`, and those of variables that clients read themselves.

        `load` does this. A process that received its settings from another process must call it.
        """
        register_secrets(os.environ, (self, *self.destinations, *self.sources, *self.api_tokens))
        for each in self.destinations:
            each.register_headers()


def unknown_variables(environ: Mapping[str, str] = os.environ) -> dict[str, str | None]:
    """Return the names in `environ` that start with RECEIVER_ and are no settings, each with the closest one.

    They are probably mistyped; the closest one is None if none is similar.
    """
    known = {variable_name(field) for field in Settings.model_fields}
    known |= {"RECEIVER_CONFIG", URL_VARIABLE, TOKEN_VARIABLE}
    found = sorted(name for name in environ if name.startswith("RECEIVER_") and name not in known)
    # Without the common start, which would make all of them similar.
    endings = {name.removeprefix("RECEIVER_"): name for name in known}
    close = {name: get_close_matches(name.removeprefix("RECEIVER_"), endings, n=1) for name in found}
    return {name: endings[matches[0]] if matches else None for name, matches in close.items()}


def _spelling(location: tuple[int | str, ...]) -> str:
    """Return a setting's name as the operator writes it: a variable, or a path into the file."""
    if not location:
        return "settings"
    head, *rest = str(location[0]).lower(), *location[1:]
    if head == "api_tokens" and rest:
        return (
            f"RECEIVER_API_TOKENS: entry {int(rest[0]) + 1}: {'.'.join(shown_key(part) for part in rest[1:])}"
        )
    if rest or head in {"destinations", "sources"} or head not in Settings.model_fields:
        return f"{DEFAULT_CONFIG}: " + ".".join(shown_key(part) for part in location)
    return variable_name(head)


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        return "is not a setting: see docs/configuration.md"
    return in_our_words(error["msg"])
