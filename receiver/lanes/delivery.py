"""Deliveries: each destination has its own lane. Results are recorded in groups."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final, NamedTuple

import structlog
from cloudevents.core.v1.event import CloudEvent

from receiver.batching import Batcher
from receiver.core.lane_names import Wake, destination_lane
from receiver.core.replay_throttle import MAX_REST_SECONDS, ReplayThrottle
from receiver.core.token_bucket import TokenBucket
from receiver.db import inbox, job_events, leases, outbox, replays
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import Attempt, DeliveryClaim, JobRef, MediaRow, StoredEvent
from receiver.db.tables import deliveries
from receiver.destinations.base import GroupDestination
from receiver.errors import DatabaseUnavailable, PublishFailed, PublishRejected
from receiver.lanes import envelope
from receiver.lanes.attempts import StartedAttempt, crash_error, jitter, log_failure, stored_text
from receiver.lanes.base import Lane, Work
from receiver.lanes.delivery_report import DeliveryReport
from receiver.lanes.delivery_results import Result, record
from receiver.lanes.destination_states import DestinationStates
from receiver.lanes.shared_circuit import SharedCircuit
from receiver.lanes.spans import start_delivery
from receiver.lanes.targets import Target
from receiver.tracing import NO_SPAN, OFF, Span, Tracer

MAX_RESULTS: Final = 200
"""Results in one transaction."""
LARGE: Final = 32
"""An in-flight limit that is worth two groups: smaller ones would cost more transactions."""
MAX_BYTES: Final = 32 * 1024 * 1024
"""Bytes of the bodies that a lane holds, unless a single one is larger."""

log = structlog.get_logger()

_PublishFirst = Callable[[Sequence[CloudEvent]], Awaitable[Sequence[Exception | None]]]


class _Delivery(NamedTuple):
    """A claimed delivery and the parts of its message."""

    claim: DeliveryClaim
    event: StoredEvent
    files: Sequence[MediaRow]
    job: JobRef | None
    span: Span = NO_SPAN
    """The span of the attempt."""


class DeliveryLane(Lane):
    """Publishes deliveries to one destination, unaffected by failures of the others."""

    def __init__(
        self,
        database: Database,
        target: Target,
        *,
        wake: Wake,
        concurrency: int | None = None,
        max_rest_seconds: float = MAX_REST_SECONDS,
        states: DestinationStates | None = None,
        tracer: Tracer = OFF,
    ) -> None:
        """`concurrency` defaults to the target's, and that to the destination's own.

        Without `states` the destination is never paused, and its circuit belongs to this lane alone.
        """
        concurrency = concurrency or target.concurrency or target.destination.concurrency
        name = destination_lane(target.name)
        super().__init__(database, deliveries, name=name, concurrency=concurrency, wake=wake)
        self._target = target
        self._tracer = tracer
        self._bucket = TokenBucket(target.rate) if target.rate else None
        self._next_claim: asyncio.TimerHandle | None = None
        self._states = states or DestinationStates(database)
        self._circuit = SharedCircuit(target, concurrency, self._states, wake=wake)
        self._report = DeliveryReport(target.name)
        self._max_claims = self._fitting = self._most = concurrency
        self._publish_first: _PublishFirst | None = None
        if isinstance(target.destination, GroupDestination):
            self._publish_first = target.destination.publish_first
            # Two large groups alternate: one is published while the other one is claimed or recorded.
            self._most = concurrency // 2 if concurrency >= LARGE else concurrency
        self._throttle = ReplayThrottle(concurrency, max_rest_seconds=max_rest_seconds)
        self._results = Batcher(self._write, max_items=MAX_RESULTS, shared_errors=DatabaseUnavailable)

    async def claim(self, limit: int) -> list[Work]:
        """Claim due deliveries, as many as the circuit breaker and the rate limit allow.

        Raises DatabaseUnavailable.
        """
        asked = min(limit, self._circuit.available(under_way=self.concurrency - limit))
        limit = self._most_now(asked)
        self.may_have_more, self.claims_again = True, False
        if not limit:
            self._claim_when_allowed()
            return []
        try:
            found, too_many = await self._database.run_transaction(partial(self._claim, limit=limit))
        except DatabaseUnavailable:
            # A claim that takes too long is rolled back, and the next one gets the same rows: halve it.
            self._max_claims = max(1, limit // 2)
            raise
        self._max_claims = self.concurrency
        self._fitting = max(1, len(found)) if too_many else min(self.concurrency, 2 * self._fitting)
        if self._bucket is not None:
            self._bucket.take(len(found))
        # Counted after the commit: a claim that was rolled back takes no place.
        replay_ids = [this.claim.id for this, _ in found if this.claim.replay_id is not None]
        self._throttle.start(replay_ids, time.monotonic())
        self.may_have_more = len(found) == limit or too_many or self._throttle.is_busy
        self.claims_again = len(found) == self._most < asked
        if self.may_have_more:
            self._claim_when_allowed()
        return self._works(found)

    def _most_now(self, asked: int) -> int:
        """Return how many of `asked` deliveries may be claimed now."""
        if self.bytes_under_way >= MAX_BYTES:
            return 0
        limit = min(asked, self._max_claims, self._fitting, self._most)
        return limit if self._bucket is None else min(limit, self._bucket.available(time.monotonic()))

    def _works(self, found: Sequence[tuple[_Delivery, bool]]) -> list[Work]:
        """Return the work of deliveries, each with whether its replay was canceled."""
        works, group = list[Work](), list[_Delivery]()
        for this, is_canceled in found:
            if self._publish_first is not None and not is_canceled:
                group.append(this)
            else:
                run = self._drop if is_canceled else self._publish
                works.append(Work(claim=this.claim, run=partial(run, this), size=len(this.event.body)))
        if self._publish_first is not None and group:
            claim, *others = (this.claim for this in group)
            size = sum(len(this.event.body) for this in group)
            run_group = partial(self._publish_group, group, self._publish_first)
            works.append(Work(claim=claim, others=others, run=run_group, size=size))
        return works

    def _claim_when_allowed(self) -> None:
        """Wake the lane when its rate limit allows more attempts: work may end earlier or later than that."""
        delay = 0.0 if self._bucket is None else self._bucket.wait(time.monotonic())
        if delay and self._next_claim is None:
            self._next_claim = asyncio.get_running_loop().call_later(delay, self._claim_again)

    def _claim_again(self) -> None:
        self._next_claim = None
        self._wake(self.name)

    async def _claim(
        self, connection: SqlConnection, *, limit: int
    ) -> tuple[list[tuple[_Delivery, bool]], bool]:
        """Claim deliveries, as many as fit into memory.

        Returns each with whether its replay was canceled, and whether some did not fit.
        """
        claims = await self._claim_rows(connection, limit)
        if not claims:
            return [], False
        size = MAX_BYTES - self.bytes_under_way
        events = await inbox.load_first_events(connection, [claim.event_seq for claim in claims], size=size)
        left = [claim for claim in claims if claim.event_seq not in events]
        if left:
            await leases.release(connection, deliveries, left)
            claims = [claim for claim in claims if claim.event_seq in events]
        return await self._load(connection, claims, events), bool(left)

    async def _load(
        self, connection: SqlConnection, claims: Sequence[DeliveryClaim], events: Mapping[int, StoredEvent]
    ) -> list[tuple[_Delivery, bool]]:
        """Load the other parts of the messages; return each delivery with whether its replay was canceled."""
        files = await outbox.load_media(connection, events)
        refs = await job_events.load_refs(connection, events)
        replay_ids = {claim.replay_id for claim in claims if claim.replay_id is not None}
        canceled = await replays.find_canceled(connection, replay_ids)
        found = list[tuple[_Delivery, bool]]()
        for claim in claims:
            seq = claim.event_seq
            this = _Delivery(claim, events[seq], files.get(seq, ()), refs.get(seq))
            found.append((this, claim.replay_id in canceled))
        return found

    async def _claim_rows(self, connection: SqlConnection, limit: int) -> list[DeliveryClaim]:
        """Claim live deliveries first, and then as many of replays as the throttle allows."""
        claim = partial(leases.claim_deliveries, connection, self._target.name, lease=self.lease_seconds)
        claims = await claim(limit=limit, replayed=False)
        now = time.monotonic()
        allowed = self._throttle.allowed(now, free=limit - len(claims), live=len(claims))
        if not allowed:
            return claims
        replayed = await claim(limit=allowed, replayed=True)
        if not replayed:
            self._throttle.found_none(now)
        return claims + replayed

    async def _publish(self, this: _Delivery) -> None:
        try:
            await self._attempt(this)
        finally:
            self._end(this)

    def _end(self, this: _Delivery) -> None:
        if this.claim.replay_id is not None:
            rest = self._throttle.end(this.claim.id, time.monotonic())
            if rest is not None:
                asyncio.get_running_loop().call_later(rest, self._wake, self.name)

    async def _publish_group(self, group: Sequence[_Delivery], publish_first: _PublishFirst) -> None:
        try:
            await self._attempt_group(group, publish_first)
        finally:
            for this in group:
                self._end(this)

    async def _attempt_group(self, group: Sequence[_Delivery], publish_first: _PublishFirst) -> None:
        """Publish deliveries together, as many at a time as the destination takes, and record them.

        If none of these arrives, time runs out or the destination is paused, the rest is released: it was not
        attempted.
        """
        until = time.monotonic() + self.lease_seconds / 3
        left = await self._build(group)
        while left and time.monotonic() < until:
            attempt = StartedAttempt.of(group[0].claim)
            try:
                failures: Sequence[Exception | None] = await publish_first([message for _, message in left])
            except Exception as error:  # noqa: BLE001 - any error belongs to these rows, not to their lane
                failures = [error] * len(left)
            sent, left = left[: len(failures)], left[len(failures) :]
            await self._end_group([this for this, _ in sent], failures, attempt)
            if not (self._circuit.may_go_on and _has_answer(failures)):
                break
        if left:
            claims = [this.claim for this, _ in left]
            await self._until_recorded(claims[0], partial(self.release, claims))

    async def _build(self, group: Sequence[_Delivery]) -> list[tuple[_Delivery, CloudEvent]]:
        """Return deliveries with their messages; record those that have none."""
        built, records = list[tuple[_Delivery, CloudEvent]](), list[Awaitable[object]]()
        for this in group:
            attempt = StartedAttempt.of(this.claim)
            if crashed := crash_error(this.claim, "delivering this event"):
                records.append(self._give_up(this, attempt.end("failed", crashed)))
                continue
            begun = self._begin(this)
            try:
                built.append((begun, self._message(begun)))
            except Exception as error:  # noqa: BLE001 - any error belongs to this row, not to its lane
                begun.span.end(error)
                records.append(self._failed(begun, attempt, error))
        await asyncio.gather(*records)
        return built

    def _begin(self, this: _Delivery) -> _Delivery:
        """Return a delivery with the span of its attempt."""
        target = self._target
        return this._replace(
            span=start_delivery(self._tracer, target.name, target.scheme, *this[:2], this.job)
        )

    def _message(self, this: _Delivery) -> CloudEvent:
        claim, event, files, job, span = this
        url = self._target.internal_url
        return envelope.build(claim, event, files, job, internal_url=url, trace=span.context)

    async def _end_group(
        self, sent: Sequence[_Delivery], failures: Sequence[Exception | None], attempt: StartedAttempt
    ) -> None:
        """Record the confirmed deliveries together, and the others one by one."""
        confirmed, records = list[_Delivery](), list[Awaitable[object]]()
        for this, failure in zip(sent, failures, strict=True):
            self._circuit.note(failure, attempt.began)
            this.span.end(failure)
            if failure is None:
                confirmed.append(this)
            else:
                records.append(self._failed(this, replace(attempt, number=this.claim.attempt), failure))
        if confirmed:
            records.append(self._finish_delivered(confirmed, attempt))
        await asyncio.gather(*records)

    async def _finish_delivered(self, group: Sequence[_Delivery], attempt: StartedAttempt) -> None:
        """Record confirmed deliveries in one transaction, or one by one if that fails."""
        claims, ended = [this.claim for this in group], attempt.end("succeeded")
        write = partial(
            leases.finish_delivered,
            claims=claims,
            started_at=ended.started_at,
            duration_ms=ended.duration_ms,
        )
        try:
            await self._record(claims[0], write, group[0].span, rows=len(claims))
        except Exception as error:
            if not isinstance(error, leases.LeaseLost):
                log.exception("results recorded one by one", lane=self.name)
            results = (replace(ended, number=claim.attempt) for claim in claims)
            pairs = zip(group, results, strict=True)
            await asyncio.gather(*(self._finish(this, each, state="delivered") for this, each in pairs))
        else:
            self._report.tell({"delivered": len(group)}, [(this.claim, this.event) for this in group])

    async def _drop(self, this: _Delivery) -> None:
        self._throttle.drop(this.claim.id)
        attempt = StartedAttempt.of(this.claim).end("failed", "its replay was canceled")
        await self._finish(this, attempt, state="canceled")

    async def _attempt(self, this: _Delivery) -> None:
        attempt = StartedAttempt.of(this.claim)
        if crashed := crash_error(this.claim, "delivering this event"):
            await self._give_up(this, attempt.end("failed", crashed))
            return
        this = self._begin(this)
        try:
            message = self._message(this)
        except Exception as error:  # noqa: BLE001 - any error belongs to this row, not to its lane
            this.span.end(error)
            await self._failed(this, attempt, error)
            return
        try:
            await self._target.destination.publish(message)
        except Exception as error:  # noqa: BLE001 - likewise
            self._circuit.note(error, attempt.began)
            this.span.end(error)
            await self._failed(this, attempt, error)
            return
        self._circuit.note(None, attempt.began)
        this.span.end()
        await self._finish(this, attempt.end("succeeded"), state="delivered")

    async def _failed(self, this: _Delivery, attempt: StartedAttempt, error: Exception) -> None:
        claim, text = this.claim, stored_text(error)
        answer = error.answer if isinstance(error, PublishFailed | PublishRejected) else None
        age = self._states.age(self._target.name, claim.age)
        delay = self._target.retry.next_delay(error, attempt=claim.attempt, age=age, jitter=jitter())
        if delay is None:
            await self._give_up(this, attempt.end("failed", text, answer=answer))
            return
        log_failure("not delivered", error, work_id=str(claim.id), retry_in=delay, **self._ids(this))
        await self._finish(this, attempt.end("retry", text, answer=answer), delay=delay)

    async def _give_up(self, this: _Delivery, attempt: Attempt) -> None:
        if await self._finish(this, attempt, state="dead"):
            log.error("dead letter", error=attempt.error, **self._ids(this))

    async def _finish(
        self, this: _Delivery, attempt: Attempt, *, state: str | None = None, delay: float = 0.0
    ) -> bool:
        """Record a result; False if the lease was lost."""
        result = Result(claim=this.claim, event=this.event, attempt=attempt, state=state, delay=delay)
        with self._recording(this.span):
            return await self._until_recorded(this.claim, lambda: self._results.add(result))

    async def _write(self, results: Sequence[Result]) -> list[bool]:
        """Record results in one transaction; return for each whether its lease was still held."""
        held = await self._database.run_transaction(partial(record, results=results))
        recorded = [each for each in results if each.claim.id in held]
        delivered = [(each.claim, each.event) for each in recorded if each.state == "delivered"]
        self._report.tell(Counter(each.state or "retry" for each in recorded), delivered)
        return [each.claim.id in held for each in results]

    def _ids(self, this: _Delivery) -> dict[str, Any]:
        claim, event = this.claim, this.event
        ids = {"event_id": str(event.id), "request_id": event.request_id, "delivery_id": str(claim.id)}
        return {"destination": self._target.name, **ids, "attempt": claim.attempt}


def _has_answer(failures: Sequence[Exception | None]) -> bool:
    """Return whether the destination has answered for any message, even if it rejected it."""
    return any(failure is None or isinstance(failure, PublishRejected) for failure in failures)
