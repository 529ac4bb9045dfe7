"""Ingest: verify the signature → parse → store once. The answer may be sent when it returns, not before."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Literal
from uuid import UUID

import structlog

from receiver.db import inbox
from receiver.db.engine import Database
from receiver.db.rows import NewEvent, NewReceipt, Outcome, event_id
from receiver.errors import DatabaseUnavailable, UnrecognizedBody
from receiver.observability import SECRETS_USED, WEBHOOKS
from receiver.signature import Secret, Verified, verify
from receiver.webhook import parse, same_json

STORE_WAIT: Final = 5.0
"""Seconds until an event that is not stored yet is answered as unavailable.

With 3 s for a slow body this leaves room inside the 10 s after which Clipia gives up on an answer.
"""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Received:
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
        self._unanswered: set[asyncio.Task[Received]] = set()

    def knows(self, source: str) -> bool:
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
    ) -> Received:
        """Verify and store one delivery; when this returns, it is committed durably.

        `signatures` are the values of all X-Clipia-Signature fields, `body` the raw bytes; `webhook_id` is
        not signed and only put on record; `job_id`, from the path, is not signed either and only helps to
        find the job whose `request_id` is not known yet.

        Raises SignatureError where the signature or its age does not hold, and DatabaseUnavailable where the
        event could not be stored in time: it may or may not be stored then, and sending it again is safe.
        """
        now = self._clock()
        verified = verify(signatures, body, secrets=self._secrets[source], now=now, tolerance=self._tolerance)
        SECRETS_USED.labels(source, verified.secret_id).inc()
        event = make_event(source, body, received_at=datetime.fromtimestamp(now, UTC), job_id=job_id)
        received = await self._store_in_time(event, verified, webhook_id)
        WEBHOOKS.labels(source, received.outcome).inc()
        if received.outcome == "accepted":
            self._on_accepted()
        log.info(
            "webhook stored",
            source=source,
            outcome=received.outcome,
            event_id=str(received.event_id),
            request_id=event.request_id,
            reason=event.reason,
            webhook_id=webhook_id,
        )
        return received

    async def record_result(self, source: str, body: bytes) -> Received:
        """Store a result that was asked for, in the place of the webhook that did not bring it.

        `body` is what the webhook would have carried. Raises DatabaseUnavailable.
        """
        event = make_event(
            source, body, received_at=datetime.fromtimestamp(self._clock(), UTC), origin="poll"
        )
        async with self._database.write() as connection:
            seq = await inbox.insert_event(connection, event)
        outcome: Outcome = "duplicate" if seq is None else "accepted"
        if seq is not None and event.state == "unrecognized":
            outcome = "unrecognized"
        WEBHOOKS.labels(source, f"poll_{outcome}").inc()
        if outcome == "accepted":
            self._on_accepted()
        return Received(event_id=event.id, outcome=outcome)

    async def _store_in_time(self, event: NewEvent, verified: Verified, webhook_id: str | None) -> Received:
        """Wait for the commit, but answer in time even where the database's driver hangs while cancelled."""
        task = asyncio.create_task(self._store(event, verified, webhook_id))
        self._unanswered.add(task)
        task.add_done_callback(self._unanswered.discard)
        try:
            done, _ = await asyncio.wait({task}, timeout=STORE_WAIT)
        except asyncio.CancelledError:
            task.cancel()
            raise
        if not done:
            task.add_done_callback(_retrieve)
            task.cancel()
            raise DatabaseUnavailable(f"not stored within {STORE_WAIT} s", reason="timeout")
        return task.result()

    async def _store(self, event: NewEvent, verified: Verified, webhook_id: str | None) -> Received:
        async with self._database.write() as connection:
            body = None
            seq = await inbox.insert_event(connection, event)
            if seq is not None:
                outcome: Outcome = "accepted" if event.state == "received" else "unrecognized"
            else:
                known = await inbox.find_event(
                    connection, source=event.source, request_id=event.request_id, sha256=event.body_sha256
                )
                if known is None:
                    # Pruned between the two statements. The next delivery starts afresh.
                    raise DatabaseUnavailable("the event vanished while it was looked up", reason="race")
                seq = known.seq
                if event.state == "unrecognized":
                    outcome = "unrecognized"
                elif known.body is None or _says_the_same(known, event):
                    outcome = "duplicate"
                else:
                    outcome, body = "conflict", event.body
            await inbox.insert_receipt(
                connection,
                seq,
                NewReceipt(
                    webhook_id=webhook_id,
                    secret_id=verified.secret_id,
                    signed_at=datetime.fromtimestamp(verified.timestamp, UTC),
                    received_at=event.received_at,
                    body_sha256=event.body_sha256,
                    outcome=outcome,
                    body=body,
                ),
            )
        return Received(event_id=event.id, outcome=outcome)


def _says_the_same(known: inbox.KnownEvent, event: NewEvent) -> bool:
    if known.origin == "poll":
        # We wrote that body ourselves, and need not have hit Clipia's words.
        return known.status == event.status
    return known.body is not None and same_json(known.body, event.body)


def make_event(
    source: str,
    body: bytes,
    *,
    received_at: datetime,
    origin: Literal["webhook", "poll"] = "webhook",
    job_id: UUID | None = None,
) -> NewEvent:
    """Make the event of an authentic webhook body.

    A body that is no usable event is kept under its own digest and never under the `request_id` that it may
    name: it must not take the place of the real result, which may still come.
    """
    sha256 = hashlib.sha256(body).hexdigest()
    try:
        generation = parse(body)
    except UnrecognizedBody as error:
        request_id = f"sha256:{sha256}"
        return NewEvent(
            id=event_id(source, request_id),
            source=source,
            request_id=request_id,
            origin=origin,
            state="unrecognized",
            reason=error.reason,
            body=body,
            body_sha256=sha256,
            received_at=received_at,
        )
    return NewEvent(
        id=event_id(source, generation.request_id),
        source=source,
        request_id=generation.request_id,
        origin=origin,
        state="received",
        status=generation.status,
        model=generation.model,
        cost=generation.cost,
        job_id=job_id,
        body=body,
        body_sha256=sha256,
        received_at=received_at,
    )


def _retrieve(task: asyncio.Task[Received]) -> None:
    """Take the outcome of an abandoned task, so that asyncio does not report it as unhandled."""
    if not task.cancelled():
        task.exception()
