"""The typed `[[destinations]]` tables of `receiver.toml`."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Final, Literal, Self, TypeVar

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
from receiver.masking import mask, register_header, register_secret, register_url

ValueT = TypeVar("ValueT")

MAX_TIMEOUT: Final = 300.0
MAX_CONCURRENCY: Final = 1024
MAX_RATE: Final = 100_000.0

_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_HEADER_VALUE: Final = re.compile(r"[!-~](?:[ -~]*[!-~])?")
_OUR_HEADERS: Final = re.compile(
    r"content-(?:type|length|encoding)|transfer-encoding|accept-encoding|(?:proxy-)?connection|keep-alive|te|"
    r"trailer|upgrade|expect|webhook-(?:id|timestamp|signature)|trace(?:parent|state)|ce-.*",
    re.IGNORECASE,
)
_USER: Final = re.compile(r"https?://[^/?#]*@", re.IGNORECASE)
"""A URL with a user; an @ in the path does not count."""
_OVER_TLS: Final = ("https:", "amqps:", "rediss:", "nats:", "tls:", "kafka:", "sqs:")

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")]


class Table(BaseModel):
    """A table of `receiver.toml`; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class RetrySettings(Table):
    """The retries of a destination: exponential backoff with full jitter, in seconds."""

    initial: float = Field(default=2.0, gt=0, le=3600)
    """The most seconds before the second attempt; they double with each further one."""
    cap: float = Field(default=600.0, gt=0, le=86_400)
    """The most seconds between two attempts."""
    give_up_after: float = Field(default=259_200.0, gt=0)
    """Seconds after which a delivery is a dead letter; the default is three days."""


_Words = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(one_or_more)]


class FilterSettings(Table):
    """The filter of a destination: it gets an event if every given line matches.

    Each line is one value or a list; `model` takes globs such as `seedance-*`.
    """

    status: Annotated[tuple[Literal["OK", "ERROR"], ...], BeforeValidator(one_or_more)] = ()
    """Whether the generation succeeded."""
    model: _Words = ()
    """Models; globs such as `seedance-*` match, too."""
    source: _Words = ()
    """Names of sources."""
    caller: _Words = ()
    """Callers of the jobs. An event without a job does not match."""
    metadata: dict[str, _Words] = Field(default_factory=dict)
    """Values of the job's metadata by name. An event without a job does not match."""

    @property
    def needs_job(self) -> bool:
        """Whether it tests fields of the job; an event without a job does not match then."""
        return bool(self.caller or self.metadata)


class TlsSettings(Table):
    """The authorities that a destination's TLS trusts, and our client certificate: paths of PEM files."""

    ca: str | None = Field(default=None, min_length=1)
    """Trusted authorities, in place of the system's."""
    certificate: str | None = Field(default=None, min_length=1)
    """The client certificate, for mutual TLS."""
    key: str | None = Field(default=None, min_length=1)
    """The certificate's key, if it is not in the certificate's file."""

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
    """Lower-case letters, digits, `_` and `-`, 63 characters at most. Deliveries belong to this name."""
    url: SecretStr
    """Where messages go; each scheme has a section in docs/destinations.md. Masked in output, because broker
    URLs contain passwords."""
    secret: SecretStr | None = None
    """HTTP only: sign as in Standard Webhooks with this `whsec_…`; several, separated by commas, during a
    rotation."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """HTTP only: sent with each request; masked in output, because they may contain tokens."""
    binary: bool = False
    """HTTP only: CloudEvents' binary mode, with the attributes as headers and the data as the body."""
    when: Literal["received", "media_stored"] = "media_stored"
    """`media_stored`: an event is sent after its files have been stored or given up; `received`: at once."""
    filter: FilterSettings = FilterSettings()
    """The events that it gets; all of them without a filter."""
    alerts: bool | Literal["only"] = False
    """`true`: it gets alerts besides events; `"only"`: alerts and no event (docs/alerts.md)."""
    retry: RetrySettings = RetrySettings()
    """The times of its attempts."""
    timeout: float | None = Field(default=None, gt=0, le=MAX_TIMEOUT)
    """Seconds for one attempt, from its start to the confirmation; 15 by default. For a file, seconds to wait
    for its lock; 10 by default."""
    concurrency: int | None = Field(default=None, ge=1, le=MAX_CONCURRENCY)
    """Concurrent attempts of each worker process; docs/destinations.md has the default of each scheme."""
    rate: float | None = Field(default=None, gt=0, le=MAX_RATE)
    """Attempts per second of each worker process."""
    tls: TlsSettings | None = None
    """Certificates, for schemes with TLS."""
    proxy: ProxyUrl | None = None
    """HTTP only: `http://user:password@host:port`, the proxy of every request. Those of the environment are
    ignored."""
    _given: frozenset[str] = PrivateAttr(default=frozenset())
    """Headers with values from variables."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """The signing secrets in the order of the setting."""
        text = self.secret.get_secret_value() if self.secret else ""
        return tuple(part.strip() for part in text.split(",") if part.strip())

    @property
    def summary(self) -> str:
        """The optional settings in words, without secrets; name, URL, `when` and filter are left out."""
        tls = self.tls or TlsSettings.model_construct()
        words = {
            f"{self.concurrency} at once": self.concurrency,
            f"{self.rate:g} per second" if self.rate else "": self.rate,
            f"{self.timeout:g} s per attempt" if self.timeout else "": self.timeout,
            f"headers {', '.join(self.headers)}": self.headers,
            f"signed with {len(self.secrets)} secrets": len(self.secrets) > 1,
            "its own authorities": tls.ca,
            "a client certificate": tls.certificate,
            "through a proxy": self.proxy,
        }
        return ", ".join(text for text, is_set in words.items() if is_set)

    @field_validator("headers")
    @classmethod
    def _sendable(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, secret in value.items():
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError("a header's name has letters, digits and hyphens, but no space or colon")
            if _OUR_HEADERS.fullmatch(name):
                raise ValueError(f"{name.lower()} is set by the receiver: remove it")
            if not _HEADER_VALUE.fullmatch(secret.get_secret_value()):
                raise ValueError(f"{shown_key(name)} is empty or contains a character that is not ASCII")
        if len({name.lower() for name in value}) < len(value):
            raise ValueError("a header is given twice: upper and lower case are the same")
        return value

    @model_validator(mode="after")
    def _fits_the_url(self) -> Self:
        url = self.url.get_secret_value()
        over_http = url.lower().startswith(("http:", "https:"))
        if not over_http and any((self.secret is not None, self.binary, self.headers, self.proxy)):
            raise ValueError("secret, headers, binary and proxy are for http: and https: only")
        if self.tls is not None and not url.lower().startswith(_OVER_TLS):
            raise ValueError(f"tls is for URLs that start with {', '.join(_OVER_TLS)}")
        if _USER.match(url) and any(name.lower() == "authorization" for name in self.headers):
            raise ValueError(
                "the URL contains a user, and there is a header Authorization: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _register_secrets(self) -> Self:
        register_url(self.url.get_secret_value())
        register_url(self.proxy.get_secret_value() if self.proxy else "")
        for secret in self.secrets:
            register_secret(secret)
        # `read_file` has registered the headers from variables. Another process gets these settings pickled,
        # so their names are kept.
        values = {name: secret.get_secret_value() for name, secret in self.headers.items()}
        self._given = frozenset(name for name, value in values.items() if mask(value) != value)
        self.register_headers()
        return self

    def register_headers(self) -> None:
        """Register the headers that may be secret with `masking`."""
        for name, value in self.headers.items():
            register_header(name, value.get_secret_value(), is_given=name in self._given)


class ByName(Mapping[str, ValueT]):
    """A value of each destination that is configured now, by name; a reload changes it."""

    def __init__(
        self,
        read: Callable[[], Iterable[DestinationSettings]],
        value: Callable[[DestinationSettings], ValueT],
    ) -> None:
        self._read = read
        self._value = value

    def __getitem__(self, name: str) -> ValueT:
        return self._values()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values())

    def __len__(self) -> int:
        return len(self._values())

    def _values(self) -> dict[str, ValueT]:
        return {each.name: self._value(each) for each in self._read()}
