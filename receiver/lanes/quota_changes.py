"""How Clipia's answer to a submission changes the account's quota; pure."""

from collections.abc import Callable

from receiver.core.quota import Quota
from receiver.db.jobs import InFlight
from receiver.errors import AccountRefused, ClipiaUnavailable

QuotaChange = Callable[[Quota, float, InFlight], Quota]
"""Returns the quota after an answer, from the quota before, the time and the generations in flight."""


def unchanged(quota: Quota, _now: float, _used: InFlight) -> Quota:
    """Return the quota as it is: the job was not sent."""
    return quota


def after_refused(quota: Quota, now: float, _used: InFlight) -> Quota:
    """Return the quota after Clipia refused the job, which shows that it accepts the account."""
    return quota.unpaused(now)


def after_accepted(quota: Quota, now: float, used: InFlight) -> Quota:
    """Return the quota after Clipia accepted the job."""
    return quota.after_accepted(now, in_flight=used.accepted)


def after_failure(
    error: ClipiaUnavailable, sent_at: float, text: str, quota: Quota, now: float, _used: InFlight
) -> Quota:
    """Return the quota after an attempt that has to be repeated."""
    if isinstance(error, AccountRefused):
        return quota.after_account_refused(now, sent_at=sent_at, pause=text)
    if error.reason == "concurrency_limit_exceeded":
        return quota.after_concurrency_limit(now, sent_at=sent_at, retry_after=error.retry_after)
    if error.status == 429:
        return quota.after_rate_limit(now, retry_after=error.retry_after)
    return quota
