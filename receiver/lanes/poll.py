"""Polls: if no webhook arrives, Clipia is asked for the result, which is stored like a webhook's."""

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Literal, cast

import structlog

from receiver.clipia.client import Call, ClipiaClient, Status
from receiver.core.lane_names import POLL_LANE, Wake
from receiver.core.payload import parse, result_body
from receiver.core.quota import Quota, RateHeaders
from receiver.core.retry import poll_delay
from receiver.db import accounts, job_events, jobs, leases, tables
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import Claim, OpenRequest
from receiver.errors import AccountRefused, ClipiaUnavailable, RefusedForNow, RequestError
from receiver.lanes.attempts import error_json, stored_json
from receiver.lanes.base import Lane, Work
from receiver.lanes.generation_metrics import observe_jobs
from receiver.lanes.spans import database_attributes, start_call
from receiver.metrics import POLLS
from receiver.tracing import NO_SPAN, OFF, Span, Tracer

CONCURRENCY: Final = 8
GIVE_UP_SECONDS: Final = 86_400.0
"""A job of this age is given up if Clipia's answers about it are unusable."""
SILENT_GIVE_UP_SECONDS: Final = 7 * 86_400.0
"""The same if Clipia refuses the account, or if a proxy answers instead."""

Store = Callable[[str, bytes], Awaitable[None]]
"""Stores a result as an event; called with its source and the body that its webhook would have."""

log = structlog.get_logger()


class PollLane(Lane):
    """Asks Clipia for the state of open jobs, within the polls' share of the account's rate limit."""

    def __init__(
        self,
        database: Database,
        client: ClipiaClient,
        *,
        store: Store,
        wake: Wake,
        poll_after: float,
        tracer: Tracer = OFF,
    ) -> None:
        """`poll_after` is the number of seconds that a webhook may take."""
        super().__init__(database, tables.jobs, name=POLL_LANE, concurrency=CONCURRENCY, wake=wake)
        self._client = client
        self._store = store
        self._tracer = tracer
        self._poll_after = poll_after

    async def claim(self, limit: int) -> list[Work]:
        """Claim due jobs, as many as the rate limit allows. Raises DatabaseUnavailable."""
        account = self._client.account
        async with self._database.write() as connection:
            if not await jobs.is_due(connection, account, "submitted"):
                return []
            quota, now = await accounts.lock(connection, account)
            allowed = min(limit, quota.allowed_polls(now))
            if not allowed:
                return []
            claimed = await jobs.claim_to_poll(connection, account, limit=allowed, lease=self.lease_seconds)
            await accounts.save(connection, account, quota.after_calls("poll", len(claimed), now))
        return [Work(claim=claim, run=partial(self._poll, claim, request)) for claim, request in claimed]

    async def _poll(self, claim: Claim, request: OpenRequest) -> None:
        call = Call()
        try:
            with start_call(self._tracer, "poll Clipia", "GET", request, claim) as span:
                status = await self._client.status(request.request_id, call=call)
                result = None
                if status.terminal:
                    # The claim has counted the first call only.
                    await self._learn(call.headers, extra_calls=1)
                    result = await self._client.result(request.request_id, call=call)
        except (RequestError, ClipiaUnavailable) as error:
            await self._failed(claim, request, error, call)
            return
        await self._learn(call.headers)
        if result is not None:
            POLLS.labels("ended").inc()
            ended = cast("Literal['COMPLETED', 'FAILED', 'CANCELED']", status.status)
            with self._storing(span):
                await self._end(claim, request, result_body(request.request_id, ended, result))
        elif status.known and not status.terminal:
            POLLS.labels("open").inc()
            await self._poll_later(claim, request, progress=status.progress)
        else:
            await self._not_understood(claim, request, status)

    def _storing(self, span: Span) -> Span:
        if span is NO_SPAN:
            return span
        attributes = database_attributes(self._database.dialect_name, "INSERT", "events")
        return span.child("INSERT events", attributes=attributes)

    async def _failed(
        self, claim: Claim, request: OpenRequest, error: RequestError | ClipiaUnavailable, call: Call
    ) -> None:
        POLLS.labels("failed").inc()
        log.warning("job not polled", job_id=str(claim.id), reason=error.reason, error=str(error))
        text = stored_json(error)
        limited = error if isinstance(error, ClipiaUnavailable) and error.status == 429 else None
        if not await self._give_up(claim, request, text, after=_patience(error, request)):
            wait = error.retry_after if isinstance(error, ClipiaUnavailable) else None
            await self._poll_later(claim, request, error=text, at_least=wait or 0.0)
        await self._learn(call.headers, limited=limited)

    async def _not_understood(self, claim: Claim, request: OpenRequest, status: Status) -> None:
        """Poll again for a day: an unknown status of a later API may still lead to a result."""
        if status.terminal:
            code, message = "no_result", f"Clipia's status is {status.status}, but it has no result."
        else:
            code = "unknown_status"
            message = f"Clipia's status is {status.status}, which its documentation does not name."
        POLLS.labels(code).inc()
        text = error_json(code, message)
        if request.error != text:
            ids = {"job_id": str(claim.id), "request_id": request.request_id}
            log.warning("job without a usable status", **ids, error=message)
        if not await self._give_up(claim, request, text):
            await self._poll_later(claim, request, error=text, progress=status.progress)

    async def _give_up(
        self, claim: Claim, request: OpenRequest, error: str, *, after: float = GIVE_UP_SECONDS
    ) -> bool:
        """Leave a job to the operator if it has been open for `after` seconds; False if it has not."""
        if request.open_for < after:
            return False
        finish = partial(
            leases.finish, table=tables.jobs, held=claim, state="unsure", error=error, updated_at=db_time(0.0)
        )
        if await self._record(claim, finish):
            POLLS.labels("given_up").inc()
            log.error("job given up", job_id=str(claim.id), request_id=request.request_id, error=error)
        return True

    async def _end(self, claim: Claim, request: OpenRequest, body: bytes) -> None:
        """Store a result as if its webhook had come; if the webhook comes later, it is a duplicate."""
        await self._store(request.source, body)
        log.info("job ended without a webhook", job_id=str(claim.id), request_id=request.request_id)
        # The fan-out finishes the job too, unless the event was stored before the job had its `request_id`.
        finish = partial(job_events.finish_job, source=request.source, generation=parse(body))
        observe_jobs([await self._record(claim, finish)])

    async def _poll_later(
        self,
        claim: Claim,
        request: OpenRequest,
        *,
        error: str | None = None,
        progress: int | None = None,
        at_least: float = 0.0,
    ) -> None:
        watched = request.watched and error is None
        delay = poll_delay(
            claim.attempt, overdue=self._poll_after, has_webhook=request.has_webhook, watched=watched
        )
        known: dict[str, Any] = {} if progress is None else {"progress": progress, "updated_at": db_time(0.0)}

        async def put_back(connection: SqlConnection) -> None:
            # A lost lease is not reported: usually the job's webhook has come in the meantime.
            wait = max(delay, at_least)
            await leases.retry(connection, tables.jobs, claim, delay=wait, error=error, **known)

        await self._record(claim, put_back)

    async def _learn(
        self, headers: RateHeaders, *, extra_calls: int = 0, limited: ClipiaUnavailable | None = None
    ) -> None:
        await learn(self._database, self._client.account, headers, calls=extra_calls, limited=limited)


async def learn(
    database: Database,
    account: str,
    headers: RateHeaders,
    *,
    calls: int,
    limited: ClipiaUnavailable | None = None,
) -> None:
    """Update the account's quota from an answer; `calls` are polls that it has not counted yet."""

    def change(quota: Quota, now: float) -> Quota:
        if calls:
            quota = quota.after_calls("poll", calls, now)
        return quota.after_rate_limit(now, retry_after=limited.retry_after) if limited else quota

    async with database.write() as connection:
        await accounts.learn(connection, account, headers, change)


def _patience(error: RequestError | ClipiaUnavailable, request: OpenRequest) -> float:
    """Return the age, in seconds, at which a job is given up because of this error."""
    if isinstance(error, RequestError | RefusedForNow) or error.reason == "unreadable":
        return GIVE_UP_SECONDS
    if isinstance(error, AccountRefused):
        return SILENT_GIVE_UP_SECONDS
    # After days without a worker, the first failure may be over in seconds.
    return SILENT_GIVE_UP_SECONDS if request.error is not None else math.inf
