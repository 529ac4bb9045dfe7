"""Clipia's error answers as exceptions: about the account, about the job, or from a proxy in between."""

from typing import Final

import httpx
from clipia import ClipiaApiError

from receiver.core.lenient_json import clean_text
from receiver.core.retry import MAX_RETRY_AFTER_SECONDS
from receiver.errors import AccountRefused, ClipiaUnavailable, RefusedByClipia, RefusedForNow
from receiver.masking import mask

_FOR_NOW: Final = (402, 403)
_NOT_READ: Final = (407, 408, 421, 423, 425, 499)
"""With these statuses, Clipia or a proxy says that it has not read the request."""


def translate(error: ClipiaApiError) -> Exception:
    """Return our exception for an error answer."""
    status = error.status
    code, type_ = _text(error, "code", 64), _text(error, "type", 64)
    reason = code or f"http_{status}"
    message = _text(error, "message", 1000) or code or f"HTTP {status}"
    # Without a limit, an absurd Retry-After would hold up the account for years.
    wait = None if error.retry_after is None else min(error.retry_after, MAX_RETRY_AFTER_SECONDS)
    if status == httpx.codes.TOO_MANY_REQUESTS:
        reason = code or "rate_limit_exceeded"
        return ClipiaUnavailable(
            message, reason=reason, status=status, may_have_arrived=False, retry_after=wait
        )
    # If an answer has neither a code nor a type, a proxy or a firewall sent it, and it does not concern the
    # account or the job.
    is_clipias = bool(code or type_)
    refusal = _refusal(message, code=code, type_=type_, status=status) if is_clipias else None
    return refusal or ClipiaUnavailable(message, reason=reason, status=status, retry_after=wait)


def _refusal(message: str, *, code: str, type_: str, status: int) -> Exception | None:
    """Return the exception if Clipia refuses the account or the job; None if the same job may pass later."""
    reason = code or f"http_{status}"
    if status == httpx.codes.UNAUTHORIZED:
        return AccountRefused(message, reason=reason, status=status, may_have_arrived=False)
    type_ = type_ or "invalid_request_error"
    if status in _FOR_NOW:
        return RefusedForNow(message, reason=reason, status=status, type_=type_)
    # If a conflict has no code, an earlier call with the same key may still be in progress.
    is_in_progress = code == "request_in_progress" or (status == httpx.codes.CONFLICT and not code)
    if is_in_progress or status in _NOT_READ or status >= httpx.codes.INTERNAL_SERVER_ERROR:
        return None
    return RefusedByClipia(message, code=reason, status=status, type_=type_)


def _text(error: ClipiaApiError, name: str, limit: int) -> str:
    """Return a text of the answer's `error` object; empty if it has none."""
    # Not error.code and error.type, which are the text "None" if the answer has null.
    details = (error.body or {}).get("error")
    value = details.get(name) if isinstance(details, dict) else None
    return quoted(value.strip(), limit) if isinstance(value, str) else ""


def quoted(text: str, limit: int) -> str:
    """Return a text of Clipia's, cut to `limit` characters and without secrets."""
    # Masked before it is cut: half of a secret would not be found.
    return clean_text(mask(text[: 10 * limit])[:limit])
