"""Values that cross the border of the database layer, and the ids of rows."""

import hashlib
import secrets
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, Self

from receiver.core.output_files import Kind, MediaRef, Variant
from receiver.price import Credits

EVENT_NAMESPACE: Final = uuid.UUID("5f0b7c0e-6d0a-5f0c-9a3e-0f6a7b1d2c4e")
"""Fixed for ever: an event keeps its id across databases, replays and re-imports."""

EventState = Literal["received", "fetching", "ready", "unrecognized", "erased"]
"""`erased`: a tombstone without a body, so that a late delivery of the event is still a duplicate."""
MediaState = Literal["pending", "stored", "not_media", "gone", "blocked", "skipped"]
DeliveryState = Literal["pending", "delivered", "dead", "canceled"]
EventStatus = Literal["OK", "ERROR"]
Outcome = Literal["accepted", "duplicate", "conflict", "unrecognized"]
AttemptOutcome = Literal["succeeded", "retry", "failed", "resubmitted", "restarted", "canceled"]
JobState = Literal["pending", "submitted", "completed", "failed", "canceled", "unsure"]
CostGroup = Literal["caller", "model", "day"]


def event_id(source: str, request_id: str) -> uuid.UUID:
    """Return the id of an event: UUID v5 of its source and `request_id` (RFC 9562, section 5.5)."""
    return uuid.uuid5(EVENT_NAMESPACE, f"{source}\n{request_id}")


def new_id() -> uuid.UUID:
    """Return a time-ordered id, a UUID v7 with 62 random bits: indexes grow at their end.

    Its time has a precision of a quarter of a microsecond (RFC 9562, section 6.2, method 3), so that ids that
    are made one after the other are in that order.
    """
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    fraction = rest * 4096 // 1_000_000
    value = (milliseconds << 80) | (0x7 << 76) | (fraction << 64) | (0x2 << 62) | secrets.randbits(62)
    return uuid.UUID(int=value)


def least_id(moment: datetime) -> uuid.UUID:
    """Return the least id that `new_id` may make at a moment."""
    milliseconds = max(0, int(moment.timestamp() * 1000))
    return uuid.UUID(int=(milliseconds << 80) | (0x7 << 76) | (0x2 << 62))


def digest_token(token: str) -> str:
    """Return the form in which the token of a callback's path is stored and compared.

    How long the comparison of two digests takes tells nothing about the token, so the database may compare
    them; and nobody who sees a row can write the path.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


class NewEvent(NamedTuple):
    """An event as ingest makes it. A tuple, like `Arrival`: groups of them are turned into columns."""

    id: uuid.UUID
    source: str
    request_id: str
    """Clipia's id; `sha256:<hex of the body>` where the body could not be recognized."""
    origin: Literal["webhook", "poll"]
    state: EventState
    body: bytes
    """The request body exactly as it was signed."""
    body_sha256: str
    received_at: datetime
    reason: str | None = None
    """Why the body was not recognized."""
    status: str | None = None
    model: str | None = None
    cost: int | None = None
    cost_micros: int = 0
    """Millionths of a credit beyond `cost`."""
    job_id: uuid.UUID | None = None
    """The job that the callback's path named; the path is not signed."""
    path_token: str | None = None
    """The digest of the token in that path (`digest_token`)."""

    @property
    def first_outcome(self) -> Outcome:
        """How the delivery that made the event is answered, and put on record."""
        return "accepted" if self.state == "received" else "unrecognized"


class Arrival(NamedTuple):
    """One authentic inbound delivery, and the event that it is of."""

    event: NewEvent
    webhook_id: str | None
    """X-Clipia-Webhook-Id: not signed, for the log only."""
    secret_id: str
    signed_at: datetime


class StoredEvent(NamedTuple):
    """An event as workers need it."""

    seq: int
    id: uuid.UUID
    source: str
    request_id: str
    status: str
    body: bytes
    received_at: datetime
    job_id: uuid.UUID | None
    path_token: str | None


@dataclass(frozen=True, kw_only=True)
class ReplayedEvent:
    """An event as the step of a replay needs it."""

    seq: int
    source: str
    status: str
    model: str | None
    state: EventState


@dataclass(frozen=True, kw_only=True)
class MediaRow:
    """One file of an event."""

    id: uuid.UUID
    position: int
    variant: Variant
    kind: Kind
    url: str
    field: str | None
    """Where in the event's output the URL stands; None for files of releases before 0010."""
    state: MediaState
    error: str | None
    size: int | None
    sha256: str | None
    content_type: str | None
    storage_key: str | None
    uri: str | None
    warning: str | None
    seen_sha256: str | None


@dataclass(frozen=True, kw_only=True)
class NewMedia:
    """A file to download, or one that is only listed."""

    position: int
    variant: Variant
    kind: Kind
    url: str
    field: str | None = None
    skipped: str | None = None
    """Why it is not downloaded."""

    @classmethod
    def of(cls, ref: MediaRef) -> Self:
        """Return a file of an output."""
        return cls(
            position=ref.position,
            variant=ref.variant,
            kind=ref.kind,
            url=ref.url,
            field=ref.field,
            skipped=None if ref.skip is None else ref.skip.words,
        )


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at a row of work, as it is put on record."""

    number: int
    started_at: datetime
    duration_ms: int
    outcome: AttemptOutcome
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A row of work that this process holds until its lease ends."""

    id: uuid.UUID
    lease: uuid.UUID
    attempt: int
    """Counts from 1; committed before the work starts, so that a crash is counted too."""
    lost: int
    """Claims in a row, before this one, that ended without a recorded result."""
    age: float
    """Seconds since the row was made or restarted, by the database's clock."""


@dataclass(frozen=True, kw_only=True)
class EventClaim(Claim):
    """A claimed row that belongs to an event."""

    event_seq: int


@dataclass(frozen=True, kw_only=True)
class DeliveryClaim(EventClaim):
    """A claimed delivery."""

    replay_id: uuid.UUID | None


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """Unfinished rows of one lane."""

    rows: int
    oldest: float
    """Age of the oldest in seconds; 0 where there is none."""


NO_INPUT: Final = b'{"input":null}'
"""The request of a job whose input was deleted; releases that know nothing of that can read it, too."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job as its caller asked for it, complete before anything is sent."""

    id: uuid.UUID
    caller: str
    idempotency_key: str
    """The caller's."""
    fingerprint: str
    """SHA-256, in hex, of everything that must be the same where the key is."""
    source: str
    model: str
    request: bytes
    """The body of the call to Clipia."""
    has_webhook: bool
    provider_key: uuid.UUID
    """The UUID v4 that Clipia gets as its Idempotency-Key."""
    metadata: dict[str, str]
    max_cost: Credits | None
    cost: Credits | None
    """Credits, where they were estimated."""
    account: str
    """The Clipia account that it is made for; what is made for a test key never goes to a live one."""
    path_token: str
    """The digest of the token in its callback's path (`digest_token`)."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Ours about the input: keys that the model's schema does not have."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A claimed job, as the call to Clipia needs it."""

    id: uuid.UUID
    model: str
    request: bytes
    provider_key: uuid.UUID
    source: str
    has_webhook: bool
    account: str | None
    """The account that it was sent to before, where it may have arrived."""
    sent_for: float | None
    """Seconds since the first try that may have arrived; None where there was none."""
    refused_for: float | None
    """Seconds since Clipia first refused it for now (402, 403); None if it did not."""
    warnings: list[dict[str, Any]] | None
    """Our own about the input."""
    max_cost: Credits | None


@dataclass(frozen=True, kw_only=True)
class OpenRequest:
    """A claimed job that Clipia works on, as a poll needs it."""

    id: uuid.UUID
    source: str
    request_id: str
    has_webhook: bool
    watched: bool
    """Whether somebody waits for it right now."""
    open_for: float
    """Seconds since Clipia accepted it."""
    error: str | None
    """What was wrong with the answer to the last poll, as JSON."""


@dataclass(frozen=True, kw_only=True)
class JobRef:
    """An event's job, as routing and the forwarded message need it."""

    id: uuid.UUID
    caller: str
    idempotency_key: str
    metadata: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class NewReplay:
    """An order to send stored events again."""

    id: uuid.UUID
    caller: str
    """Who ordered it."""
    idempotency_key: str
    fingerprint: str
    """SHA-256, in hex, of everything that must be the same where the key is."""
    reason: str
    selection: dict[str, Any]
    destinations: list[str]
    media: bool
    rate: float | None
    """Events per second at most."""
    force: bool = False
    """Whether intact files are downloaded again, too."""


@dataclass(frozen=True, kw_only=True)
class ReplayOrder:
    """A claimed replay, as its next step needs it."""

    id: uuid.UUID
    selection: dict[str, Any]
    destinations: list[str]
    media: bool
    force: bool
    rate: float | None
    after_seq: int
    until_seq: int
    created_at: datetime
