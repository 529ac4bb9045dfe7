"""The errors of the client: those that the receiver raised, and those of a call without an answer."""

from http import HTTPStatus
from typing import Any, Final, NamedTuple

import httpx
import orjson

from receiver.api.answers import ERROR_CODES
from receiver.error_texts import cause
from receiver.errors import (
    ClipiaUnavailable,
    DatabaseUnavailable,
    ReceiverError,
    ReceiverUnavailable,
    RefusedByClipia,
    RequestError,
    RequestTooLarge,
    SettingsError,
)
from receiver.masking import mask

MAX_MESSAGE_LENGTH: Final = 2000
_WITH_KEY: Final = 3
"""Slashes in a path such as /v1/events/KEY."""


def unavailable(origin: str, method: str, error: Exception) -> ReceiverUnavailable:
    """Return the error for a call that got no whole answer."""
    done = (
        ""
        if method == "GET" or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
        else (" It may have carried out the call: look before you repeat it.")
    )
    return ReceiverUnavailable(
        f"no answer from the receiver at {origin} ({cause(error)}): check the URL, and whether "
        f"`receiver serve` runs there.{done}",
        reason="unreachable",
    )


def is_foreign(origin: str, path: str) -> ReceiverUnavailable:
    """Return the error for an answer that is not one of this API."""
    return ReceiverUnavailable(
        f"the answer of {origin} to {path} is not one of a receiver's internal API: check host, port and "
        "path of the URL; a receiver of another release may differ, too",
        reason="foreign",
    )


def error_of(origin: str, method: str, path: str, response: httpx.Response, content: bytes) -> ReceiverError:
    """Return the error that an answer stands for."""
    found = _read(content)
    if found is None:
        return _without_error(origin, path, response)
    if found.code == "invalid_token":
        message = f"the receiver at {origin} does not know the token: use one of its RECEIVER_API_TOKENS"
        return RequestError(message, code=found.code, type_=found.type)
    # A path with a key may name an object that does not exist.
    if found.code == "method_not_allowed" or (found.code == "not_found" and path.count("/") < _WITH_KEY):
        return ReceiverUnavailable(
            f"{origin} has no {method} {path}: is it the listener of the internal API, and as new as this "
            "client?",
            reason="unknown_path",
        )
    if found.code == "internal_error":
        trace = _printable(response.headers.get("x-request-id", "unknown"))
        return ReceiverError(f"a bug in the receiver at {origin}: its log has x_request_id {trace}")
    return _of_code(found, response)


def _without_error(origin: str, path: str, response: httpx.Response) -> ReceiverUnavailable:
    if response.has_redirect_location:
        return ReceiverUnavailable(
            f"{origin} redirects the call elsewhere, and the token is not sent there: write the final URL",
            reason="redirect",
        )
    if response.status_code in (502, 503, 504):
        return ReceiverUnavailable(
            f"a proxy at {origin} answered {response.status_code}: does the receiver behind it run?",
            reason="proxy",
        )
    return is_foreign(origin, path)


def _of_code(found: "_Error", response: httpx.Response) -> ReceiverError:
    status, code = response.status_code, found.code
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        return _for_now(code, found.message, response)
    details: dict[str, Any] = {"code": code, "type_": found.type, "job_id": found.job_id}
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return RequestTooLarge(found.message, **details)
    if code in ERROR_CODES and ERROR_CODES[code].status == status:
        return RequestError(found.message, **details)
    return RefusedByClipia(found.message, status=status, **details)


def _for_now(code: str, message: str, response: httpx.Response) -> ReceiverError:
    text = response.headers.get("retry-after", "")
    wait = float(text) if text.isascii() and text.isdigit() and len(text) < 6 else None
    if code == "not_configured":
        return SettingsError(message)
    if code == "service_unavailable":
        return DatabaseUnavailable(message, reason=code, retry_after=wait)
    return ClipiaUnavailable(message, reason=code, status=response.status_code, retry_after=wait)


class _Error(NamedTuple):
    type: str
    code: str
    message: str
    job_id: str | None


def _read(content: bytes) -> _Error | None:
    """Return the fields of an error; None if the content is not in the API's shape."""
    try:
        answer = orjson.loads(content)
        texts = [answer["error"][name] for name in ("type", "code", "message")]
        job_id = answer.get("job_id")
    except (orjson.JSONDecodeError, AttributeError, KeyError, TypeError):
        return None
    if not all(isinstance(text, str) for text in texts) or not isinstance(job_id, str | None):
        return None
    type_, code, message = map(_printable, texts)
    return _Error(type_, code, message, None if job_id is None else _printable(job_id))


def _printable(text: str) -> str:
    """Return a text of the other side for a message: without secrets and escape sequences."""
    return mask("".join(each if each.isprintable() else " " for each in text[:MAX_MESSAGE_LENGTH]))
