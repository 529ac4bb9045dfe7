"""The internal API's table of endpoints: a row routes a call, guards it, reads its input and documents it."""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Generic, TypeVar, cast
from uuid import UUID

import orjson
import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route
from starlette.types import Scope as StarletteScope

from receiver.api.action_record import ActionLog, Record, readable
from receiver.api.answers import error_body, error_response
from receiver.api.auth import Caller, Callers
from receiver.api.parameters import Parameters, invalid
from receiver.core.request_values import split_page
from receiver.db.database import Database
from receiver.errors import (
    ClipiaUnavailable,
    DatabaseUnavailable,
    ReceiverError,
    RequestError,
    RequestTooLarge,
    SettingsError,
)
from receiver.setting_fields import Scope

MAX_BODY_BYTES: Final = 1024 * 1024 + 65_536
"""The largest request to Clipia, and room for the fields around it."""
BODY_SECONDS: Final = 10.0
"""How long a body may take to arrive."""
MAX_REASON_LENGTH: Final = 1000
EXPECTED: Final = (RequestError, ClipiaUnavailable, DatabaseUnavailable, SettingsError)
"""Errors that `expected_error_response` turns into an answer; any other error is a bug."""

T = TypeVar("T")
QueryT = TypeVar("QueryT")
BodyT = TypeVar("BodyT")

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Call(Generic[QueryT, BodyT]):
    """A call whose token and query have been checked. The types are None if its row has none."""

    request: Request
    caller: Caller
    query: QueryT
    endpoint: "Endpoint"
    record: Record

    @property
    def key(self) -> str:
        """The `{id}` or `{slug}` of the path."""
        (value,) = self.request.path_params.values()
        return str(value)

    @property
    def id(self) -> UUID | None:
        """The id in the path, or None if it is not a UUID."""
        try:
            return UUID(self.key)
        except ValueError:
            return None

    async def read_body(self) -> BodyT:
        """Read the body. Raises RequestError.

        Handlers call it after they have found the object of the path: an unknown id is 404, with any body.
        """
        row = self.endpoint
        values = await read_object(self.request, optional=row.body_is_optional)
        if self.record.reason is not None and "reason" in row.body.model_fields:
            values.setdefault("reason", self.record.reason)
        body = row.body.read(values)
        self.record.note(body)
        return cast("BodyT", body)


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A row of the table."""

    method: str
    path: str
    scope: Scope
    handler: Callable[[Call[Any, Any]], Awaitable[Response]]
    name: str
    """The operation's id in the specification."""
    summary: str
    answer: Any = None
    """The type of the answer, or of an element if it is a list; None if no answer but errors is JSON."""
    example: Any = None
    """An answer, or an element of one."""
    query: type[Parameters] | None = None
    """None: query parameters are ignored."""
    body: Any = None
    """A model with the method `read`."""
    body_is_optional: bool = False
    body_example: Any = None
    is_list: bool = False
    statuses: tuple[tuple[int, str], ...] = ((200, "Done."),)
    errors: tuple[str, ...] = ()
    """Codes besides those that follow from the other columns."""
    headers: tuple[Mapping[str, Any], ...] = ()
    """Request headers that it reads, as OpenAPI's parameters."""
    other_answers: tuple[tuple[int, Mapping[str, Any]], ...] = ()
    """Answers that are not JSON, as OpenAPI's responses."""
    takes_key: bool = False
    """Whether it reads Idempotency-Key and answers with it."""
    asks_clipia: bool = False
    """Whether Clipia's errors may be its answer."""

    @property
    def is_action(self) -> bool:
        """Whether it is an action of an operator, which goes on record."""
        return self.scope == "operate" and self.method != "GET"


def guarded(
    table: Sequence[Endpoint],
    callers: Callers,
    database: Database,
    *,
    expected: tuple[type[ReceiverError], ...] = EXPECTED,
) -> list[BaseRoute]:
    """Return the routes of endpoints; each checks the caller's token and scope first.

    Errors of the types `expected` become answers; others are raised, as they are if the caller is in this
    process.

    A path gets one route for all its methods: Starlette answers 405 from the first route of a path, and
    `Allow` would name only the methods of that route.
    """
    actions = ActionLog(database)
    by_path: dict[str, dict[str, Endpoint]] = {}
    for row in sorted(table, key=lambda row: "{" in row.path):
        by_path.setdefault(row.path, {})[row.method] = row
    return [
        (Route if "{" in path else _FixedRoute)(
            path, _guard(callers, actions, methods, expected), methods=list(methods)
        )
        for path, methods in by_path.items()
    ]


class _FixedRoute(Route):
    """A path without an id: with any method, `/v1/events/fetch` is not the event with the id `fetch`."""

    def matches(self, scope: StarletteScope) -> tuple[Match, StarletteScope]:
        """Match other methods too, which `handle` answers 405."""
        match, child = super().matches(scope)
        return (match if match is Match.NONE else Match.FULL), child


def _guard(
    callers: Callers,
    actions: ActionLog,
    methods: Mapping[str, Endpoint],
    expected: tuple[type[ReceiverError], ...],
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        # GET's handler also answers HEAD; the server leaves out the body.
        row = methods["GET" if request.method == "HEAD" else request.method]
        try:
            caller = callers.require(request.headers, row.scope)
            record = Record()
            query = _read_query(row, request, record)
            call: Call[Any, Any] = Call(
                request=request, caller=caller, query=query, endpoint=row, record=record
            )
            return await (_act(actions, call, expected) if row.is_action else row.handler(call))
        except expected as error:
            return expected_error_response(error)
        except ClientDisconnect:
            return Response(status_code=400)  # the client is gone; Starlette needs some response

    return endpoint


def _read_query(row: Endpoint, request: Request, record: Record) -> Parameters | None:
    if row.query is None and not row.is_action:
        return None
    values = _query_of(request)
    if row.is_action:
        reason = values.get("reason", "")
        if len(reason) > MAX_REASON_LENGTH:
            raise invalid(f"reason: write {MAX_REASON_LENGTH} characters at most")
        record.reason = readable(reason)
        if row.query is None or "reason" not in row.query.model_fields:
            values.pop("reason", None)
    query = None if row.query is None else row.query.read(values)
    record.note(query)
    return query


async def _act(
    actions: ActionLog, call: Call[Any, Any], expected: tuple[type[ReceiverError], ...]
) -> Response:
    """Carry out an action between the record of its beginning and of its outcome.

    Without the first record it does not begin: the caller gets DatabaseUnavailable. If its process dies, the
    outcome stays open.
    """
    row, record, author = call.endpoint, call.record, call.caller.name
    target = "/".join(str(each) for each in call.request.path_params.values())
    action_id = await actions.begin(record, by=author, operation=row.name, target=target)
    end = partial(actions.end, action_id, record, by=author, operation=row.name)
    error = None
    try:
        response = await row.handler(call)
    except EXPECTED as raised:
        error, response = raised, expected_error_response(raised)
    except ClientDisconnect:
        await end(status=400, code="client_disconnected")
        raise
    except Exception:
        await end(status=500, code="internal_error")
        raise
    code = (
        orjson.loads(response.body)["error"]["code"]
        if response.status_code >= HTTPStatus.BAD_REQUEST
        else None
    )
    await end(status=response.status_code, code=code)
    if error is not None and not isinstance(error, expected):
        raise error
    return response


def _query_of(request: Request) -> dict[str, str]:
    for name, value in request.query_params.multi_items():
        if "\0" in name + value:
            raise invalid(f"{name[:64]!r}: remove the NUL character")
    return dict(request.query_params)


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
    raw = await read_body(request)
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


async def read_body(request: Request, *, limit: int = MAX_BODY_BYTES) -> bytes:
    """Return a body. Raises RequestError if it has more than `limit` bytes or is too slow."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    message = f"the body is larger than {limit} bytes"
                    raise RequestTooLarge(message, code="invalid_request")
    except TimeoutError:
        raise RequestError(
            f"the body took longer than {BODY_SECONDS:.0f} s; send it again", code="request_timeout"
        ) from None
    return bytes(body)


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer in JSON that no cache may keep."""
    # SQLAlchemy's column names are a subclass of str, and asyncpg's ids a subclass of UUID.
    body = orjson.dumps(content, default=_plain, option=orjson.OPT_NON_STR_KEYS)
    return Response(body, status, {"cache-control": "no-store", **(headers or {})}, "application/json")


def _plain(value: object) -> str:
    if isinstance(value, UUID):
        return str(value)
    raise TypeError(type(value).__name__)


def list_response(rows: Sequence[Any], next_: str | None = None) -> Response:
    """Return a page of a list; `next_` is the cursor of the following page."""
    return json_response({"data": rows, "next": next_})


def page_response(rows: Sequence[Mapping[str, Any]], limit: int, cursor: str) -> Response:
    """Return a page of `limit` rows; the query fetches one more."""
    return list_response(*split_page(rows, limit, cursor))


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
