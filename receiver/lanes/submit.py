"""Submissions: a job is sent with the same key and the same bytes until Clipia's answer is recorded."""

from dataclasses import asdict
from functools import partial
from typing import Final
from uuid import UUID

import structlog

from receiver.budgets import require_price
from receiver.clipia.catalogue import Catalogue
from receiver.clipia.client import CALL_TIMEOUT_SECONDS, UNUSABLE_ID, Accepted, Call, ClipiaClient, boot_clock
from receiver.core.lane_names import FAN_OUT_LANE, SUBMIT_LANE, Wake
from receiver.core.quota import Quota
from receiver.core.retry import REFUSED_GIVE_UP_SECONDS, SUBMIT, SUBMIT_UNANSWERED
from receiver.db import accounts, jobs, refused_jobs, submission_freezes, tables
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.job_events import FinishedJob
from receiver.db.rows import Claim, JobState, Submission
from receiver.errors import AccountRefused, ClipiaUnavailable, RefusedByClipia, RefusedForNow, RequestError
from receiver.lanes.attempts import StartedAttempt, jitter, stored_json, stored_text
from receiver.lanes.base import Lane, Work
from receiver.lanes.generation_metrics import observe_jobs
from receiver.lanes.spans import start_call
from receiver.lanes.submit_records import QuotaChange, SubmitAttempt
from receiver.metrics import SUBMISSIONS
from receiver.tracing import OFF, Span, Tracer

CONCURRENCY: Final = 16
ACCOUNT_PAUSE_SECONDS: Final = 5.0
"""Shortest time until a job is tried again after Clipia refused the account; jitter at most doubles it."""
_MAYBE_PAID: Final = ("idempotency_key_reuse", UNUSABLE_ID)
"""Codes of refusals after which Clipia may have a generation for the job nevertheless."""

log = structlog.get_logger()


def _unchanged(quota: Quota, _now: float) -> Quota:
    return quota


class SubmitLane(Lane):
    """Submits jobs to one Clipia account, within its quota."""

    def __init__(
        self,
        database: Database,
        client: ClipiaClient,
        catalogue: Catalogue,
        *,
        wake: Wake,
        poll_after: float,
        refused_give_up_after: float = REFUSED_GIVE_UP_SECONDS,
        tracer: Tracer = OFF,
    ) -> None:
        """`poll_after` is the number of seconds that a webhook may take.

        A job that Clipia refuses for now (402, 403) is tried for `refused_give_up_after` seconds.
        """
        super().__init__(database, tables.jobs, name=SUBMIT_LANE, concurrency=CONCURRENCY, wake=wake)
        self._client = client
        self._catalogue = catalogue
        self._poll_after = poll_after
        self._refused_give_up_after = refused_give_up_after
        self._tracer = tracer
        self._claimed = 0

    async def claim(self, limit: int) -> list[Work]:
        """Claim due jobs, as many as the quota allows. Raises DatabaseUnavailable."""
        async with self._database.write() as connection:
            if not await jobs.is_due(connection, self._client.account, "pending"):
                return []
            works = await self.claim_in(connection, limit=limit)
            # After a restore the rows may be old: Clipia may have accepted the jobs since.
            if works or await submission_freezes.find(connection) is not None:
                return works
            # Jobs that have been refused for too long end even if the quota allows no last attempt.
            give_up_after = self._refused_give_up_after
            expired = await refused_jobs.expire(connection, self._client.account, give_up_after=give_up_after)
        for job in expired:
            SUBMISSIONS.labels("unsure" if job.state == "unsure" else "refused").inc()
            log.error("refused job ended", job_id=str(job.id), state=job.state, error=job.error)
        return []

    async def claim_in(
        self, connection: SqlConnection, *, limit: int, job_id: UUID | None = None
    ) -> list[Work]:
        """Claim inside the caller's transaction; only the job `job_id` if it is given."""
        if await submission_freezes.find(connection) is not None:
            return []
        account = self._client.account
        quota, now = await accounts.lock(connection, account)
        in_flight = await jobs.in_flight(connection, account)
        allowed = min(limit, quota.allowed_submissions(now, in_flight=in_flight.total))
        if not allowed:
            return []
        claimed = await jobs.claim_to_submit(
            connection, account, limit=allowed, lease=self.lease_seconds, job_id=job_id, start=self._claimed
        )
        if claimed:
            self._claimed += 0 if job_id else len(claimed)
            await accounts.save(connection, account, quota.after_calls("submit", len(claimed), now))
        claimed_at = boot_clock()
        return [
            Work(claim=claim, run=partial(self._submit, claim, submission, claimed_at, now))
            for claim, submission in claimed
        ]

    async def _submit(self, claim: Claim, submission: Submission, claimed_at: float, now: float) -> None:
        this = SubmitAttempt(
            account=self._client.account,
            claim=claim,
            submission=submission,
            claimed_at=claimed_at,
            sent_at=now,
            attempt=StartedAttempt.of(claim),
            # If this process is suspended, its lease expires and another one may send the job.
            call=Call(not_after=claimed_at + self.lease_seconds - CALL_TIMEOUT_SECONDS),
        )
        if error := self._unsafe_to_send(this):
            await self._end(this, error, state="unsure")
            return
        change: QuotaChange = _unchanged
        try:
            await require_price(submission, self._catalogue, age=claim.age)
            # Even a refusal of the job shows that Clipia accepts the account.
            change = Quota.unpaused
            with self._traced(this):
                accepted = await self._client.submit(
                    submission.model, submission.request, key=submission.provider_key, call=this.call
                )
        except RequestError as error:
            # No other client has this key. If Clipia knows it for other bytes, the job may have a generation.
            await self._refused(this, error, change, maybe_paid=error.code in _MAYBE_PAID)
        except RefusedForNow as error:
            await self._refused_for_now(this, error)
        except ClipiaUnavailable as error:
            await self._failed(this, error)
        except Exception as error:
            log.exception("submission failed unexpectedly", job_id=str(claim.id))
            await self._failed(this, ClipiaUnavailable(stored_text(error), reason="internal_error"))
        else:
            await self._accepted(this, accepted)

    def _traced(self, this: SubmitAttempt) -> Span:
        """Begin the span of a call."""
        this.span = start_call(self._tracer, "submit to Clipia", "POST", this.submission, this.claim)
        return this.span

    def _unsafe_to_send(self, this: SubmitAttempt) -> RequestError | None:
        """Return why another attempt could be charged twice; None if it could not."""
        if this.submission.account not in (None, self._client.account):
            return RequestError(
                "An earlier attempt may have arrived, but CLIPIA_KEY or CLIPIA_BASE_URL has changed since: "
                "its idempotency key means nothing to another account.",
                code="account_changed",
            )
        if this.sent_for() >= SUBMIT_UNANSWERED.give_up_after:
            return RequestError(
                "No attempt was answered within 23 hours of the first one; Clipia forgets the key after 24.",
                code="outcome_unknown",
            )
        return None

    async def _accepted(self, this: SubmitAttempt, accepted: Accepted) -> None:
        record = partial(this.record_accepted, accepted=accepted, poll_after=self._poll_after)
        result = await self._record(this.claim, record, this.span)
        if result == "taken":
            error = RequestError(
                f"Clipia answered with the request_id of another job ({accepted.request_id}), so this job's "
                "own generation is unknown.",
                code="request_id_taken",
            )
            await self._end(this, error, state="unsure")
        elif result:
            SUBMISSIONS.labels("accepted").inc()
            log.info("job submitted", job_id=str(this.claim.id), **asdict(accepted))
        if isinstance(result, FinishedJob):
            observe_jobs([result])
            # The job's event has waited for this answer.
            self._wake(FAN_OUT_LANE)

    async def _refused(
        self, this: SubmitAttempt, error: RequestError, change: QuotaChange, *, maybe_paid: bool = False
    ) -> None:
        """End a job that is refused for good."""
        # An earlier attempt may have been accepted: Clipia does not document whether it checks keys first.
        maybe_paid |= this.submission.sent_for is not None
        await self._end(this, error, state="unsure" if maybe_paid else "failed", change=change)

    async def _refused_for_now(self, this: SubmitAttempt, error: RefusedForNow) -> None:
        """Put back a job that Clipia refuses for now, or end it; other jobs go on."""
        give_up_after = self._refused_give_up_after
        record = partial(this.record_refused_for_now, error=stored_json(error), give_up_after=give_up_after)
        delay = await self._record(this.claim, record, this.span)
        if delay is None:
            status = error.status or 402
            final = RefusedByClipia(str(error), code=error.reason, status=status, type_=error.type)
            await self._refused(this, final, Quota.unpaused)
        elif delay is not False:
            SUBMISSIONS.labels("refused_for_now").inc()
            # The operator may have to top up the account; one error per job is enough to report that.
            refused_for = this.submission.refused_for
            emit = log.error if refused_for is None else log.info
            ids = {"job_id": str(this.claim.id), "reason": error.reason, "error": str(error)}
            emit("job refused for now", **ids, refused_for=refused_for or 0.0, retry_in=delay)

    async def _failed(self, this: SubmitAttempt, error: ClipiaUnavailable) -> None:
        """Put back a job without an answer, or end it as `unsure`."""
        is_account = isinstance(error, AccountRefused)
        never_sent = not error.may_have_arrived and this.submission.sent_for is None
        policy = SUBMIT if never_sent else SUBMIT_UNANSWERED
        age = 0.0 if never_sent else this.sent_for()
        delay = policy.next_delay(error, attempt=this.claim.attempt, age=age, jitter=jitter())
        if is_account:
            delay = ACCOUNT_PAUSE_SECONDS * (1 + jitter())
        if delay is None:
            message = f"No attempt was answered in time; the last one: {error}"
            await self._end(this, RequestError(message, code="outcome_unknown"), state="unsure")
            return
        record = partial(this.record_retry, failure=error, delay=delay, never_sent=never_sent)
        if await self._record(this.claim, record, this.span):
            SUBMISSIONS.labels("account_refused" if is_account else "retry").inc()
            emit = log.error if is_account else log.warning
            message = "submissions paused: Clipia refuses the account" if is_account else "job not submitted"
            ids = {"job_id": str(this.claim.id), "reason": error.reason, "error": str(error)}
            emit(message, **ids, attempt=this.claim.attempt, retry_in=delay)

    async def _end(
        self, this: SubmitAttempt, error: RequestError, *, state: JobState, change: QuotaChange = _unchanged
    ) -> None:
        """End a job without a result."""
        attempt = this.attempt.end("failed", stored_json(error))
        record = partial(this.record_end, attempt=attempt, state=state, change=change)
        if await self._record(this.claim, record, this.span):
            SUBMISSIONS.labels("unsure" if state == "unsure" else "refused").inc()
            ids = {"job_id": str(this.claim.id), "code": error.code, "error": str(error)}
            log.error("job ended without a result", **ids, state=state)
