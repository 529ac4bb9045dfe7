"""Events that were not recognized when they came and that this release can read: counted, and taken up.

A release that is less strict than the one that stored them reads more. Nothing is taken up by itself: it
would be forwarded long after it came, and an operator decides that.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final, Literal
from uuid import UUID

import structlog
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db import inbox, unrecognized
from receiver.db.database import Database
from receiver.db.rows import NewEvent
from receiver.db.unrecognized import Unrecognized
from receiver.ingest import compare, make_event

PAGE: Final = 20
"""Events that are looked at together."""
MOST_COUNTED: Final = 10_000
"""Events that are counted at most, the newest."""
MOST_READ: Final = 500
"""Bodies that one count reads at most; the others' turn comes with the next counts."""

Outcome = Literal["accepted", "duplicate", "conflict", "unrecognized"]

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What becomes of one event."""

    was: UUID
    """The id that it had until now."""
    event_id: UUID
    """The id of the event that it is, or is another delivery of."""
    request_id: str
    outcome: Outcome
    """`accepted` waits for its fan-out now; `unrecognized` stays as it is."""
    reason: str | None


async def recover(database: Database, *, dry_run: bool = False) -> AsyncIterator[Recovered]:
    """Take up every event that can be read now, oldest first; yield what becomes of each.

    An event that has come meanwhile stands: what is recovered is one more delivery of it, a duplicate or a
    conflict. Any number of runs may go on at once, and one may end anywhere. Raises DatabaseUnavailable.
    """
    after = 0
    planned: dict[UUID, NewEvent] = {}
    while True:
        async with database.read() as connection:
            page = await unrecognized.list_page(connection, after=after, limit=PAGE)
        for old in page:
            event = make_event(
                old.source, old.body, received_at=old.received_at, origin=old.origin, job_id=old.job_id
            )
            outcome: Outcome | None
            if event.state == "unrecognized":
                outcome = "unrecognized"
            elif dry_run:
                outcome = await _plan(database, old, event, planned)
            else:
                outcome = await _recover(database, old, event)
            if outcome is not None:
                yield Recovered(
                    was=old.id,
                    event_id=event.id,
                    request_id=event.request_id,
                    outcome=outcome,
                    reason=event.reason,
                )
        if not page:
            return
        after = page[-1].seq


async def _plan(
    database: Database, old: Unrecognized, event: NewEvent, planned: dict[UUID, NewEvent]
) -> Outcome:
    """Return what `_recover` would, after the events that are planned already."""
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
    """Take up one event; return None if somebody else has."""
    try:
        outcome = await _take_up(database, old, event)
    except IntegrityError:
        # A webhook has brought the event since it was looked for: now it is found.
        outcome = await _take_up(database, old, event)
    if outcome is not None:
        log.warning(
            "unrecognized event taken up",
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
    connection: AsyncConnection, known: inbox.KnownEvent, event: NewEvent
) -> Literal["duplicate", "conflict"]:
    if event.origin == "poll":
        return "duplicate"  # as it is for a result that was asked for and had come already
    return compare(known, event, await inbox.load_bodies(connection, [known.seq]))


class Count:
    """Counts unrecognized events, and remembers which of them this release can read."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._readable: dict[int, bool] = {}

    async def __call__(self) -> dict[bool, int]:
        """Return how many can be recovered (True) and how many cannot. Raises DatabaseUnavailable."""
        async with self._database.read() as connection:
            seqs = await unrecognized.list_seqs(connection, limit=MOST_COUNTED)
        self._readable = {seq: self._readable[seq] for seq in seqs if seq in self._readable}
        new = [seq for seq in seqs if seq not in self._readable][:MOST_READ]
        for start in range(0, len(new), PAGE):
            async with self._database.read() as connection:
                bodies = await unrecognized.load_bodies(connection, new[start : start + PAGE])
            self._readable |= {
                seq: unrecognized.read_request_id(body) is not None for seq, body in bodies.items()
            }
        recoverable = sum(self._readable.values())
        return {True: recoverable, False: len(seqs) - recoverable}
