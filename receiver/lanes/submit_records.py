"""Results of submissions: each method records one in the transaction of its connection."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import structlog

from receiver.clipia.client import Accepted, Call, boot_clock
from receiver.clipia.job_request import join_warnings
from receiver.core.payload import parse
from receiver.core.quota import Quota
from receiver.core.retry import poll_delay, refused_delay
from receiver.db import accounts, job_events, jobs, leases, refused_jobs, tables
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.rows import Attempt, Claim, JobState, Submission
from receiver.errors import AccountRefused, ClipiaUnavailable, UnrecognizedBody
from receiver.lanes.attempts import StartedAttempt, error_json, jitter, stored_json
from receiver.tracing import NO_SPAN, Span

QuotaChange = Callable[[Quota, float], Quota]
"""Returns the quota after an answer, from the quota before and the time."""

log = structlog.get_logger()


@dataclass(kw_only=True)
class SubmitAttempt:
    """One attempt at submitting a job."""

    account: str
    claim: Claim
    submission: Submission
    claimed_at: float
    """The time of the claim by `boot_clock`."""
    sent_at: float
    """The same by the database's clock."""
    attempt: StartedAttempt
    call: Call
    span: Span = NO_SPAN
    """The span of the call."""

    def sent_for(self) -> float:
        """Return the seconds since the first attempt that may have arrived, which may be this one."""
        return (self.submission.sent_for or 0.0) + boot_clock() - self.claimed_at

    async def record_accepted(
        self, connection: SqlConnection, *, accepted: Accepted, poll_after: float
    ) -> Literal["submitted", "taken", False] | job_events.FinishedJob:
        """Move a job to `submitted`.

        Returns the finished job if its event has come already, `taken` if another job has the same
        `request_id`, and False if the lease was lost.
        """
        submission = self.submission
        answer = asdict(accepted) | {"warnings": join_warnings(submission.warnings or [], accepted.warnings)}
        delay = poll_delay(0, overdue=poll_after, has_webhook=submission.has_webhook, watched=False)
        source, provider_key = submission.source, submission.provider_key
        recorded = await jobs.record_submitted(
            connection, self.claim, source=source, provider_key=provider_key, poll_after=delay, **answer
        )
        if recorded == "taken":
            return "taken"
        finished: job_events.FinishedJob | None = None
        if recorded == "recorded":
            if submission.refused_for is not None:
                # Clipia accepts jobs again, so the other refused jobs are due now.
                await refused_jobs.release(connection, self.account)
            finished = await _finish_by_event(connection, source, accepted.request_id)
        # If the webhook was faster, the job has ended already, and only the answer is added.
        elif not await jobs.add_answer(connection, self.claim.id, **answer):
            # If another worker holds the job now, it sends the same key and gets the same generation.
            if not await jobs.is_still_sent(connection, self.claim.id, provider_key):
                await self._record_stray(connection, accepted)
            return False
        await leases.record_attempt(connection, self.claim.id, self.attempt.end("succeeded"))
        used = await jobs.in_flight(connection, self.account)
        await self._learn(connection, lambda quota, now: quota.after_accepted(now, in_flight=used.accepted))
        return finished or "submitted"

    async def _record_stray(self, connection: SqlConnection, accepted: Accepted) -> None:
        """Record a generation that Clipia accepted for a job that has ended otherwise: it is charged too."""
        message = f"accepted as {accepted.request_id} for {accepted.cost} credits"
        attempt = self.attempt.end("failed", error_json("stray_generation", message))
        await leases.record_attempt(connection, self.claim.id, attempt)
        job_id = str(self.claim.id)
        log.error("generation of a job that has ended otherwise", job_id=job_id, **asdict(accepted))

    async def record_refused_for_now(
        self, connection: SqlConnection, *, error: str, give_up_after: float
    ) -> float | Literal[False] | None:
        """Put back a job that Clipia refuses for now; return the seconds until the next attempt.

        Returns None, with no change, if the job has been refused for too long. Returns False if the lease was
        lost.
        """
        refused_for = self.submission.refused_for
        quota = await accounts.read(connection, self.account)
        others = await refused_jobs.count(connection, self.account)
        least = quota.retry_interval(others + (refused_for is None))
        delay = refused_delay(refused_for or 0.0, least=least, give_up_after=give_up_after, jitter=jitter())
        if delay is None:
            return None
        never_sent = self.submission.sent_for is None
        held = await self._put_back(connection, error, delay=delay, never_sent=never_sent, refused=True)
        await self._learn(connection, Quota.unpaused)
        return delay if held else False

    async def record_retry(
        self, connection: SqlConnection, *, failure: ClipiaUnavailable, delay: float, never_sent: bool
    ) -> bool:
        """Put back a job for another attempt; False if the lease was lost."""
        error = stored_json(failure)

        def change(quota: Quota, now: float) -> Quota:
            if isinstance(failure, AccountRefused):
                return quota.after_account_refused(now, sent_at=self.sent_at, pause=error)
            wait = failure.retry_after
            if failure.reason == "concurrency_limit_exceeded":
                return quota.after_concurrency_limit(now, sent_at=self.sent_at, retry_after=wait)
            return quota.after_rate_limit(now, retry_after=wait) if failure.status == 429 else quota

        held = await self._put_back(connection, error, delay=delay, never_sent=never_sent)
        await self._learn(connection, change)
        return held

    async def _put_back(self, connection: SqlConnection, error: str, **values: Any) -> bool:
        held = await jobs.put_back(connection, self.claim, error=error, **values)
        if held:
            await leases.record_attempt(connection, self.claim.id, self.attempt.end("retry", error))
        return held

    async def record_end(
        self, connection: SqlConnection, *, attempt: Attempt, state: JobState, change: QuotaChange
    ) -> bool:
        """End a job without a result; False if the lease was lost."""
        # A failed job has no generation, so it is not charged.
        values: dict[str, Any] = {"updated_at": db_time(0.0)} | ({"charged": 0} if state == "failed" else {})
        held = await leases.finish(
            connection, tables.jobs, self.claim, state=state, error=attempt.error, **values
        )
        if held:
            await leases.record_attempt(connection, self.claim.id, attempt)
        await self._learn(connection, change)
        return held

    async def _learn(self, connection: SqlConnection, change: QuotaChange) -> None:
        """Update the account's quota from an answer."""
        await accounts.learn(connection, self.account, self.call.headers, change)


async def _finish_by_event(
    connection: SqlConnection, source: str, request_id: str
) -> job_events.FinishedJob | None:
    """Finish a job if its event came before its `request_id` was known."""
    body = await job_events.find_event_body(connection, source, request_id)
    if body is None:
        return None
    try:
        generation = parse(body)
    except UnrecognizedBody:
        return None
    return await job_events.finish_job(connection, source, generation)
