"""`/v1/jobs`, `/v1/models` and `/v1/account`: internal services submit jobs and read their results."""

from typing import Annotated, Any, Final
from uuid import UUID

from pydantic import ConfigDict, model_validator
from starlette.responses import Response

from receiver.api import examples
from receiver.api.auth import Caller
from receiver.api.endpoints import (
    EXPECTED,
    Call,
    Endpoint,
    expected_error_response,
    json_response,
    list_response,
    not_found,
    while_connected,
)
from receiver.api.models import ModelEstimate
from receiver.api.parameters import Limit, MetadataFilter, Moment, Parameters, Seconds, invalid, one_of
from receiver.clipia.job_request import JobRequest
from receiver.core.trace_context import TraceContext
from receiver.db.rows import CostGroup, JobState, new_id
from receiver.db.views import JobCosts
from receiver.submitter import Job, Submitter
from receiver.submitter.account_status import Account

REPLAYED_HEADER: Final = "idempotent-replayed"
"""In the answer to a submission whose key was used before."""
_TRACE_HEADERS: Final = tuple(
    {
        "name": name,
        "in": "header",
        "description": f"{what} (W3C Trace Context). An invalid one is ignored.",
        "schema": {"type": "string"},
        "example": example,
    }
    for name, what, example in (
        (
            "traceparent",
            "The caller's span: the job continues its trace",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
        ("tracestate", "What tracing systems add to it; passed on with the job's message", "vendor=value"),
    )
)


class JobsQuery(MetadataFilter):
    """Filters of a list of jobs."""

    limit: Limit = 50
    cursor: str | None = None
    """The `next` of the page before."""
    state: Annotated[JobState | None, one_of(JobState)] = None
    model: str | None = None
    caller: str | None = None
    since: Moment | None = None
    """Made at or after this time."""
    until: Moment | None = None
    """Made before this time."""


class WaitQuery(Parameters):
    """How long to wait for the end of a job."""

    model_config = ConfigDict(extra="ignore")

    wait: Seconds = 0.0
    """Seconds to wait until the job and its files are finished."""


class CostsQuery(Parameters):
    """The rows of a sum of credits."""

    by: Annotated[CostGroup, one_of(CostGroup)] = "day"
    caller: str | None = None
    since: Moment | None = None
    """Jobs made at or after this time."""
    until: Moment | None = None
    """Jobs made before this time."""


class JobOrder(JobRequest):
    """A job, and how long to wait for its end."""

    wait: Seconds = 0.0
    """Seconds to wait until the job and its files are finished."""


class EstimateBody(Parameters):
    """An input whose price is asked for; other fields, such as those of a job, are ignored."""

    model_config = ConfigDict(extra="ignore")

    input: dict[str, Any]
    """The model's parameters."""
    strict: bool | None = None
    """Whether unknown keys of the input are invalid; null: the setting decides."""

    @model_validator(mode="before")
    @classmethod
    def _check(cls, values: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(values.get("input"), dict):
            raise invalid('input: write an object, as in {"input": {"prompt": "a cat"}}')
        if not isinstance(values.get("strict"), bool | None):
            raise invalid("strict: write true or false")
        return values


class JobEndpoints:
    """A caller sees its own jobs; one with the scope `operate` sees all of them."""

    def __init__(self, submitter: Submitter) -> None:
        self._submitter = submitter

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [*self._job_table(), *self._order_table(), *self._catalogue_table()]

    def _job_table(self) -> list[Endpoint]:
        return [
            Endpoint(
                method="POST",
                path="/v1/jobs",
                scope="submit",
                handler=self._submit,
                name="submit_job",
                summary="Submit a job once: the same Idempotency-Key is the same job",
                body=JobOrder,
                body_example=examples.JOB_ORDER,
                answer=Job,
                example=examples.JOB,
                statuses=(
                    (201, "A new job, and Clipia has accepted it."),
                    (200, "This key's job, which exists already."),
                    (202, "The job is on record, and Clipia has not accepted it yet; a worker goes on."),
                ),
                errors=(
                    *("model_input_invalid", "model_not_found", "max_cost_exceeded", "budget_exceeded"),
                    *("idempotency_key_reuse", "submissions_frozen"),
                ),
                takes_key=True,
                headers=_TRACE_HEADERS,
                asks_clipia=True,
            ),
            Endpoint(
                method="GET",
                path="/v1/jobs",
                scope="read",
                handler=self._list,
                name="list_jobs",
                summary="List jobs, newest first, without files, deliveries and attempts",
                query=JobsQuery,
                answer=Job,
                is_list=True,
                example=examples.LISTED_JOB,
            ),
            Endpoint(
                method="GET",
                path="/v1/jobs/costs",
                scope="read",
                handler=self._costs,
                name="sum_costs",
                summary="Add up the credits of jobs by day, caller or model",
                query=CostsQuery,
                answer=JobCosts,
                is_list=True,
                example={"day": "2026-01-31", "jobs": 3, "reserved": 0, "charged": 36, "refunded": 0},
            ),
            Endpoint(
                method="GET",
                path="/v1/jobs/{id}",
                scope="read",
                handler=self._show,
                name="show_job",
                summary="Show a job with its attempts, files and deliveries, or wait for its end",
                query=WaitQuery,
                answer=Job,
                example=examples.JOB,
                errors=("not_found",),
            ),
        ]

    def _order_table(self) -> list[Endpoint]:
        return [
            Endpoint(
                method="POST",
                path="/v1/jobs/{id}/resubmit",
                scope="operate",
                handler=self._resubmit,
                name="resubmit_job",
                summary="Submit a job without a result again; it may be paid for twice",
                answer=Job,
                example=examples.JOB,
                statuses=((202, "A worker submits it."),),
                errors=("not_found", "not_resubmittable", "not_configured"),
            ),
            Endpoint(
                method="POST",
                path="/v1/jobs/{id}/cancel",
                scope="operate",
                handler=self._cancel,
                name="cancel_job",
                summary="End a job; one that Clipia may have becomes unsure",
                answer=Job,
                example=examples.JOB,
                errors=("not_found", "not_cancelable"),
            ),
        ]

    def _catalogue_table(self) -> list[Endpoint]:
        return [
            Endpoint(
                method="GET",
                path="/v1/models",
                scope="read",
                handler=self._models,
                name="list_models",
                summary="List Clipia's models",
                answer=dict[str, Any],
                is_list=True,
                example=examples.MODEL,
                asks_clipia=True,
            ),
            Endpoint(
                method="GET",
                path="/v1/models/{slug}",
                scope="read",
                handler=self._model,
                name="show_model",
                summary="Show one of Clipia's models with the schema of its input",
                answer=dict[str, Any],
                example=examples.MODEL,
                errors=("model_not_found",),
                asks_clipia=True,
            ),
            Endpoint(
                method="POST",
                path="/v1/models/{slug}/estimate",
                scope="read",
                handler=self._estimate,
                name="estimate_price",
                summary="Ask for the price of an input",
                body=EstimateBody,
                body_example={"input": {"prompt": "a cat"}},
                answer=ModelEstimate,
                example={"credits": 12, "warnings": []},
                errors=("model_input_invalid", "model_not_found"),
                asks_clipia=True,
            ),
            Endpoint(
                method="GET",
                path="/v1/account",
                scope="operate",
                handler=self._account,
                name="show_account",
                summary="Show Clipia's balance and limits, and the sums of the receiver's own jobs",
                answer=Account,
                example=examples.ACCOUNT,
                asks_clipia=True,
            ),
        ]

    async def _submit(self, call: Call[None, JobOrder]) -> Response:
        given = [value for name, value in call.request.headers.raw if name == b"idempotency-key"]
        raw = given[0] if given else str(new_id()).encode()
        try:
            response = await self._issue(call, _read_key(raw) if len(given) < 2 else "")
        except EXPECTED as error:
            response = expected_error_response(error)
        # Errors carry it, too: a caller without a key of its own needs this one to retry the same job.
        response.raw_headers.append((b"idempotency-key", raw))
        return response

    async def _issue(self, call: Call[None, JobOrder], key: str) -> Response:
        order = await call.read_body()
        given = call.request.headers
        trace = TraceContext.read(given.getlist("traceparent"), given.getlist("tracestate"))
        job = await self._submitter.issue(order, key=key, caller=call.caller.name, trace=trace)
        new = job.new
        if order.wait:
            waited = await while_connected(call.request, self._submitter.wait(job.id, seconds=order.wait))
            job = waited or job
        status = 202 if job.request_id is None else 201 if new else 200
        headers = {"location": f"/v1/jobs/{job.id}"} | ({} if new else {REPLAYED_HEADER: "true"})
        return json_response(job.as_dict(), status=status, headers=headers)

    async def _show(self, call: Call[WaitQuery, None]) -> Response:
        return json_response((await self._find(call, seconds=call.query.wait)).as_dict())

    async def _list(self, call: Call[JobsQuery, None]) -> Response:
        query = call.query
        page = await self._submitter.list_jobs(
            limit=query.limit,
            cursor=query.cursor,
            caller=_owner(call.caller, query.caller),
            state=query.state,
            model=query.model,
            since=query.since,
            until=query.until,
            metadata=query.metadata,
        )
        return list_response([job.as_dict() for job in page.jobs], page.next)

    async def _costs(self, call: Call[CostsQuery, None]) -> Response:
        rows = await self._submitter.costs(
            by=call.query.by,
            caller=_owner(call.caller, call.query.caller),
            since=call.query.since,
            until=call.query.until,
        )
        return list_response(rows)

    async def _resubmit(self, call: Call[None, None]) -> Response:
        job = await self._find(call)
        return json_response(
            (await self._submitter.resubmit(job.id, by=call.caller.name)).as_dict(), status=202
        )

    async def _cancel(self, call: Call[None, None]) -> Response:
        job = await self._find(call)
        return json_response((await self._submitter.cancel(job.id, by=call.caller.name)).as_dict())

    async def _models(self, _call: Call[None, None]) -> Response:
        return list_response(await self._submitter.catalogue.models())

    async def _model(self, call: Call[None, None]) -> Response:
        return json_response(await self._submitter.catalogue.model(call.key))

    async def _estimate(self, call: Call[None, EstimateBody]) -> Response:
        body = await call.read_body()
        estimate = self._submitter.catalogue.estimate_checked
        return json_response(await estimate(call.key, body.input, strict=body.strict))

    async def _account(self, _call: Call[None, None]) -> Response:
        return json_response(await self._submitter.account())

    async def _find(self, call: Call[Any, None], *, seconds: float = 0.0) -> Job:
        owner = None if _sees_all(call.caller) else call.caller.name
        job = None
        if call.id is not None:
            job = await self._wait(call, call.id, seconds, owner)
        # Clipia's ids look like ours. PostgreSQL rejects NUL in a text parameter.
        if job is None and "\0" not in call.key:
            known = await self._submitter.find(call.key)
            if known is not None and owner in (None, known.caller):
                job = await self._wait(call, known.id, seconds, owner)
        if job is None:
            raise not_found("job")
        return job

    async def _wait(
        self, call: Call[Any, None], job_id: UUID, seconds: float, owner: str | None
    ) -> Job | None:
        waited = self._submitter.wait(job_id, seconds=seconds, caller=owner)
        return await while_connected(call.request, waited)


def _read_key(raw: bytes) -> str:
    """Return the caller's key, decoded as UTF-8, which most clients send, or else as Latin-1."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _sees_all(caller: Caller) -> bool:
    return "operate" in caller.scopes


def _owner(caller: Caller, wanted: str | None) -> str | None:
    """Return the caller whose jobs are shown; None for those of all callers."""
    if _sees_all(caller):
        return wanted
    # The name of another caller finds no job, so the answer does not tell whether it has any.
    return caller.name if wanted in (None, caller.name) else ""
