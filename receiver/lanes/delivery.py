"""Deliveries: each destination has a lane of its own; what came of the tries is recorded in groups."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from cloudevents.core.v1.event import CloudEvent
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.batching import Batcher
from receiver.core import envelope
from receiver.core.circuit_breaker import CircuitBreaker
from receiver.core.payload import reread
from receiver.core.token_bucket import TokenBucket
from receiver.db import inbox, job_events, leases, outbox, replays
from receiver.db.database import Database
from receiver.db.rows import Attempt, Claim, DeliveryClaim, JobRef, MediaRow, StoredEvent
from receiver.db.tables import deliveries
from receiver.errors import DatabaseUnavailable, PublishFailed, PublishRejected
from receiver.lanes.base import (
    LEASE,
    MAX_LOST,
    Record,
    Target,
    Work,
    WorkLane,
    describe,
    destination_lane,
    jitter,
    log_failure,
    start_attempt,
)
from receiver.metrics import CIRCUIT_OPEN, DELIVERIES

LARGEST_GROUP: Final = 200
"""Results that share a transaction at most."""
LIVE: Final = 1.0
"""Seconds for which a live delivery counts as traffic that replays give way to."""
MAX_REST: Final = 0.25
"""Seconds that replays rest at most between two batches."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What came of a try: the delivery's last state, or with `delay` (seconds) another try."""

    claim: DeliveryClaim
    event: StoredEvent
    attempt: Attempt
    state: str | None = None
    delay: float = 0.0


class DeliveryLane(WorkLane):
    """Publishes deliveries to one destination; no other destination's trouble reaches it."""

    def __init__(
        self,
        database: Database,
        target: Target,
        *,
        wake: Callable[[str], None],
        concurrency: int | None = None,
    ) -> None:
        """`concurrency` is the target's, or the destination's own, unless it is given."""
        concurrency = concurrency or target.concurrency or target.destination.concurrency
        name = destination_lane(target.name)
        super().__init__(database, deliveries, name=name, concurrency=concurrency, wake=wake)
        self._target = target
        self._circuit = CircuitBreaker(concurrency)
        self._bucket = TokenBucket(target.rate) if target.rate else None
        self._next_look: asyncio.TimerHandle | None = None
        if target.is_down:
            self._circuit.open(time.monotonic())
        CIRCUIT_OPEN.labels(target.name).set(self._circuit.is_open)
        self._most = concurrency
        self._replay_share = max(1, concurrency // 4)
        self._replaying: dict[UUID, float] = {}
        self._live_until = self._replays_from = self._no_replays_until = 0.0
        self._results = Batcher(self._write, max_items=LARGEST_GROUP, shared_errors=DatabaseUnavailable)

    async def claim(self, limit: int) -> list[Work]:
        """Claim deliveries that are due, as many as the circuit lets through. Raises DatabaseUnavailable."""
        room = self._circuit.available(time.monotonic(), under_way=self.concurrency - limit)
        limit = min(limit, room, self._most)
        if self._bucket is not None:
            limit = min(limit, self._bucket.available(time.monotonic()))
        self.left_behind = True
        if not limit:
            self._look_when_allowed()
            return []
        try:
            work, replayed = await self._database.run_transaction(partial(self._take, limit=limit))
        except DatabaseUnavailable:
            # A claim that takes too long is rolled back, and its rows are the first of the next one.
            self._most = max(1, limit // 2)
            raise
        self._most = self.concurrency
        if self._bucket is not None:
            self._bucket.take(len(work))
        # Only now: a claim that was rolled back takes no place.
        self._replaying |= dict.fromkeys(replayed, time.monotonic())
        self.left_behind = len(work) == limit or bool(self._replaying)
        if self.left_behind:
            self._look_when_allowed()
        return work

    def _look_when_allowed(self) -> None:
        """Wake the lane when its rate allows more tries: work ends too early for that, or too late."""
        delay = 0.0 if self._bucket is None else self._bucket.wait(time.monotonic())
        if delay and self._next_look is None:
            self._next_look = asyncio.get_running_loop().call_later(delay, self._look_again)

    def _look_again(self) -> None:
        self._next_look = None
        self._wake(self.name)

    async def _take(self, connection: AsyncConnection, *, limit: int) -> tuple[list[Work], list[UUID]]:
        """Claim deliveries; return what to do with them, and the ids of those that are of replays."""
        claims = await self._claim(connection, limit)
        if not claims:
            return [], []
        seqs = {claim.event_seq for claim in claims}
        events = await inbox.load_events(connection, seqs)
        files = await outbox.load_media(connection, seqs)
        refs = await job_events.load_refs(connection, seqs)
        replay_ids = {claim.id: claim.replay_id for claim in claims if claim.replay_id is not None}
        canceled = await replays.canceled(connection, set(replay_ids.values()))
        return [
            Work(claim=claim, run=partial(self._drop, claim, events[claim.event_seq]))
            if claim.replay_id in canceled
            else Work(
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
        ], list(replay_ids)

    async def _claim(self, connection: AsyncConnection, limit: int) -> list[DeliveryClaim]:
        """Claim what is live first, and of replays no more than leaves room and time for it.

        Where there were no replays a moment ago, what is live does not wait for another look.
        """
        claim = partial(leases.claim_deliveries, connection, self._target.name, lease=LEASE)
        claims = await claim(limit=limit, replayed=False)
        now = time.monotonic()
        if claims:
            self._live_until = now + LIVE
        room = min(limit - len(claims), self._replay_share - len(self._replaying))
        if room > 0 and now >= max(self._replays_from, self._no_replays_until if claims else now):
            replayed = await claim(limit=room, replayed=True)
            if not replayed:
                self._no_replays_until = now + MAX_REST
            claims += replayed
        return claims

    def _replayed(self, claim: DeliveryClaim) -> None:
        """Let replays rest for as long as they have worked, while there is live traffic."""
        now = time.monotonic()
        # Gone already where its lease was lost and this process has claimed it anew.
        began = self._replaying.pop(claim.id, now)
        if self._replays_from <= now < self._live_until:
            rest = min(MAX_REST, now - began)
            self._replays_from = now + rest
            asyncio.get_running_loop().call_later(rest, self._wake, self.name)

    async def _publish(
        self, claim: DeliveryClaim, event: StoredEvent, files: Sequence[MediaRow], job: JobRef | None
    ) -> None:
        try:
            await self._try(claim, event, files, job)
        finally:
            if claim.replay_id is not None:
                self._replayed(claim)

    async def _drop(self, claim: DeliveryClaim, event: StoredEvent) -> None:
        """End a delivery whose replay was canceled."""
        self._replaying.pop(claim.id, None)
        attempt = start_attempt(claim)("failed", "its replay was canceled")
        await self._settle(Result(claim=claim, event=event, attempt=attempt, state="canceled"))

    async def _try(
        self, claim: DeliveryClaim, event: StoredEvent, files: Sequence[MediaRow], job: JobRef | None
    ) -> None:
        attempt, started = start_attempt(claim), time.monotonic()
        if claim.lost >= MAX_LOST:
            await self._give_up(claim, attempt("failed", f"its delivery ended {claim.lost} workers"), event)
            return
        try:
            message = build_message(event, files, job, claim)
        except Exception as error:  # noqa: BLE001 - whatever happened belongs to this row, not to its lane
            await self._failed(claim, attempt, event, error)
            return
        try:
            await self._target.destination.publish(message)
        except Exception as error:  # noqa: BLE001 - likewise
            self._note(error, started)
            await self._failed(claim, attempt, event, error)
            return
        self._note(None, started)
        await self._settle(Result(claim=claim, event=event, attempt=attempt("succeeded"), state="delivered"))

    def _note(self, error: Exception | None, started: float) -> None:
        """Tell the circuit how the destination is doing; refusing one message is no trouble."""
        was_open = self._circuit.is_open
        after = (error.retry_after if isinstance(error, PublishFailed) else None) or 0.0
        if error is None or isinstance(error, PublishRejected):
            self._circuit.succeeded()
            if was_open:
                log.info("destination takes events again", destination=self._target.name)
        elif self._circuit.failed(time.monotonic(), started=started, retry_after=after):
            log.error("destination left alone", destination=self._target.name, error=describe(error))
        if self._circuit.is_open != was_open:
            CIRCUIT_OPEN.labels(self._target.name).set(not was_open)

    async def _failed(
        self, claim: DeliveryClaim, attempt: Record, event: StoredEvent, error: Exception
    ) -> None:
        message = describe(error)
        delay = self._target.retry.next_delay(error, attempt=claim.attempt, age=claim.age, jitter=jitter())
        if delay is None:
            await self._give_up(claim, attempt("failed", message), event)
            return
        log_failure("not delivered", claim, error, message, delay=delay, **self._ids(claim, event))
        await self._settle(Result(claim=claim, event=event, attempt=attempt("retry", message), delay=delay))

    async def _give_up(self, claim: DeliveryClaim, attempt: Attempt, event: StoredEvent) -> None:
        if await self._settle(Result(claim=claim, event=event, attempt=attempt, state="dead")):
            log.error("dead letter", error=attempt.error, **self._ids(claim, event))

    async def _settle(self, result: Result) -> bool:
        """Record a result; False where the lease was lost meanwhile."""
        return await self._until_recorded(result.claim, lambda: self._results.add(result))

    async def _write(self, results: Sequence[Result]) -> list[bool]:
        """Record results in one transaction; return which of them found their lease still held."""
        held = await self._database.run_transaction(partial(_record, results=results))
        self._count([each for each in results if each.claim.id in held])
        return [each.claim.id in held for each in results]

    def _count(self, results: Sequence[Result]) -> None:
        """Count what is on record now. The log has one line for all that was delivered."""
        for outcome, count in Counter(each.state or "retry" for each in results).items():
            DELIVERIES.labels(self._target.name, outcome).inc(count)
        if delivered := [each.event.request_id for each in results if each.state == "delivered"]:
            log.info("events delivered", destination=self._target.name, request_ids=delivered)

    def _ids(self, claim: DeliveryClaim, event: StoredEvent) -> dict[str, Any]:
        return {
            "destination": self._target.name,
            "event_id": str(event.id),
            "request_id": event.request_id,
            "delivery_id": str(claim.id),
            "attempt": claim.attempt,
        }


async def _record(connection: AsyncConnection, results: Sequence[Result]) -> set[UUID]:
    """Record results; return the ids of those whose lease was still held."""
    held = set[UUID]()
    finished: dict[tuple[str, str | None], list[Claim]] = defaultdict(list)
    await leases.lock(connection, deliveries, [each.claim for each in results])
    for each in results:
        if each.state is not None:
            finished[each.state, each.attempt.error].append(each.claim)
        elif await leases.retry(
            connection, deliveries, each.claim, delay=each.delay, error=each.attempt.error
        ):
            held.add(each.claim.id)
    for (state, error), claims in finished.items():
        held |= await leases.finish_all(connection, deliveries, claims, state=state, error=error)
    tries = [(each.claim.id, each.attempt) for each in results if each.claim.id in held]
    await leases.record_attempts(connection, tries)
    return held


def build_message(
    event: StoredEvent, files: Sequence[MediaRow], job: JobRef | None, claim: DeliveryClaim
) -> CloudEvent:
    """Make the message of a claimed delivery."""
    content = reread(event.body)
    return envelope.build(
        event_id=event.id,
        source=event.source,
        received_at=event.received_at,
        request_id=event.request_id,
        status=event.status,
        model=content.model,
        cost=content.cost,
        output=content.output,
        error=content.error,
        altered=content.altered,
        media=[
            envelope.ForwardedFile(
                url=row.url,
                field=row.field,
                kind=row.kind,
                variant=row.variant,
                state=row.state,
                uri=row.uri,
                sha256=row.sha256,
                size=row.size,
                content_type=row.content_type,
                error=row.error,
                warning=row.warning,
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
