"""The submitter: reserve the key, submit, record; and look at what became of jobs."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Self
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.budgets import Budgets
from receiver.clipia.catalogue import Catalogue
from receiver.clipia.client import CALL_TIMEOUT_SECONDS, ClipiaClient, open_client
from receiver.clipia.job_request import JobRequest, refreeze
from receiver.core.lane_names import SUBMIT_LANE, Wake, wake_no_lane
from receiver.core.request_checks import check_caller, check_key, read_cursor
from receiver.core.retry import REFUSED_GIVE_UP_SECONDS
from receiver.db import decisions, freezes, jobs, migrate, reads
from receiver.db.database import Database
from receiver.db.rows import CostGroup, JobState, NewJob
from receiver.db.views import JobCosts
from receiver.errors import ClipiaUnavailable, RefusedByClipia, RequestError, SettingsError
from receiver.lanes.attempts import error_json
from receiver.lanes.base import Work
from receiver.lanes.submit import SubmitLane
from receiver.logs import configure_library_logging
from receiver.price import Credits, read_credits, total
from receiver.settings import DEFAULT_SOURCE, InputCheck, Settings
from receiver.submitter.account_status import AccountStatus, read_account_status
from receiver.submitter.job import Job, JobPage, read_error
from receiver.submitter.waiting import JobWaiter

ANSWER_TIMEOUT_SECONDS: Final = CALL_TIMEOUT_SECONDS + 5.0
"""Seconds for which `submit` waits for Clipia; the submission goes on after that."""
MAX_CONCURRENT_READS: Final = 3
"""Looks at single jobs at once: waiters that wake up together queue here, not for connections."""

_NO_KEY: Final = "CLIPIA_KEY is not set: nothing can be submitted without Clipia's API key"

log = structlog.get_logger()


class Submitter:
    """Issues jobs; safe to use from any number of processes and tasks at once."""

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
    ) -> None:
        """Take over `client`, which `close` closes; without one jobs can be looked at but not submitted.

        `public_url` is where Clipia reaches the callback; without it jobs have no webhook and are polled.
        `budgets` are credits per caller and UTC day. The times are in seconds.
        """
        self.database: Final = database
        self._client = client
        self._public_url = public_url
        self._budgets = Budgets(budgets or {})
        self._wake = wake
        self._waiting = JobWaiter(database)
        self._reads = asyncio.Semaphore(MAX_CONCURRENT_READS)
        self._running: set[asyncio.Task[Any]] = set()
        self.lane: SubmitLane | None = None
        self._catalogue: Catalogue | None = None
        if client is not None:
            times = {"poll_after": poll_after, "refused_give_up_after": refused_give_up_after}
            self._catalogue = Catalogue(database, client, input_check=input_check)
            self.lane = SubmitLane(database, client, self._catalogue, wake=wake, **times)

    @classmethod
    @asynccontextmanager
    async def open(cls, settings: Settings | None = None) -> AsyncIterator[Self]:
        """Open a submitter on the service's database, with the service's settings unless others are given.

        Its logs go to `logging`. Raises SettingsError, which says what to set, and DatabaseUnavailable.
        """
        configure_library_logging()
        settings = settings or Settings.load()
        database = Database(settings.database_url.get_secret_value())
        try:
            await migrate.prepare(database, durable_without=settings.durable_without)
            submitter = cls.configured(settings, database)
            try:
                yield submitter
            finally:
                await submitter.close()
        finally:
            await database.close()

    @classmethod
    def configured(cls, settings: Settings, database: Database, *, wake: Wake = wake_no_lane) -> Self:
        """Make a submitter as the settings say. Raises SettingsError."""
        return cls(
            database,
            open_client(settings),
            public_url=settings.public_url,
            budgets=settings.budgets,
            poll_after=settings.poll_after,
            refused_give_up_after=settings.refused_give_up_after,
            input_check=settings.input_check,
            wake=wake,
        )

    async def close(self) -> None:
        """Let submissions under way end, and close the connections to Clipia."""
        if self._running:
            await asyncio.wait(self._running, timeout=CALL_TIMEOUT_SECONDS)
        await self._waiting.close()
        if self._client is not None:
            await self._client.close()

    @property
    def client(self) -> ClipiaClient:
        """The API; raises SettingsError if no key is set."""
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
    ) -> Job:
        """Issue a job, or return the one that this caller's key already stands for.

        When this returns, the job is committed, and will be submitted exactly once whatever happens; its
        state is `pending` where Clipia could not take it yet. Without a key one is made, and a call that is
        repeated makes another job. `strict` refuses keys of the input that the model's schema does not have,
        which else pass with a warning; None is as the settings say.

        Raises RequestError if the input does not fit a model, the price exceeds `max_cost` (credits) or the
        caller's budget, the key stands for other parameters (409, `idempotency_key_reuse`), or Clipia refused
        the job for good. Raises ClipiaUnavailable where a price has to be known and Clipia cannot be asked,
        and DatabaseUnavailable: call again with the same key then.
        """
        values = {
            "model": model,
            "input": dict(input),
            "metadata": dict(metadata or {}),
            "max_cost": max_cost,
            "strict": strict,
        }
        return await self.issue(JobRequest.read(values), key=idempotency_key, caller=caller)

    async def issue(self, request: JobRequest, *, key: str | None, caller: str) -> Job:
        """Issue a job that has been read already; else as `submit`."""
        check_caller(caller)
        fingerprint = request.fingerprint()
        if key is not None:
            async with self.database.read() as connection:
                known = await jobs.find(connection, caller, check_key(key))
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
        )
        async with self.database.write() as connection:
            new = await jobs.insert(connection, job)
            if new:
                await freezes.require_none(connection)
            works = await self._start(connection, job) if new else []
            known = None if new else await jobs.find(connection, caller, job.idempotency_key)
        if known is not None:
            return await self._repeat(known, fingerprint)
        log.info("job issued", job_id=str(job.id), caller=caller, model=job.model)
        if not works:
            self._wake(SUBMIT_LANE)
        for work in works:
            await self._finish(work)
        return await self._show_or_raise(job.id, new=True)

    async def get(self, job_id: UUID, *, caller: str | None = None) -> Job | None:
        """Return a job with its event, or None; where a `caller` is given only if it is that caller's."""
        async with self._reads, self.database.read() as connection:
            row = await reads.show_job(connection, job_id, caller=caller)
        return None if row is None else Job.of(row)

    async def find(self, request_id: str) -> Job | None:
        """Return the job that Clipia knows under a `request_id`, or None."""
        async with self.database.read() as connection:
            job_id = await jobs.find_by_request(connection, DEFAULT_SOURCE, request_id)
        return None if job_id is None else await self.get(job_id)

    async def wait(self, job_id: UUID, *, seconds: float, caller: str | None = None) -> Job | None:
        """Return a job once it has ended and its files are settled, or as it is after `seconds`."""
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
        """Return jobs, newest first; `metadata` are keys and the values that they must have."""
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
        more = len(rows) > limit
        return JobPage(
            jobs=[Job.of(row) for row in rows[:limit]], next=str(rows[limit - 1]["seq"]) if more else None
        )

    async def costs(
        self,
        *,
        by: CostGroup,
        caller: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[JobCosts]:
        """Return `{by, jobs, reserved, charged, refunded}` in credits by caller, model or UTC day."""
        async with self.database.read() as connection:
            return await reads.job_costs(connection, by=by, caller=caller, since=since, until=until)

    async def account(self) -> dict[str, Any]:
        """Return Clipia's account, and what our own ledger says of the same 30 days.

        `difference_30d` are the credits that Clipia charged and the ledger does not know of: jobs of others
        who use the account, or a mistake.
        """
        account = await self.catalogue.balance()
        rows = await self.costs(by="day", since=datetime.now(UTC) - timedelta(days=30))
        standing = await self.standing()
        totals = {
            name: total(row[name] for row in rows) for name in ("jobs", "reserved", "charged", "refunded")
        }
        spent = read_credits((account.get("usage_30d") or {}).get("credits_spent"))
        return account | {
            "ledger_30d": totals,
            "difference_30d": None if spent is None else total((spent, -totals["charged"])),
            "limits": {
                "requests_per_minute": standing.quota.requests_per_minute,
                "in_flight": standing.quota.in_flight_limit,
                "paused": read_error(standing.pause),
                "refused_jobs": standing.refused_jobs,
            },
        }

    async def standing(self) -> AccountStatus:
        """Return how the account stands; raises SettingsError if no key is set."""
        async with self.database.read() as connection:
            return await read_account_status(connection, self.client.account)

    async def paused(self) -> bool:
        """Tell whether no job is accepted: Clipia refuses the account, or submissions are frozen."""
        return self._client is not None and (await self.standing()).paused

    async def cancel(self, job_id: UUID, *, by: str) -> Job:
        """End a job as a person decided; Clipia has no cancel, and is told nothing.

        A job that was never sent, or that is unsure already, is `canceled`. If Clipia may have it, it is
        `unsure`, and its event still ends it. Raises RequestError for one that has ended or is at Clipia.
        """
        text = error_json("canceled", f"Canceled by {by}.")
        async with self.database.write() as connection:
            state = await decisions.cancel(connection, job_id, error=text, by=by)
        job = await self._get_decided(job_id)
        if state is None:
            raise RequestError(
                f"the job is {job.state}; one that has ended, or is at Clipia just now, cannot be canceled",
                code="not_cancelable",
            )
        log.warning("job canceled by a person", job_id=str(job_id), by=by, state=state)
        return job

    async def resubmit(self, job_id: UUID, *, by: str) -> Job:
        """Submit a job that ended without a result once more, under a new key: it may be paid for twice.

        That is for a person to decide; nothing here does it by itself. Raises RequestError if the job is in
        another state.
        """
        account = self.client.account
        done = False
        async with self.database.write() as connection:
            frozen = await decisions.find_request(connection, job_id)
            if frozen is not None:
                request, path_token = refreeze(frozen, job_id, self._public_url)
                done = await decisions.resubmit(
                    connection,
                    job_id,
                    request=request,
                    has_webhook=self._public_url is not None,
                    account=account,
                    path_token=path_token,
                    by=by,
                )
        job = await self._get_decided(job_id)
        if not done:
            raise RequestError(
                f"the job is {job.state}; only one that is unsure, failed or canceled can be submitted again",
                code="not_resubmittable",
            )
        self._wake(SUBMIT_LANE)
        log.warning("job submitted anew by a person", job_id=str(job_id), by=by)
        return job

    async def _get_decided(self, job_id: UUID) -> Job:
        job = await self.get(job_id)
        if job is None:
            raise RequestError(f"there is no job {job_id}", code="not_found")
        return job

    async def _start(self, connection: AsyncConnection, job: NewJob) -> list[Work]:
        """In the transaction that inserts a job: hold it against the budget, and claim it if it is next."""
        await self._budgets.require_within(connection, job)
        if self.lane is None or not await jobs.is_next(connection, job.account, job.id):
            return []
        return await self.lane.claim_in(connection, limit=1, job_id=job.id)

    async def _finish(self, work: Work) -> None:
        """Run a submission to its end, however long its caller stays to see it."""
        task = asyncio.ensure_future(work.run())
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait({task}, timeout=ANSWER_TIMEOUT_SECONDS)
        if task.done():
            task.result()

    async def _repeat(self, known: jobs.KnownJob, fingerprint: str) -> Job:
        if known.fingerprint != fingerprint:
            raise RequestError(
                "this Idempotency-Key was used with other parameters",
                code="idempotency_key_reuse",
                job_id=str(known.id),
            )
        return await self._show_or_raise(known.id)

    async def _show_or_raise(self, job_id: UUID, *, new: bool = False) -> Job:
        """Return a job; raise RequestError where Clipia never accepted it and never will."""
        async with self.database.read() as connection:
            row = await reads.show_job(connection, job_id)
        if row is None:
            raise ClipiaUnavailable("the job vanished while it was looked up", reason="race")
        job = Job.of(row, new=new)
        if job.state == "failed" and job.request_id is None:
            error = job.error or {}
            message = error.get("message") or "Clipia refused the job."
            code = error.get("code") or "invalid_request"
            type_ = error.get("type", "invalid_request_error")
            if "status" in error:
                raise RefusedByClipia(
                    message, code=code, status=error["status"], type_=type_, job_id=str(job_id)
                )
            raise RequestError(message, code=code, type_=type_, job_id=str(job_id))
        return job
