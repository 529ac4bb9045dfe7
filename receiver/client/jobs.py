"""The calls of the client about jobs, and about Clipia's models and account."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from receiver.api.freezes import FreezeState, Thawed
from receiver.api.jobs import REPLAYED_HEADER
from receiver.api.models import ModelEstimate
from receiver.client.calls import Calls, Page, by_metadata, escaped
from receiver.db.rows import CostGroup, JobState
from receiver.db.views import JobCosts
from receiver.errors import RequestError
from receiver.price import Credits
from receiver.submitter.account_status import Account
from receiver.submitter.job import Job


class JobCalls(Calls):
    """Jobs, their costs, and the freeze of submissions."""

    async def submit_job(
        self,
        model: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's name
        *,
        key: str | None = None,
        metadata: Mapping[str, str] | None = None,
        max_cost: Credits | None = None,
        strict: bool | None = None,
        wait: float = 0.0,
    ) -> Job:
        """Submit a job once: the same `key` is the same job. Wait up to `wait` seconds for its end.

        Without a key, a repeated call makes another job.
        """
        body = {
            "model": model,
            "input": input,
            "metadata": metadata or None,
            "max_cost": max_cost,
            "strict": strict,
            "wait": wait or None,
        }
        answer = await self._send("POST", "/v1/jobs", body=body, key=key, wait=wait)
        job: Job = self._parsed(Job, answer, "/v1/jobs")
        return replace(job, new=REPLAYED_HEADER not in answer.headers)

    async def list_jobs(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        state: JobState | None = None,
        model: str | None = None,
        caller: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Page[Job]:
        """Return jobs, newest first, without files, deliveries and attempts."""
        query = {
            "cursor": cursor,
            "state": state,
            "model": model,
            "caller": caller,
            "since": since,
            "until": until,
            **by_metadata(metadata),
        }
        return await self._list(Job, "/v1/jobs", query, limit=limit)

    async def show_job(self, key: object, *, wait: float = 0.0) -> Job:
        """Return a job by its id or request_id, after up to `wait` seconds if it has not ended."""
        path = f"/v1/jobs/{escaped(key)}"
        found: Job = await self._get(Job, path, {"wait": wait or None}, wait=wait)
        return found

    async def sum_costs(
        self,
        *,
        by: CostGroup = "day",
        caller: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> list[JobCosts]:
        """Return the credits of jobs by day, caller or model."""
        query = {"by": by, "caller": caller, "since": since, "until": until}
        page: Page[JobCosts] = await self._get(Page[JobCosts], "/v1/jobs/costs", query)
        return page.data

    async def resubmit_job(self, key: object, *, reason: str | None = None) -> Job:
        """Submit a job without a result again; it may be paid for twice."""
        path = f"/v1/jobs/{escaped(key)}/resubmit"
        found: Job = await self._act(Job, "POST", path, reason=reason)
        return found

    async def cancel_job(self, key: object, *, reason: str | None = None) -> Job:
        """End a job; one that Clipia may have becomes unsure."""
        found: Job = await self._act(Job, "POST", f"/v1/jobs/{escaped(key)}/cancel", reason=reason)
        return found

    async def show_freeze(self) -> FreezeState:
        """Return whether submissions are frozen."""
        found: FreezeState = await self._get(FreezeState, "/v1/freeze")
        return found

    async def freeze_submissions(self, *, reason: str = "", restored: bool = False) -> FreezeState:
        """Accept and submit no jobs."""
        body = {"reason": reason, "restored": restored}
        found: FreezeState = await self._act(FreezeState, "POST", "/v1/freeze", body)
        return found

    async def thaw_submissions(self, *, reason: str | None = None) -> Thawed:
        """Accept and submit jobs again."""
        found: Thawed = await self._act(Thawed, "DELETE", "/v1/freeze", reason=reason)
        return found


class CatalogueCalls(Calls):
    """Clipia's models, prices and account."""

    async def list_models(self) -> list[dict[str, Any]]:
        """Return Clipia's models."""
        page: Page[dict[str, Any]] = await self._get(Page[dict[str, Any]], "/v1/models")
        return page.data

    async def show_model(self, slug: str) -> dict[str, Any]:
        """Return one of Clipia's models with the schema of its input."""
        found: dict[str, Any] = await self._get(dict[str, Any], _model_path(slug))
        return found

    async def estimate_price(
        self,
        slug: str,
        input: Mapping[str, Any],  # noqa: A002 - the API's name
        *,
        strict: bool | None = None,
    ) -> ModelEstimate:
        """Return the price of an input."""
        path = f"{_model_path(slug)}/estimate"
        found: ModelEstimate = await self._act(
            ModelEstimate, "POST", path, {"input": input, "strict": strict}
        )
        return found

    async def show_account(self) -> Account:
        """Return Clipia's balance and limits, and the sums of the receiver's own jobs."""
        found: Account = await self._get(Account, "/v1/account")
        return found


def _model_path(slug: str) -> str:
    if "/" in slug or not slug:
        # A server decodes %2F before it routes the call.
        raise RequestError(f"There is no model {slug[:64]!r}.", code="model_not_found")
    return f"/v1/models/{escaped(slug)}"
