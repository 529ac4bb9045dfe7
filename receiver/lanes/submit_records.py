"""Results of submissions: each function records one in the transaction of its connection."""

from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.clipia.client import Accepted, Call, boot_clock
from receiver.clipia.job_request import join_warnings
from receiver.core.payload import parse
from receiver.core.retry import poll_delay, refused_delay
from receiver.db import accounts, job_events, jobs, leases, refused_jobs, tables
from receiver.db.clock import db_time
from receiver.db.rows import Attempt, Claim, JobState, Submission
from receiver.errors import ClipiaUnavailable, UnrecognizedBody
from receiver.lanes.attempts import StartedAttempt, error_json, jitter
from receiver.lanes.quota_changes import QuotaChange, after_accepted, after_failure, after_refused

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
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

    def sent_for(self) -> float:
        """Return the seconds since the first attempt that may have arrived, such as this one."""
        return (self.submission.sent_for or 0.0) + boot_clock() - self.claimed_at


async def record_accepted(
    connection: AsyncConnection, *, this: SubmitAttempt, accepted: Accepted, call: Call, poll_after: float
) -> Literal["submitted", "ended", "taken", False]:
    """Move a job to `submitted`.

    Returns `ended` if the job's event has come already, `taken` if another job has the same `request_id`, and
    False if the lease was lost meanwhile.
    """
    submission = this.submission
    answer = asdict(accepted) | {"warnings": join_warnings(submission.warnings or [], accepted.warnings)}
    recorded = await jobs.record_submitted(
        connection,
        this.claim,
        source=submission.source,
        provider_key=submission.provider_key,
        poll_after=poll_delay(0, overdue=poll_after, has_webhook=submission.has_webhook, watched=False),
        **answer,
    )
    if recorded == "taken":
        return "taken"
    has_event = False
    if recorded == "recorded":
        if submission.refused_for is not None:
            # Clipia accepts jobs again, so the other refused jobs are due now.
            await refused_jobs.release(connection, this.account)
        has_event = await _finish_by_event(connection, submission.source, accepted.request_id)
    # If the webhook was faster, the job has ended already, and only the answer is added.
    elif not await jobs.add_answer(connection, this.claim.id, **answer):
        # Another worker that holds the job now sends the same key, and gets the same generation.
        if not await jobs.is_still_sent(connection, this.claim.id, submission.provider_key):
            await _record_stray(connection, this, accepted)
        return False
    await leases.record_attempt(connection, this.claim.id, this.attempt.end("succeeded"))
    await _learn(connection, this, call, after_accepted)
    return "ended" if has_event else "submitted"


async def _finish_by_event(connection: AsyncConnection, source: str, request_id: str) -> bool:
    """Finish a job if its event came before its `request_id` was known; return whether there was one."""
    body = await job_events.find_event_body(connection, source, request_id)
    if body is None:
        return False
    try:
        generation = parse(body)
    except UnrecognizedBody:
        return False
    await job_events.finish_job(connection, source, generation)
    return True


async def _record_stray(connection: AsyncConnection, this: SubmitAttempt, accepted: Accepted) -> None:
    """Record a generation that Clipia accepted for a job that has ended otherwise: it is charged too."""
    stray = error_json("stray_generation", f"accepted as {accepted.request_id} for {accepted.cost} credits")
    await leases.record_attempt(connection, this.claim.id, this.attempt.end("failed", stray))
    log.error("generation of a job that has ended otherwise", job_id=str(this.claim.id), **asdict(accepted))


async def record_refused_for_now(
    connection: AsyncConnection, *, this: SubmitAttempt, error: str, call: Call, give_up_after: float
) -> float | Literal[False] | None:
    """Put back a job that Clipia refuses for now; return the seconds until the next attempt.

    Returns None, with no change, if the job has been refused for too long. Returns False if the lease was
    lost meanwhile.
    """
    refused_for = this.submission.refused_for
    quota = await accounts.read(connection, this.account)
    others = await refused_jobs.count(connection, this.account)
    delay = refused_delay(
        refused_for or 0.0,
        least=quota.retry_interval(others + (refused_for is None)),
        give_up_after=give_up_after,
        jitter=jitter(),
    )
    if delay is None:
        return None
    never_sent = this.submission.sent_for is None
    held = await jobs.put_back(
        connection, this.claim, delay=delay, error=error, never_sent=never_sent, refused=True
    )
    if held:
        await leases.record_attempt(connection, this.claim.id, this.attempt.end("retry", error))
    await _learn(connection, this, call, after_refused)
    return delay if held else False


async def record_retry(
    connection: AsyncConnection,
    *,
    this: SubmitAttempt,
    failure: ClipiaUnavailable,
    error: str,
    call: Call,
    delay: float,
    never_sent: bool,
) -> bool:
    """Put back a job for another attempt; False if the lease was lost meanwhile."""
    held = await jobs.put_back(connection, this.claim, delay=delay, error=error, never_sent=never_sent)
    if held:
        await leases.record_attempt(connection, this.claim.id, this.attempt.end("retry", error))
    await _learn(connection, this, call, partial(after_failure, failure, this.sent_at, error))
    return held


async def record_end(
    connection: AsyncConnection,
    *,
    this: SubmitAttempt,
    attempt: Attempt,
    state: JobState,
    call: Call | None,
    change: QuotaChange,
) -> bool:
    """End a job without a result; False if the lease was lost meanwhile."""
    held = await leases.finish(
        connection,
        tables.jobs,
        this.claim,
        state=state,
        error=attempt.error,
        updated_at=db_time(0.0),
        # A failed job has no generation, so it is not charged.
        **({"charged": 0} if state == "failed" else {}),
    )
    if held:
        await leases.record_attempt(connection, this.claim.id, attempt)
    if call is not None:
        await _learn(connection, this, call, change)
    return held


async def _learn(connection: AsyncConnection, this: SubmitAttempt, call: Call, change: QuotaChange) -> None:
    """Update the account's quota from an answer."""
    used = await jobs.in_flight(connection, this.account)
    await accounts.learn(connection, this.account, call.headers, lambda quota, now: change(quota, now, used))
