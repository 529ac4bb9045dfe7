"""Values that the database layer takes and returns, and the ids of rows."""

import hashlib
import secrets
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, Self

from receiver.core.output_files import Kind, MediaRef, Variant
from receiver.price import Credits

EVENT_NAMESPACE: Final = uuid.UUID("5f0b7c0e-6d0a-5f0c-9a3e-0f6a7b1d2c4e")
"""It never changes, so an event has the same id in every database and after every import."""
_NAMESPACE_BYTES: Final = EVENT_NAMESPACE.bytes

EventState = Literal["received", "fetching", "ready", "unrecognized", "erased"]
"""`erased`: a tombstone without a body, so that a later request for the event is still a duplicate."""
MediaState = Literal["pending", "stored", "not_media", "gone", "blocked", "skipped", "superseded"]
"""`superseded`: only an earlier body of the event names the file, so no message does."""
DeliveryState = Literal["pending", "delivered", "dead", "canceled"]
EventStatus = Literal["OK", "ERROR"]
Origin = Literal["webhook", "poll"]
Outcome = Literal["accepted", "duplicate", "conflict", "unrecognized", "promoted", "superseded"]
"""The last two are made by a person: the body of `promoted` is the event's, that of `superseded` was decided
against."""
AttemptOutcome = Literal["succeeded", "retry", "failed", "resubmitted", "restarted", "canceled", "superseded"]
JobState = Literal["pending", "submitted", "completed", "failed", "canceled", "unsure"]
CostGroup = Literal["caller", "model", "day"]


def raw_event_id(source: str, request_id: str) -> bytes:
    """Return the bytes of an event's id: UUID v5 of its source and `request_id` (RFC 9562, section 5.5).

    `uuid.uuid5` is simpler, but takes each webhook two microseconds more.
    """
    named = _source_hash(source).copy()
    named.update(request_id.encode())
    digest = named.digest()
    return b"%b%c%c%c%b" % (
        digest[:6],
        digest[6] & 0x0F | 0x50,
        digest[7],
        digest[8] & 0x3F | 0x80,
        digest[9:16],
    )


def id_text(raw_id: bytes) -> str:
    """Return the text of an id; an object of UUID would take twice the time."""
    digits = raw_id.hex()
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


@lru_cache(maxsize=64)
def _source_hash(source: str) -> Any:
    return hashlib.sha1(_NAMESPACE_BYTES + f"{source}\n".encode(), usedforsecurity=False)


def event_id(source: str, request_id: str) -> uuid.UUID:
    """Return the id of an event."""
    return uuid.UUID(bytes=raw_event_id(source, request_id))


def new_id() -> uuid.UUID:
    """Return a UUID v7, which begins with the time, so that an index grows at its end.

    The time has a precision of a quarter of a microsecond (RFC 9562, section 6.2, method 3), so ids are in
    the order in which a process makes them. 62 bits are random.
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
    """Return the SHA-256 of the token in a callback's path, which is stored in its place.

    The time that the database takes to compare two digests does not reveal the token, and the path cannot be
    made from a row.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).hexdigest()


class NewEvent(NamedTuple):
    """An event as ingest makes it, with its first receipt; a tuple, because groups are turned into columns.

    Its values are as the hot path needs them: an object of UUID or datetime costs each webhook a microsecond.
    """

    raw_id: bytes
    request_id: str
    """Clipia's id; `sha256:<hex of the body>` if the body was not recognized."""
    model: str | None
    cost: int | None
    cost_micros: int
    """Millionths of a credit beyond `cost`."""
    body: bytes
    """The request body exactly as it was signed."""
    body_sha256: bytes
    received_at: float
    """Unix seconds."""
    job_id: uuid.UUID | None
    """The job in the callback's path, which is not signed."""
    path_token: str | None
    """The digest of the token in that path (`digest_token`)."""
    webhook_id: str | None
    """X-Clipia-Webhook-Id; it is not signed and only recorded."""
    signed_at: float | None
    """Unix seconds; None if the event was polled."""
    # The rest has few different values, and PostgreSQL gets each combination once for a group.
    source: str
    origin: Origin
    state: EventState
    reason: str | None
    """Why the body was not recognized."""
    status: str | None
    secret_id: str | None
    """The secret of the signature; None if the event was polled."""

    @property
    def id(self) -> uuid.UUID:
        """The id of the event."""
        return uuid.UUID(bytes=self.raw_id)

    @property
    def first_outcome(self) -> Outcome:
        """The outcome of the request that made the event."""
        return "accepted" if self.state == "received" else "unrecognized"

    def columns(self) -> dict[str, Any]:
        """Return the values of its columns, as the types of the tables take them."""
        values = self._asdict()
        del values["raw_id"]
        return values | {
            "id": self.id,
            "received_at": to_datetime(self.received_at),
            "signed_at": None if self.signed_at is None else to_datetime(self.signed_at),
        }


def to_datetime(seconds: float) -> datetime:
    """Return unix seconds as a point in time."""
    return datetime.fromtimestamp(seconds, UTC)


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
    first_outcome: Outcome | None = None
    """`promoted` if its body was."""


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
    """The path of the URL in the event's output; None for files of releases before 0010."""
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
    """Why it is not downloaded; None if it is."""

    @classmethod
    def of(cls, ref: MediaRef) -> Self:
        """Make the record of a file in an output."""
        return cls(
            position=ref.position,
            variant=ref.variant,
            kind=ref.kind,
            url=ref.url,
            field=ref.field,
            skipped=None if ref.skip is None else ref.skip.message,
        )


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt at a row of work, as it is recorded."""

    number: int
    started_at: datetime
    duration_ms: int
    outcome: AttemptOutcome
    error: str | None = None
    answer: str | None = None
    """The start of a consumer's answer that did not confirm the event."""


@dataclass(kw_only=True, slots=True)
class Claim:
    """A row of work that this process has claimed until the lease ends.

    It is not frozen: making a frozen one takes twice as long, and each delivery has one.
    """

    id: uuid.UUID
    lease: uuid.UUID
    attempt: int
    """Counts from 1. It is committed before the work starts, so a crash counts too."""
    lost: int
    """Consecutive claims before this one that ended without a recorded result."""
    age: float
    """Seconds since the row was made or restarted, by the database's clock."""


@dataclass(kw_only=True, slots=True)
class EventClaim(Claim):
    """A claimed row that belongs to an event."""

    event_seq: int


@dataclass(kw_only=True, slots=True)
class DeliveryClaim(EventClaim):
    """A claimed delivery."""

    replay_id: uuid.UUID | None


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """Unfinished rows of one lane."""

    rows: int
    oldest: float
    """Age of the oldest row in seconds; 0 without rows."""


NO_INPUT: Final = b'{"input":null}'
"""The request of a job after its input was deleted; earlier releases can read it too."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job as its caller asked for it, before it is sent."""

    id: uuid.UUID
    caller: str
    idempotency_key: str
    """The caller's."""
    fingerprint: str
    """SHA-256 (hex) of the parameters that have to be the same if the key is used again."""
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
    """The estimate; None if there is none."""
    account: str
    """The Clipia account. A job of a test key is never sent to a live account."""
    path_token: str
    """The digest of the token in its callback's path (`digest_token`)."""
    warnings: list[dict[str, Any]] = field(default_factory=list)
    """Keys of the input that the model's schema does not have."""
    traceparent: str | None = None
    """The span of its caller; None if the caller sent none."""
    tracestate: str | None = None


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
    """The account that an earlier attempt may have reached."""
    sent_for: float | None
    """Seconds since the first attempt that may have reached Clipia; None if there was none."""
    refused_for: float | None
    """Seconds since Clipia first refused it for now (402, 403); None if it did not."""
    warnings: list[dict[str, Any]] | None
    """Keys of the input that the model's schema does not have."""
    max_cost: Credits | None
    traceparent: str | None = None
    """The span of its caller."""
    tracestate: str | None = None


@dataclass(frozen=True, kw_only=True)
class OpenRequest:
    """A claimed job that Clipia works on, as a poll needs it."""

    id: uuid.UUID
    source: str
    request_id: str
    has_webhook: bool
    watched: bool
    """Whether a caller waits for it now."""
    open_for: float
    """Seconds since Clipia accepted it."""
    error: str | None
    """The problem with the answer to the last poll, as JSON."""
    traceparent: str | None = None
    """The span of its caller."""
    tracestate: str | None = None


@dataclass(frozen=True, kw_only=True)
class JobRef:
    """An event's job, as routing and the forwarded message need it."""

    id: uuid.UUID
    caller: str
    idempotency_key: str
    metadata: dict[str, str]
    traceparent: str | None = None
    tracestate: str | None = None


@dataclass(frozen=True, kw_only=True)
class NewReplay:
    """An order to send stored events again."""

    id: uuid.UUID
    caller: str
    idempotency_key: str
    fingerprint: str
    """SHA-256 (hex) of the parameters that have to be the same if the key is used again."""
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
