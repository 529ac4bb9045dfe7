"""`/v1/jobs`, `/v1/models` and `/v1/account`: submission and what became of it, for internal services."""

from typing import Final, Literal, cast, get_args

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver.api.auth import Caller, Tokens
from receiver.api.endpoints import (
    EXPECTED,
    Endpoint,
    answer_error,
    guarded,
    invalid,
    json_answer,
    nothing_left,
    read_id,
    read_limit,
    read_object,
    read_query,
    read_time,
    while_connected,
)
from receiver.clipia.job_request import MAX_METADATA, JobRequest
from receiver.db.rows import JobState, new_id
from receiver.errors import RequestError
from receiver.submitter import Job, Submitter

LONGEST_WAIT: Final = 300.0
"""Seconds that a long poll may last."""


class Jobs:
    """The endpoints. A caller sees its own jobs; one with the scope `operate` sees all of them."""

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
            response = answer_error(error)
        # On every answer: who has sent no key needs the one that was made to send the same job again.
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
        return json_answer(job.as_dict(), status=status, headers={"location": f"/v1/jobs/{job.id}"})

    async def _show(self, request: Request, caller: Caller) -> Response:
        seconds = _seconds(request.query_params.get("wait", "0"))
        return json_answer((await self._find(request, caller, seconds=seconds)).as_dict())

    async def _list(self, request: Request, caller: Caller) -> Response:
        query = read_query(request)
        metadata = {
            name.removeprefix("metadata."): query.pop(name)
            for name in list(query)
            if name.startswith("metadata.")
        }
        if len(metadata) > MAX_METADATA:
            raise invalid(f"metadata: a job has no more than {MAX_METADATA} names")
        wanted = query.pop("caller", None)
        if not _sees_all(caller):
            # Another caller's jobs are not there, whether there are any or not.
            wanted = caller.name if wanted in (None, caller.name) else ""
        state = query.pop("state", None)
        if state is not None and state not in get_args(JobState):
            raise invalid(f"state: write one of {', '.join(get_args(JobState))}")
        page = await self._submitter.list_jobs(
            limit=read_limit(query.pop("limit", "50")),
            cursor=query.pop("cursor", None),
            caller=wanted,
            state=cast("JobState | None", state),
            model=query.pop("model", None),
            since=read_time("since", query.pop("since", None)),
            until=read_time("until", query.pop("until", None)),
            metadata=metadata,
        )
        nothing_left(query)
        return json_answer({"data": [job.as_dict() for job in page.jobs], "next": page.next})

    async def _costs(self, request: Request, caller: Caller) -> Response:
        query = read_query(request)
        by = query.pop("by", "day")
        if by not in ("caller", "model", "day"):
            raise invalid("by: write caller, model or day")
        rows = await self._submitter.costs(
            by=cast("Literal['caller', 'model', 'day']", by),
            caller=None if _sees_all(caller) else caller.name,
            since=read_time("since", query.pop("since", None)),
            until=read_time("until", query.pop("until", None)),
        )
        nothing_left(query)
        return json_answer({"data": rows})

    async def _resubmit(self, request: Request, caller: Caller) -> Response:
        job = await self._find(request, caller)
        return json_answer((await self._submitter.resubmit(job.id, by=caller.name)).as_dict(), status=202)

    async def _cancel(self, request: Request, caller: Caller) -> Response:
        job = await self._find(request, caller)
        return json_answer((await self._submitter.cancel(job.id, by=caller.name)).as_dict())

    async def _models(self, _request: Request, _caller: Caller) -> Response:
        return json_answer({"data": await self._submitter.catalogue.models()})

    async def _model(self, request: Request, _caller: Caller) -> Response:
        return json_answer(await self._submitter.catalogue.model(request.path_params["slug"]))

    async def _estimate(self, request: Request, _caller: Caller) -> Response:
        body = await read_object(request)
        given, strict = body.get("input"), body.get("strict")
        if not isinstance(given, dict):
            raise invalid('input: write an object, as in {"input": {"prompt": "a cat"}}')
        if not isinstance(strict, bool | None):
            raise invalid("strict: write true or false")
        estimate = self._submitter.catalogue.estimate_checked
        return json_answer(await estimate(request.path_params["slug"], given, strict=strict))

    async def _account(self, _request: Request, _caller: Caller) -> Response:
        return json_answer(await self._submitter.account())

    async def _find(self, request: Request, caller: Caller, *, seconds: float = 0.0) -> Job:
        job_id, job = read_id(request), None
        owner = None if _sees_all(caller) else caller.name
        if job_id is not None:
            waited = self._submitter.wait(job_id, seconds=seconds, caller=owner)
            job = await while_connected(request, waited)
        if job is None:
            raise RequestError("there is no such job", code="not_found")
        return job


def _read_key(raw: bytes) -> str:
    """Return the caller's key: UTF-8, as most clients write it, or else what HTTP takes bytes for."""
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
    if isinstance(value, bool) or not 0 <= seconds <= LONGEST_WAIT:
        raise invalid(f"wait: write seconds from 0 to {LONGEST_WAIT:.0f}")
    return seconds
