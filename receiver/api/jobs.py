"""`/v1/jobs`, `/v1/models` and `/v1/account`: internal services submit jobs and read their results."""

from typing import Final, cast, get_args

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver.api.auth import Caller, Tokens
from receiver.api.endpoints import (
    EXPECTED,
    Endpoint,
    expected_error_response,
    guarded,
    invalid,
    json_response,
    not_found,
    read_choice,
    read_id,
    read_limit,
    read_object,
    read_query,
    read_time,
    reject_unknown,
    while_connected,
)
from receiver.clipia.job_request import MAX_METADATA, JobRequest
from receiver.db.rows import CostGroup, JobState, new_id
from receiver.submitter import Job, Submitter

MAX_WAIT_SECONDS: Final = 300.0
"""How long a long poll may last."""


class JobEndpoints:
    """A caller sees its own jobs; one with the scope `operate` sees all of them."""

    def __init__(self, submitter: Submitter, tokens: Tokens) -> None:
        self._submitter = submitter
        self._tokens = tokens

    def routes(self) -> list[BaseRoute]:
        """Return the routes, each with the scope that it needs."""
        table: list[Endpoint] = [
            ("POST", "/v1/jobs", "submit", self._submit),
            ("GET", "/v1/jobs", "read", self._list),
            ("GET", "/v1/jobs/costs", "read", self._costs),
            ("GET", "/v1/jobs/{id}", "read", self._show),
            ("POST", "/v1/jobs/{id}/resubmit", "operate", self._resubmit),
            ("POST", "/v1/jobs/{id}/cancel", "operate", self._cancel),
            ("GET", "/v1/models", "read", self._models),
            ("GET", "/v1/models/{slug}", "read", self._model),
            ("POST", "/v1/models/{slug}/estimate", "read", self._estimate),
            ("GET", "/v1/account", "operate", self._account),
        ]
        return guarded(table, self._tokens)

    async def _submit(self, request: Request, caller: Caller) -> Response:
        given = [value for name, value in request.headers.raw if name == b"idempotency-key"]
        raw = given[0] if given else str(new_id()).encode()
        try:
            response = await self._issue(request, caller, _read_key(raw) if len(given) < 2 else "")
        except EXPECTED as error:
            response = expected_error_response(error)
        # Errors carry it, too: a caller without a key of its own needs this one to retry the same job.
        response.raw_headers.append((b"idempotency-key", raw))
        return response

    async def _issue(self, request: Request, caller: Caller, key: str) -> Response:
        body = await read_object(request)
        wait = _seconds(body.pop("wait", 0))
        job = await self._submitter.issue(JobRequest.read(body), key=key, caller=caller.name)
        new = job.new
        if wait:
            waited = await while_connected(request, self._submitter.wait(job.id, seconds=wait))
            job = waited or job
        status = 202 if job.request_id is None else 201 if new else 200
        return json_response(job.as_dict(), status=status, headers={"location": f"/v1/jobs/{job.id}"})

    async def _show(self, request: Request, caller: Caller) -> Response:
        seconds = _seconds(request.query_params.get("wait", "0"))
        return json_response((await self._find(request, caller, seconds=seconds)).as_dict())

    async def _list(self, request: Request, caller: Caller) -> Response:
        query = read_query(request)
        metadata = {
            name.removeprefix("metadata."): query.pop(name)
            for name in list(query)
            if name.startswith("metadata.")
        }
        if len(metadata) > MAX_METADATA:
            raise invalid(f"metadata: filter by {MAX_METADATA} names at most")
        owner = query.pop("caller", None)
        if not _sees_all(caller):
            # The name of another caller finds no job, so the answer does not tell whether it has any.
            owner = caller.name if owner in (None, caller.name) else ""
        page = await self._submitter.list_jobs(
            limit=read_limit(query),
            cursor=query.pop("cursor", None),
            caller=owner,
            state=cast("JobState | None", read_choice(query, "state", get_args(JobState))),
            model=query.pop("model", None),
            since=read_time(query, "since"),
            until=read_time(query, "until"),
            metadata=metadata,
        )
        reject_unknown(query)
        return json_response({"data": [job.as_dict() for job in page.jobs], "next": page.next})

    async def _costs(self, request: Request, caller: Caller) -> Response:
        query = read_query(request)
        by = read_choice(query, "by", get_args(CostGroup)) or "day"
        rows = await self._submitter.costs(
            by=cast("CostGroup", by),
            caller=None if _sees_all(caller) else caller.name,
            since=read_time(query, "since"),
            until=read_time(query, "until"),
        )
        reject_unknown(query)
        return json_response({"data": rows})

    async def _resubmit(self, request: Request, caller: Caller) -> Response:
        job = await self._find(request, caller)
        return json_response((await self._submitter.resubmit(job.id, by=caller.name)).as_dict(), status=202)

    async def _cancel(self, request: Request, caller: Caller) -> Response:
        job = await self._find(request, caller)
        return json_response((await self._submitter.cancel(job.id, by=caller.name)).as_dict())

    async def _models(self, _request: Request, _caller: Caller) -> Response:
        return json_response({"data": await self._submitter.catalogue.models()})

    async def _model(self, request: Request, _caller: Caller) -> Response:
        return json_response(await self._submitter.catalogue.model(request.path_params["slug"]))

    async def _estimate(self, request: Request, _caller: Caller) -> Response:
        body = await read_object(request)
        given, strict = body.get("input"), body.get("strict")
        if not isinstance(given, dict):
            raise invalid('input: write an object, as in {"input": {"prompt": "a cat"}}')
        if not isinstance(strict, bool | None):
            raise invalid("strict: write true or false")
        estimate = self._submitter.catalogue.estimate_checked
        return json_response(await estimate(request.path_params["slug"], given, strict=strict))

    async def _account(self, _request: Request, _caller: Caller) -> Response:
        return json_response(await self._submitter.account())

    async def _find(self, request: Request, caller: Caller, *, seconds: float = 0.0) -> Job:
        job_id, job = read_id(request), None
        owner = None if _sees_all(caller) else caller.name
        if job_id is not None:
            waited = self._submitter.wait(job_id, seconds=seconds, caller=owner)
            job = await while_connected(request, waited)
        if job is None:
            raise not_found("job")
        return job


def _read_key(raw: bytes) -> str:
    """Return the caller's key, decoded as UTF-8, which most clients send, or else as Latin-1."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _sees_all(caller: Caller) -> bool:
    return "operate" in caller.scopes


def _seconds(value: object) -> float:
    try:
        seconds = float(value) if isinstance(value, str | int | float) else -1.0
    except (ValueError, OverflowError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 <= seconds <= MAX_WAIT_SECONDS:
        raise invalid(f"wait: write seconds from 0 to {MAX_WAIT_SECONDS:.0f}")
    return seconds
