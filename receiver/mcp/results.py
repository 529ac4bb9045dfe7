"""Results for agents: plain JSON of limited size, and errors in the receiver's own words."""

from typing import Any, Final

import orjson
import structlog

from receiver.error_texts import traceback_lines
from receiver.errors import ReceiverError, RequestError, SettingsError, TransientError
from receiver.masking import mask

MAX_TEXT_CHARACTERS: Final = 4000
"""A longer text of a payload, a consumer or a file's URL is cut."""
MAX_ERROR_CHARACTERS: Final = 2000
MAX_RESULT_BYTES: Final = 512 * 1024

log = structlog.get_logger()


def bounded(value: Any) -> Any:
    """Return a result with texts of limited length. Raises RequestError if it is too large as a whole."""
    found = _cut(value)
    size = len(orjson.dumps(found))
    if size > MAX_RESULT_BYTES:
        raise RequestError(
            f"the result has {size} bytes, more than {MAX_RESULT_BYTES}: ask for less, as with `limit`",
            code="result_too_large",
        )
    return found


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT_CHARACTERS else f"{value[:MAX_TEXT_CHARACTERS]}…"
    if isinstance(value, list):
        return [_cut(each) for each in value]
    if isinstance(value, dict):
        return {name: _cut(each) for name, each in value.items()}
    return value


def error_of(error: Exception) -> str:
    """Return an error for an agent, as `code: message`. The text of an unexpected one is left out."""
    if not isinstance(error, ReceiverError):
        log.error("tool failed", frames=traceback_lines(error))
        return "internal_error: a bug in the receiver; its log has the traceback"
    parts = [f"{_code_of(error)}: {mask(str(error))[:MAX_ERROR_CHARACTERS]}"]
    if isinstance(error, RequestError) and error.job_id is not None:
        parts.append(f"The generation is {error.job_id}.")
    if isinstance(error, TransientError):
        wait = "" if error.retry_after is None else f" in {error.retry_after:.0f} s"
        parts.append(f"Try again{wait}, a generation with the same idempotency_key.")
    return " ".join(parts)


def _code_of(error: ReceiverError) -> str:
    if isinstance(error, RequestError):
        return error.code
    if isinstance(error, TransientError):
        return error.reason
    return "not_configured" if isinstance(error, SettingsError) else "internal_error"
