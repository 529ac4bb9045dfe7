"""Answers in Clipia's shape: JSON bodies, and errors as ``{"error": {"type", "code", "message"}}``."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from receiver.errors import ReceiverError

CODES: Final[Mapping[str, tuple[int, str]]] = {
    "invalid_request": (400, "invalid_request_error"),
    "webhook_url_invalid": (400, "invalid_request_error"),
    "model_input_invalid": (400, "invalid_request_error"),
    "invalid_api_key": (401, "authentication_error"),
    "insufficient_credits": (402, "billing_error"),
    "subscription_required": (402, "billing_error"),
    "insufficient_scope": (403, "permission_error"),
    "not_found": (404, "invalid_request_error"),
    "model_not_found": (404, "invalid_request_error"),
    "idempotency_key_reuse": (409, "invalid_request_error"),
    "request_in_progress": (409, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "concurrency_limit_exceeded": (429, "rate_limit_error"),
    "internal_error": (500, "api_error"),
    "service_unavailable": (503, "api_error"),
}
"""Every documented error code with its HTTP status and its type."""


class Problem(ReceiverError):
    """Answers a request with an error.

    `code` is one of `CODES`; any other code needs a `status`. `headers` are added to the answer.
    """

    def __init__(
        self, code: str, message: str, *, status: int | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        usual_status, self.type = CODES.get(code, (400, "invalid_request_error"))
        self.code = code
        self.status = status or usual_status
        self.headers = headers

    def response(self) -> Response:
        """Return the answer."""
        error = {"type": self.type, "code": self.code, "message": str(self)}
        return json_response({"error": error}, status=self.status, headers=self.headers)


def json_response(content: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with `content` as JSON."""
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


async def read_object(request: Request) -> dict[str, Any]:
    """Return the request's JSON object. Raises `Problem` if the body is anything else."""
    try:
        content = orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise Problem("invalid_request", f"The body is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise Problem("invalid_request", "The body must be a JSON object.")
    return content


def read_input(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `input` of a submission or an estimate. Raises `Problem` if it is no object."""
    given = content.get("input")
    if not isinstance(given, dict):
        raise Problem("invalid_request", 'The body must have an "input" that is an object.')
    return given


def retry_after(seconds: float, *, now: float, as_date: bool = False) -> dict[str, str]:
    """Return the Retry-After header for a wait of `seconds`, as whole seconds or as an HTTP date."""
    wait = math.ceil(seconds)
    return {"Retry-After": formatdate(now + wait, usegmt=True) if as_date else str(wait)}


def timestamp(moment: float, *, timespec: str = "seconds") -> str:
    """Return unix seconds as ISO 8601 in UTC; Clipia's have whole seconds."""
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
