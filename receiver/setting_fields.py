"""The fields of the settings, in the order of docs/configuration.md, which is made of their docstrings.

A docstring may name a page of docs/, such as `docs/media.md#links`, which becomes a link there.
`python tests/support/configuration_reference.py` writes the tables of the page.
"""

import re
from typing import Annotated, Final, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode

from receiver.config_file import MIN_TOKEN, ProxyUrl
from receiver.destination_settings import DestinationSettings, Name, Table
from receiver.price import Credits
from receiver.source_settings import SourceSettings

Scope = Literal["submit", "read", "operate"]
InputCheck = Literal["on", "strict", "off"]
SCOPES: Final[tuple[Scope, ...]] = ("submit", "read", "operate")


class ApiToken(Table):
    """A bearer token of the internal API: the caller's name, its token and its scopes."""

    name: Name
    token: SecretStr
    scopes: frozenset[Scope]

    @field_validator("name")
    @classmethod
    def _no_token(cls, value: str) -> str:
        if re.fullmatch(r"[0-9a-f]{32,}", value):
            raise ValueError("looks like a token: write name:token[:scope+scope]")
        return value

    @field_validator("token")
    @classmethod
    def _sendable(cls, value: SecretStr) -> SecretStr:
        if not re.fullmatch(rf"[!-~]{{{MIN_TOKEN},}}", value.get_secret_value()):
            raise ValueError(
                f"write name:token[:scope+scope] with a token of {MIN_TOKEN} or more ASCII characters, "
                "without spaces"
            )
        return value


class SettingFields(BaseSettings):
    """All settings with their defaults and bounds; `Settings` reads and checks them."""

    clipia_webhook_secret: SecretStr | None = Field(default=None, validation_alias="CLIPIA_WEBHOOK_SECRET")
    """The signing secret from the Clipia developer console; required. Several, separated by commas, while you
    rotate: new and old are both accepted."""
    clipia_retired_webhook_secret: SecretStr | None = Field(
        default=None, validation_alias="CLIPIA_RETIRED_WEBHOOK_SECRET"
    )
    """Earlier secrets, separated by commas. They are not accepted; a diagnosis names the one that a rejected
    webhook was signed with (docs/rejections.md)."""
    clipia_key: SecretStr | None = Field(default=None, validation_alias="CLIPIA_KEY")
    """The API key for jobs: `clipia_live_…`, or `clipia_test_…` for Clipia's sandbox."""
    clipia_base_url: str = Field(default="https://api.clipia.ai", validation_alias="CLIPIA_BASE_URL")
    """The address of Clipia."""
    clipia_proxy: ProxyUrl | None = Field(default=None, validation_alias="CLIPIA_PROXY")
    """`http://user:password@host:port`: calls to Clipia go through this proxy. `HTTPS_PROXY` is ignored."""
    database_url: SecretStr = SecretStr("sqlite:///data/receiver.db")
    """`sqlite:///path`, or `postgresql://user:password@host:5432/name` with libpq's parameters, direct or
    through a pooler (docs/database.md)."""
    durable_without: Annotated[tuple[Literal["fsync", "full_page_writes"], ...], NoDecode] = ()
    """PostgreSQL may run without these, if its storage is durable by other means (docs/database.md)."""
    storage_url: SecretStr = SecretStr("file:data/media")
    """The storage of media: `file:folder`, `s3://bucket/prefix?endpoint=…&region=…`, `gs://bucket/prefix` or
    `az://container/prefix` (docs/media.md#storage)."""
    public_url: str | None = None
    """`https://…`: this service's address for Clipia. Jobs get a `webhook_url` under it; without it they are
    polled from the start."""
    internal_url: str | None = None
    """`https://…` or `http://…`: the internal listener's address for consumers and agents. Messages get a
    `link` to each stored file under it (docs/media.md#links), and `/mcp` answers requests to its host
    (docs/mcp.md#hosts)."""
    api_tokens: Annotated[tuple[ApiToken, ...], NoDecode] = ()
    """`name:token[:scope+scope]`; a token has 16 characters or more, and scopes are `submit`, `read` and
    `operate`; a token without scopes has all three. The name is the caller of the jobs that the token
    submits, and the author of its actions. Without tokens, `/v1` rejects every call; with one, `/metrics`
    needs `read`."""
    destination_url: SecretStr | None = None
    """One destination, called `default`: `file:path.jsonl`, `https://…` or a broker's URL
    (docs/destinations.md)."""
    destinations: tuple[DestinationSettings, ...] = ()
    sources: tuple[SourceSettings, ...] = ()
    signature_tolerance: int = Field(default=300, ge=30, le=900)
    """Seconds by which a signature's time may differ from now, either way."""
    rejections_kept: int = Field(default=1000, ge=0, le=10_000)
    """Rejected requests that are kept with a diagnosis; 0 keeps none (docs/rejections.md)."""
    max_body_bytes: int = Field(default=256 * 1024, ge=1024, le=16 * 1024 * 1024)
    """The largest webhook body, in bytes."""
    max_buffered_bytes: int = Field(default=64 * 1024 * 1024, ge=8 * 1024 * 1024, le=16 * 1024**3)
    """Memory of a web process for connections and for requests that are being read or wait for the database,
    in bytes; at least four of the largest bodies. If it is used up, the largest unfinished requests are
    answered 503 (docs/operating.md#memory)."""
    keep_alive: int = Field(default=75, ge=1, le=3600)
    """Seconds that an idle connection is kept: if the proxy in front keeps it longer, clients get 502s
    (docs/deployment.md#keep-alive)."""
    drain: float = Field(default=5.0, ge=0, le=300)
    """Seconds after SIGTERM for which `serve` keeps serving while `/readyz` says 503
    (docs/deployment.md#how-a-process-ends)."""
    media_hosts: Annotated[tuple[str, ...], NoDecode] = ("media.clipia.ai",)
    """Hosts that media may come from. An entry with a scheme, such as `http://127.0.0.1:9000`, allows exactly
    that origin, for development."""
    media_ca: Annotated[str, Field(min_length=1)] | None = None
    """Path of a PEM file with authorities that are trusted for downloads in addition to the public ones."""
    media_proxy: ProxyUrl | None = None
    """`http://user:password@host:port`: downloads go through this proxy; docs/media.md#where-connections-go
    lists the checks that are left out then. `HTTPS_PROXY` is ignored."""
    media_max_files: int = Field(default=512, ge=1, le=10_000)
    """Files of one event that are fetched; the others are listed as `skipped`."""
    media_max_url_length: int = Field(default=8192, ge=256, le=65_536)
    """Characters of a URL that is fetched."""
    poll_after: float = Field(default=60.0, ge=1, le=86_400)
    """Seconds that a job's webhook may take before the job is polled."""
    refused_give_up_after: float = Field(default=86_400.0, ge=0, le=30 * 86_400)
    """If Clipia refuses a job for now (402, 403), it is tried again for this many seconds and then
    `failed`."""
    input_check: InputCheck = "on"
    """`on`: a parameter that the model's schema does not have passes with a warning; `strict`: it is an
    error; `off`: Clipia alone checks inputs (docs/jobs.md#before-it-costs)."""
    budgets: Annotated[dict[str, Credits], NoDecode] = Field(default_factory=dict)
    """`caller:credits`: the most that a caller's jobs may cost per UTC day; the caller `*` stands for each
    caller that is not named. In the file also a table: `budgets = { shop = 500 }`."""
    retention_days: int | None = Field(default=None, ge=30, le=36_500)
    """Events older than this are deleted each night by a worker; without it everything is kept
    (docs/retention.md#each-night)."""
    retention_also: Annotated[tuple[Literal["media", "dead_letters"], ...], NoDecode] = ()
    """What is deleted with these events: `media`, their files in the storage; `dead_letters`, events that
    have some, too."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least level that is logged."""
