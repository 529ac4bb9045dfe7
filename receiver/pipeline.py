"""What happens to an event between its ack and its deliveries: fan-out and media."""

import hashlib
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db import inbox, job_events, jobs, leases, outbox
from receiver.db.engine import Database
from receiver.db.rows import (
    Attempt,
    EventClaim,
    EventState,
    MediaRow,
    NewMedia,
    StoredEvent,
)
from receiver.db.tables import media
from receiver.errors import (
    DatabaseUnavailable,
    MediaBlocked,
    MediaDoubtful,
    MediaMissing,
    NotMedia,
    StorageUnavailable,
    TransientError,
    UnrecognizedBody,
)
from receiver.lanes import (
    LEASE,
    MAX_LOST,
    MEDIA_LANE,
    Record,
    Target,
    Work,
    WorkLane,
    describe,
    destination_lane,
    facts_of,
    jitter,
    log_failure,
    start_attempt,
)
from receiver.media import Downloader, StoredFile
from receiver.observability import MEDIA_BYTES, MEDIA_FILES
from receiver.retry import DAY, GIVE_UP_AFTER, MEDIA_ODD, media_policy
from receiver.routing import Facts, refusal
from receiver.webhook import MAX_FILES, Generation, parse

FreshUrl = Callable[[StoredEvent, MediaRow], Awaitable[str | None]]

FAN_OUT_LIMIT: Final = 200
"""Events that are fanned out together at most."""
LOT_BYTES: Final = 1024 * 1024
"""Bytes that the bodies of those have together at most, unless it is one event.

They are read while the transaction is open: PostgreSQL ends one that is idle for long, and on SQLite every
webhook waits for it.
"""
FAILED_REST: Final = 60.0
"""Seconds for which events whose fan-out failed rest if they are many."""
FRESH_URLS: Final = 3
"""Tries at a file after which nobody asks any more whether it has moved."""
ASK_AGAIN: Final = 15.0
"""Seconds until Clipia is asked again where a file is, if it could not be asked."""
ASK_FOR: Final = 3 * DAY
"""Age of a download, in seconds, from which that is no reason to wait any more."""
STORAGE_PAUSE: Final = 15.0
"""Seconds without new downloads after our storage refused a file that it had not refused before."""

log = structlog.get_logger()


_AddWork = Callable[[AsyncConnection, Sequence[StoredEvent]], Awaitable[set[str] | None]]


class FanOut:
    """Moves events out of `received`: their files and their deliveries in the same transaction."""

    def __init__(
        self, database: Database, targets: Collection[Target], *, wake: Callable[[str], None]
    ) -> None:
        self._database = database
        self._targets = targets
        self._wake = wake
        self._most = FAN_OUT_LIMIT
        self._taken = 0
        self._failed: dict[int, float] = {}
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
            return len(events), more, await add_work(connection, events) if events else None

        count, self.left_behind, lanes = await self._database.run_at_once(work)
        for lane in lanes or ():
            self._wake(lane)
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
                self._failed[event.seq] = time.monotonic() + FAILED_REST
                if (datetime.now(UTC) - event.received_at).total_seconds() >= GIVE_UP_AFTER:
                    await inbox.set_state(connection, [event.seq], "unrecognized", reason="fan_out")
        return lanes if failed < len(events) else None

    def _resting(self, limit: int) -> Collection[int]:
        """Return events that failed lately, once there are so many that they could be a whole lot."""
        now = time.monotonic()
        self._failed = {seq: until for seq, until in self._failed.items() if until > now}
        return self._failed if 2 * len(self._failed) >= limit else ()

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
        for (event, generation), each in zip(recognized, facts, strict=True):
            files += [
                (
                    event.seq,
                    NewMedia(
                        position=ref.position,
                        variant=ref.variant,
                        kind=ref.kind,
                        url=ref.url,
                        field=ref.field,
                        skipped=f"the event has more than {MAX_FILES} files" if ref.skipped else None,
                    ),
                )
                for ref in generation.media
            ]
            for target in self._targets:
                if refusal(target.filter, each) is None:
                    waits = generation.media and target.waits_for_media
                    (held if waits else due).append((event.seq, target.name))
        await outbox.insert_media(connection, files)
        await outbox.insert_deliveries(connection, due, due=True)
        await outbox.insert_deliveries(connection, held, due=False)
        states: dict[EventState, list[int]] = defaultdict(list)
        for event, known in parsed:
            states["unrecognized" if known is None else "fetching" if known.media else "ready"].append(
                event.seq
            )
        for state, seqs in states.items():
            await inbox.set_state(connection, seqs, state)
        if files:
            lanes.add(MEDIA_LANE)
        return lanes | {destination_lane(name) for _, name in due}

    async def _settle_jobs(
        self, connection: AsyncConnection, recognized: Sequence[tuple[StoredEvent, Generation]]
    ) -> bool:
        """Bring the events' jobs to their last state; return whether there were any."""
        seqs = await job_events.with_open_jobs(connection, [event.seq for event, _ in recognized])
        settled = [
            await job_events.settle_with(
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
    ) -> list[Facts]:
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
        generation = parse(event.body)
    except UnrecognizedBody as error:
        # It was recognized when it came in: this release reads more strictly than the one that stored it.
        log.error("event not recognized", event_id=str(event.id), reason=error.reason)  # noqa: TRY400
        return None
    skipped = sum(ref.skipped for ref in generation.media)
    if generation.media_left_out or skipped:
        log.warning(
            "media left out",
            event_id=str(event.id),
            count=generation.media_left_out,
            skipped=skipped,
            kept=len(generation.media) - skipped,
        )
    return generation


class MediaLane(WorkLane):
    """Downloads the files of events."""

    def __init__(
        self,
        database: Database,
        downloader: Downloader,
        *,
        wake: Callable[[str], None],
        fresh_url: FreshUrl | None = None,
        concurrency: int = 8,
    ) -> None:
        """`fresh_url` tells where Clipia has a file now, for one that is no longer where it was."""
        super().__init__(database, media, name=MEDIA_LANE, concurrency=concurrency, wake=wake)
        self._downloader = downloader
        self._fresh_url = fresh_url
        self._paused_until = 0.0
        self._refused = set[UUID]()

    async def claim(self, limit: int) -> list[Work]:
        """Claim files that are due. Raises DatabaseUnavailable."""
        if time.monotonic() < self._paused_until:
            return []

        async def work(connection: AsyncConnection) -> list[Work]:
            claims = await leases.claim_media(connection, limit=limit, lease=LEASE)
            if not claims:
                return []
            seqs = {claim.event_seq for claim in claims}
            events = await inbox.load_events(connection, seqs)
            files = await outbox.load_media(connection, seqs)
            rows = {row.id: row for event_files in files.values() for row in event_files}
            return [
                Work(claim=claim, run=partial(self._save, claim, events[claim.event_seq], rows[claim.id]))
                for claim in claims
            ]

        return await self._database.run_at_once(work)

    async def _save(self, claim: EventClaim, event: StoredEvent, row: MediaRow) -> None:
        attempt = start_attempt(claim)
        if claim.lost >= MAX_LOST:
            await self._give_up(claim, attempt("failed", f"its download ended {claim.lost} workers"), "gone")
            return
        try:
            stored = await self._downloader.save(
                url=row.url,
                kind=row.kind,
                stem=storage_stem(event, row),
                seen=row.seen_sha256,
                last=claim.age >= MEDIA_ODD.give_up_after,
            )
        except Exception as error:  # noqa: BLE001 - whatever happened belongs to this row, not to its lane
            await self._failed(claim, attempt, event, row, error)
            return
        await self._stored(claim, attempt, event, row, stored)

    async def _stored(
        self, claim: EventClaim, attempt: Record, event: StoredEvent, row: MediaRow, stored: StoredFile
    ) -> None:
        self._refused.discard(claim.id)
        refused = None if stored.is_media else f"the host sends a page or a text in place of the {row.kind}"
        if await self._finish(
            claim,
            attempt("failed", refused) if refused else attempt("succeeded"),
            state="not_media" if refused else "stored",
            error=refused,
            warning=stored.warning,
            size=stored.size,
            sha256=stored.sha256,
            content_type=stored.content_type,
            storage_key=stored.key,
            uri=stored.uri,
        ):
            MEDIA_FILES.labels("not_media" if refused else "flagged" if stored.warning else "stored").inc()
            MEDIA_BYTES.inc(stored.size)
            log.log(
                logging.WARNING if refused or stored.warning else logging.INFO,
                "media stored",
                refused=refused,
                warning=stored.warning,
                event_id=str(event.id),
                request_id=event.request_id,
                variant=row.variant,
                uri=stored.uri,
                size=stored.size,
                sha256=stored.sha256,
                content_type=stored.content_type,
            )

    async def _failed(
        self, claim: EventClaim, attempt: Record, event: StoredEvent, row: MediaRow, error: Exception
    ) -> None:
        is_absent = isinstance(error, (MediaMissing, NotMedia))
        if is_absent and claim.attempt <= FRESH_URLS and self._fresh_url is not None:
            try:
                url = await self._fresh_url(event, row)
            except TransientError as unknown:
                if claim.age < ASK_FOR:
                    await self._ask_again(claim, attempt("retry", f"{describe(error)}; {unknown}"), unknown)
                    return
                url = None
            if url not in (None, row.url):
                log.info("media moved", work_id=str(claim.id), request_id=event.request_id)
                await self._put_back(claim, attempt("retry", describe(error)), delay=1.0, url=url)
                return
        message = describe(error)
        if isinstance(error, StorageUnavailable):
            # A file that the storage refuses again and again is no reason to keep the others waiting.
            if claim.id not in self._refused:
                self._paused_until = time.monotonic() + STORAGE_PAUSE
            self._refused.add(claim.id)
        delay = media_policy(error).next_delay(error, attempt=claim.attempt, age=claim.age, jitter=jitter())
        ids = {"event_id": str(event.id), "request_id": event.request_id, "variant": row.variant}
        log_failure("media not stored", claim, error, message, delay=delay, **ids)
        if delay is None:
            state = "blocked" if isinstance(error, MediaBlocked) else "gone"
            await self._give_up(claim, attempt("failed", message), state)
        elif await self._put_back(
            claim,
            attempt("retry", message),
            delay=delay,
            seen_sha256=error.sha256 if isinstance(error, MediaDoubtful) else row.seen_sha256,
        ):
            MEDIA_FILES.labels("retry").inc()

    async def _ask_again(self, claim: EventClaim, attempt: Attempt, unknown: TransientError) -> None:
        """Put a file back whose present URL cannot be asked for now; the try counts for nothing."""
        delay = max(ASK_AGAIN, unknown.retry_after or 0.0) * (1.0 + jitter())
        log.info("fresh URL not to be had yet", work_id=str(claim.id), reason=unknown.reason, retry_in=delay)
        await self._put_back(claim, attempt, delay=delay, attempts=media.c.attempts - 1)

    async def _give_up(self, claim: EventClaim, attempt: Attempt, state: str) -> None:
        if await self._finish(claim, attempt, state=state, error=attempt.error):
            MEDIA_FILES.labels(state).inc()

    async def _finish(
        self, claim: EventClaim, attempt: Attempt, *, state: str, error: str | None = None, **values: Any
    ) -> bool:
        """Record the last result of a file; False where its lease was lost meanwhile."""
        names: list[str] = []

        async def write(connection: AsyncConnection) -> bool:
            held = await leases.finish(connection, media, claim, state=state, error=error, **values)
            if held:
                await leases.record_attempt(connection, claim.id, attempt)
                # With the event's last file the deliveries that waited for it become due.
                names[:] = await outbox.settle(connection, claim.event_seq)
            return held

        held = await self._record(claim, write)
        for name in names:
            self._wake(destination_lane(name))
        return held

    async def _put_back(self, claim: EventClaim, attempt: Attempt, *, delay: float, **values: Any) -> bool:
        """Record a failed try and when the next one is due; False where the lease was lost meanwhile."""

        async def write(connection: AsyncConnection) -> bool:
            held = await leases.retry(connection, media, claim, delay=delay, error=attempt.error, **values)
            if held:
                await leases.record_attempt(connection, claim.id, attempt)
            return held

        return await self._record(claim, write)


def storage_stem(event: StoredEvent, row: MediaRow) -> str:
    """Return the storage key of a file without its extension.

    It is ours, never the URL's or the payload's, and always the same: a download that is repeated after a
    crash meets its own file.
    """
    digest = hashlib.sha256(f"{event.source}\n{event.request_id}".encode()).hexdigest()
    return f"{digest[:2]}/{digest}/{row.position:02d}-{row.variant}"
