"""The facts that an explanation is made of, and its shape."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final, Literal, NamedTuple
from uuid import UUID

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.db.deliveries import FailureGroup
from receiver.db.destinations import Circuit, Pause
from receiver.db.rejections import ListedRejection
from receiver.db.submission_freezes import Freeze
from receiver.db.views import EventDetails, JobDetails
from receiver.db.workers import SeenWorker

State = Literal[
    "delivered",
    "stored",
    "job_pending",
    "job_submitted",
    "event_received",
    "media_pending",
    "waits_for_media",
    "delivery_due",
    "delivery_under_way",
    "delivery_failing",
    "destination_down",
    "job_frozen",
    "account_paused",
    "job_refused",
    "no_worker",
    "no_key",
    "webhook_rejected",
    "job_unsure",
    "event_unrecognized",
    "conflict",
    "destination_paused",
    "destination_removed",
    "destination_unserved",
    "delivery_dead",
    "job_failed",
    "job_canceled",
    "event_pruned",
    "event_erased",
    "media_lost",
    "filtered",
    "delivery_canceled",
    "unknown",
]
Outcome = Literal["delivered", "waiting", "needs_action", "ended", "unknown"]

OUTCOMES: Final[Mapping[Outcome, Sequence[State]]] = MappingProxyType(
    {
        "needs_action": (
            *("webhook_rejected", "job_frozen", "no_worker", "no_key", "account_paused", "job_refused"),
            *("job_unsure", "event_unrecognized", "destination_removed", "destination_paused"),
            *("destination_unserved", "delivery_dead", "conflict"),
        ),
        "waiting": (
            *("job_pending", "job_submitted", "event_received", "destination_down", "delivery_failing"),
            *("delivery_under_way", "delivery_due", "media_pending", "waits_for_media"),
        ),
        "ended": (
            *("job_failed", "job_canceled", "event_pruned", "event_erased", "media_lost", "filtered"),
            "delivery_canceled",
        ),
        "delivered": ("delivered", "stored"),
        "unknown": ("unknown",),
    }
)
"""The states of each outcome. If several apply, the first one is shown."""


class Fact(TypedDict):
    """A fact with its time."""

    at: datetime
    text: str


class Explanation(TypedDict):
    """The reason why an object is in its state."""

    key: str
    state: State
    outcome: Outcome
    """`delivered` to all destinations, `waiting` for something that comes by itself, `needs_action` of a
    person, `ended` without being delivered everywhere, or `unknown`."""
    verdict: str
    facts: list[Fact]
    """In the order of time."""
    commands: list[str]
    """The next commands to run."""
    event_id: UUID | None
    request_id: str | None
    job_id: UUID | None
    delivery_id: UUID | None


class Part(NamedTuple):
    """The state of one step, such as one delivery."""

    state: State
    text: str
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class DestinationFacts:
    """A destination, as far as it concerns an event."""

    name: str
    configured: bool = True
    mismatch: str | None = None
    """The reason of its filter for leaving the event out."""
    pause: Pause | None = None
    circuit: Circuit | None = None
    failures: Sequence[FailureGroup] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """All rows about an id, and the state of the service."""

    key: str
    now: datetime
    job: JobDetails | None = None
    event: EventDetails | None = None
    delivery_id: UUID | None = None
    others: int = 0
    rejections: Sequence[ListedRejection] = ()
    freeze: Freeze | None = None
    pause: Mapping[str, Any] | None = None
    """Clipia's error if it refuses the account."""
    workers: Sequence[SeenWorker] = ()
    destinations: Sequence[DestinationFacts] = field(default_factory=tuple)

    @property
    def lanes(self) -> set[str]:
        """The lanes of all running workers."""
        return {lane for each in self.workers if each.is_running for lane in each.lanes}


def outcome_of(state: State) -> Outcome:
    """Return the outcome of a state."""
    return next(outcome for outcome, states in OUTCOMES.items() if state in states)


_ORDER: Final = [state for states in OUTCOMES.values() for state in states]


def first(parts: Iterable[Part]) -> list[Part]:
    """Return parts in the order of their urgency."""
    return sorted(parts, key=lambda part: _ORDER.index(part.state))


def clock(time: datetime, now: datetime) -> str:
    """Return a time for a sentence: the hour alone if it is of the last day."""
    is_today = abs((now - time).total_seconds()) < 72_000
    return time.strftime("%H:%M" if is_today else "%Y-%m-%d %H:%M")
