"""The fan-out: adds the files and the deliveries of an event."""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Final

import structlog

from receiver.core.lane_names import MEDIA_LANE, SUBMIT_LANE, Wake, destination_lane
from receiver.core.output_files import FileRules, Listing
from receiver.core.payload import Generation, parse
from receiver.core.retry import GIVE_UP_SECONDS
from receiver.db import inbox, job_events, outbox
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.job_events import FinishedJob
from receiver.db.rows import EventState, JobRef, NewMedia, StoredEvent
from receiver.errors import DatabaseUnavailable, UnrecognizedBody
from receiver.lanes.attempts import stored_text
from receiver.lanes.generation_metrics import count_results, observe_jobs
from receiver.lanes.spans import FannedOut, tell_fan_out
from receiver.lanes.targets import Routes, Target, facts_of
from receiver.metrics import MEDIA_SKIPPED
from receiver.tracing import OFF, Tracer

MAX_EVENTS: Final = 200
"""Events in one batch."""
MAX_BATCH_BYTES: Final = 1024 * 1024
"""Bytes of the bodies in one batch, unless the batch is a single event.

The bodies are parsed while the transaction is open: PostgreSQL ends a transaction that is idle for too long,
and on SQLite all webhooks wait for it.
"""
REST_SECONDS: Final = 60.0
"""How long failed events are left out of batches if there are many of them."""
MIN_FAILING_SECONDS: Final = 3600.0
"""How long the fan-out of an event must have failed before the event is set aside, even if it is old.

After an outage of days the oldest events are old, and their first failure may be the database's.
"""

log = structlog.get_logger()

_ANY_HOST: Final = FileRules()


@dataclass
class _Added:
    """The result of a fan-out."""

    lanes: set[str] = field(default_factory=set)
    """The lanes that have work now."""
    skipped: Counter[str] = field(default_factory=Counter)
    """The URLs that are not downloaded, by reason."""
    failed: int = 0
    """Events without a result."""
    results: list[Generation] = field(default_factory=list)
    jobs: list[FinishedJob] = field(default_factory=list)
    """The jobs that have ended."""
    traced: list[FannedOut] = field(default_factory=list)
    """The events, if tracing is on."""

    def add(self, other: "_Added") -> None:
        """Add another result."""
        self.lanes |= other.lanes
        self.skipped += other.skipped
        self.results += other.results
        self.jobs += other.jobs
        self.traced += other.traced


_AddWork = Callable[[SqlConnection, Sequence[StoredEvent]], Awaitable[_Added]]
_Recognized = Sequence[tuple[StoredEvent, Generation]]


class FanOut:
    """Moves events out of `received`, with their files and their deliveries in the same transaction."""

    def __init__(
        self,
        database: Database,
        targets: Collection[Target],
        *,
        wake: Wake,
        rules: FileRules = _ANY_HOST,
        tracer: Tracer = OFF,
        max_batch_bytes: int = MAX_BATCH_BYTES,
        rest_seconds: float = REST_SECONDS,
        min_failing_seconds: float = MIN_FAILING_SECONDS,
    ) -> None:
        """`rules` say which files are downloaded."""
        self._database = database
        self._targets = self.targets = targets
        """`targets` may be replaced; a run keeps those that it began with."""
        self._wake = wake
        self._rules = rules
        self._tracer = tracer
        self._max_batch_bytes = max_batch_bytes
        self._rest_seconds = rest_seconds
        self._min_failing_seconds = min_failing_seconds
        self._max_events = MAX_EVENTS
        self._taken = 0
        self._failed: dict[int, tuple[float, float]] = {}
        """By `seq` of an event: the time of its first failure, and the end of its rest."""
        self.may_have_more = False
        """Whether the last batch left events behind."""

    async def run(self, *, limit: int = MAX_EVENTS) -> int:
        """Fan out up to `limit` events and return how many. Raises DatabaseUnavailable.

        If a batch fails because the database is too slow, the next one has half as many events. The oldest
        events come first, so without that the same batch would fail each time.
        """
        limit = min(limit, self._max_events)
        self._taken = 0
        # The facts that are loaded for the filters are those of these targets.
        self._targets = self.targets
        try:
            found = await self._run_batch(limit)
        except DatabaseUnavailable:
            self._max_events = max(1, (self._taken or limit) // 2)
            raise
        self._max_events = MAX_EVENTS
        return found

    async def _run_batch(self, limit: int) -> int:
        """Fan out a batch. If that fails, use a savepoint per event: a bad one must not block the others."""
        try:
            return await self._run(limit, self._add_work)
        except DatabaseUnavailable:
            raise
        except Exception as error:
            found = await self._run(limit, self._add_work_singly)
            if not found:
                raise
            log.warning("batch fanned out event by event", error=stored_text(error), count=found)
            return found

    async def _run(self, limit: int, add_work: _AddWork) -> int:
        take = partial(self._take, limit=limit, add_work=add_work)
        began = time.time()
        self.may_have_more, added = await self._database.run_transaction(take)
        tell_fan_out(self._tracer, added.traced, system=self._database.dialect_name, began=began)
        for lane in added.lanes:
            self._wake(lane)
        for reason, number in added.skipped.items():
            MEDIA_SKIPPED.labels(reason).inc(number)
        count_results(added.results)
        observe_jobs(added.jobs)
        return 0 if added.failed == self._taken else self._taken

    async def _take(
        self, connection: SqlConnection, *, limit: int, add_work: _AddWork
    ) -> tuple[bool, _Added]:
        """Lock a batch and fan it out; return whether it left events behind, and its result."""
        events, more = await inbox.lock_received(
            connection, limit=limit, size=self._max_batch_bytes, without=self._resting(limit)
        )
        self._taken = len(events)
        return more, await add_work(connection, events) if events else _Added()

    async def _add_work_singly(self, connection: SqlConnection, events: Sequence[StoredEvent]) -> _Added:
        """Fan out each event in a savepoint of its own.

        An event that fails stays among the oldest, and enough of them would fill each batch. If there are
        many, they are left out for a minute. After three days each is set aside as `unrecognized`, and
        `receiver events recover` takes it up again.
        """
        total = _Added()
        for event in events:
            try:
                async with connection.begin_nested():
                    added = await self._add_work(connection, [event])
            except Exception:
                total.failed += 1
                log.exception("event not fanned out", event_id=str(event.id))
                await self._note_failure(connection, event)
            else:
                total.add(added)
        return total

    async def _note_failure(self, connection: SqlConnection, event: StoredEvent) -> None:
        """Let an event rest, or set it aside if it is old and has failed for long."""
        now = time.monotonic()
        first, _ = self._failed.get(event.seq, (now, now))
        self._failed[event.seq] = (first, now + self._rest_seconds)
        age = (datetime.now(UTC) - event.received_at).total_seconds()
        if age >= GIVE_UP_SECONDS and now - first >= self._min_failing_seconds:
            await inbox.set_state(connection, [event.seq], "unrecognized", reason="fan_out")

    def _resting(self, limit: int) -> Collection[int]:
        """Return the events that failed lately, if they could fill half of a batch."""
        now = time.monotonic()
        # If the rest of an event ended long ago, it has been fanned out since, here or by another worker.
        self._failed = {seq: each for seq, each in self._failed.items() if each[1] + self._rest_seconds > now}
        resting = [seq for seq, (_, until) in self._failed.items() if until > now]
        return resting if 2 * len(resting) >= limit else ()

    async def _add_work(self, connection: SqlConnection, events: Sequence[StoredEvent]) -> _Added:
        """Add the files and the deliveries of the events, and finish their jobs."""
        parsed = [(event, _parse(event)) for event in events]
        recognized = [(event, generation) for event, generation in parsed if generation is not None]
        if unrecognized := [event.seq for event, generation in parsed if generation is None]:
            await inbox.set_state(connection, unrecognized, "unrecognized")
        finished = await self._finish_jobs(connection, recognized)
        refs = await self._load_refs(connection, recognized)
        added = await self._add_rows(connection, recognized, refs)
        added.results, added.jobs = [generation for _, generation in recognized], finished
        if finished:
            added.lanes.add(SUBMIT_LANE)
        return added

    async def _add_rows(
        self, connection: SqlConnection, recognized: _Recognized, refs: Mapping[int, JobRef]
    ) -> _Added:
        files, routes, added = list[tuple[int, NewMedia]](), Routes(), _Added()
        states: dict[EventState, list[int]] = {"fetching": [], "ready": []}
        for event, generation in recognized:
            job = refs.get(event.seq)
            listing = generation.list_files(self._rules)
            added.skipped += _count_skipped(event, listing)
            files.extend((event.seq, NewMedia.of(ref)) for ref in listing.files)
            is_fetching = any(ref.skip is None for ref in listing.files)
            states["fetching" if is_fetching else "ready"].append(event.seq)
            facts = facts_of(event, generation.model, job)
            number = routes.add(event.seq, self._targets, facts, is_fetching=is_fetching)
            if self._tracer.is_on:
                traced = FannedOut(event=event, job=job, files=len(listing.files), deliveries=number)
                added.traced.append(traced)
        await outbox.insert_media(connection, files)
        await outbox.insert_deliveries(connection, routes.due, due=True)
        await outbox.insert_deliveries(connection, routes.held, due=False)
        for state, seqs in states.items():
            if seqs:
                await inbox.set_state(connection, seqs, state)
        added.lanes.update(destination_lane(name) for _, name in routes.due)
        if states["fetching"]:
            added.lanes.add(MEDIA_LANE)
        return added

    async def _finish_jobs(self, connection: SqlConnection, recognized: _Recognized) -> list[FinishedJob]:
        """Finish the jobs of the events and return them."""
        seqs = await job_events.find_with_open_jobs(connection, [event.seq for event, _ in recognized])
        finished = [
            await job_events.finish_job(
                connection, event.source, generation, job_id=event.job_id, path_token=event.path_token
            )
            for event, generation in recognized
            if event.seq in seqs
        ]
        return [job for job in finished if job is not None]

    async def _load_refs(self, connection: SqlConnection, recognized: _Recognized) -> dict[int, JobRef]:
        """Return the jobs of events, by the event's `seq`, if filters or spans need them."""
        needs_job = self._tracer.is_on or any(target.filter.needs_job for target in self._targets)
        seqs = [event.seq for event, _ in recognized] if needs_job else []
        return await job_events.load_refs(connection, seqs) if seqs else {}


def _parse(event: StoredEvent) -> Generation | None:
    try:
        return parse(event.body)
    except UnrecognizedBody as error:
        # The release that stored the event recognized it; this one parses more strictly.
        log.error("event not recognized", event_id=str(event.id), reason=error.reason)
        return None


def _count_skipped(event: StoredEvent, listing: Listing) -> Counter[str]:
    """Count the URLs of an event that are not downloaded, by reason, and log them."""
    skipped = Counter(ref.skip.reason for ref in listing.files if ref.skip is not None)
    if listing.left_out:
        skipped["not_listed"] = listing.left_out
    if skipped:
        fetched = sum(ref.skip is None for ref in listing.files)
        log.warning("media left out", event_id=str(event.id), reasons=dict(skipped), kept=fetched)
    return skipped
