"""Ingest: verify the signature → parse → store once. The answer may be sent when it returns, not before."""

import hashlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Final, Literal, NamedTuple
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.batching import Batcher
from receiver.core.lenient_json import same_json
from receiver.core.payload import summarize
from receiver.core.signature import Secret, verify
from receiver.db import arrivals, inbox, prices
from receiver.db.database import Database
from receiver.db.rows import Arrival, NewEvent, Outcome, event_id
from receiver.errors import DatabaseUnavailable, UnrecognizedBody
from receiver.metrics import SECRETS_USED, WEBHOOKS

LARGEST_GROUP: Final = 256
"""The most deliveries that share a transaction."""
HEAVIEST_GROUP: Final = 1024 * 1024
"""The most bytes of bodies that share a transaction: the driver copies all of them, more than once."""

log = structlog.get_logger()


class Received(NamedTuple):
    """What became of one authentic delivery."""

    event_id: UUID
    outcome: Outcome


class Ingest:
    """The use case behind the callback."""

    def __init__(
        self,
        database: Database,
        *,
        secrets: Mapping[str, Sequence[Secret]],
        tolerance: int,
        clock: Callable[[], float],
        on_accepted: Callable[[], None],
    ) -> None:
        """`secrets` are those of each source, `tolerance` in seconds, `clock` tells unix seconds.

        `on_accepted` is called after a new event is committed; losing the call loses nothing.
        """
        self._database = database
        self._secrets = secrets
        self._tolerance = tolerance
        self._clock = clock
        self._on_accepted = on_accepted
        self._first = _grouped(self._store)
        self._again = _grouped(self._compare)
        self._verified = {
            (source, secret.id): SECRETS_USED.labels(source, secret.id)
            for source, known in secrets.items()
            for secret in known
        }

    def has_source(self, source: str) -> bool:
        """Tell whether there is such a source."""
        return source in self._secrets

    async def receive(
        self,
        source: str,
        *,
        signatures: Sequence[bytes],
        body: bytes,
        webhook_id: str | None = None,
        job_id: UUID | None = None,
        path_token: str | None = None,
    ) -> Received:
        """Verify and store one delivery; when this returns, it is committed durably.

        `signatures` are the values of all X-Clipia-Signature fields, `body` the raw bytes; `webhook_id` is
        not signed and only put on record; `job_id` and `path_token`, from the path, are not signed either and
        only help to find the job whose `request_id` is not known yet.

        Raises SignatureError where the signature or its age does not hold, and DatabaseUnavailable where the
        event could not be stored: it may or may not be stored then, and sending it again is safe. It waits
        for the database without a limit of its own: the caller's deadline covers the body, too. Cancelling
        it means the same as DatabaseUnavailable.
        """
        now = self._clock()
        verified = verify(signatures, body, secrets=self._secrets[source], now=now, tolerance=self._tolerance)
        self._verified[source, verified.secret_id].inc()
        event = make_event(
            source,
            body,
            received_at=datetime.fromtimestamp(now, UTC),
            job_id=job_id,
            path_token=path_token,
        )
        arrival = Arrival(
            event, webhook_id, verified.secret_id, datetime.fromtimestamp(verified.timestamp, UTC)
        )
        outcome = await self._first.add(arrival) or await self._again.add(arrival)
        if outcome is None:
            # Pruned since it was found to be there. The next delivery starts afresh.
            raise DatabaseUnavailable("the event vanished while it was looked up", reason="race")
        return Received(event.id, outcome)

    async def record_result(self, source: str, body: bytes) -> Received:
        """Store a result that was asked for, in the place of the webhook that did not bring it.

        `body` is what the webhook would have carried. Raises DatabaseUnavailable.
        """
        event = make_event(
            source, body, received_at=datetime.fromtimestamp(self._clock(), UTC), origin="poll"
        )
        async with self._database.write() as connection:
            seq = await inbox.insert_event(connection, event)
        outcome = "duplicate" if seq is None else event.first_outcome
        WEBHOOKS.labels(source, f"poll_{outcome}").inc()
        if outcome == "accepted":
            self._on_accepted()
        return Received(event_id=event.id, outcome=outcome)

    async def _store(self, group: Sequence[Arrival]) -> list[Outcome | None]:
        """Store what is new, and return how it is answered; None where the event was there already."""
        # Of two deliveries of one event in a group the second is a repetition like any other.
        new = {arrival.event.id: arrival for arrival in reversed(group)}
        known = await arrivals.insert_new(self._database, [*new.values()])
        outcomes: list[Outcome | None] = [
            arrival.event.first_outcome
            if arrival.event.id not in known and new[arrival.event.id] is arrival
            else None
            for arrival in group
        ]
        self._report(group, outcomes)
        if "accepted" in outcomes:
            self._on_accepted()
        return outcomes

    async def _compare(self, group: Sequence[Arrival]) -> list[Outcome | None]:
        """Put deliveries of events that are there already on record, and return how they are answered.

        None is for one whose event is there no more.
        """
        outcomes = await self._database.run_transaction(partial(_record_again, group=group), is_webhook=True)
        self._report(group, outcomes)
        return outcomes

    def _report(self, group: Sequence[Arrival], outcomes: Sequence[Outcome | None]) -> None:
        """Count and log those that have an outcome.

        A line tells of all that were stored together: one for each would cost more than storing it.
        """
        lots: dict[tuple[str, Outcome], list[str]] = defaultdict(list)
        for (event, webhook_id, *_), outcome in zip(group, outcomes, strict=True):
            if outcome is None:
                continue
            lots[event.source, outcome].append(event.request_id)
            if outcome in {"conflict", "unrecognized"}:
                log.warning(
                    "webhook kept and not forwarded",
                    source=event.source,
                    outcome=outcome,
                    event_id=str(event.id),
                    request_id=event.request_id,
                    reason=event.reason,
                    webhook_id=webhook_id,
                )
        for (source, outcome), request_ids in lots.items():
            WEBHOOKS.labels(source, outcome).inc(len(request_ids))
            log.info("webhooks stored", source=source, outcome=outcome, request_ids=request_ids)


def _grouped(
    write: Callable[[Sequence[Arrival]], Awaitable[Sequence[Outcome | None]]],
) -> Batcher[Arrival, Outcome | None]:
    return Batcher(
        write,
        max_items=LARGEST_GROUP,
        weigh=lambda arrival: len(arrival.event.body),
        max_bytes=HEAVIEST_GROUP,
        shared_errors=DatabaseUnavailable,
    )


async def _record_again(connection: AsyncConnection, group: Sequence[Arrival]) -> list[Outcome | None]:
    found = await inbox.find_events(connection, {event.id for event, *_ in group})
    known = [found.get(event.id) for event, *_ in group]
    others = {
        one.seq
        for one, (event, *_) in zip(known, group, strict=True)
        if one is not None and one.body_sha256 != event.body_sha256
    }
    bodies = await inbox.load_bodies(connection, others) if others else {}
    outcomes: list[Outcome | None] = [
        None
        if one is None
        else "unrecognized"
        if event.state == "unrecognized"
        else compare(one, event, bodies)
        for one, (event, *_) in zip(known, group, strict=True)
    ]
    await inbox.record_receipts(
        connection,
        [
            (one.seq, arrival, outcome)
            for one, arrival, outcome in zip(known, group, outcomes, strict=True)
            if one is not None and outcome is not None
        ],
    )
    return outcomes


def compare(
    known: inbox.KnownEvent, event: NewEvent, bodies: Mapping[int, bytes]
) -> Literal["duplicate", "conflict"]:
    """Tell whether another delivery of an event that is there already says the same.

    `bodies` are those of known events, by `seq`, that are not the same bytes.
    """
    # A conflict would keep the body on its receipt, and with it what was erased.
    if known.body_sha256 == event.body_sha256 or known.state == "erased":
        return "duplicate"
    if known.origin == "poll":
        # We wrote that body ourselves, and need not have hit Clipia's words.
        same = known.status == event.status
    else:
        same = same_json(bodies[known.seq], event.body)
    return "duplicate" if same else "conflict"


def make_event(
    source: str,
    body: bytes,
    *,
    received_at: datetime,
    origin: Literal["webhook", "poll"] = "webhook",
    job_id: UUID | None = None,
    path_token: str | None = None,
) -> NewEvent:
    """Make the event of an authentic webhook body.

    A body that is no usable event is kept under its own digest and never under the `request_id` that it may
    name: it must not take the place of the real result, which may still come.
    """
    sha256 = hashlib.sha256(body).hexdigest()
    try:
        summary = summarize(body)
    except UnrecognizedBody as error:
        request_id = f"sha256:{sha256}"
        return NewEvent(
            id=event_id(source, request_id),
            source=source,
            request_id=request_id,
            origin=origin,
            state="unrecognized",
            reason=error.reason,
            job_id=job_id,
            path_token=path_token,
            body=body,
            body_sha256=sha256,
            received_at=received_at,
        )
    return NewEvent(
        id=event_id(source, summary.request_id),
        source=source,
        request_id=summary.request_id,
        origin=origin,
        state="received",
        status=summary.status,
        model=summary.model,
        **prices.split(cost=summary.cost),
        job_id=job_id,
        path_token=path_token,
        body=body,
        body_sha256=sha256,
        received_at=received_at,
    )
