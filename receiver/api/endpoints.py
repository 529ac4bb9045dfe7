"""What the endpoints of the internal API share: scopes, errors, and how requests are read."""

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

LARGEST_PAGE: Final = 200
LARGEST_BODY: Final = 1024 * 1024 + 65_536
"""Bytes: a request to Clipia of the largest size, and what is written around it."""
BODY_WAIT: Final = 10.0
"""Seconds that a body may take to arrive."""
EXPECTED: Final = (RequestError, ClipiaUnavailable, DatabaseUnavailable, SettingsError)
"""Errors that are an answer."""

Handler = Callable[[Request, Caller], Awaitable[Response]]
Endpoint = tuple[str, str, Scope, Handler]
"""Method, path, the scope that it needs, and who answers."""

T = TypeVar("T")

log = structlog.get_logger()


def guarded(table: Sequence[Endpoint], tokens: Tokens) -> list[BaseRoute]:
    """Return the routes of endpoints that only callers with the scope reach.

    One route for all methods of a path: Starlette answers 405 from the first route of the path, and its
    `Allow` names the methods of that route only.
    """
    by_path: dict[str, dict[str, tuple[Scope, Handler]]] = {}
    for method, path, scope, handler in table:
        by_path.setdefault(path, {})[method] = scope, handler
    return [Route(path, _guard(tokens, methods), methods=list(methods)) for path, methods in by_path.items()]


def _guard(
    tokens: Tokens, methods: Mapping[str, tuple[Scope, Handler]]
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        # HEAD is answered by GET's handler; the server leaves out the body.
        scope, handler = methods["GET" if request.method == "HEAD" else request.method]
        try:
            return await handler(request, tokens.require(request.headers, scope))
        except EXPECTED as error:
            return answer_error(error)
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads

    return endpoint


def answer_error(error: ReceiverError) -> Response:
    """Answer with an expected error; `EXPECTED` lists them."""
    if isinstance(error, RequestError):
        return error_response(error)
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


async def read_object(request: Request, *, optional: bool = False) -> dict[str, Any]:
    """Read the JSON object of a body; with `optional` no body is an empty one. Raises RequestError."""
    try:
        async with asyncio.timeout(BODY_WAIT):
            raw = await _read_body(request)
    except TimeoutError:
        raise RequestError(f"the body took longer than {BODY_WAIT:.0f} s", code="request_timeout") from None
    if optional and not raw:
        return {}
    try:
        # Not orjson: it would turn large integers into fractions, and a seed is none.
        content = json.loads(raw.decode(), parse_constant=_refuse_constant, parse_float=_read_float)
        # Half a character is no text, and no database stores it.
        json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise invalid("the body: write a JSON object")
    return content


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def _read_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is beyond all bounds")
    return number


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise RequestTooLarge(f"the body is larger than {LARGEST_BODY} bytes", code="invalid_request")
    return bytes(body)


def read_query(request: Request) -> dict[str, str]:
    """Return the parameters of a list. Raises RequestError."""
    for name, value in request.query_params.multi_items():
        if "\0" in name + value:
            raise invalid(f"{name[:64]!r}: no database stores NUL")
    return dict(request.query_params)


def json_answer(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with JSON that nobody may cache."""
    # A row's keys are SQLAlchemy's own kind of str, and its ids asyncpg's own kind of UUID.
    body = orjson.dumps(content, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    return Response(body, status, {"cache-control": "no-store", **(headers or {})}, "application/json")


def _plain(value: object) -> str:
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(type(value).__name__)


def read_choice(query: dict[str, str], name: str, choices: Sequence[str]) -> str | None:
    """Take a parameter that has only so many values out of a query. Raises RequestError."""
    value = query.pop(name, None)
    if value is not None and value not in choices:
        raise invalid(f"{name}: write one of {', '.join(choices)}")
    return value


def read_limit(text: str) -> int:
    """Read the size of a page. Raises RequestError."""
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= LARGEST_PAGE):
        raise invalid(f"limit: write a number from 1 to {LARGEST_PAGE}")
    return int(text)


def read_time(name: str, text: str | None) -> datetime | None:
    """Read a moment; one without a zone is UTC. Raises RequestError."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise invalid(f"{name}: write a time such as 2026-01-31T12:00:00Z") from None
    try:
        return moment.astimezone(UTC) if moment.tzinfo else moment.replace(tzinfo=UTC)
    except OverflowError:
        raise invalid(f"{name}: is beyond the years 1 to 9999") from None


def nothing_left(query: Mapping[str, str]) -> None:
    """Refuse parameters that nobody has read."""
    if query:
        raise invalid(f"{min(query)}: is no filter of this list")


def invalid(message: str) -> RequestError:
    """Return the refusal of bad input."""
    return RequestError(message, code="invalid_request")


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return what comes of some waiting; end it with ClientDisconnect where its client goes away."""
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
    """Return the id in the path; None where it is none."""
    try:
        return UUID(request.path_params["id"])
    except ValueError:
        return None
