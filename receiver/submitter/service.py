"""The submitter: it reserves the idempotency key, submits the job, records the answer, and reads jobs."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self
from uuid import UUID

import structlog

from receiver.budgets import Budgets
from receiver.clipia.catalogue import Catalogue
from receiver.clipia.client import CALL_TIMEOUT_SECONDS, ClipiaClient, open_client
from receiver.clipia.job_request import JobRequest, refreeze
from receiver.core.lane_names import SUBMIT_LANE, Wake, wake_no_lane
from receiver.core.request_values import check_caller, check_key, read_cursor
from receiver.core.retry import REFUSED_GIVE_UP_SECONDS
from receiver.core.trace_context import TraceContext
from receiver.db import jobs, migrate, operator_decisions, reads, submission_freezes, tables
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import CostGroup, JobState, NewJob
from receiver.db.statements import Known, find_known
from receiver.db.views import JobCosts
from receiver.errors import ClipiaUnavailable, RefusedByClipia, RequestError, SettingsError
from receiver.lanes.attempts import error_json
from receiver.lanes.base import Work
from receiver.lanes.spans import start_submission
from receiver.lanes.submit import SubmitLane
from receiver.logs import configure_library_logging
from receiver.price import Credits
from receiver.setting_fields import InputCheck
from receiver.settings import DEFAULT_SOURCE, Settings
from receiver.submitter.account_status import Account, AccountStatus, account_report, read_account_status
from receiver.submitter.job import Job, JobPage
from receiver.submitter.waiting import JobWaiter
from receiver.tracing import OFF, Tracer, start_tracing

ANSWER_TIMEOUT_SECONDS: Final = CALL_TIMEOUT_SECONDS + 5.0
"""`submit` waits this long for Clipia. After that, the submission continues in the background."""
MAX_CONCURRENT_READS: Final = 3
"""Concurrent reads of single jobs: many callers that wake up together must not take all connections."""

_NO_KEY: Final = "CLIPIA_KEY is not set: jobs cannot be submitted without Clipia's API key"

log = structlog.get_logger()


class Submitter:
    """Submits jobs; many processes and tasks may use one database at the same time."""

    def __init__(
        self,
        database: Database,
        client: ClipiaClient | None,
        *,
        public_url: str | None = None,
        budgets: Mapping[str, Credits] | None = None,
        poll_after: float = 60.0,
        refused_give_up_after: float = REFUSED_GIVE_UP_SECONDS,
        input_check: InputCheck = "on",
        wake: Wake = wake_no_lane,
        tracer: Tracer = OFF,
    ) -> None:
        """Take over `client` (`close` closes it). Without a client, jobs can be read but not submitted.

        `public_url` is the public base URL of the callback; without it, jobs have no webhook and are polled.
        `budgets` are credits per caller and UTC day. The times are in seconds.
        """
        self.database: Final = database
        self._client = client
        self._public_url = public_url
        self._budgets = Budgets(budgets or {})
        self._wake = wake
        self.tracer: Final = tracer
        self._waiting = JobWaiter(database)
        self._reads = asyncio.Semaphore(MAX_CONCURRENT_READS)
        self._running: set[asyncio.Task[Any]] = set()
        self.lane: SubmitLane | None = None
        self._catalogue: Catalogue | None = None
        if client is not None:
            times = {"poll_after": poll_after, "refused_give_up_after": refused_give_up_after}
            self._catalogue = Catalogue(database, client, input_check=input_check)
            self.lane = SubmitLane(database, client, self._catalogue, wake=wake, tracer=tracer, **times)

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings | None = None) -> AsyncIterator[Self]:
        """Open a submitter on the service's database; without `settings`, those of the service are used.

        Its logs go to `logging`. Raises SettingsError, which names the setting, and DatabaseUnavailable.
        """
        configure_library_logging()
        settings = settings or Settings.load()
        database = Database(settings.database_url.get_secret_value())
        try:
            await migrate.prepare(database, durable_without=settings.durable_without)
            # The program may have the variables for its own spans, and not our extra.
            tracer = start_tracing(is_optional=True)
            submitter = cls.configured(settings, database, tracer=tracer)
            try:
                yield submitter
            finally:
                await submitter.close()
                await tracer.close()
        finally:
            await database.close()

    @classmethod
    def configured(
        cls, settings: Settings, database: Database, *, wake: Wake = wake_no_lane, tracer: Tracer = OFF
    ) -> Self:
        """Make a submitter from settings. Raises SettingsError."""
        return cls(
            database,
            open_client(settings),
            public_url=settings.public_url,
            budgets=settings.budgets,
            poll_after=settings.poll_after,
            refused_give_up_after=settings.refused_give_up_after,
            input_check=settings.input_check,
            wake=wake,
            tracer=tracer,
        )

    async def close(self) -> None:
        """Wait for the submissions in flight, and close the connections to Clipia."""
        if self._running:
            await asyncio.wait(self._running, timeout=CALL_TIMEOUT_SECONDS)
        await self._waiting.close()
        if self._client is not None:
            await self._client.close()

    @property
    def client(self) -> ClipiaClient:
        """The client; raises SettingsError if no key is set."""
        if self._client is None:
            raise SettingsError(_NO_KEY)
        return self._client

    @property
    def catalogue(self) -> Catalogue:
        """Models, prices and the account; raises SettingsError if no key is set."""
        if self._catalogue is None:
            raise SettingsError(_NO_KEY)
        return self._catalogue

    async def submit(
        self,
        model: str,
        input: Mapping[str, Any],  # noqa: A002 - Clipia's name for it
        *,
        idempotency_key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        max_cost: Credits | None = None,
        strict: bool | None = None,
        caller: str = "local",
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Job:
        """Submit a job, or return the existing job if this caller has used the key before.

        When this returns, the job is committed and will be submitted exactly once. If Clipia could not accept
        it yet, its state is `pending`. Without a key, a random one is used, and a repeated call creates
        another job. If `strict` is true, unknown keys of the input are invalid; otherwise they cause a
        warning. None: the setting decides. `traceparent` and `tracestate` (W3C Trace Context) are those of
        the caller's span; the job continues its trace. Invalid ones are ignored.

        Raises RequestError if the input is invalid for the model, the price exceeds `max_cost` (credits) or
        the caller's budget, the key was used with other parameters (409, `idempotency_key_reuse`), or Clipia
        refused the job for good. Raises ClipiaUnavailable if the price is needed and Clipia does not answer,
        and DatabaseUnavailable; call it again with the same key then.
        """
        values = {"model": model, "input": dict(input), "metadata": dict(metadata or {})}
        request = JobRequest.read(values | {"max_cost": max_cost, "strict": strict})
        trace = TraceContext.parse(traceparent, tracestate)
        return await self.issue(request, key=idempotency_key, caller=caller, trace=trace)

    async def issue(
        self, request: JobRequest, *, key: str | None, caller: str, trace: TraceContext | None = None
    ) -> Job:
        """Submit a validated job, as `submit` does; `trace` is the caller's span."""
        check_caller(caller)
        began = time.time()
        fingerprint = request.fingerprint()
        if key is not None:
            async with self.database.read() as connection:
                known = await find_known(connection, tables.jobs, caller, check_key(key))
            if known is not None:
                return await self._repeat(known, fingerprint)
        warnings = await self.catalogue.check(request.model, request.input, strict=request.strict)
        job = request.freeze(
            caller=caller,
            key=key,
            public_url=self._public_url,
            account=self.client.account,
            cost=await self._budgets.price(request, caller, self.catalogue),
            warnings=warnings,
            trace=trace,
        )
        stored = time.time()
        async with self.database.write() as connection:
            new = await jobs.insert(connection, job)
            if new:
                await submission_freezes.require_none(connection)
            works = await self._start(connection, job) if new else []
            known = None if new else await find_known(connection, tables.jobs, caller, job.idempotency_key)
        if known is not None:
            return await self._repeat(known, fingerprint)
        log.info("job issued", job_id=str(job.id), caller=caller, model=job.model)
        # Only now is it known that the job is new.
        system = self.database.dialect_name
        with start_submission(self.tracer, job, began=began, storing=stored, system=system):
            if not works:
                self._wake(SUBMIT_LANE)
            for work in works:
                await self._finish(work)
            return await self._show_or_raise(job.id, new=True)

    async def get(self, job_id: UUID, *, caller: str | None = None) -> Job | None:
        """Return a job with its event, or None. With a `caller`, only a job of this caller is returned."""
        async with self._reads, self.database.read() as connection:
            row = await reads.show_job(connection, job_id, caller=caller)
        return None if row is None else Job.of(row)

    async def find(self, request_id: str) -> Job | None:
        """Return the job with this `request_id` of Clipia's, or None."""
        async with self.database.read() as connection:
            job_id = await jobs.find_by_request(connection, DEFAULT_SOURCE, request_id)
        return None if job_id is None else await self.get(job_id)

    async def wait(self, job_id: UUID, *, seconds: float, caller: str | None = None) -> Job | None:
        """Return a job when it and its files are finished, or in its present state after `seconds`."""
        deadline = time.monotonic() + seconds
        job = await self.get(job_id, caller=caller)
        if job is None or job.ended or seconds <= 0:
            return job
        await self._waiting.wait(job_id, seconds=deadline - time.monotonic())
        return await self.get(job_id, caller=caller)

    async def list_jobs(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        caller: str | None = None,
        state: JobState | None = None,
        model: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> JobPage:
        """Return jobs, newest first; `metadata` filters by exact values."""
        before = read_cursor(cursor)
        async with self.database.read() as connection:
            rows = await reads.list_jobs(
                connection,
                limit=limit + 1,
                before=before,
                caller=caller,
                state=state,
                model=model,
                since=since,
                until=until,
                metadata=metadata or {},
            )
        last = rows[limit - 1] if len(rows) > limit else None
        return JobPage(jobs=[Job.of(row) for row in rows[:limit]], next=str(last["seq"]) if last else None)

    async def costs(
        self,
        *,
        by: CostGroup,
        caller: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[JobCosts]:
        """Return credits by caller, model or UTC day."""
        async with self.database.read() as connection:
            return await reads.job_costs(connection, by=by, caller=caller, since=since, until=until)

    async def account(self) -> Account:
        """Return Clipia's account, and our own sums for the same 30 days.

        `difference_30d` are the credits that Clipia charged minus those of our jobs. If it is not 0, others
        use the account too, or there is an error.
        """
        answer = await self.catalogue.balance()
        costs = await self.costs(by="day", since=datetime.now(UTC) - timedelta(days=30))
        return account_report(answer, costs, await self.standing())

    async def standing(self) -> AccountStatus:
        """Return the status of the account; raises SettingsError if no key is set."""
        async with self.database.read() as connection:
            return await read_account_status(connection, self.client.account)

    async def paused(self) -> bool:
        """Tell whether submissions are stopped: Clipia refuses the account, or the operator froze them."""
        return self._client is not None and (await self.standing()).paused

    async def cancel(self, job_id: UUID, *, by: str) -> Job:
        """End a job for the operator. Clipia has no way to cancel a generation.

        If the job was never sent, or is already `unsure`, it becomes `canceled`. If Clipia may have it, it
        becomes `unsure`, and an event can still finish it. Raises RequestError if the job has ended or a
        call to Clipia is in progress.
        """
        text = error_json("canceled", f"Canceled by {by}.")
        async with self.database.write() as connection:
            state = await operator_decisions.cancel(connection, job_id, error=text, by=by)
        job = await self._get_existing(job_id)
        if state is None:
            reason = "a job cannot be canceled if it has ended or a call to Clipia is in progress"
            raise RequestError(f"the job is {job.state}; {reason}", code="not_cancelable")
        log.warning("job canceled by the operator", job_id=str(job_id), by=by, state=state)
        return job

    async def resubmit(self, job_id: UUID, *, by: str) -> Job:
        """Submit a job without a result again, with a new key. It may be paid for twice.

        Only the operator can order this. Raises RequestError if the state of the job does not allow it.
        """
        account = self.client.account
        done = False
        async with self.database.write() as connection:
            frozen = await operator_decisions.find_request(connection, job_id)
            if frozen is not None:
                request, path_token = refreeze(frozen, job_id, self._public_url)
                done = await operator_decisions.resubmit(
                    connection,
                    job_id,
                    request=request,
                    has_webhook=self._public_url is not None,
                    account=account,
                    path_token=path_token,
                    by=by,
                )
        job = await self._get_existing(job_id)
        if not done:
            message = f"the job is {job.state}; only unsure, failed or canceled jobs can be submitted again"
            raise RequestError(message, code="not_resubmittable")
        self._wake(SUBMIT_LANE)
        log.warning("job submitted again by the operator", job_id=str(job_id), by=by)
        return job

    async def _get_existing(self, job_id: UUID) -> Job:
        job = await self.get(job_id)
        if job is None:
            raise RequestError(f"there is no job {job_id}", code="not_found")
        return job

    async def _start(self, connection: SqlConnection, job: NewJob) -> list[Work]:
        """Check the budget and, if the job is next, claim it; in the transaction that inserts the job."""
        await self._budgets.require_within(connection, job)
        if self.lane is None or not await jobs.is_next(connection, job.account, job.id):
            return []
        return await self.lane.claim_in(connection, limit=1, job_id=job.id)

    async def _finish(self, work: Work) -> None:
        """Run a submission to its end, even if its caller is cancelled."""
        task = asyncio.ensure_future(work.run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait({task}, timeout=ANSWER_TIMEOUT_SECONDS)
        if task.done():
            task.result()

    async def _repeat(self, known: Known, fingerprint: str) -> Job:
        if known.fingerprint != fingerprint:
            message = "this Idempotency-Key was used with other parameters: use a new one"
            raise RequestError(message, code="idempotency_key_reuse", job_id=str(known.id))
        return await self._show_or_raise(known.id)

    async def _show_or_raise(self, job_id: UUID, *, new: bool = False) -> Job:
        """Return a job. Raises RequestError if Clipia refused it for good."""
        async with self.database.read() as connection:
            row = await reads.show_job(connection, job_id)
        if row is None:
            raise ClipiaUnavailable("the job vanished while it was read: try again", reason="race")
        job = Job.of(row, new=new)
        if job.state == "failed" and job.request_id is None:
            error = job.error or {}
            message = error.get("message") or "Clipia refused the job."
            details = {
                "code": error.get("code") or "invalid_request",
                "type_": error.get("type", "invalid_request_error"),
                "job_id": str(job_id),
            }
            if "status" in error:
                raise RefusedByClipia(message, status=error["status"], **details)
            raise RequestError(message, **details)
        return job
