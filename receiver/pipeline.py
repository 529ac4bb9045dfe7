"""What happens to an event after its ack: fan-out, media, deliveries."""

import hashlib
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver import envelope
from receiver.circuit import Circuit
from receiver.db import inbox, jobs, leases, outbox
from receiver.db.engine import Database
from receiver.db.rows import (
    Attempt,
    DeliveryClaim,
    EventClaim,
    EventState,
    JobRef,
    MediaRow,
    NewMedia,
    StoredEvent,
)
from receiver.db.tables import deliveries, media
from receiver.errors import MediaBlocked, MediaMissing, PublishFailed, StorageUnavailable, UnrecognizedBody
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
from receiver.media import Downloader
from receiver.observability import CIRCUIT_OPEN, DELIVERIES, MEDIA_BYTES, MEDIA_FILES
from receiver.retry import media_policy
from receiver.routing import Facts, refusal
from receiver.webhook import Generation, parse

FreshUrl = Callable[[StoredEvent, MediaRow], Awaitable[str | None]]

FRESH_URLS: Final = 3
"""Tries at a file after which nobody asks any more whether it has moved."""
STORAGE_PAUSE: Final = 15.0
"""Seconds without new downloads after our storage refused a file."""

log = structlog.get_logger()


class FanOut:
    """Moves events out of `received`: their files and their deliveries in the same transaction."""

    def __init__(
        self, database: Database, targets: Collection[Target], *, wake: Callable[[str], None]
    ) -> None:
        self._database = database
        self._targets = targets
        self._wake = wake

    async def run(self, *, limit: int = 100) -> int:
        """Fan out up to `limit` events and return how many. Raises DatabaseUnavailable."""
        lanes: set[str] = set()
        async with self._database.write() as connection:
            events = await inbox.lock_received(connection, limit=limit)
            by_state: dict[EventState, list[int]] = defaultdict(list)
            for event in events:
                by_state[await self._add_work(connection, event, lanes)].append(event.seq)
            for state, seqs in by_state.items():
                await inbox.set_state(connection, seqs, state)
        for lane in lanes:
            self._wake(lane)
        return len(events)

    async def _add_work(self, connection: AsyncConnection, event: StoredEvent, lanes: set[str]) -> EventState:
        try:
            generation = parse(event.body)
        except UnrecognizedBody as error:
            # It was recognized when it came in: this release reads more strictly than the one that stored it.
            log.error("event not recognized", event_id=str(event.id), reason=error.reason)  # noqa: TRY400
            return "unrecognized"
        if generation.media_left_out:
            log.warning(
                "media left out",
                event_id=str(event.id),
                count=generation.media_left_out,
                kept=len(generation.media),
            )
        files = [
            NewMedia(position=ref.position, variant=ref.variant, kind=ref.kind, url=ref.url)
            for ref in generation.media
        ]
        if await jobs.settle_with(connection, event.source, generation, job_id=event.job_id):
            lanes.add(jobs.SUBMIT_LANE)
        await outbox.insert_media(connection, event.seq, files)
        if files:
            lanes.add(MEDIA_LANE)
        facts = await self._facts(connection, event, generation)
        for target in self._targets:
            if refusal(target.filter, facts) is not None:
                continue
            due = not (files and target.waits_for_media)
            await outbox.insert_delivery(connection, event.seq, target.name, due=due)
            if due:
                lanes.add(destination_lane(target.name))
        return "fetching" if files else "ready"

    async def _facts(self, connection: AsyncConnection, event: StoredEvent, generation: Generation) -> Facts:
        needs_job = any(target.filter.needs_job for target in self._targets)
        refs = await jobs.load_refs(connection, [event.seq]) if needs_job else {}
        return facts_of(event, generation.model, refs.get(event.seq))


class MediaLane(WorkLane[EventClaim]):
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

    async def claim(self, limit: int) -> list[Work]:
        """Claim files that are due. Raises DatabaseUnavailable."""
        if time.monotonic() < self._paused_until:
            return []
        async with self._database.write() as connection:
            claims = await leases.claim_of_events(connection, media, limit=limit, lease=LEASE)
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

    async def _save(self, claim: EventClaim, event: StoredEvent, row: MediaRow) -> None:
        attempt = start_attempt(claim)
        if claim.lost >= MAX_LOST:
            await self._give_up(claim, attempt("failed", f"its download ended {claim.lost} workers"), "gone")
            return
        try:
            stored = await self._downloader.save(url=row.url, kind=row.kind, stem=storage_stem(event, row))
        except Exception as error:  # noqa: BLE001 - whatever happened belongs to this row, not to its lane
            await self._failed(claim, attempt, event, row, error)
            return
        if await self._finish(
            claim,
            attempt("succeeded"),
            state="stored",
            size=stored.size,
            sha256=stored.sha256,
            content_type=stored.content_type,
            storage_key=stored.key,
            uri=stored.uri,
        ):
            MEDIA_FILES.labels("stored").inc()
            MEDIA_BYTES.inc(stored.size)
            log.info(
                "media stored",
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
        if isinstance(error, MediaMissing) and claim.attempt <= FRESH_URLS:
            url = await self._fresh_url(event, row) if self._fresh_url is not None else None
            if url not in (None, row.url):
                log.info("media moved", work_id=str(claim.id), request_id=event.request_id)
                await self._put_back(claim, attempt("retry", describe(error)), delay=1.0, url=url)
                return
        message = describe(error)
        if isinstance(error, StorageUnavailable):
            self._paused_until = time.monotonic() + STORAGE_PAUSE
        delay = media_policy(error).next_delay(error, attempt=claim.attempt, age=claim.age, jitter=jitter())
        log_failure("media not stored", claim, error, message, delay=delay)
        if delay is None:
            state = "blocked" if isinstance(error, MediaBlocked) else "gone"
            await self._give_up(claim, attempt("failed", message), state)
        elif await self._put_back(claim, attempt("retry", message), delay=delay):
            MEDIA_FILES.labels("retry").inc()

    async def _give_up(self, claim: EventClaim, attempt: Attempt, state: str) -> None:
        if await self._finish(claim, attempt, state=state, error=attempt.error):
            MEDIA_FILES.labels(state).inc()

    async def _follow_up(self, connection: AsyncConnection, claim: EventClaim) -> list[str]:
        """Release the deliveries that waited for the event's last file."""
        return [destination_lane(name) for name in await outbox.settle(connection, claim.event_seq)]


class DeliveryLane(WorkLane[DeliveryClaim]):
    """Publishes deliveries to one destination; no other destination's trouble reaches it."""

    def __init__(
        self, database: Database, target: Target, *, wake: Callable[[str], None], concurrency: int = 32
    ) -> None:
        name = destination_lane(target.name)
        super().__init__(database, deliveries, name=name, concurrency=concurrency, wake=wake)
        self._target = target
        self._circuit = Circuit(concurrency)
        self._replay_share = max(1, concurrency // 4)
        self._replaying = set[UUID]()

    async def claim(self, limit: int) -> list[Work]:
        """Claim deliveries that are due, as many as the circuit lets through. Raises DatabaseUnavailable."""
        limit = min(limit, self._circuit.room(time.monotonic(), under_way=self.concurrency - limit))
        if not limit:
            return []
        async with self._database.write() as connection:
            claims = await self._claim(connection, limit)
            if not claims:
                return []
            seqs = {claim.event_seq for claim in claims}
            events = await inbox.load_events(connection, seqs)
            files = await outbox.load_media(connection, seqs)
            refs = await jobs.load_refs(connection, seqs)
        # Only now: a claim that was rolled back takes no place.
        self._replaying |= {claim.id for claim in claims if claim.replay_id is not None}
        return [
            Work(
                claim=claim,
                run=partial(
                    self._publish,
                    claim,
                    events[claim.event_seq],
                    files.get(claim.event_seq, ()),
                    refs.get(claim.event_seq),
                ),
            )
            for claim in claims
        ]

    async def _claim(self, connection: AsyncConnection, limit: int) -> list[DeliveryClaim]:
        """Claim what is live first, and of replays no more than leaves room for it."""
        claim = partial(leases.claim_deliveries, connection, self._target.name, lease=LEASE)
        claims = await claim(limit=limit, replayed=False)
        room = min(limit - len(claims), self._replay_share - len(self._replaying))
        if room > 0:
            claims += await claim(limit=room, replayed=True)
        return claims

    async def _publish(
        self, claim: DeliveryClaim, event: StoredEvent, files: Sequence[MediaRow], job: JobRef | None
    ) -> None:
        try:
            await self._try(claim, event, files, job)
        finally:
            self._replaying.discard(claim.id)

    async def _try(
        self, claim: DeliveryClaim, event: StoredEvent, files: Sequence[MediaRow], job: JobRef | None
    ) -> None:
        attempt, started = start_attempt(claim), time.monotonic()
        if claim.lost >= MAX_LOST:
            await self._give_up(claim, attempt("failed", f"its delivery ended {claim.lost} workers"), event)
            return
        try:
            await self._target.destination.publish(build_message(event, files, job, claim))
        except Exception as error:  # noqa: BLE001 - whatever happened belongs to this row, not to its lane
            self._note(error, started)
            await self._failed(claim, attempt, event, error)
            return
        self._note(None, started)
        if await self._finish(claim, attempt("succeeded"), state="delivered"):
            self._count("delivered")
            log.info("delivered", **self._ids(claim, event))

    def _note(self, error: Exception | None, started: float) -> None:
        """Tell the circuit how the destination is doing; refusing one message is no trouble."""
        if not isinstance(error, PublishFailed):
            self._circuit.succeeded()
        elif self._circuit.failed(time.monotonic(), started=started):
            log.error("destination left alone", destination=self._target.name, error=str(error))
        CIRCUIT_OPEN.labels(self._target.name).set(self._circuit.is_open)

    async def _failed(
        self, claim: DeliveryClaim, attempt: Record, event: StoredEvent, error: Exception
    ) -> None:
        message = describe(error)
        delay = self._target.retry.next_delay(error, attempt=claim.attempt, age=claim.age, jitter=jitter())
        if delay is None:
            await self._give_up(claim, attempt("failed", message), event)
            return
        log_failure("not delivered", claim, error, message, delay=delay, destination=self._target.name)
        if await self._put_back(claim, attempt("retry", message), delay=delay):
            self._count("retry")

    async def _give_up(self, claim: DeliveryClaim, attempt: Attempt, event: StoredEvent) -> None:
        if await self._finish(claim, attempt, state="dead", error=attempt.error):
            self._count("dead")
            log.error("dead letter", error=attempt.error, **self._ids(claim, event))

    def _count(self, outcome: str) -> None:
        DELIVERIES.labels(self._target.name, outcome).inc()

    def _ids(self, claim: DeliveryClaim, event: StoredEvent) -> dict[str, Any]:
        return {
            "destination": self._target.name,
            "event_id": str(event.id),
            "request_id": event.request_id,
            "delivery_id": str(claim.id),
            "attempt": claim.attempt,
        }


def build_message(
    event: StoredEvent, files: Sequence[MediaRow], job: JobRef | None, claim: DeliveryClaim
) -> CloudEvent:
    """Make the message of a claimed delivery."""
    generation = parse(event.body)
    return envelope.build(
        event_id=event.id,
        source=event.source,
        received_at=event.received_at,
        request_id=event.request_id,
        status=event.status,
        model=generation.model,
        cost=generation.cost,
        output=generation.output,
        error=generation.error,
        media=[
            envelope.ForwardedFile(
                url=row.url,
                kind=row.kind,
                variant=row.variant,
                state=row.state,
                uri=row.uri,
                sha256=row.sha256,
                size=row.size,
                content_type=row.content_type,
                error=row.error,
            )
            for row in files
        ],
        job=None
        if job is None
        else envelope.ForwardedJob(
            id=str(job.id), idempotency_key=job.idempotency_key, metadata=job.metadata
        ),
        delivery_id=claim.id,
        attempt=claim.attempt,
        replay_id=claim.replay_id,
    )


def storage_stem(event: StoredEvent, row: MediaRow) -> str:
    """Return the storage key of a file without its extension.

    It is ours, never the URL's or the payload's, and always the same: a download that is repeated after a
    crash meets its own file.
    """
    digest = hashlib.sha256(f"{event.source}\n{event.request_id}".encode()).hexdigest()
    return f"{digest[:2]}/{digest}/{row.position:02d}-{row.variant}"
