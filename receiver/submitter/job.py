"""The job that callers get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

import orjson
from pydantic import Field

from receiver.clipia.job_request import read_input
from receiver.db.rows import JobState
from receiver.db.views import JobDetails
from receiver.price import Credits

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """One file of a job's result."""

    id: UUID
    """`GET /v1/media/{id}` serves the stored file."""
    kind: str
    variant: str
    url: str
    """Clipia's URL."""
    field: str | None
    """The place of the URL in the event's output."""
    state: str
    uri: str | None
    """The place in our storage; None until the file is stored."""
    size: int | None
    """Bytes."""
    sha256: str | None
    content_type: str | None
    error: str | None
    warning: str | None
    """A contradiction, such as a wrong size, in a file that Clipia's CDN sends again and again."""


@dataclass(frozen=True, kw_only=True)
class JobDelivery:
    """The delivery of a job's event to one destination."""

    id: UUID
    destination: str
    state: str
    attempts: int
    error: str | None
    finished_at: datetime | None


@dataclass(frozen=True, kw_only=True)
class JobEvent:
    """The event with the result of a job."""

    id: UUID
    status: str
    state: str
    origin: str
    """`webhook`, or `poll` if the webhook did not arrive."""
    received_at: datetime
    media: tuple[JobFile, ...]
    """Empty in lists."""
    deliveries: tuple[JobDelivery, ...]


@dataclass(frozen=True, kw_only=True)
class JobAttempt:
    """One attempt at submitting a job."""

    number: int
    started_at: datetime
    duration_ms: int
    outcome: str
    error: Any


@dataclass(frozen=True, kw_only=True)
class Job:
    """One generation that a caller submitted. Credits are exact to a millionth."""

    id: UUID
    state: JobState
    caller: str
    idempotency_key: str
    model: str
    input: dict[str, Any] | None
    """None if `receiver prune` or `receiver events erase` deleted it."""
    metadata: dict[str, str]
    max_cost: Credits | None
    request_id: str | None
    progress: int | None
    """Percent, None if not known."""
    cost: Credits | None
    """The price: an estimate until Clipia accepts the job, then the reserved credits."""
    charged: Credits | None
    """The final price; None until it is known."""
    warnings: list[dict[str, Any]]
    """One for each parameter that Clipia ignores."""
    error: dict[str, Any] | None
    """`{"code", "message", ...}` of the job if it failed, or of the last failed attempt to submit it."""
    created_at: datetime
    submitted_at: datetime | None
    updated_at: datetime
    finished_at: datetime | None
    next_attempt_at: datetime | None
    event: JobEvent | None
    attempts: tuple[JobAttempt, ...]
    """Attempts at submitting it; empty in lists."""
    has_webhook: bool
    """Whether Clipia sends a webhook for it; otherwise the receiver polls its result."""
    live: bool | None
    """Whether it is of a live key, and not of a test key; None if no key took it yet."""
    new: Annotated[bool, Field(exclude=True)] = False
    """Whether this call created the job."""

    @property
    def ended(self) -> bool:
        """Whether the job and its files are finished."""
        busy = self.event is not None and self.event.state in ("received", "fetching")
        return self.state not in ("pending", "submitted") and not busy

    @classmethod
    def of(cls, row: JobDetails, *, new: bool = False) -> "Job":
        """Make a job of a row."""
        event = row["event"]
        return _make(
            cls,
            row,
            input=read_input(row["request"]),
            warnings=row["warnings"] or [],
            error=read_error(row["error"]),
            event=None if event is None else _event(event),
            attempts=tuple(
                _make(JobAttempt, each, error=read_error(each["error"])) for each in row["attempt_log"]
            ),
            live=is_live(row["account"]),
            new=new,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that the API shows."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _NOT_SHOWN}


_NOT_SHOWN = ("new",)


@dataclass(frozen=True, kw_only=True)
class JobPage:
    """One page of a list, newest first."""

    jobs: Sequence[Job]
    next: str | None
    """The cursor of the next page; None if this is the last one."""


def is_live(account: str | None) -> bool | None:
    """Return whether an account is that of a live key; None if there is none."""
    return None if account is None else account.startswith("live-")


def read_error(text: str | None) -> dict[str, Any] | None:
    """Return an error as an object. It is stored as JSON, or as plain text by older releases."""
    if text is None:
        return None
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {"code": "internal_error", "message": text}
    return found if isinstance(found, dict) else {"code": "generation_failed", "message": str(found)}


def _event(row: Mapping[str, Any]) -> JobEvent:
    media = tuple(_make(JobFile, each) for each in row["media"])
    return _make(
        JobEvent, row, media=media, deliveries=tuple(_make(JobDelivery, each) for each in row["deliveries"])
    )


def _make(kind: type[T], row: Mapping[str, Any], **values: Any) -> T:
    """Make an instance of a dataclass: its fields are `values`, and the others are those of the row."""
    return kind(**values, **{name: row[name] for name in kind.__annotations__ if name not in values})
