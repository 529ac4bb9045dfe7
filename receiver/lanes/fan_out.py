"""The fan-out: what follows from an event, its files and its deliveries."""

import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import Final

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.core.output_files import FileRules, Listing
from receiver.core.payload import Generation, parse
from receiver.core.retry import GIVE_UP_SECONDS
from receiver.core.routing import RoutingFacts, mismatch
from receiver.db import inbox, job_events, jobs, outbox
from receiver.db.database import Database
from receiver.db.rows import EventState, NewMedia, StoredEvent
from receiver.errors import DatabaseUnavailable, UnrecognizedBody
from receiver.lanes.base import MEDIA_LANE, Target, describe, destination_lane, facts_of
from receiver.metrics import MEDIA_SKIPPED

FAN_OUT_LIMIT: Final = 200
"""Events that are fanned out together at most."""
LOT_BYTES: Final = 1024 * 1024
"""Bytes that the bodies of those have together at most, unless it is one event.

They are read while the transaction is open: PostgreSQL ends one that is idle for long, and on SQLite every
webhook waits for it.
"""
FAILED_REST: Final = 60.0
"""Seconds for which events whose fan-out failed rest if they are many."""
FAILED_FOR: Final = 3600.0
"""Seconds for which the fan-out of an event must have failed before it is set aside, however old it is.

An outage of days leaves old events behind, and their first failure may be the database's.
"""
log = structlog.get_logger()


_AddWork = Callable[[AsyncConnection, Sequence[StoredEvent]], Awaitable[set[str] | None]]


_ANY_HOST: Final = FileRules()


class FanOut:
    """Moves events out of `received`: their files and their deliveries in the same transaction."""

    def __init__(
        self,
        database: Database,
        targets: Collection[Target],
        *,
        wake: Callable[[str], None],
        rules: FileRules = _ANY_HOST,
    ) -> None:
        """`rules` say which files are fetched."""
        self._database = database
        self._targets = targets
        self._wake = wake
        self._rules = rules
        self._skipped = Counter[str]()
        self._most = FAN_OUT_LIMIT
        self._taken = 0
        self._failed: dict[int, tuple[float, float]] = {}
        """By `seq` of an event: when its fan-out failed first, and until when it rests."""
        self.left_behind = False
        """Whether there may be more events than the last run took."""

    async def run(self, *, limit: int = FAN_OUT_LIMIT) -> int:
        """Fan out up to `limit` events and return how many. Raises DatabaseUnavailable.

        If the database does not manage a lot, the next one has half as many events: the oldest events are
        always the same, and the same lot would fail for ever.
        """
        limit = min(limit, self._most)
        self._taken = 0
        try:
            found = await self._run_lot(limit)
        except DatabaseUnavailable:
            self._most = max(1, (self._taken or limit) // 2)
            raise
        self._most = FAN_OUT_LIMIT
        return found

    async def _run_lot(self, limit: int) -> int:
        """Fan out a lot; if that fails, each event by itself, so that a bad one holds up no other."""
        try:
            return await self._run(limit, self._add_work)
        except DatabaseUnavailable:
            raise
        except Exception as error:
            found = await self._run(limit, self._add_work_singly)
            if not found:
                raise
            log.warning("fan-out went event by event", error=describe(error), count=found)
            return found

    async def _run(self, limit: int, add_work: _AddWork) -> int:
        async def work(connection: AsyncConnection) -> tuple[int, bool, set[str] | None]:
            events, more = await inbox.lock_received(
                connection, limit=limit, size=LOT_BYTES, without=self._resting(limit)
            )
            self._taken = len(events)
            self._skipped.clear()
            return len(events), more, await add_work(connection, events) if events else None

        count, self.left_behind, lanes = await self._database.run_transaction(work)
        for lane in lanes or ():
            self._wake(lane)
        for reason, number in self._skipped.items():
            MEDIA_SKIPPED.labels(reason).inc(number)
        return 0 if lanes is None else count

    async def _add_work_singly(
        self, connection: AsyncConnection, events: Sequence[StoredEvent]
    ) -> set[str] | None:
        """Add what follows from each event that can be done; None where that is none of them.

        One that fails is among the oldest for ever, and enough of them would be every lot. So many of them
        rest, and in the end each is set aside as `unrecognized`: `receiver events recover` takes it up again.
        """
        lanes: set[str] = set()
        failed = 0
        for event in events:
            try:
                async with connection.begin_nested():
                    lanes |= await self._add_work(connection, [event])
            except Exception:
                failed += 1
                log.exception("event not fanned out", event_id=str(event.id))
                now = time.monotonic()
                first, _ = self._failed.get(event.seq, (now, now))
                self._failed[event.seq] = (first, now + FAILED_REST)
                age = (datetime.now(UTC) - event.received_at).total_seconds()
                if age >= GIVE_UP_SECONDS and now - first >= FAILED_FOR:
                    await inbox.set_state(connection, [event.seq], "unrecognized", reason="fan_out")
        return lanes if failed < len(events) else None

    def _resting(self, limit: int) -> Collection[int]:
        """Return events that failed lately, once there are so many that they could be a whole lot."""
        now = time.monotonic()
        # One whose rest is long over has been fanned out since, here or by another worker.
        self._failed = {seq: each for seq, each in self._failed.items() if each[1] + FAILED_REST > now}
        resting = [seq for seq, (_, until) in self._failed.items() if until > now]
        return resting if 2 * len(resting) >= limit else ()

    async def _add_work(self, connection: AsyncConnection, events: Sequence[StoredEvent]) -> set[str]:
        """Add what follows from the events; return the lanes that have work now."""
        lanes: set[str] = set()
        parsed = [(event, _read(event)) for event in events]
        recognized = [(event, generation) for event, generation in parsed if generation is not None]
        if await self._settle_jobs(connection, recognized):
            lanes.add(jobs.SUBMIT_LANE)
        facts = await self._facts(connection, recognized)
        files: list[tuple[int, NewMedia]] = []
        due: list[tuple[int, str]] = []
        held: list[tuple[int, str]] = []
        states: dict[EventState, list[int]] = defaultdict(list)
        skipped = Counter[str]()
        for (event, generation), each in zip(recognized, facts, strict=True):
            listing = generation.list_files(self._rules)
            skipped += _count_skipped(event, listing)
            files += [(event.seq, NewMedia.of(ref)) for ref in listing.files]
            is_fetching = any(ref.skip is None for ref in listing.files)
            states["fetching" if is_fetching else "ready"].append(event.seq)
            for target in self._targets:
                if mismatch(target.filter, each) is None:
                    waits = is_fetching and target.waits_for_media
                    (held if waits else due).append((event.seq, target.name))
        states["unrecognized"] = [event.seq for event, generation in parsed if generation is None]
        await outbox.insert_media(connection, files)
        await outbox.insert_deliveries(connection, due, due=True)
        await outbox.insert_deliveries(connection, held, due=False)
        for state, seqs in states.items():
            if seqs:
                await inbox.set_state(connection, seqs, state)
        if states["fetching"]:
            lanes.add(MEDIA_LANE)
        self._skipped += skipped
        return lanes | {destination_lane(name) for _, name in due}

    async def _settle_jobs(
        self, connection: AsyncConnection, recognized: Sequence[tuple[StoredEvent, Generation]]
    ) -> bool:
        """Bring the events' jobs to their last state; return whether there were any."""
        seqs = await job_events.find_with_open_jobs(connection, [event.seq for event, _ in recognized])
        settled = [
            await job_events.finish_job(
                connection,
                event.source,
                generation,
                job_id=event.job_id,
                path_token=event.path_token,
            )
            for event, generation in recognized
            if event.seq in seqs
        ]
        return any(settled)

    async def _facts(
        self, connection: AsyncConnection, recognized: Sequence[tuple[StoredEvent, Generation]]
    ) -> list[RoutingFacts]:
        """Return what the filters look at, for each event."""
        needs_job = any(target.filter.needs_job for target in self._targets)
        refs = (
            await job_events.load_refs(connection, [event.seq for event, _ in recognized])
            if needs_job
            else {}
        )
        return [facts_of(event, generation.model, refs.get(event.seq)) for event, generation in recognized]


def _read(event: StoredEvent) -> Generation | None:
    try:
        return parse(event.body)
    except UnrecognizedBody as error:
        # It was recognized when it came in: this release reads more strictly than the one that stored it.
        log.error("event not recognized", event_id=str(event.id), reason=error.reason)
        return None


def _count_skipped(event: StoredEvent, listing: Listing) -> Counter[str]:
    """Count the URLs of an event that are not fetched, by the reason, and say so in the log."""
    skipped = Counter(ref.skip.reason for ref in listing.files if ref.skip is not None)
    if listing.left_out:
        skipped["not_listed"] = listing.left_out
    if skipped:
        fetched = sum(ref.skip is None for ref in listing.files)
        log.warning("media left out", event_id=str(event.id), reasons=dict(skipped), kept=fetched)
    return skipped
