"""The rows that `reads` and `replays` return to the API and the commands.

They are dictionaries, because both write them as JSON; a test compares the keys with the queries.
"""

from datetime import datetime
from typing import Any, Literal, NotRequired
from uuid import UUID

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.core.output_files import Kind, Variant
from receiver.db.rows import (
    AttemptOutcome,
    DeliveryState,
    EventState,
    EventStatus,
    JobState,
    MediaState,
    Origin,
    Outcome,
)
from receiver.price import Credits


class EventHead(TypedDict):
    """An event without its body."""

    seq: int
    id: UUID
    source: str
    request_id: str
    origin: Origin
    state: EventState
    reason: str | None
    status: EventStatus | None
    model: str | None
    cost: Credits | None
    body_sha256: str
    received_at: datetime
    job_id: UUID | None
    """The job of its `request_id`."""


class EventSummary(EventHead):
    """An event of a list."""

    media: dict[str, int]
    """How many of its files are in each state."""
    deliveries: dict[str, int]


class EventWithBody(EventHead):
    """An event and the request body that made it."""

    body: bytes
    recoverable: NotRequired[bool]
    """Of an unrecognized event: whether this release can read it."""


class LoggedAttempt(TypedDict):
    """One attempt at a file, a delivery or a submission."""

    seq: int
    number: int
    """0 for a change without an attempt, such as a restart by the operator."""
    started_at: datetime
    duration_ms: int
    outcome: AttemptOutcome
    error: str | None
    answer: str | None
    """The first KiB of an HTTP destination's answer that did not confirm the event."""


class ReceiptHead(TypedDict):
    """A request on record for an event, without a body."""

    seq: int
    webhook_id: str | None
    secret_id: str
    """`poll` if the body was polled, and not signed."""
    signed_at: datetime
    received_at: datetime
    body_sha256: str
    outcome: Outcome
    repeated: int
    """Later requests with this outcome that have no row."""


class Receipt(ReceiptHead):
    """A request on record for an event."""

    body: bytes | None
    """Of a conflict, and of a body that another one has superseded."""


class _Work(TypedDict):
    id: UUID
    attempts: int
    """Since it was made or restarted."""
    next_attempt_at: datetime | None
    error: str | None
    created_at: datetime
    finished_at: datetime | None


class File(_Work):
    """A file of an event."""

    position: int
    variant: Variant
    kind: Kind
    url: str
    field: str | None
    state: MediaState
    size: int | None
    sha256: str | None
    content_type: str | None
    storage_key: str | None
    uri: str | None
    warning: str | None
    restarted_at: datetime | None


class Delivery(_Work):
    """A delivery of an event."""

    destination: str
    state: DeliveryState
    replay_id: UUID | None
    restarted_at: datetime | None


class FileWithLog(File):
    """A file and the attempts to download it."""

    attempt_log: list[LoggedAttempt]


class DeliveryWithLog(Delivery):
    """A delivery and the attempts at it."""

    attempt_log: list[LoggedAttempt]


class EventDetails(EventWithBody):
    """An event with all rows that refer to it."""

    receipts: list[Receipt]
    """The first ones."""
    receipts_total: int
    media: list[FileWithLog]
    deliveries: list[DeliveryWithLog]


class ListedDelivery(Delivery):
    """A delivery of a list, with columns of its event."""

    event_id: UUID
    request_id: str
    status: EventStatus | None
    model: str | None


class FileToVerify(TypedDict):
    """A file as its check needs it."""

    id: UUID
    kind: Kind
    url: str
    field: str | None
    storage_key: str
    uri: str
    size: int
    sha256: str
    warning: str | None
    request_id: str


class JobEvent(EventHead):
    """The event of a job; lists leave its files and deliveries out."""

    media: list[File]
    deliveries: list[Delivery]


class JobDetails(_Work):
    """A job with its event."""

    seq: int
    caller: str
    idempotency_key: str
    fingerprint: str
    source: str
    model: str
    request: bytes
    has_webhook: bool
    provider_key: UUID
    metadata: dict[str, str]
    max_cost: Credits | None
    state: JobState
    lost: int
    lease: UUID | None
    account: str | None
    sent_at: datetime | None
    refused_at: datetime | None
    submitted_at: datetime | None
    updated_at: datetime
    watched_until: datetime | None
    request_id: str | None
    progress: int | None
    cost: Credits | None
    charged: Credits | None
    warnings: list[dict[str, Any]] | None
    path_token: str | None
    traceparent: str | None
    tracestate: str | None
    event: JobEvent | None
    attempt_log: list[LoggedAttempt]
    """Empty in lists."""


class JobCosts(TypedDict):
    """Credits of the jobs of one caller, model or UTC day."""

    caller: NotRequired[str]
    model: NotRequired[str]
    day: NotRequired[str]
    jobs: int
    reserved: Credits
    charged: Credits
    refunded: Credits


class ReplayHead(TypedDict):
    """A replay and its progress."""

    seq: int
    id: UUID
    caller: str
    idempotency_key: str
    reason: str
    state: Literal["pending", "completed", "failed", "canceled"]
    selection: dict[str, Any]
    destinations: list[str]
    media: bool
    force: bool
    rate: float | None
    matched: int
    handled: int
    ordered: int
    downloads: int
    error: str | None
    created_at: datetime
    finished_at: datetime | None


class ReplayDetails(ReplayHead):
    """A replay and the number of its deliveries in each state, by destination."""

    deliveries: dict[str, dict[str, int]]


class ReplayCounts(TypedDict):
    """The size of a replay that was not ordered yet."""

    events: int
    deliveries: dict[str, int]
