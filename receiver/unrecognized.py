"""Recovery of unrecognized events that this release can read.

A newer release may read bodies that an older one could not. They are counted, but not recovered
automatically: the events would be forwarded long after they came, and the operator decides that.
"""

from dataclasses import dataclass
from typing import Final, Literal
from uuid import UUID

import structlog
from sqlalchemy.exc import IntegrityError

from receiver.db import inbox, unrecognized
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import NewEvent
from receiver.db.unrecognized import Unrecognized
from receiver.ingest import compare, make_event

PAGE_EVENTS: Final = 20
"""Events that are read together."""
PART_PAGES: Final = 50
"""Pages of one call."""
MAX_COUNTED_EVENTS: Final = 10_000
"""Only the newest events are counted."""
MAX_READ_BODIES: Final = 500
"""Bodies that one count reads; the next counts read the others."""

Outcome = Literal["accepted", "duplicate", "conflict", "unrecognized"]

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """The result for one event."""

    was: UUID
    """The id before the recovery."""
    event_id: UUID
    """The id of the recovered event, or of the stored event that it repeats."""
    request_id: str
    outcome: Outcome
    """`accepted`: the event waits for its fan-out. `unrecognized`: it was not changed."""
    reason: str | None


async def recover_part(
    database: Database, *, after: int, dry_run: bool
) -> tuple[list[Recovered], int | None]:
    """Recover the next unrecognized events that can be read, oldest first; return also the next `after`.

    If the event has come again in the meantime, the recovered one becomes a repeated receipt of it: a
    duplicate or a conflict. Concurrent runs are safe, and a run may be killed at any point. A dry run
    compares the events of one part with each other. Raises DatabaseUnavailable.
    """
    found: list[Recovered] = []
    planned: dict[UUID, NewEvent] = {}
    for _ in range(PART_PAGES):
        async with database.read() as connection:
            page = await unrecognized.list_page(connection, after=after, limit=PAGE_EVENTS)
        for old in page:
            event = make_event(
                old.source,
                old.body,
                received_at=old.received_at.timestamp(),
                origin=old.origin,
                job_id=old.job_id,
            )
            outcome = await _outcome(database, old, event, planned if dry_run else None)
            if outcome is not None:
                found.append(
                    Recovered(
                        was=old.id,
                        event_id=event.id,
                        request_id=event.request_id,
                        outcome=outcome,
                        reason=event.reason,
                    )
                )
        if not page:
            return found, None
        after = page[-1].seq
    return found, after


async def _outcome(
    database: Database, old: Unrecognized, event: NewEvent, planned: dict[UUID, NewEvent] | None
) -> Outcome | None:
    if event.state == "unrecognized":
        return "unrecognized"
    if planned is not None:
        return await _plan(database, old, event, planned)
    return await _recover(database, old, event)


async def _plan(
    database: Database, old: Unrecognized, event: NewEvent, planned: dict[UUID, NewEvent]
) -> Outcome:
    """Return the outcome that `_recover` would have, after the events that are already planned."""
    async with database.read() as connection:
        known = (await inbox.find_events(connection, {event.id})).get(event.id)
        if known is not None and known.seq != old.seq:
            return await _repeat(connection, known, event)
    if event.id not in planned:
        planned[event.id] = event
        return "accepted"
    first = planned[event.id]
    known = inbox.KnownEvent(0, first.origin, first.status, first.body_sha256, first.state)
    return compare(known, event, {0: first.body})


async def _recover(database: Database, old: Unrecognized, event: NewEvent) -> Outcome | None:
    """Recover one event; return None if another run has recovered it."""
    try:
        outcome = await _take_up(database, old, event)
    except IntegrityError:
        # A webhook has stored the event since the query; the second attempt finds it.
        outcome = await _take_up(database, old, event)
    if outcome is not None:
        log.warning(
            "unrecognized event recovered",
            was=str(old.id),
            event_id=str(event.id),
            request_id=event.request_id,
            outcome=outcome,
        )
    return outcome


async def _take_up(database: Database, old: Unrecognized, event: NewEvent) -> Outcome | None:
    async with database.write() as connection:
        if not await unrecognized.lock(connection, old.seq):
            return None
        known = (await inbox.find_events(connection, {event.id})).get(event.id)
        if known is None or known.seq == old.seq:
            await unrecognized.recognize(connection, old.seq, event)
            return "accepted"
        outcome = await _repeat(connection, known, event)
        await unrecognized.merge(connection, old.seq, into=known.seq, outcome=outcome)
        return outcome


async def _repeat(
    connection: SqlConnection, known: inbox.KnownEvent, event: NewEvent
) -> Literal["duplicate", "conflict"]:
    if event.origin == "poll":
        return "duplicate"  # `record_result` has no conflicts either
    return compare(known, event, await inbox.load_bodies(connection, [known.seq]))


class RecoverableCounter:
    """Counts unrecognized events, and caches which of them this release can read."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._readable: dict[int, bool] = {}

    async def __call__(self) -> dict[bool, int]:
        """Return the number of recoverable events (True) and of the others. Raises DatabaseUnavailable."""
        async with self._database.read() as connection:
            seqs = await unrecognized.list_seqs(connection, limit=MAX_COUNTED_EVENTS)
        self._readable = {seq: self._readable[seq] for seq in seqs if seq in self._readable}
        new = [seq for seq in seqs if seq not in self._readable][:MAX_READ_BODIES]
        for start in range(0, len(new), PAGE_EVENTS):
            async with self._database.read() as connection:
                bodies = await unrecognized.load_bodies(connection, new[start : start + PAGE_EVENTS])
            self._readable |= {
                seq: unrecognized.read_request_id(body) is not None for seq, body in bodies.items()
            }
        recoverable = sum(self._readable.values())
        return {True: recoverable, False: len(seqs) - recoverable}
