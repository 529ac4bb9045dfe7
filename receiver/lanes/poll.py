"""Reconciliation: what did not come is asked for: overdue results, which go through the inbox, and files."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, Literal, cast

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.clipia.client import Call, ClipiaClient, Status
from receiver.core.output_files import FileRules
from receiver.core.payload import parse, result_body
from receiver.core.quota import Quota, RateHeaders
from receiver.core.retry import poll_delay
from receiver.db import accounts, job_events, jobs, leases, tables
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.jobs import POLL_LANE
from receiver.db.rows import Claim, MediaRow, OpenRequest, StoredEvent
from receiver.errors import (
    AccountRefused,
    ClipiaUnavailable,
    DatabaseUnavailable,
    RefusedForNow,
    RequestError,
    UnrecognizedBody,
)
from receiver.lanes.base import LEASE, Work, WorkLane, error_text, stored_error
from receiver.metrics import POLLS
from receiver.settings import DEFAULT_SOURCE

CONCURRENCY: Final = 8

GIVE_UP_SECONDS: Final = 86_400.0
"""Seconds after which a job is given up of which Clipia says nothing that can be used."""
SILENT_GIVE_UP_AFTER: Final = 7 * 86_400.0
"""Seconds after which a job is given up if Clipia refuses the account, or something in between answers."""

Store = Callable[[str, bytes], Awaitable[None]]
"""Puts a result into the inbox: the source and the body that its webhook would have had."""

ANSWERS_KEPT: Final = 60.0
"""Seconds for which an answer is good for the other files of its event."""

Urls = dict[str | None, str]
"""The files of a result by where they stand in it."""

log = structlog.get_logger()


class PollLane(WorkLane):
    """Asks Clipia for jobs whose end is not known, within their share of the account's requests."""

    def __init__(
        self,
        database: Database,
        client: ClipiaClient,
        *,
        store: Store,
        wake: Callable[[str], None],
        poll_after: float,
    ) -> None:
        """`poll_after` is how many seconds a webhook may take."""
        super().__init__(database, tables.jobs, name=POLL_LANE, concurrency=CONCURRENCY, wake=wake)
        self._client = client
        self._store = store
        self._poll_after = poll_after

    async def claim(self, limit: int) -> list[Work]:
        """Claim jobs that are due, as many as their share allows. Raises DatabaseUnavailable."""
        account = self._client.account
        async with self._database.write() as connection:
            if not await jobs.is_due(connection, account, "submitted"):
                return []
            quota, now = await accounts.lock(connection, account)
            room = quota.allowed_polls(now)
            if not room:
                return []
            claimed = await jobs.claim_to_poll(connection, account, limit=min(limit, room), lease=LEASE)
            await accounts.save(connection, account, quota.after_calls("poll", len(claimed), now))
        return [Work(claim=claim, run=partial(self._poll, claim, request)) for claim, request in claimed]

    async def _poll(self, claim: Claim, request: OpenRequest) -> None:
        call = Call()
        try:
            status = await self._client.status(request.request_id, call=call)
            result = None
            if status.terminal:
                # The first call's share was taken at the claim.
                await self._learn(call.headers, extra_calls=1)
                result = await self._client.result(request.request_id, call=call)
        except (RequestError, ClipiaUnavailable) as error:
            await self._not_answered(claim, request, error, call)
            return
        await self._learn(call.headers)
        if result is None and status.known and not status.terminal:
            POLLS.labels("open").inc()
            await self._later(claim, request, progress=status.progress)
            return
        if result is None:
            await self._not_understood(claim, request, status)
            return
        POLLS.labels("ended").inc()
        ended = cast("Literal['COMPLETED', 'FAILED', 'CANCELED']", status.status)
        await self._end(claim, request, result_body(request.request_id, ended, result))

    async def _not_answered(
        self, claim: Claim, request: OpenRequest, error: RequestError | ClipiaUnavailable, call: Call
    ) -> None:
        POLLS.labels("failed").inc()
        log.warning("job not asked for", job_id=str(claim.id), reason=error.reason, error=str(error))
        text = stored_error(error)
        throttled = error if isinstance(error, ClipiaUnavailable) and error.status == 429 else None
        if not await self._give_up(claim, request, text, after=_patience(error, request)):
            wait = error.retry_after if isinstance(error, ClipiaUnavailable) else None
            await self._later(claim, request, error=text, at_least=wait or 0.0)
        await self._learn(call.headers, throttled=throttled)

    async def _not_understood(self, claim: Claim, request: OpenRequest, status: Status) -> None:
        """Go on asking for a day: a status of a later API may be on the way to an end, or be one."""
        if status.terminal:
            code, words = "no_result", f"Clipia says {status.status}, and gives no result."
        else:
            code, words = (
                "unknown_status",
                f"Clipia says {status.status}, which its documentation does not name.",
            )
        POLLS.labels(code).inc()
        text = error_text(code, words)
        if request.error != text:
            log.warning(
                "job not understood", job_id=str(claim.id), request_id=request.request_id, error=words
            )
        if not await self._give_up(claim, request, text):
            await self._later(claim, request, error=text, progress=status.progress)

    async def _give_up(
        self, claim: Claim, request: OpenRequest, error: str, *, after: float = GIVE_UP_SECONDS
    ) -> bool:
        """Leave a job to people if Clipia tells nothing readable of it; False if it is too early for that."""
        if request.open_for < after:
            return False

        async def write(connection: AsyncConnection) -> bool:
            return await leases.finish(
                connection, tables.jobs, claim, state="unsure", error=error, updated_at=db_time(0.0)
            )

        if await self._record(claim, write):
            POLLS.labels("given_up").inc()
            log.error("job given up", job_id=str(claim.id), request_id=request.request_id, error=error)
        return True

    async def _end(self, claim: Claim, request: OpenRequest, body: bytes) -> None:
        """Store a result as if its webhook had come; a webhook that comes later is then a duplicate."""
        await self._store(request.source, body)
        log.info("job ended without a webhook", job_id=str(claim.id), request_id=request.request_id)
        generation = parse(body)

        async def write(connection: AsyncConnection) -> bool:
            # The fan-out does the same, unless the event was there before the job's `request_id`.
            await job_events.finish_job(connection, request.source, generation)
            return True

        await self._record(claim, write)

    async def _later(
        self,
        claim: Claim,
        request: OpenRequest,
        *,
        error: str | None = None,
        progress: int | None = None,
        at_least: float = 0.0,
    ) -> None:
        delay = poll_delay(
            claim.attempt,
            overdue=self._poll_after,
            has_webhook=request.has_webhook,
            watched=request.watched and error is None,
        )
        known: dict[str, Any] = {} if progress is None else {"progress": progress, "updated_at": db_time(0.0)}

        async def write(connection: AsyncConnection) -> bool:
            await leases.retry(
                connection, tables.jobs, claim, delay=max(delay, at_least), error=error, **known
            )
            # Where the lease is gone, its webhook has come meanwhile.
            return True

        await self._record(claim, write)

    async def _learn(
        self, headers: RateHeaders, *, extra_calls: int = 0, throttled: ClipiaUnavailable | None = None
    ) -> None:
        """Keep what an answer says about the account's limits."""

        def change(quota: Quota, now: float) -> Quota:
            if extra_calls:
                quota = quota.after_calls("poll", extra_calls, now)
            return quota.after_rate_limit(now, retry_after=throttled.retry_after) if throttled else quota

        async with self._database.write() as connection:
            await accounts.learn(connection, self._client.account, headers, change)


def _patience(error: RequestError | ClipiaUnavailable, request: OpenRequest) -> float:
    """Return the seconds for which a job is asked for in spite of such an error."""
    if isinstance(error, RequestError | RefusedForNow) or error.reason == "unreadable":
        return GIVE_UP_SECONDS
    if isinstance(error, AccountRefused):
        return SILENT_GIVE_UP_AFTER
    # After days without a worker the first failure may be one that passes in seconds.
    return SILENT_GIVE_UP_AFTER if request.error is not None else math.inf


class FreshUrls:
    """Asks Clipia where a file is now, within the polls' share of the account's requests."""

    def __init__(self, database: Database, client: ClipiaClient, *, rules: FileRules | None = None) -> None:
        """`rules` are those by which the files of the event were listed."""
        self._database = database
        self._client = client
        self._rules = rules or FileRules()
        self._answers: dict[int, tuple[float, asyncio.Task[Urls]]] = {}

    async def find(self, event: StoredEvent, file: MediaRow) -> str | None:
        """Return a file's present URL; None where there is none.

        Raises ClipiaUnavailable or DatabaseUnavailable where that is not to be known now.
        """
        if event.source != DEFAULT_SOURCE:
            return None  # another account's, which our key does not open
        now = time.monotonic()
        self._answers = {seq: kept for seq, kept in self._answers.items() if kept[0] > now}
        if event.seq not in self._answers:
            asking = asyncio.create_task(self._ask(event), name=f"fresh URLs of {event.request_id}")
            self._answers[event.seq] = (now + ANSWERS_KEPT, asking)
        try:
            urls = await asyncio.shield(self._answers[event.seq][1])
        except (ClipiaUnavailable, DatabaseUnavailable):
            self._answers.pop(event.seq, None)
            raise
        except (RequestError, UnrecognizedBody) as error:
            self._answers.pop(event.seq, None)
            log.warning("no fresh URL", request_id=event.request_id, reason=error.reason)
            return None
        return urls.get(self._field_of(event, file))

    async def _ask(self, event: StoredEvent) -> Urls:
        async with self._database.write() as connection:
            quota, now = await accounts.lock(connection, self._client.account)
            if not quota.allowed_polls(now):
                raise ClipiaUnavailable("no call is left for now", reason="budget", may_have_arrived=False)
            await accounts.save(connection, self._client.account, quota.after_calls("poll", 1, now))
        result = await self._client.result(event.request_id, call=Call())
        generation = parse(result_body(event.request_id, "COMPLETED", result or b"{}"))
        return {ref.field: ref.url for ref in generation.list_files(self._rules).files if ref.skip is None}

    def _field_of(self, event: StoredEvent, file: MediaRow) -> str | None:
        """Return where in its output a file stands; releases before 0010 did not record it."""
        if file.field is not None:
            return file.field
        files = parse(event.body).list_files(self._rules).files
        return next((ref.field for ref in files if ref.url == file.url), None)
