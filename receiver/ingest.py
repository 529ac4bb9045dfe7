"""Ingest: verify the signature, parse the body, store the event once. The answer is sent only after that."""

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Final, Literal, NamedTuple
from uuid import UUID

import structlog

from receiver.batching import Batcher, Done, Entry, resolve
from receiver.core.lenient_json import same_json
from receiver.core.payload import summarize
from receiver.core.signature import Secret, verify
from receiver.db import inbox, prices
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import EventState, NewEvent, Outcome, id_text, raw_event_id
from receiver.errors import DatabaseUnavailable, UnrecognizedBody
from receiver.lanes.spans import start_storing
from receiver.metrics import SECRETS_USED, WEBHOOKS
from receiver.tracing import OFF, Tracer

MAX_BATCH_WEBHOOKS: Final = 256
"""The most webhooks in one transaction."""
MAX_BATCH_BYTES: Final = 1024 * 1024
"""The most bytes of bodies in one transaction: the driver copies all of them several times."""
DRAIN_SECONDS: Final = 5.0
"""How long a stopping process waits for the database, at most."""

log = structlog.get_logger()


class SignedRequest(NamedTuple):
    """A request to the callback. Only the signature and the body are verified.

    `webhook_id` is only recorded. `job_id` and `path_token`, from the path, only help to find the job if its
    `request_id` is not known yet.
    """

    source: str
    signatures: Sequence[bytes]
    """The values of all X-Clipia-Signature fields."""
    body: bytes
    """The raw body."""
    webhook_id: str | None = None
    job_id: UUID | None = None
    path_token: str | None = None


class Received(NamedTuple):
    """The result of one authentic request."""

    event_id: str
    outcome: Outcome


class Ingest:
    """Verifies and stores webhooks; used by the callback."""

    def __init__(
        self,
        database: Database,
        *,
        secrets: Mapping[str, Sequence[Secret]],
        tolerance: int,
        clock: Callable[[], float],
        on_accepted: Callable[[], None],
        tracer: Tracer = OFF,
    ) -> None:
        """`secrets` are given by source; `tolerance` is in seconds, and `clock` returns unix seconds.

        `on_accepted` is called after a new event was committed. It only saves time: workers also poll.
        """
        self._database = database
        self._secrets = secrets
        self._tolerance = tolerance
        self._clock = clock
        self._on_accepted = on_accepted
        self._tracer = tracer
        self._new = _batcher(self._store)
        self._repeated = _batcher(self._record_repeats)
        self._verified = {(source, secret.id): 0 for source, known in secrets.items() for secret in known}
        self._count_verified()

    @property
    def sources(self) -> Collection[str]:
        """The names of the configured sources."""
        return self._secrets.keys()

    def submit(self, request: SignedRequest, done: Done[Received]) -> "Submission":
        """Verify one request, queue it, and call `done` once it is durably committed or has failed.

        Raises SignatureError if the signature is invalid or too old. `done` gets a DatabaseUnavailable if the
        event may not have been stored; sending it again is safe. The same holds for a cancelled submission.
        There is no timeout: the caller sets one for the body and the database together.
        """
        source, signatures, body, webhook_id, job_id, path_token = request
        now = self._clock()
        verified = verify(signatures, body, secrets=self._secrets[source], now=now, tolerance=self._tolerance)
        # Counted once for a group: each increment takes a lock.
        self._verified[source, verified.secret_id] += 1
        event = make_event(
            source,
            body,
            received_at=now,
            job_id=job_id,
            path_token=path_token,
            webhook_id=webhook_id,
            secret_id=verified.secret_id,
            signed_at=verified.timestamp,
        )
        return Submission(event, done, self._new, self._repeated)

    async def receive(self, request: SignedRequest) -> Received:
        """Do what `submit` does, and return the result once it is committed. Raises its errors."""
        future: asyncio.Future[Received] = asyncio.get_running_loop().create_future()
        submission = self.submit(request, partial(resolve, future))
        try:
            return await future
        finally:
            submission.cancel()
            # The future has the error, and the error's traceback has this frame.
            del future, submission

    async def drain(self) -> None:
        """Return when all waiting requests are stored or have failed, or after DRAIN_SECONDS.

        The caller must not submit more.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._new.drain()
                await self._repeated.drain()

    async def record_result(self, source: str, body: bytes) -> Received:
        """Store a polled result in place of a webhook that did not come.

        `body` is the body that the webhook would have had. Raises DatabaseUnavailable.
        """
        event = make_event(source, body, received_at=self._clock(), origin="poll")
        known = await self._database.insert_arrivals([event])
        outcome: Outcome = "duplicate" if known else event.first_outcome
        WEBHOOKS.labels(source, f"poll_{outcome}").inc()
        if outcome == "accepted":
            self._on_accepted()
        return Received(id_text(event.raw_id), outcome)

    async def _store(self, group: Sequence[NewEvent]) -> list[Outcome | None]:
        """Store new events; return their outcomes, and None for each event that was stored before."""
        self._count_verified()
        # If an event is twice in a group, only its first request is new.
        new = {event.raw_id: event for event in reversed(group)}
        with start_storing(self._tracer, group, system=self._database.dialect_name):
            known = await self._database.insert_arrivals([*new.values()])
        outcomes: list[Outcome | None] = [
            event.first_outcome if event.raw_id not in known and new[event.raw_id] is event else None
            for event in group
        ]
        self._report(group, outcomes)
        if "accepted" in outcomes:
            self._on_accepted()
        return outcomes

    async def _record_repeats(self, group: Sequence[NewEvent]) -> list[Outcome | None]:
        """Record requests for stored events; return their outcomes, None if the event was pruned."""
        outcomes = await self._database.run_transaction(
            partial(_insert_repeats, group=group), is_webhook=True
        )
        self._report(group, outcomes)
        return outcomes

    def _count_verified(self) -> None:
        for labels, number in self._verified.items():
            SECRETS_USED.labels(*labels).inc(number)
            self._verified[labels] = 0

    def _report(self, group: Sequence[NewEvent], outcomes: Sequence[Outcome | None]) -> None:
        """Count and log the outcomes.

        There is one log record per source and outcome: one per webhook would cost more than storing it.
        """
        lots: dict[tuple[str, Outcome], list[str]] = defaultdict(list)
        for event, outcome in zip(group, outcomes, strict=True):
            if outcome is None:
                continue
            lots[event.source, outcome].append(event.request_id)
            if outcome in {"conflict", "unrecognized"}:
                log.warning(
                    "webhook stored but not forwarded",
                    source=event.source,
                    outcome=outcome,
                    event_id=str(event.id),
                    request_id=event.request_id,
                    reason=event.reason,
                    webhook_id=event.webhook_id,
                )
        for (source, outcome), request_ids in lots.items():
            WEBHOOKS.labels(source, outcome).inc(len(request_ids))
            log.info("webhooks stored", source=source, outcome=outcome, request_ids=request_ids)


class Submission:
    """A request that waits until it is stored: as a new event, or else as a repeat of a stored one."""

    __slots__ = ("_done", "_entry", "_event", "_repeated")

    def __init__(
        self,
        event: NewEvent,
        done: Done[Received],
        new: Batcher[NewEvent, Outcome | None],
        repeated: Batcher[NewEvent, Outcome | None],
    ) -> None:
        self._event = event
        self._done: Done[Received] | None = done
        self._repeated: Batcher[NewEvent, Outcome | None] | None = repeated
        self._entry: Entry[NewEvent, Outcome | None] | None = new.put(event, self._stored)

    def cancel(self) -> None:
        """Drop the request if it still waits; `done` is not called any more."""
        if self._entry is not None:
            self._entry.cancel()
        self._entry = self._done = None

    def _stored(self, outcome: Outcome | None, error: Exception | None) -> None:
        repeated, self._repeated = self._repeated, None
        if outcome is None and error is None:
            if repeated is not None:
                self._entry = repeated.put(self._event, self._stored)
                return
            # The event was pruned between the two transactions. The next request stores it as a new one.
            error = DatabaseUnavailable("the event was pruned while its webhook was recorded", reason="race")
        done = self._done
        self._entry = self._done = None
        if done is not None:
            done(None if outcome is None else Received(id_text(self._event.raw_id), outcome), error)


def _batcher(
    write: Callable[[Sequence[NewEvent]], Awaitable[Sequence[Outcome | None]]],
) -> Batcher[NewEvent, Outcome | None]:
    return Batcher(
        write,
        max_items=MAX_BATCH_WEBHOOKS,
        weigh=lambda event: len(event.body),
        max_bytes=MAX_BATCH_BYTES,
        is_balanced=True,
        shared_errors=DatabaseUnavailable,
    )


async def _insert_repeats(connection: SqlConnection, group: Sequence[NewEvent]) -> list[Outcome | None]:
    found = await inbox.find_events(connection, {event.id for event in group})
    stored = [found.get(event.id) for event in group]
    bodies = await _load_unequal_bodies(connection, group, stored)
    outcomes = [_repeat_outcome(known, event, bodies) for known, event in zip(stored, group, strict=True)]
    outcomes = await _without_decided(connection, group, stored, outcomes)
    receipts = [
        (known.seq, event, outcome)
        for known, event, outcome in zip(stored, group, outcomes, strict=True)
        if known is not None and outcome is not None
    ]
    await inbox.record_receipts(connection, receipts)
    return outcomes


async def _load_unequal_bodies(
    connection: SqlConnection, group: Sequence[NewEvent], stored: Sequence[inbox.KnownEvent | None]
) -> dict[int, bytes]:
    pairs = zip(stored, group, strict=True)
    seqs = {known.seq for known, event in pairs if known and known.body_sha256 != event.body_sha256}
    return await inbox.load_bodies(connection, seqs) if seqs else {}


async def _without_decided(
    connection: SqlConnection,
    group: Sequence[NewEvent],
    stored: Sequence[inbox.KnownEvent | None],
    outcomes: Sequence[Outcome | None],
) -> list[Outcome | None]:
    """Turn a conflict into a duplicate if a person has decided against the same body before."""
    if "conflict" not in outcomes:
        return list(outcomes)
    seqs = {known.seq for known in stored if known is not None}
    decided = await inbox.find_superseded(connection, seqs)
    return [
        "duplicate" if known is not None and (known.seq, event.body_sha256) in decided else outcome
        for known, event, outcome in zip(stored, group, outcomes, strict=True)
    ]


def _repeat_outcome(
    known: inbox.KnownEvent | None, event: NewEvent, bodies: Mapping[int, bytes]
) -> Outcome | None:
    if known is None:
        return None
    return "unrecognized" if event.state == "unrecognized" else compare(known, event, bodies)


def compare(
    known: inbox.KnownEvent, event: NewEvent, bodies: Mapping[int, bytes]
) -> Literal["duplicate", "conflict"]:
    """Return whether a repeated webhook agrees with its stored event.

    `bodies` has the stored bodies that are not the same bytes, by `seq`.
    """
    # The receipt of a conflict stores the body; that would bring the content of an erased event back.
    if known.body_sha256 == event.body_sha256 or known.state == "erased":
        return "duplicate"
    if known.origin == "poll":
        # The polled body was written by us, so its other fields may differ from Clipia's.
        same = known.status == event.status
    else:
        same = same_json(bodies[known.seq], event.body)
    return "duplicate" if same else "conflict"


def make_event(
    source: str,
    body: bytes,
    *,
    received_at: float,
    origin: Literal["webhook", "poll"] = "webhook",
    job_id: UUID | None = None,
    path_token: str | None = None,
    webhook_id: str | None = None,
    secret_id: str | None = None,
    signed_at: float | None = None,
) -> NewEvent:
    """Make the event of an authentic body; the last three are of its request.

    An unrecognized body gets its digest as `request_id`, even if it contains a `request_id`: it must not take
    the place of the real result, which may still come.
    """
    sha256 = hashlib.sha256(body).digest()
    state: EventState = "received"
    reason = None
    try:
        request_id, status, model, cost = summarize(body)
    except UnrecognizedBody as error:
        request_id, status, model, cost = f"sha256:{sha256.hex()}", None, None, None
        state, reason = "unrecognized", error.reason
    # By position: names would double the time.
    return NewEvent(
        raw_event_id(source, request_id),
        request_id,
        model,
        *prices.columns(cost),
        body,
        sha256,
        received_at,
        job_id,
        path_token,
        webhook_id,
        signed_at,
        source,
        origin,
        state,
        reason,
        status,
        secret_id,
    )
