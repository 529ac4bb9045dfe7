"""Retry as a decision: (attempt, error, age) → seconds until the next try, or give up. Pure."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

from receiver.errors import (
    MediaDoubtful,
    MediaMissing,
    NotMedia,
    ReceiverError,
    StorageUnavailable,
    TransientError,
)

DAY: Final = 86_400.0
GIVE_UP_SECONDS: Final = 3 * DAY
"""Seconds for which work is tried, unless a setting says otherwise."""
MAX_RETRY_AFTER: Final = DAY
"""Seconds that another side's Retry-After is heeded for at most."""

# Proxies join headers of one name with commas.
_SECONDS: Final = re.compile(r"[0-9]+(?:[ \t]*,[ \t]*[0-9]+)*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with full jitter: each delay is uniform in [0, min(cap, initial · 2ⁿ)].

    Full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter") spreads a backlog over the whole
    interval, so that a destination that comes back is not hit by all of it at once.
    """

    initial: float = 2.0
    """Upper bound of the first delay, in seconds."""
    cap: float = 600.0
    """Upper bound of every delay, in seconds."""
    give_up_after: float = GIVE_UP_SECONDS
    """Age of the work, in seconds, from which a failed try is the last one."""
    min_attempts: int = 1
    """Tries that are made however old the work is."""

    def next_delay(self, error: Exception, *, attempt: int, age: float, jitter: float) -> float | None:
        """Return the seconds to wait before the next try, or None to give up.

        `attempt` counts from 1 and is the try that just failed; `age` is how long ago the work was made, in
        seconds; `jitter` is a random number in [0, 1). An unexpected exception is retried like a transient
        one: it may be a bug that the next release mends, and giving up at once would lose the work.
        """
        if isinstance(error, ReceiverError) and not isinstance(error, TransientError):
            return None
        if attempt >= self.min_attempts and age >= self.give_up_after:
            return None
        # The exponent is bounded: 2.0 ** 1024 would overflow long before three days of retries are over.
        delay = jitter * min(self.cap, self.initial * 2.0 ** min(attempt - 1, 32))
        if isinstance(error, TransientError) and error.retry_after is not None:
            delay = max(delay, error.retry_after)
        remaining = self.give_up_after - age
        # The last try falls on the deadline, not somewhere before it.
        return min(delay, remaining) if remaining > 0 else delay


MEDIA: Final = RetryPolicy(initial=2.0, cap=600.0)
"""Downloads that fail: the CDN is slow, down or cuts off."""

MEDIA_MISSING: Final = RetryPolicy(initial=1200.0, cap=1800.0, give_up_after=3600.0, min_attempts=3)
"""Files that the CDN says it does not have: at least three tries over at least an hour, then `gone`."""

MEDIA_DOUBTFUL: Final = RetryPolicy(initial=2.0, cap=600.0, give_up_after=3600.0)
"""Bodies that may not be the file: the one that comes after an hour is kept, and marked."""

STORAGE: Final = RetryPolicy(initial=5.0, cap=60.0, give_up_after=math.inf)
"""Our own storage is full or away: the file is not the cause, so it is never given up for that."""


SUBMIT: Final = RetryPolicy(initial=1.0, cap=120.0, give_up_after=math.inf)
"""Submissions that certainly did not arrive: a job that was asked for is sent when that is possible again."""

KEY_VALID_SECONDS: Final = 23 * 3600.0
"""Seconds from a job's first try in which another one is safe.

Clipia forgets an idempotency key after 24 hours, and would then generate and charge anew.
"""

SUBMIT_UNANSWERED: Final = RetryPolicy(initial=1.0, cap=300.0, give_up_after=KEY_VALID_SECONDS)
"""Submissions that may have arrived: sent again under the same key for as long as it holds."""

REFUSED_GIVE_UP_SECONDS: Final = DAY
"""Seconds after which a job ends that Clipia refuses for now (402, 403)."""
_REFUSED_FIRST: Final = 10.0
_REFUSED_CAP: Final = 300.0


def refused_delay(refused_for: float, *, least: float, give_up_after: float, jitter: float) -> float | None:
    """Return the seconds until a job that Clipia refuses for now is tried again, or None to give up.

    It waits about as long again as it has been refused so far, 5 minutes at most, but never less than `least`
    seconds.
    """
    if refused_for >= give_up_after:
        return None
    delay = (0.5 + 0.5 * jitter) * min(_REFUSED_CAP, max(_REFUSED_FIRST, 2 * refused_for))
    # The last try falls on the deadline, not somewhere after it.
    return min(max(delay, least), give_up_after - refused_for)


def poll_delay(polls: int, *, overdue: float, has_webhook: bool, watched: bool) -> float:
    """Return the seconds until a job's state is asked for again, after `polls` times.

    A webhook is given `overdue` seconds before it is taken for lost. While somebody waits for the job, it is
    asked for as often as Clipia's documentation allows.
    """
    if watched:
        return 3.0
    first, cap = (overdue, max(overdue, 300.0)) if has_webhook else (2.0, 15.0)
    return min(cap, first * 1.5 ** min(polls, 32))


def media_policy(error: Exception) -> RetryPolicy:
    """Return the policy for a failed download."""
    if isinstance(error, StorageUnavailable):
        return STORAGE
    if isinstance(error, (NotMedia, MediaDoubtful)):
        return MEDIA_DOUBTFUL
    return MEDIA_MISSING if isinstance(error, MediaMissing) else MEDIA


def parse_retry_after(value: str, *, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for (0 to a day), None if it says nothing."""
    if _SECONDS.fullmatch(value):
        seconds = max(float(each) for each in value.split(","))
    else:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            # The latter is raised for a year, or a zone, of twenty digits.
            return None
        # An HTTP date is in GMT, also if it does not say so.
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def longest_wait(values: Iterable[str], *, now: datetime) -> float | None:
    """Return the longest wait that several Retry-After headers ask for, None if none says anything."""
    waits = (parse_retry_after(value.strip(), now=now) for value in values)
    return max((wait for wait in waits if wait is not None), default=None)
