"""The typed `[[destinations]]` tables of `receiver.toml`."""

import re
from typing import Annotated, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    field_validator,
    model_validator,
)

from receiver.config_file import ProxyUrl, one_or_more, shown_key
from receiver.masking import hold, hold_header, hold_url, mask

MAX_TIMEOUT: Final = 300.0
MAX_CONCURRENCY: Final = 1024
MAX_RATE: Final = 100_000.0

_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_HEADER_VALUE: Final = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_OUR_HEADERS: Final = re.compile(
    r"content-(?:type|length|encoding)|transfer-encoding|accept-encoding|(?:proxy-)?connection|keep-alive|te|"
    r"trailer|upgrade|expect|webhook-(?:id|timestamp|signature)|ce-.*",
    re.IGNORECASE,
)
_USER: Final = re.compile(r"https?://[^/?#]*@", re.IGNORECASE)
"""A URL with a user; an @ may also stand in its path."""
_OVER_TLS: Final = ("https:", "amqps:", "rediss:", "nats:", "tls:", "kafka:", "sqs:")

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


class TlsSettings(Table):
    """Whom a destination's TLS trusts, and the certificate that we show; paths of PEM files."""

    ca: str | None = Field(default=None, min_length=1)
    """Authorities that are trusted in place of the system's."""
    certificate: str | None = Field(default=None, min_length=1)
    key: str | None = Field(default=None, min_length=1)
    """The certificate's key, unless it stands in the certificate's file."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.key is not None and self.certificate is None:
            raise ValueError("key needs certificate, the file of the client certificate")
        if self.ca is None and self.certificate is None:
            raise ValueError("write ca, certificate or both, each the path of a PEM file")
        return self


class DestinationSettings(Table):
    """One `[[destinations]]` table."""

    name: Name
    url: SecretStr
    """Where to; masked in output, because broker URLs carry passwords."""
    secret: SecretStr | None = None
    """`whsec_…`: sign HTTP forwards after Standard Webhooks. Several, separated by commas, while rotating."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """HTTP only: sent with each request; masked in output, because they may carry tokens."""
    binary: bool = False
    """HTTP only: CloudEvents' binary mode, with the attributes in headers and the data for a body."""
    when: Literal["received", "media_stored"] = "media_stored"
    filter: FilterSettings = FilterSettings()
    retry: RetrySettings = RetrySettings()
    timeout: float | None = Field(default=None, gt=0, le=MAX_TIMEOUT)
    """Seconds for one try."""
    concurrency: int | None = Field(default=None, ge=1, le=MAX_CONCURRENCY)
    """Tries under way at once, in each worker process."""
    rate: float | None = Field(default=None, gt=0, le=MAX_RATE)
    """Tries per second, in each worker process."""
    tls: TlsSettings | None = None
    proxy: ProxyUrl | None = None
    """HTTP only: every request goes through it."""
    _given: frozenset[str] = PrivateAttr(default=frozenset())
    """Headers whose values come from variables."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """The signing secrets, in the order given."""
        text = self.secret.get_secret_value() if self.secret else ""
        return tuple(part.strip() for part in text.split(",") if part.strip())

    @property
    def described(self) -> str:
        """What is set beyond name, URL, `when` and filter, in words without a secret; empty if nothing is."""
        tls = self.tls or TlsSettings.model_construct()
        words = {
            f"{self.concurrency} at once": self.concurrency,
            f"{self.rate:g} a second" if self.rate else "": self.rate,
            f"{self.timeout:g} s a try" if self.timeout else "": self.timeout,
            f"headers {', '.join(self.headers)}": self.headers,
            f"signed with {len(self.secrets)} secrets": len(self.secrets) > 1,
            "authorities of its own": tls.ca,
            "a client certificate": tls.certificate,
            "through a proxy": self.proxy,
        }
        return ", ".join(text for text, is_set in words.items() if is_set)

    @field_validator("headers")
    @classmethod
    def _sendable(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, secret in value.items():
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError("a header's name has letters, digits and hyphens, and no space or colon")
            if _OUR_HEADERS.fullmatch(name):
                raise ValueError(f"{name.lower()} is set by the receiver")
            if not _HEADER_VALUE.fullmatch(secret.get_secret_value()):
                raise ValueError(f"{shown_key(name)} is empty or holds a character that is not ASCII")
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("the same header stands there twice, in small and capital letters")
        return value

    @model_validator(mode="after")
    def _is_heeded(self) -> Self:
        url = self.url.get_secret_value()
        over_http = url.lower().startswith(("http:", "https:"))
        if not over_http and (self.secret is not None or self.binary or self.headers or self.proxy):
            raise ValueError("secret, headers, binary and proxy are for http: and https: alone")
        if self.tls is not None and not url.lower().startswith(_OVER_TLS):
            raise ValueError(f"tls is for URLs that start with {', '.join(_OVER_TLS)}")
        if _USER.match(url) and any(name.lower() == "authorization" for name in self.headers):
            raise ValueError("the URL has a user already: write either that or the header Authorization")
        hold_url(url)
        hold_url(self.proxy.get_secret_value() if self.proxy else "")
        for secret in self.secrets:
            hold(secret)
        # Those from variables, which reading the file has held: for a process that gets these settings as
        # they are.
        self._given = frozenset(
            name for name, value in self.headers.items() if mask(text := value.get_secret_value()) != text
        )
        self.hold_headers()
        return self

    def hold_headers(self) -> None:
        """Let `masking` hold the headers that may be secret."""
        for name, value in self.headers.items():
            hold_header(name, value.get_secret_value(), is_given=name in self._given)
