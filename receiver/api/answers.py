"""Answers in Clipia's own error shape."""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from types import MappingProxyType
from typing import Any, Final

import orjson
from starlette.responses import Response
from starlette.types import Send

from receiver.errors import Refused

_UNREAD: Final = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
)
"""Refusals that come before the body was read to its end."""

_REASONS: Final[Mapping[HTTPStatus, tuple[str, str]]] = MappingProxyType(
    {
        HTTPStatus.BAD_REQUEST: ("invalid_request", "This is not a valid HTTP/1.1 request."),
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: ("headers_too_large", "The headers are too large."),
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED: ("http_version_not_supported", "Use HTTP/1.1."),
        HTTPStatus.SERVICE_UNAVAILABLE: ("service_unavailable", "Too many requests at once; send it again."),
    }
)
_RETRY_AFTER: Final = b"5"

Headers = Sequence[tuple[bytes, bytes]]
CLOSE: Final[Headers] = ((b"connection", b"close"),)
"""For an answer that is sent before the request's body was read to its end."""


HEAD_COMPLETE: Final = "head_complete"
"""The entry of a request's `state` with the event loop's time at which its head was complete."""


def error_body(type_: str, code: str, message: str, *, job_id: str | None = None) -> bytes:
    """Return `{"error": {"type", "code", "message"}}`, and the id of the job that it is about."""
    job = {} if job_id is None else {"job_id": job_id}
    return orjson.dumps({"error": {"type": type_, "code": code, "message": message}, **job})


async def send_json(send: Send, status: int, body: bytes | dict[str, Any], headers: Headers = ()) -> None:
    """Send a whole JSON answer without building a response object."""
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    fields = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(content)),
        (b"cache-control", b"no-store"),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": content})


def refusal(error: Refused) -> Response:
    """Answer with an error in Clipia's shape, and the job's id where one was made."""
    body = error_body(error.type, error.code, str(error), job_id=error.job_id)
    headers = {"www-authenticate": "Bearer"} if error.status == HTTPStatus.UNAUTHORIZED else {}
    if error.status in _UNREAD:
        headers["connection"] = "close"
    return Response(body, error.status, headers, "application/json")


def raw_refusal(status: HTTPStatus, default_headers: Headers) -> bytes:
    """Return a whole refusal as it goes over the wire, for a request that the application never gets."""
    code, message = _REASONS[status]
    again = status == HTTPStatus.SERVICE_UNAVAILABLE
    body = error_body("api_error" if again else "invalid_request_error", code, message)
    headers = [
        *default_headers,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        *([(b"retry-after", _RETRY_AFTER)] if again else []),
    ]
    head = b"".join(b"%s: %s\r\n" % header for header in headers)
    return f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() + head + b"\r\n" + body
