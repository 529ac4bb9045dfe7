"""When an alert is raised, resolved and told; pure.

Conditions are read every few seconds. An alert is open while its condition holds, and for a short time after
that, so that a condition that flaps is one alert. Messages about it are limited: a burst of dead letters is
one message, and so is a destination that goes down and up all the time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final, Literal, get_args
from uuid import UUID

AlertKind = Literal[
    "destination_down",
    "dead_letters",
    "jobs_unsure",
    "submissions_paused",
    "secret_mismatch",
    "backlog_old",
    "disk_nearly_full",
    "retention_failed",
]
KINDS: Final[tuple[AlertKind, ...]] = get_args(AlertKind)
Told = Literal["raised", "resolved"]

RUNBOOKS: Final[Mapping[AlertKind, str]] = MappingProxyType(
    {
        "destination_down": "docs/runbooks/destination-down.md",
        "dead_letters": "docs/runbooks/dead-letters.md",
        "jobs_unsure": "docs/runbooks/jobs-unsure.md",
        "submissions_paused": "docs/runbooks/submissions-paused.md",
        "secret_mismatch": "docs/runbooks/secret-mismatch.md",
        "backlog_old": "docs/runbooks/backlog-old.md",
        "disk_nearly_full": "docs/runbooks/disk-nearly-full.md",
        "retention_failed": "docs/runbooks/retention-failed.md",
    }
)

GATHER: Final = timedelta(seconds=10)
"""How long a condition has to hold before it is told; the first message has all that comes meanwhile."""
QUIET: Final = timedelta(seconds=60)
"""An alert is resolved if its condition has not been seen for this long."""
LIMIT: Final = timedelta(minutes=10)
"""At most one message of each type about an alert in this time."""
REMINDER: Final = timedelta(hours=24)
"""A message is repeated if the alert is still open after this time."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A condition that holds now."""

    kind: AlertKind
    subject: str
    """The destination, source, lane, account or disk."""
    text: str
    """One sentence, without a secret and without the words of a peer."""
    command: str
    """The next command to run."""
    count: int = 1
    first_at: datetime | None = None
    last_at: datetime | None = None
    """The latest occurrence; None if the condition is a state, which has none."""
    examples: tuple[str, ...] = ()
    """Ids of some of the objects."""

    @property
    def key(self) -> tuple[AlertKind, str]:
        """The alert that it belongs to."""
        return self.kind, self.subject


@dataclass(frozen=True, kw_only=True)
class Alert(Finding):
    """An alert on record."""

    occurrence: UUID
    """The same in all messages from its start to its end."""
    raised_at: datetime
    seen_at: datetime
    """The last time at which its condition held."""
    resolved_at: datetime | None = None
    told: Told | None = None
    """The type of the last message about it."""
    told_at: datetime | None = None
    """The time of the last message that it is raised."""
    told_last_at: datetime | None = None
    """The latest occurrence in that message."""


def observe(alert: Alert | None, finding: Finding, *, now: datetime, occurrence: UUID) -> Alert:
    """Return the alert of a condition that holds; `occurrence` is its id if it begins."""
    facts = vars(finding) | {"first_at": finding.first_at or now, "seen_at": now}
    if alert is None:
        return Alert(**facts, occurrence=occurrence, raised_at=now)
    if alert.resolved_at is not None:
        return replace(alert, **facts, occurrence=occurrence, raised_at=now, resolved_at=None)
    if finding.first_at is None:
        facts["first_at"] = alert.first_at
    return replace(alert, **facts)


def settle(alert: Alert, *, now: datetime, watched_since: datetime) -> tuple[Alert, Told | None]:
    """End an alert whose condition is over; return it with the type of the message that is due.

    Before `watched_since` the conditions were not read for a while, so that time says nothing: rows that are
    renewed every few seconds were stale, too.
    """
    if alert.resolved_at is None and now - max(alert.seen_at, watched_since) >= QUIET:
        alert = replace(alert, resolved_at=now)
    if alert.resolved_at is not None:
        # Told at once: an alert that was not told needs no message at its end either.
        return (replace(alert, told="resolved"), "resolved") if alert.told == "raised" else (alert, None)
    if not _is_due(alert, now):
        return alert, None
    return replace(alert, told="raised", told_at=now, told_last_at=alert.last_at), "raised"


def _is_due(alert: Alert, now: datetime) -> bool:
    if alert.seen_at - alert.raised_at < GATHER or (
        alert.told_at is not None and now - alert.told_at < LIMIT
    ):
        return False
    if alert.told != "raised" or alert.told_at is None:
        return True
    has_news = alert.last_at is not None and (
        alert.told_last_at is None or alert.last_at > alert.told_last_at
    )
    return has_news or now - alert.told_at >= REMINDER
