"""Submissions as rows of work: the same key and the same bytes until Clipia's answer is on record."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.budgets import require_price
from receiver.clipia.catalogue import Catalogue
from receiver.clipia.client import CALL_TIMEOUT_SECONDS, UNUSABLE_ID, Accepted, Call, ClipiaClient, clock
from receiver.clipia.job_request import join_warnings
from receiver.core.payload import parse
from receiver.core.retry import REFUSED_GIVE_UP_SECONDS, SUBMIT, SUBMIT_UNANSWERED, poll_delay, refused_delay
from receiver.db import accounts, freezes, job_events, jobs, leases, refused_jobs, tables
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.jobs import SUBMIT_LANE
from receiver.db.rows import Claim, JobState, Submission
from receiver.errors import (
    AccountRefused,
    ClipiaUnavailable,
    RefusedByClipia,
    RefusedForNow,
    RequestError,
    UnrecognizedBody,
)
from receiver.lanes.base import (
    FAN_OUT_LANE,
    LEASE,
    Record,
    Work,
    WorkLane,
    describe,
    error_text,
    jitter,
    start_attempt,
    stored_error,
)
from receiver.lanes.quota_lessons import Change, after_failure, looked_at, unchanged
from receiver.metrics import SUBMISSIONS

CONCURRENCY: Final = 16
ACCOUNT_WAIT: Final = 5.0
"""Least seconds until a job whose account was refused is tried again; up to twice that, at random."""
_MAYBE_PAID: Final = ("idempotency_key_reuse", UNUSABLE_ID)
"""Codes of refusals after which there may be a generation all the same."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _Try:
    """One call: the job, when it was claimed, and the record to be made."""

    claim: Claim
    submission: Submission
    claimed_at: float
    sent_at: float
    record: Record

    def sent_for(self) -> float:
        """Return the seconds since the first try that may have arrived; this one may, too."""
        return (self.submission.sent_for or 0.0) + clock() - self.claimed_at


class SubmitLane(WorkLane):
    """Submits jobs to one Clipia account, within its limits."""

    def __init__(
        self,
        database: Database,
        client: ClipiaClient,
        catalogue: Catalogue,
        *,
        wake: Callable[[str], None],
        poll_after: float,
        refused_give_up_after: float = REFUSED_GIVE_UP_SECONDS,
    ) -> None:
        """`poll_after` is how many seconds a webhook may take.

        `refused_give_up_after` is for how many seconds a job is tried that Clipia refuses for now (402, 403).
        """
        super().__init__(database, tables.jobs, name=SUBMIT_LANE, concurrency=CONCURRENCY, wake=wake)
        self._client = client
        self._catalogue = catalogue
        self._poll_after = poll_after
        self._refused_give_up_after = refused_give_up_after
        self._claimed = 0

    async def claim(self, limit: int) -> list[Work]:
        """Claim jobs that are due, as many as the account lets us send. Raises DatabaseUnavailable."""
        async with self._database.write() as connection:
            if not await jobs.is_due(connection, self._client.account, "pending"):
                return []
            works = await self.claim_in(connection, limit=limit)
            expired = [] if works else await self._expire(connection)
        for job in expired:
            SUBMISSIONS.labels("unsure" if job.state == "unsure" else "refused").inc()
            log.error("refused job ended", job_id=str(job.id), state=job.state, error=job.error)
        return works

    async def _expire(self, connection: AsyncConnection) -> list[refused_jobs.Expired]:
        """End refused jobs whose time is over, although the account has no room for their last try."""
        # What a restored database says of a job may be old: Clipia may have accepted it since.
        if await freezes.find(connection) is not None:
            return []
        return await refused_jobs.expire(
            connection, self._client.account, give_up_after=self._refused_give_up_after
        )

    async def claim_in(
        self, connection: AsyncConnection, *, limit: int, job_id: UUID | None = None
    ) -> list[Work]:
        """Claim inside the caller's transaction, where `job_id` is given only that job."""
        if await freezes.find(connection) is not None:
            return []
        account = self._client.account
        quota, now = await accounts.lock(connection, account)
        room = quota.allowed_submissions(now, in_flight=(await jobs.in_flight(connection, account)).total)
        if not room:
            return []
        claimed = await jobs.claim_to_submit(
            connection, account, limit=min(limit, room), lease=LEASE, job_id=job_id, start=self._claimed
        )
        if claimed:
            self._claimed += 0 if job_id else len(claimed)
            await accounts.save(connection, account, quota.after_calls("submit", len(claimed), now))
        claimed_at = clock()
        return [
            Work(claim=claim, run=partial(self._submit, claim, submission, claimed_at, now))
            for claim, submission in claimed
        ]

    async def _submit(self, claim: Claim, submission: Submission, claimed_at: float, now: float) -> None:
        this = _Try(
            claim=claim,
            submission=submission,
            claimed_at=claimed_at,
            sent_at=now,
            record=start_attempt(claim),
        )
        if trouble := self._cannot_be_sent(this):
            await self._stop(this, trouble, state="unsure")
            return
        # A process that was stopped meanwhile must not send what another one may hold by now.
        call = Call(not_after=claimed_at + LEASE - CALL_TIMEOUT_SECONDS)
        sent: Call | None = None
        try:
            await require_price(submission, self._catalogue, age=claim.age)
            sent = call
            accepted = await self._client.submit(
                submission.model, submission.request, key=submission.provider_key, call=call
            )
        except RequestError as error:
            # The key is ours alone: where it stands for something else, another one could be charged.
            await self._refuse(this, error, sent, maybe_paid=error.code in _MAYBE_PAID)
        except RefusedForNow as error:
            await self._rest(this, error, call)
        except ClipiaUnavailable as error:
            await self._try_again(this, error, call)
        except Exception as error:
            log.exception("submission failed unexpectedly", job_id=str(claim.id))
            unsure = ClipiaUnavailable(describe(error), reason="internal_error")
            await self._try_again(this, unsure, call)
        else:
            await self._accept(this, accepted, call)

    def _cannot_be_sent(self, this: _Try) -> RequestError | None:
        """Return why another try could be paid for twice."""
        if this.submission.account not in (None, self._client.account):
            return RequestError(
                "An earlier try may have arrived, but CLIPIA_KEY or CLIPIA_BASE_URL has changed since: "
                "its idempotency key means nothing to another account.",
                code="account_changed",
            )
        if this.sent_for() >= SUBMIT_UNANSWERED.give_up_after:
            return RequestError(
                "No try was answered within 23 hours of the first one; Clipia forgets the key after 24.",
                code="outcome_unknown",
            )
        return None

    async def _accept(self, this: _Try, accepted: Accepted, call: Call) -> None:
        submission = this.submission
        said = asdict(accepted) | {"warnings": join_warnings(submission.warnings or [], accepted.warnings)}
        taken = ended = False

        async def write(connection: AsyncConnection) -> bool:
            nonlocal taken, ended
            poll_after = poll_delay(
                0, overdue=self._poll_after, has_webhook=submission.has_webhook, watched=False
            )
            recorded = await jobs.record_submitted(
                connection,
                this.claim,
                source=submission.source,
                provider_key=submission.provider_key,
                poll_after=poll_after,
                **said,
            )
            if recorded == "taken":
                taken = True
                return True
            if recorded == "recorded":
                ended = await self._after_accepted(connection, submission, accepted.request_id)
            # A webhook that was faster has brought the job to its end already.
            elif not await jobs.add_answer(connection, this.claim.id, **said):
                # Whoever has the job by now sends the same key, and gets the same generation.
                if not await jobs.is_still_sent(connection, this.claim.id, submission.provider_key):
                    await self._keep_stray(connection, this, accepted)
                return False
            await leases.record_attempt(connection, this.claim.id, this.record("succeeded"))
            await self._learn(
                connection, call, lambda quota, now, used: quota.after_accepted(now, in_flight=used.accepted)
            )
            return True

        held = await self._record(this.claim, write)
        if taken:
            error = RequestError(
                f"Clipia answered with the request_id of another job ({accepted.request_id}), so this job's "
                "own generation is unknown.",
                code="request_id_taken",
            )
            await self._stop(this, error, state="unsure", call=call)
        elif held:
            SUBMISSIONS.labels("accepted").inc()
            log.info("job submitted", job_id=str(this.claim.id), **asdict(accepted))
        if ended:
            # Its event waited for this answer.
            self._wake(FAN_OUT_LANE)

    async def _after_accepted(
        self, connection: AsyncConnection, submission: Submission, request_id: str
    ) -> bool:
        """Let the other refused jobs try again, too; return whether this one's event was there already."""
        if submission.refused_for is not None:
            await refused_jobs.release(connection, self._client.account)
        return await _settle_at_once(connection, submission.source, request_id)

    async def _keep_stray(self, connection: AsyncConnection, this: _Try, accepted: Accepted) -> None:
        """Put on record what Clipia accepted for a job that has ended otherwise: it is paid for, too."""
        stray = error_text(
            "stray_generation", f"accepted as {accepted.request_id} for {accepted.cost} credits"
        )
        await leases.record_attempt(connection, this.claim.id, this.record("failed", stray))
        log.error(
            "generation of a job that has ended otherwise", job_id=str(this.claim.id), **asdict(accepted)
        )

    async def _refuse(
        self, this: _Try, error: RequestError, call: Call | None, *, maybe_paid: bool = False
    ) -> None:
        """End a job that is refused for good; without a `call` it was not sent this time."""
        # An earlier try may have arrived all the same: whether Clipia looks at keys first is not public.
        maybe_paid |= this.submission.sent_for is not None
        state: JobState = "unsure" if maybe_paid else "failed"
        await self._stop(this, error, state=state, call=call, change=looked_at)

    async def _rest(self, this: _Try, error: RefusedForNow, call: Call) -> None:
        """Put a job back that Clipia refuses for now, or end it; other jobs go on."""
        account, refused_for = self._client.account, this.submission.refused_for
        text = stored_error(error)
        delay: float | None = None

        async def write(connection: AsyncConnection) -> bool:
            nonlocal delay
            quota = await accounts.read(connection, account)
            others = await refused_jobs.count(connection, account)
            delay = refused_delay(
                refused_for or 0.0,
                least=quota.retry_interval(others + (refused_for is None)),
                give_up_after=self._refused_give_up_after,
                jitter=jitter(),
            )
            if delay is None:
                return True
            never_sent = this.submission.sent_for is None
            held = await jobs.put_back(
                connection, this.claim, delay=delay, error=text, never_sent=never_sent, refused=True
            )
            if held:
                await leases.record_attempt(connection, this.claim.id, this.record("retry", text))
            await self._learn(connection, call, looked_at)
            return held

        held = await self._record(this.claim, write)
        if delay is None:
            final = RefusedByClipia(
                str(error), code=error.reason, status=error.status or 402, type_=error.type
            )
            await self._refuse(this, final, call)
        elif held:
            SUBMISSIONS.labels("refused_for_now").inc()
            # At the first time somebody may have to top up; later ones say nothing new.
            emit = log.error if refused_for is None else log.info
            emit(
                "job refused for now",
                job_id=str(this.claim.id),
                reason=error.reason,
                error=str(error),
                refused_for=refused_for or 0.0,
                retry_in=delay,
            )

    async def _stop(
        self,
        this: _Try,
        error: RequestError,
        *,
        state: JobState,
        call: Call | None = None,
        change: Change = unchanged,
    ) -> None:
        """End a job without a result; `call` and `change` tell what its last answer says of the account."""
        text = stored_error(error)
        attempt = this.record("failed", text)

        async def write(connection: AsyncConnection) -> bool:
            held = await leases.finish(
                connection,
                tables.jobs,
                this.claim,
                state=state,
                error=text,
                updated_at=db_time(0.0),
                # What was never generated costs nothing.
                **({"charged": 0} if state == "failed" else {}),
            )
            if held:
                await leases.record_attempt(connection, this.claim.id, attempt)
            if call is not None:
                await self._learn(connection, call, change)
            return held

        if await self._record(this.claim, write):
            SUBMISSIONS.labels("unsure" if state == "unsure" else "refused").inc()
            log.error(
                "job ended without a result",
                job_id=str(this.claim.id),
                state=state,
                code=error.code,
                error=str(error),
            )

    async def _try_again(self, this: _Try, error: ClipiaUnavailable, call: Call) -> None:
        sent_before = this.submission.sent_for is not None
        never_sent = not error.may_have_arrived and not sent_before
        policy = SUBMIT if never_sent else SUBMIT_UNANSWERED
        age = 0.0 if never_sent else this.sent_for()
        delay = policy.next_delay(error, attempt=this.claim.attempt, age=age, jitter=jitter())
        if isinstance(error, AccountRefused):
            delay = ACCOUNT_WAIT * (1 + jitter())
        if delay is None:
            unknown = RequestError(
                f"No try was answered in time; the last one: {error}", code="outcome_unknown"
            )
            await self._stop(this, unknown, state="unsure", call=call)
            return
        text = stored_error(error)

        async def write(connection: AsyncConnection) -> bool:
            held = await jobs.put_back(connection, this.claim, delay=delay, error=text, never_sent=never_sent)
            if held:
                await leases.record_attempt(connection, this.claim.id, this.record("retry", text))
            await self._learn(connection, call, partial(after_failure, error, this.sent_at, text))
            return held

        if await self._record(this.claim, write):
            SUBMISSIONS.labels("account_refused" if isinstance(error, AccountRefused) else "retry").inc()
            emit = log.error if isinstance(error, AccountRefused) else log.warning
            emit(
                "submissions paused: Clipia refuses the account"
                if isinstance(error, AccountRefused)
                else "job not submitted",
                job_id=str(this.claim.id),
                reason=error.reason,
                error=str(error),
                attempt=this.claim.attempt,
                retry_in=delay,
            )

    async def _learn(self, connection: AsyncConnection, call: Call, change: Change) -> None:
        """Keep what an answer says about the account's limits."""
        used = await jobs.in_flight(connection, self._client.account)
        await accounts.learn(
            connection, self._client.account, call.headers, lambda quota, now: change(quota, now, used)
        )


async def _settle_at_once(connection: AsyncConnection, source: str, request_id: str) -> bool:
    """End a job whose event came before its `request_id` was known; return whether there was one."""
    body = await job_events.find_event_body(connection, source, request_id)
    if body is None:
        return False
    try:
        generation = parse(body)
    except UnrecognizedBody:
        return False
    await job_events.finish_job(connection, source, generation)
    return True
