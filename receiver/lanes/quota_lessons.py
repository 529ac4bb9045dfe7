"""What Clipia's answer to a submission says of the account's limits; pure."""

from collections.abc import Callable

from receiver.core.quota import Limits
from receiver.db.jobs import InFlight
from receiver.errors import AccountRefused, ClipiaUnavailable

Change = Callable[[Limits, float, InFlight], Limits]
"""Returns what is known of an account's limits after an answer."""


def unchanged(limits: Limits, _now: float, _used: InFlight) -> Limits:
    """Learn nothing from what is no answer."""
    return limits


def looked_at(limits: Limits, now: float, _used: InFlight) -> Limits:
    """Go on after Clipia looked at a submission, whatever it said of it."""
    return limits.resumed(now)


def after_failure(
    error: ClipiaUnavailable, sent_at: float, text: str, limits: Limits, now: float, _used: InFlight
) -> Limits:
    """Learn from a try that has to be made again."""
    if isinstance(error, AccountRefused):
        return limits.refused(now, sent_at=sent_at, pause=text)
    if error.reason == "concurrency_limit_exceeded":
        return limits.crowded(now, sent_at=sent_at, retry_after=error.retry_after)
    if error.status == 429:
        return limits.throttled(now, retry_after=error.retry_after)
    return limits
