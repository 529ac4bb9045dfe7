"""What Clipia's answer to a submission says of the account's limits; pure."""

from collections.abc import Callable

from receiver.core.quota import Quota
from receiver.db.jobs import InFlight
from receiver.errors import AccountRefused, ClipiaUnavailable

Change = Callable[[Quota, float, InFlight], Quota]
"""Returns what is known of an account's limits after an answer."""


def unchanged(quota: Quota, _now: float, _used: InFlight) -> Quota:
    """Learn nothing from what is no answer."""
    return quota


def looked_at(quota: Quota, now: float, _used: InFlight) -> Quota:
    """Go on after Clipia looked at a submission, whatever it said of it."""
    return quota.unpaused(now)


def after_failure(
    error: ClipiaUnavailable, sent_at: float, text: str, quota: Quota, now: float, _used: InFlight
) -> Quota:
    """Learn from a try that has to be made again."""
    if isinstance(error, AccountRefused):
        return quota.after_account_refused(now, sent_at=sent_at, pause=text)
    if error.reason == "concurrency_limit_exceeded":
        return quota.after_concurrency_limit(now, sent_at=sent_at, retry_after=error.retry_after)
    if error.status == 429:
        return quota.after_rate_limit(now, retry_after=error.retry_after)
    return quota
