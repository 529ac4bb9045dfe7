"""Clipia's error answers: whether they are about the account, the job, or something in between."""

from typing import Final

import httpx
from clipia import ClipiaApiError

from receiver.core.lenient_json import clean_text
from receiver.core.retry import MAX_RETRY_AFTER
from receiver.errors import AccountRefused, ClipiaUnavailable, RefusedByClipia, RefusedForNow
from receiver.masking import mask

_FOR_NOW: Final = (402, 403)
_NOT_READ: Final = (407, 408, 421, 423, 425, 499)
"""Statuses which say that a request was not read, or not yet: nothing of its content,
whether Clipia or a proxy says so.
"""


def translate(error: ClipiaApiError) -> Exception:
    """Return the exception of ours that an error answer is."""
    # Not the SDK's attributes, in which null is the text "None".
    said, status = (error.body or {}).get("error"), error.status
    code, type_, message = (_member(said, *each) for each in (("code", 64), ("type", 64), ("message", 1000)))
    message, reason = message or code or f"HTTP {status}", code or f"http_{status}"
    # Without both, an error comes from something in between, such as a firewall, and says nothing about the
    # job or the account.
    is_clipias = bool(code or type_)
    if is_clipias and status == httpx.codes.UNAUTHORIZED:
        return AccountRefused(message, reason=reason, status=status, may_have_arrived=False)
    type_ = type_ or "invalid_request_error"
    if is_clipias and status in _FOR_NOW:
        return RefusedForNow(message, reason=reason, status=status, type_=type_)
    # Retry-After is somebody else's data; a day is as good as never.
    wait = None if error.retry_after is None else min(error.retry_after, MAX_RETRY_AFTER)
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return ClipiaUnavailable(
            message,
            reason=code or "rate_limit_exceeded",
            status=status,
            may_have_arrived=False,
            retry_after=wait,
        )
    # A conflict without a code may be an earlier call that is still being worked on.
    is_in_progress = code == "request_in_progress" or (status == httpx.codes.CONFLICT and not code)
    may_pass = is_in_progress or status in _NOT_READ or status >= httpx.codes.INTERNAL_SERVER_ERROR
    if is_clipias and not may_pass:
        return RefusedByClipia(message, code=reason, status=status, type_=type_)
    return ClipiaUnavailable(message, reason=reason, status=status, retry_after=wait)


def _member(said: object, name: str, limit: int) -> str:
    """Return a text in the `error` object of an answer; empty if it is none."""
    value = said.get(name) if isinstance(said, dict) else None
    return quoted(value.strip(), limit) if isinstance(value, str) else ""


def quoted(text: str, limit: int) -> str:
    """Return words of Clipia's, cut, and without the secrets that it may have repeated."""
    # Masked before the cut, which could leave half of a secret.
    return clean_text(mask(text[: 10 * limit])[:limit])
