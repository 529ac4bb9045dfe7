"""Destinations as the lanes use them, and the routing of events to them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from receiver.core.retry import RetryPolicy
from receiver.core.routing import RoutingFacts, mismatch
from receiver.db import job_events
from receiver.db.connection import SqlConnection
from receiver.db.rows import JobRef, ReplayedEvent, StoredEvent
from receiver.destination_settings import FilterSettings
from receiver.destinations import Destination


@dataclass(frozen=True, kw_only=True)
class Target:
    """A destination with the settings that the lanes need."""

    name: str
    destination: Destination
    waits_for_media: bool
    retry: RetryPolicy
    filter: FilterSettings = field(default_factory=FilterSettings)
    is_down: bool = False
    """Whether it could not be opened when the process started."""
    concurrency: int | None = None
    """The in-flight limit of its deliveries; None for the destination's own."""
    rate: float | None = None
    """Attempts that may begin per second; None for no limit."""
    scheme: str = ""
    """The scheme of its URL; spans name the kind of the destination by it."""
    internal_url: str | None = None
    """The internal listener's URL, for the links to files in messages; None for no links."""


@dataclass(frozen=True)
class Routes:
    """Deliveries to be added, each as (event's `seq`, destination)."""

    due: list[tuple[int, str]] = field(default_factory=list)
    held: list[tuple[int, str]] = field(default_factory=list)
    """Deliveries that wait until the event's files are stored."""

    def add(self, seq: int, targets: Iterable[Target], facts: RoutingFacts, *, is_fetching: bool) -> int:
        """Add an event's delivery to each target with a filter that the event passes; return their number."""
        number = 0
        for target in targets:
            if mismatch(target.filter, facts) is None:
                deliveries = self.held if is_fetching and target.waits_for_media else self.due
                deliveries.append((seq, target.name))
                number += 1
        return number


def facts_of(event: StoredEvent | ReplayedEvent, model: str | None, job: JobRef | None) -> RoutingFacts:
    """Return the facts about an event that filters compare."""
    caller, metadata = (job.caller, job.metadata) if job else (None, {})
    status, source = event.status, event.source
    return RoutingFacts(status=status, model=model, source=source, caller=caller, metadata=metadata)


async def load_facts(connection: SqlConnection, events: Sequence[ReplayedEvent]) -> list[RoutingFacts]:
    """Return the facts about each event."""
    refs = await job_events.load_refs(connection, [event.seq for event in events])
    return [facts_of(event, event.model, refs.get(event.seq)) for event in events]
