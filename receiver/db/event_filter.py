"""The filters of a list of events: by columns, by the event's job, and by its deliveries."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import ColumnElement, and_, exists, func, select, union_all

from receiver.db.connection import SqlConnection
from receiver.db.rows import DeliveryState, event_id
from receiver.db.sources import find_event_ids
from receiver.db.statements import between, equal
from receiver.db.tables import deliveries, events, in_state, is_live, is_replayed, jobs

FEW_JOBS: Final = 1000
"""The events of so few jobs are found by their ids, of more jobs by reading events in their order."""

_OF_EVENT: Final = and_(jobs.c.source == events.c.source, jobs.c.request_id == events.c.request_id)


@dataclass(frozen=True, kw_only=True)
class EventFilter:
    """The events that match all given values."""

    source: str | None = None
    state: str | None = None
    status: str | None = None
    model: str | None = None
    since: datetime | None = None
    until: datetime | None = None
    """Received at or after `since` and before `until`."""
    caller: str | None = None
    """Of its job, as the metadata and the key."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    idempotency_key: str | None = None
    job_id: UUID | None = None
    event_id: UUID | None = None
    request_id: str | None = None
    delivery_id: UUID | None = None
    delivery_state: DeliveryState | None = None
    """Events with a delivery in this state, and to `destination` if that is given."""
    destination: str | None = None

    async def conditions(self, connection: SqlConnection) -> list[ColumnElement[bool]]:
        """Return the conditions on `events`."""
        values = {"source": self.source, "state": self.state, "status": self.status, "model": self.model}
        found = equal(events, {**values, "id": self.event_id})
        found += between(events.c.received_at, self.since, self.until)
        if self.request_id is not None:
            ids = (await find_event_ids(connection, [self.request_id]))[self.request_id]
            found += [events.c.id.in_(ids), events.c.request_id == self.request_id]
        if self.delivery_id is not None:
            of_delivery = select(deliveries.c.event_seq).where(deliveries.c.id == self.delivery_id)
            found.append(events.c.seq == of_delivery.scalar_subquery())
        return [*found, *await self._job_conditions(connection), *self._delivery_conditions()]

    async def _job_conditions(self, connection: SqlConnection) -> list[ColumnElement[bool]]:
        wanted = equal(
            jobs, {"caller": self.caller, "id": self.job_id, "idempotency_key": self.idempotency_key}
        )
        wanted += [has_metadata(connection, key, value) for key, value in self.metadata.items()]
        if not wanted:
            return []
        if self.idempotency_key is not None and self.caller is None:
            wanted.append(jobs.c.caller.in_(await find_callers(connection)))
        if self.caller is not None or self.idempotency_key is not None or self.job_id is not None:
            # No index leads from a job to its event, but the event's id is a hash of columns of the job.
            names = jobs.c.source, jobs.c.request_id
            listed = select(*names).where(*wanted, jobs.c.request_id.is_not(None)).limit(FEW_JOBS + 1)
            rows = (await connection.execute(listed)).all()
            if len(rows) <= FEW_JOBS:
                return [events.c.id.in_([event_id(source, request_id) for source, request_id in rows])]
        return [exists().where(_OF_EVENT, *wanted)]

    def _delivery_conditions(self) -> Iterable[ColumnElement[bool]]:
        wanted = equal(deliveries, {"destination": self.destination})
        if self.delivery_state is not None:
            wanted.append(in_state(deliveries, self.delivery_state))
        of_events = select(deliveries.c.event_seq).where(*wanted)
        # Pending and dead ones are few, and partial indexes have them all: those of pending ones two.
        if self.delivery_state == "pending":
            yield events.c.seq.in_(union_all(*(of_events.where(half) for half in (is_live, is_replayed))))
        elif self.delivery_state == "dead":
            yield events.c.seq.in_(of_events)
        elif wanted:
            yield exists().where(deliveries.c.event_seq == events.c.seq, *wanted)


EVERY_EVENT: Final = EventFilter()


async def find_callers(connection: SqlConnection) -> list[str]:
    """Return the callers of all jobs; the index has each of them first, so no other row is read.

    The index on the keys begins with the caller, and a query without one would read all jobs.
    """
    first = select(func.min(jobs.c.caller).label("caller")).cte("callers", recursive=True)
    following = select(func.min(jobs.c.caller)).where(jobs.c.caller > first.c.caller).scalar_subquery()
    callers = first.union_all(select(following).where(first.c.caller.is_not(None)))
    found = await connection.execute(select(callers.c.caller).where(callers.c.caller.is_not(None)))
    return list(found.scalars())


def has_metadata(connection: SqlConnection, key: str, value: str) -> ColumnElement[bool]:
    """Return the condition that a job has a value in its metadata."""
    if connection.dialect.name == "postgresql":
        found: ColumnElement[bool] = jobs.c.metadata[key].as_string() == value
        return found
    # A JSON path cannot name every key, so the keys are compared as values.
    pairs = func.json_each(jobs.c.metadata).table_valued("key", "value")
    return exists().where(pairs.c.key == key, pairs.c.value == value)
