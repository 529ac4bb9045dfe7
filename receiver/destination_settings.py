"""The typed `[[destinations]]` tables of `receiver.toml`."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, model_validator

from receiver.config import one_or_more
from receiver.masking import hold, hold_url

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class Table(BaseModel):
    """A table of `receiver.toml`: it can hold no key that means nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class RetrySettings(Table):
    """How a destination is retried: exponential backoff with full jitter, in seconds."""

    initial: float = Field(default=2.0, gt=0, le=3600)
    cap: float = Field(default=600.0, gt=0, le=86_400)
    give_up_after: float = Field(default=259_200.0, gt=0)


_Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(one_or_more)]


class FilterSettings(Table):
    """Which events a destination gets: all that fit every line; a line that is not there fits all.

    Each takes one value or a list of them; `model` takes globs, such as `seedance-*`.
    """

    status: Annotated[tuple[Literal["OK", "ERROR"], ...], BeforeValidator(one_or_more)] = ()
    model: _Words = ()
    source: _Words = ()
    caller: _Words = ()
    metadata: dict[str, _Words] = Field(default_factory=dict)

    @property
    def needs_job(self) -> bool:
        """Whether it looks at what only our own jobs have."""
        return bool(self.caller or self.metadata)


class DestinationSettings(Table):
    """One `[[destinations]]` table."""

    name: Name
    url: SecretStr
    """Where to; masked in output, because broker URLs carry passwords."""
    secret: SecretStr | None = None
    """`whsec_…`: sign HTTP forwards after Standard Webhooks."""
    binary: bool = False
    """HTTP only: CloudEvents' binary mode, with the attributes in headers and the data for a body."""
    when: Literal["received", "media_stored"] = "media_stored"
    filter: FilterSettings = FilterSettings()
    retry: RetrySettings = RetrySettings()

    @model_validator(mode="after")
    def _is_heeded(self) -> Self:
        over_http = self.url.get_secret_value().lower().startswith(("http:", "https:"))
        if not over_http and (self.secret is not None or self.binary):
            raise ValueError("secret and binary are for http: and https: alone")
        hold_url(self.url.get_secret_value())
        hold(self.secret.get_secret_value() if self.secret else "")
        return self
