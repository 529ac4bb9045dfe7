"""Error answers in the shape of Clipia's own, and their HTTP status."""

import asyncio
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Final, NamedTuple

import orjson
from starlette.responses import Response
from starlette.types import Message, Send

from receiver.errors import RefusedByClipia, RequestError, RequestTooLarge

_UNREAD: Final = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.MISDIRECTED_REQUEST,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
)
"""Statuses of answers that are sent before the body was read to its end."""

_REASONS: Final[Mapping[HTTPStatus, tuple[str, str]]] = MappingProxyType(
    {
        HTTPStatus.BAD_REQUEST: ("invalid_request", "This is not a valid HTTP/1.1 request."),
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: ("headers_too_large", "The headers are too large."),
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED: ("http_version_not_supported", "Use HTTP/1.1."),
        HTTPStatus.SERVICE_UNAVAILABLE: (
            "service_unavailable",
            "The server holds too many requests; send this one again.",
        ),
    }
)
_RETRY_AFTER: Final = b"5"


class ErrorCode(NamedTuple):
    """A `code` of the receiver's own errors."""

    status: HTTPStatus
    meaning: str


ERROR_CODES: Final[Mapping[str, ErrorCode]] = MappingProxyType(
    {
        "invalid_request": ErrorCode(HTTPStatus.BAD_REQUEST, "a parameter or the body is wrong"),
        "model_input_invalid": ErrorCode(HTTPStatus.BAD_REQUEST, "the input does not fit the model's schema"),
        "invalid_token": ErrorCode(HTTPStatus.UNAUTHORIZED, "the token is missing or unknown"),
        "budget_exceeded": ErrorCode(HTTPStatus.PAYMENT_REQUIRED, "the caller's budget is spent"),
        "max_cost_exceeded": ErrorCode(HTTPStatus.PAYMENT_REQUIRED, "the price is above `max_cost`"),
        "insufficient_scope": ErrorCode(HTTPStatus.FORBIDDEN, "the token lacks the scope"),
        "model_not_found": ErrorCode(HTTPStatus.NOT_FOUND, "there is no such model"),
        "not_found": ErrorCode(HTTPStatus.NOT_FOUND, "there is no such object"),
        "file_missing": ErrorCode(HTTPStatus.GONE, "the stored file is not in the storage any more"),
        "unknown_request": ErrorCode(HTTPStatus.NOT_FOUND, "Clipia does not know the request_id"),
        "method_not_allowed": ErrorCode(HTTPStatus.METHOD_NOT_ALLOWED, "the path has other methods"),
        "request_timeout": ErrorCode(HTTPStatus.REQUEST_TIMEOUT, "the body did not arrive in time"),
        "account_changed": ErrorCode(HTTPStatus.CONFLICT, "the job may have reached another account"),
        "ambiguous": ErrorCode(
            HTTPStatus.CONFLICT, "several events have this request_id: use the event's id"
        ),
        "file_changed": ErrorCode(HTTPStatus.CONFLICT, "the stored file is not the one that was downloaded"),
        "idempotency_key_reuse": ErrorCode(HTTPStatus.CONFLICT, "the key was used with other parameters"),
        "not_finished": ErrorCode(HTTPStatus.CONFLICT, "Clipia has not finished the generation"),
        "no_message": ErrorCode(HTTPStatus.CONFLICT, "the event cannot be made a message"),
        "not_cancelable": ErrorCode(HTTPStatus.CONFLICT, "it has ended, or cannot be canceled now"),
        "not_frozen": ErrorCode(HTTPStatus.CONFLICT, "submissions are not frozen"),
        "not_linkable": ErrorCode(HTTPStatus.CONFLICT, "the storage makes no links to the file"),
        "not_promotable": ErrorCode(HTTPStatus.CONFLICT, "the receipt has no body to promote"),
        "not_resubmittable": ErrorCode(HTTPStatus.CONFLICT, "the job cannot be submitted again"),
        "not_settled": ErrorCode(HTTPStatus.CONFLICT, "work on the event is pending or under way"),
        "not_stored": ErrorCode(HTTPStatus.CONFLICT, "the file is not stored, or not yet"),
        "outcome_unknown": ErrorCode(HTTPStatus.CONFLICT, "the job may have been accepted"),
        "request_id_taken": ErrorCode(HTTPStatus.CONFLICT, "Clipia gave the job another job's request_id"),
        "range_not_satisfiable": ErrorCode(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "no byte of the file is in the range"
        ),
        "unknown_host": ErrorCode(
            HTTPStatus.MISDIRECTED_REQUEST, "the Host header is not that of RECEIVER_INTERNAL_URL"
        ),
        "unknown_origin": ErrorCode(HTTPStatus.FORBIDDEN, "the Origin header is that of another site"),
        "too_many_streams": ErrorCode(HTTPStatus.TOO_MANY_REQUESTS, "the process serves enough streams"),
        "internal_error": ErrorCode(HTTPStatus.INTERNAL_SERVER_ERROR, "a bug; the log has the traceback"),
        "not_configured": ErrorCode(HTTPStatus.SERVICE_UNAVAILABLE, "a setting is missing or wrong"),
        "service_unavailable": ErrorCode(HTTPStatus.SERVICE_UNAVAILABLE, "the database or storage is away"),
        "submissions_frozen": ErrorCode(
            HTTPStatus.SERVICE_UNAVAILABLE, "no job is taken until `receiver jobs thaw`"
        ),
    }
)
"""A RequestError with another code is answered 400."""

Headers = Sequence[tuple[bytes, bytes]]
CLOSE: Final[Headers] = ((b"connection", b"close"),)
"""For an answer that is sent before the body was read to its end."""

HEAD_COMPLETE: Final = "head_complete"
"""The key in a request's `state` for the event loop's time at which its head was complete."""


def error_body(type_: str, code: str, message: str, *, job_id: str | None = None) -> bytes:
    """Return `{"error": {"type", "code", "message"}}`, with `job_id` if a job was made."""
    job = {} if job_id is None else {"job_id": job_id}
    return orjson.dumps({"error": {"type": type_, "code": code, "message": message}, **job})


class AnswerCut(Exception):
    """An answer cannot be sent to its end: the protocol aborts the connection, so that its client notices."""


class Answer(NamedTuple):
    """An answer in JSON, and its headers apart from those that every answer has."""

    status: int
    body: bytes
    headers: Headers = ()

    @property
    def all_headers(self) -> Headers:
        """All headers, for both doors of the callback."""
        return (
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(self.body)),
            (b"cache-control", b"no-store"),
            *self.headers,
        )


def in_time(send: Send, seconds: float) -> Send:
    """Return a `send` that raises AnswerCut if the client reads nothing for `seconds`."""

    async def send_in_time(message: Message) -> None:
        try:
            async with asyncio.timeout(seconds):
                await send(message)
        except TimeoutError:
            raise AnswerCut from None

    return send_in_time


async def send_answer(send: Send, answer: Answer) -> None:
    """Send an answer through ASGI."""
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.all_headers]})
    await send({"type": "http.response.body", "body": answer.body})


def status_of(error: RequestError) -> int:
    """Return the HTTP status of an error: Clipia's status if Clipia refused, or else that of its `code`."""
    if isinstance(error, RefusedByClipia):
        return error.status
    if isinstance(error, RequestTooLarge):
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    known = ERROR_CODES.get(error.code)
    return HTTPStatus.BAD_REQUEST if known is None else known.status


def error_response(error: RequestError) -> Response:
    """Return an error in Clipia's shape, with the job's id if one was made."""
    status = status_of(error)
    body = error_body(error.type, error.code, str(error), job_id=error.job_id)
    headers = {"www-authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else {}
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["retry-after"] = _RETRY_AFTER.decode()
    if status in _UNREAD:
        headers["connection"] = "close"
    return Response(body, status, headers, "application/json")


def raw_error_response(status: HTTPStatus, default_headers: Headers) -> bytes:
    """Return the bytes of an error answer, for a request that does not reach the application."""
    code, message = _REASONS[status]
    is_temporary = status == HTTPStatus.SERVICE_UNAVAILABLE
    body = error_body("api_error" if is_temporary else "invalid_request_error", code, message)
    headers = [
        *default_headers,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        *([(b"retry-after", _RETRY_AFTER)] if is_temporary else []),
    ]
    head = b"".join(b"%s: %s\r\n" % header for header in headers)
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() + head + b"\r\n" + body
