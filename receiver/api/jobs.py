"""`/v1/jobs`, `/v1/models` and `/v1/account`: submission and what became of it, for internal services."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, cast, get_args
from uuid import UUID

import orjson
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.api.answers import error_body, refusal
from receiver.api.auth import Caller, Tokens
from receiver.db.rows import JobState, new_id
from receiver.errors import ClipiaUnavailable, DatabaseUnavailable, ReceiverError, Refused, SettingsError
from receiver.settings import Scope
from receiver.submitter import Job, Submitter
from receiver.submitter.request import LARGEST_REQUEST, JobRequest, check_key

LONGEST_WAIT: Final = 300.0
"""Seconds that a long poll may last."""
LARGEST_PAGE: Final = 200
BODY_WAIT: Final = 10.0
"""Seconds that a body may take to arrive."""

_EXPECTED: Final = (Refused, ClipiaUnavailable, DatabaseUnavailable, SettingsError)

Handler = Callable[[Request, Caller], Awaitable[Response]]

log = structlog.get_logger()


class Jobs:
    """The endpoints. A caller sees its own jobs; one with the scope `operate` sees all of them."""

    def __init__(self, submitter: Submitter, tokens: Tokens) -> None:
        self._submitter = submitter
        self._tokens = tokens

    def routes(self) -> list[BaseRoute]:
        """Return the routes, each with the scope that it needs."""
        table: tuple[tuple[str, str, Scope, Handler], ...] = (
            ("POST", "/v1/jobs", "submit", self._submit),
            ("GET", "/v1/jobs", "read", self._list),
            ("GET", "/v1/jobs/costs", "read", self._costs),
            ("GET", "/v1/jobs/{id}", "read", self._show),
            ("POST", "/v1/jobs/{id}/resubmit", "operate", self._resubmit),
            ("GET", "/v1/models", "read", self._models),
            ("GET", "/v1/models/{slug}", "read", self._model),
            ("POST", "/v1/models/{slug}/estimate", "read", self._estimate),
            ("GET", "/v1/account", "operate", self._account),
        )
        return [
            Route(path, self._guard(scope, handler), methods=[method], max_body_size=LARGEST_REQUEST + 65_536)
            for method, path, scope, handler in table
        ]

    def _guard(self, scope: Scope, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                return await handler(request, self._tokens.require(request.headers, scope))
            except _EXPECTED as error:
                return _answer(error)
            except ClientDisconnect:
                return Response(status_code=400)  # which nobody reads

        return endpoint

    async def _submit(self, request: Request, caller: Caller) -> Response:
        key = _read_key(request) or str(new_id())
        try:
            response = await self._issue(request, caller, key)
        except _EXPECTED as error:
            response = _answer(error)
        # On every answer: who has sent no key needs the one that was made to send the same job again.
        response.raw_headers.append((b"idempotency-key", key.encode()))
        return response

    async def _issue(self, request: Request, caller: Caller, key: str) -> Response:
        body = await _read_object(request)
        wait = _seconds(body.pop("wait", 0))
        job = await self._submitter.issue(JobRequest.read(body), key=key, caller=caller.name)
        new = job.new
        if wait:
            job = await self._submitter.wait(job.id, seconds=wait) or job
        status = 202 if job.request_id is None else 201 if new else 200
        return _json(job.as_dict(), status=status, headers={"location": f"/v1/jobs/{job.id}"})

    async def _show(self, request: Request, caller: Caller) -> Response:
        seconds = _seconds(request.query_params.get("wait", "0"))
        return _json((await self._find(request, caller, seconds=seconds)).as_dict())

    async def _list(self, request: Request, caller: Caller) -> Response:
        query = _read_query(request)
        metadata = {
            name.removeprefix("metadata."): query.pop(name)
            for name in list(query)
            if name.startswith("metadata.")
        }
        wanted = query.pop("caller", None)
        if not _sees_all(caller):
            # Another caller's jobs are not there, whether there are any or not.
            wanted = caller.name if wanted in (None, caller.name) else ""
        state = query.pop("state", None)
        if state is not None and state not in get_args(JobState):
            raise _invalid(f"state: write one of {', '.join(get_args(JobState))}")
        page = await self._submitter.list_jobs(
            limit=_limit(query.pop("limit", "50")),
            cursor=query.pop("cursor", None),
            caller=wanted,
            state=cast("JobState | None", state),
            model=query.pop("model", None),
            since=_time("since", query.pop("since", None)),
            until=_time("until", query.pop("until", None)),
            metadata=metadata,
        )
        _nothing_left(query)
        return _json({"data": [job.as_dict() for job in page.jobs], "next": page.next})

    async def _costs(self, request: Request, caller: Caller) -> Response:
        query = _read_query(request)
        by = query.pop("by", "day")
        if by not in ("caller", "model", "day"):
            raise _invalid("by: write caller, model or day")
        rows = await self._submitter.costs(
            by=cast("Literal['caller', 'model', 'day']", by),
            caller=None if _sees_all(caller) else caller.name,
            since=_time("since", query.pop("since", None)),
            until=_time("until", query.pop("until", None)),
        )
        _nothing_left(query)
        return _json({"data": rows})

    async def _resubmit(self, request: Request, caller: Caller) -> Response:
        job = await self._find(request, caller)
        return _json((await self._submitter.resubmit(job.id, by=caller.name)).as_dict(), status=202)

    async def _models(self, _request: Request, _caller: Caller) -> Response:
        return _json({"data": await self._submitter.catalogue.models()})

    async def _model(self, request: Request, _caller: Caller) -> Response:
        return _json(await self._submitter.catalogue.model(request.path_params["slug"]))

    async def _estimate(self, request: Request, _caller: Caller) -> Response:
        body = await _read_object(request)
        given = body.get("input")
        if not isinstance(given, dict):
            raise _invalid('input: write an object, as in {"input": {"prompt": "a cat"}}')
        slug = request.path_params["slug"]
        await self._submitter.catalogue.check(slug, given)
        return _json(await self._submitter.catalogue.estimate(slug, given))

    async def _account(self, _request: Request, _caller: Caller) -> Response:
        return _json(await self._submitter.account())

    async def _find(self, request: Request, caller: Caller, *, seconds: float = 0.0) -> Job:
        try:
            job_id = UUID(request.path_params["id"])
        except ValueError:
            job = None
        else:
            owner = None if _sees_all(caller) else caller.name
            job = await self._submitter.wait(job_id, seconds=seconds, caller=owner)
        if job is None:
            raise Refused("there is no such job", code="not_found", status=404)
        return job


def _answer(error: ReceiverError) -> Response:
    if isinstance(error, Refused):
        return refusal(error)
    if isinstance(error, SettingsError):
        code, message, wait = "not_configured", str(error), 60.0
    elif isinstance(error, ClipiaUnavailable):
        code, message, wait = error.reason, str(error), error.retry_after or 5.0
    else:
        # Whoever may call this need not see the database's own words.
        log.warning("request not served", error=str(error))
        message = "The database is unavailable; send it again, a submission with its Idempotency-Key."
        code, wait = "service_unavailable", 5.0
    body = error_body("api_error", code, message)
    return Response(body, 503, {"retry-after": str(max(1, round(wait)))}, "application/json")


def _read_key(request: Request) -> str | None:
    """Return the caller's key; a header's bytes are UTF-8 here, as they are in every other client of ours."""
    found = [value for name, value in request.headers.raw if name == b"idempotency-key"]
    if not found:
        return None
    try:
        return check_key(found[0].decode()) if len(found) == 1 else check_key("")
    except UnicodeDecodeError:
        raise _invalid("Idempotency-Key: is not UTF-8") from None


def _read_query(request: Request) -> dict[str, str]:
    for name, value in request.query_params.multi_items():
        if "\0" in name + value:
            raise _invalid(f"{name[:64]!r}: no database stores NUL")
    return dict(request.query_params)


async def _read_object(request: Request) -> dict[str, Any]:
    try:
        async with asyncio.timeout(BODY_WAIT):
            raw = await request.body()
    except TimeoutError:
        raise Refused(
            f"the body took longer than {BODY_WAIT:.0f} s", code="request_timeout", status=408
        ) from None
    try:
        content = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _invalid(f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise _invalid("the body: write a JSON object")
    return content


def _json(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        orjson.dumps(content), status, {"cache-control": "no-store", **(headers or {})}, "application/json"
    )


def _sees_all(caller: Caller) -> bool:
    return "operate" in caller.scopes


def _seconds(value: object) -> float:
    try:
        seconds = float(value) if isinstance(value, str | int | float) else -1.0
    except ValueError:
        seconds = -1.0
    if isinstance(value, bool) or not 0 <= seconds <= LONGEST_WAIT:
        raise _invalid(f"wait: write seconds from 0 to {LONGEST_WAIT:.0f}")
    return seconds


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= LARGEST_PAGE):  # noqa: PLR2004
        raise _invalid(f"limit: write a number from 1 to {LARGEST_PAGE}")
    return int(text)


def _time(name: str, text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise _invalid(f"{name}: write a time such as 2026-01-31T12:00:00Z") from None
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise _invalid(f"{name}: is beyond the years 1 to 9999") from None


def _nothing_left(query: Mapping[str, str]) -> None:
    if query:
        raise _invalid(f"{min(query)}: is no filter of this list")


def _invalid(message: str) -> Refused:
    return Refused(message, code="invalid_request", status=400)
