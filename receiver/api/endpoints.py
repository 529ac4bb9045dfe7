"""Shared parts of the internal API's endpoints: scopes, errors, request bodies and query parameters."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar
from uuid import UUID

import orjson
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from receiver.api.answers import error_body, error_response
from receiver.api.auth import Caller, Tokens
from receiver.errors import (
    ClipiaUnavailable,
    DatabaseUnavailable,
    ReceiverError,
    RequestError,
    RequestTooLarge,
    SettingsError,
)
from receiver.settings import Scope

MAX_PAGE_ROWS: Final = 200
MAX_BODY_BYTES: Final = 1024 * 1024 + 65_536
"""The largest request to Clipia, and room for the fields around it."""
BODY_SECONDS: Final = 10.0
"""How long a body may take to arrive."""
EXPECTED: Final = (RequestError, ClipiaUnavailable, DatabaseUnavailable, SettingsError)
"""Errors that `expected_error_response` turns into an answer; any other error is a bug."""

Handler = Callable[[Request, Caller], Awaitable[Response]]
Endpoint = tuple[str, str, Scope, Handler]
"""Method, path, required scope, handler."""
Query = dict[str, str]
"""Query parameters that have not been read yet: each `read_…` function removes its own."""

T = TypeVar("T")

log = structlog.get_logger()


def guarded(table: Sequence[Endpoint], tokens: Tokens) -> list[BaseRoute]:
    """Return the routes of endpoints; each checks the caller's token and scope first.

    A path gets one route for all its methods: Starlette answers 405 from the first route of a path, and
    `Allow` would name only the methods of that route.
    """
    by_path: dict[str, dict[str, tuple[Scope, Handler]]] = {}
    for method, path, scope, handler in table:
        by_path.setdefault(path, {})[method] = scope, handler
    return [Route(path, _guard(tokens, methods), methods=list(methods)) for path, methods in by_path.items()]


def _guard(
    tokens: Tokens, methods: Mapping[str, tuple[Scope, Handler]]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        # GET's handler also answers HEAD; the server leaves out the body.
        scope, handler = methods["GET" if request.method == "HEAD" else request.method]
        try:
            return await handler(request, tokens.require(request.headers, scope))
        except EXPECTED as error:
            return expected_error_response(error)
        except ClientDisconnect:
            return Response(status_code=400)  # the client is gone; Starlette needs some response

    return endpoint


def expected_error_response(error: ReceiverError) -> Response:
    """Return the answer to one of the `EXPECTED` errors."""
    if isinstance(error, RequestError):
        return error_response(error)
    if isinstance(error, SettingsError):
        code, message, wait = "not_configured", str(error), 60.0
    elif isinstance(error, ClipiaUnavailable):
        code, message, wait = error.reason, str(error), error.retry_after or 5.0
    else:
        # The database's own message may name hosts and users, so only the log gets it.
        log.warning("request not served", error=str(error))
        message = "The database is unavailable; send it again, a submission with the same Idempotency-Key."
        code, wait = "service_unavailable", 5.0
    body = error_body("api_error", code, message)
    return Response(body, 503, {"retry-after": str(max(1, round(wait)))}, "application/json")


async def read_object(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """Return the JSON object of a body; with `optional`, an empty body is `{}`. Raises RequestError."""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            raw = await _read_body(request)
    except TimeoutError:
        raise RequestError(
            f"the body took longer than {BODY_SECONDS:.0f} s; send it again", code="request_timeout"
        ) from None
    if optional and not raw:
        return {}
    try:
        # orjson would turn integers above 64 bits into floats, and a seed has to stay an integer.
        content = json.loads(raw.decode(), parse_constant=_reject_constant, parse_float=_read_float)
        # Fails for a lone surrogate, which no database stores.
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise invalid("the body: write a JSON object")
    return content


def _reject_constant(word: str) -> None:
    raise ValueError(f"JSON has no {word}")


def _read_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestTooLarge(f"the body is larger than {MAX_BODY_BYTES} bytes", code="invalid_request")
    return bytes(body)


def read_query(request: Request) -> Query:
    """Return the query parameters of a list. Raises RequestError."""
    for name, value in request.query_params.multi_items():
        if "\0" in name + value:
            raise invalid(f"{name[:64]!r}: remove the NUL character")
    return dict(request.query_params)


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer in JSON that no cache may keep."""
    # SQLAlchemy's column names are a subclass of str, and asyncpg's ids a subclass of UUID.
    body = orjson.dumps(content, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    return Response(body, status, {"cache-control": "no-store", **(headers or {})}, "application/json")


def _plain(value: object) -> str:
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(type(value).__name__)


def read_choice(query: Query, name: str, choices: Sequence[str]) -> str | None:
    """Read a parameter that has to be one of `choices`. Raises RequestError."""
    value = query.pop(name, None)
    if value is not None and value not in choices:
        raise invalid(f"{name}: write one of {', '.join(choices)}")
    return value


def read_limit(query: Query) -> int:
    """Read the size of a page. Raises RequestError."""
    text = query.pop("limit", "50")
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= MAX_PAGE_ROWS):
        raise invalid(f"limit: write a number from 1 to {MAX_PAGE_ROWS}")
    return int(text)


def read_time(parameters: dict[str, Any], name: str) -> datetime | None:
    """Read a time; without a zone it is UTC. Raises RequestError."""
    text = parameters.pop(name, None)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError):
        raise invalid(f"{name}: write a time such as 2026-01-31T12:00:00Z") from None
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise invalid(f"{name}: write a year from 1 to 9999") from None


def reject_unknown(parameters: Mapping[str, object]) -> None:
    """Raise RequestError for a parameter that the endpoint did not read."""
    if parameters:
        raise invalid(f"{min(parameters)}: unknown parameter; remove it or check its spelling")


def page_of(rows: Sequence[Mapping[str, Any]], limit: int, cursor: str) -> dict[str, Any]:
    """Return a page of `limit` rows; the query fetches one more, to see if there is another page."""
    more = len(rows) > limit
    return {"data": rows[:limit], "next": str(rows[limit - 1][cursor]) if more else None}


def invalid(message: str) -> RequestError:
    """Return the error for bad input."""
    return RequestError(message, code="invalid_request")


def not_found(noun: str) -> RequestError:
    """Return the error for an id that names no object."""
    return RequestError(f"there is no such {noun}", code="not_found")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`; cancel it and raise ClientDisconnect if the client disconnects."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        gone.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def read_id(request: Request) -> UUID | None:
    """Return the id in the path, or None if it is not a UUID."""
    try:
        return UUID(request.path_params["id"])
    except ValueError:
        return None
