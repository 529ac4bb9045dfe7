"""Retry policies: from attempt, error and age to the seconds until the next attempt, or giving up; pure."""

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
"""Work is retried for this long, by default."""
MAX_RETRY_AFTER_SECONDS: Final = DAY
"""A longer Retry-After counts as this many seconds."""

# A proxy may join several headers with commas.
_SECONDS: Final = re.compile(r"[0-9]+(?:[ \t]*,[ \t]*[0-9]+)*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with full jitter: each delay is uniform in [0, min(cap, initial · 2ⁿ)].

    Full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter") spreads a backlog over the whole
    interval. Without it, a destination that has just come back would get the whole backlog at once.
    """

    initial: float = 2.0
    """Upper bound of the first delay, in seconds."""
    cap: float = 600.0
    """Upper bound of every delay, in seconds."""
    give_up_after: float = GIVE_UP_SECONDS
    """If the work is older than this (seconds), a failed attempt is the last one."""
    min_attempts: int = 1
    """Attempts that are made even if the work is older."""

    def next_delay(self, error: Exception, *, attempt: int, age: float, jitter: float) -> float | None:
        """Return the seconds to wait before the next attempt, or None to give up.

        `attempt` is the number of the failed attempt, from 1; `age` is the age of the work in seconds;
        `jitter` is a random number in [0, 1). An unexpected exception is retried like a transient one: it may
        be a bug that the next release fixes, and if it were permanent, the work would be lost.
        """
        if isinstance(error, ReceiverError) and not isinstance(error, TransientError):
            return None
        if attempt >= self.min_attempts and age >= self.give_up_after:
            return None
        # The exponent is limited, because 2.0 ** 1024 overflows.
        delay = jitter * min(self.cap, self.initial * 2.0 ** min(attempt - 1, 32))
        if isinstance(error, TransientError) and error.retry_after is not None:
            delay = max(delay, error.retry_after)
        remaining = self.give_up_after - age
        # The last attempt is at the deadline, not before it.
        return min(delay, remaining) if remaining > 0 else delay


MEDIA: Final = RetryPolicy(initial=2.0, cap=600.0)
"""Failed downloads: the CDN is slow, down or closes the connection."""

MEDIA_MISSING: Final = RetryPolicy(initial=1200.0, cap=1800.0, give_up_after=3600.0, min_attempts=3)
"""Missing files (404 and the like): `gone` after at least three attempts over at least an hour."""

MEDIA_DOUBTFUL: Final = RetryPolicy(initial=2.0, cap=600.0, give_up_after=3600.0)
"""Doubtful bodies: if there is still no better one after an hour, the last one is stored with a warning."""

STORAGE: Final = RetryPolicy(initial=5.0, cap=60.0, give_up_after=math.inf)
"""Our storage is full or unreachable. The file is not at fault, so the download is never given up."""


SUBMIT: Final = RetryPolicy(initial=1.0, cap=120.0, give_up_after=math.inf)
"""Submissions that surely did not reach Clipia: retried until they do."""

KEY_VALID_SECONDS: Final = 23 * 3600.0
"""From its first attempt, a submission may be repeated for this long.

Clipia forgets an idempotency key after 24 hours. A repeated submission would then generate and charge again.
"""

SUBMIT_UNANSWERED: Final = RetryPolicy(initial=1.0, cap=300.0, give_up_after=KEY_VALID_SECONDS)
"""Submissions that may have reached Clipia: repeated with the same key while it is valid."""

REFUSED_GIVE_UP_SECONDS: Final = DAY
"""If Clipia has refused a job (402, 403) for this long, it ends."""
_REFUSED_FIRST: Final = 10.0
_REFUSED_CAP: Final = 300.0


def refused_delay(refused_for: float, *, least: float, give_up_after: float, jitter: float) -> float | None:
    """Return the seconds until the next attempt at a job that Clipia refuses for now, or None to give up.

    The delay is about the time for which it was refused so far, up to 5 minutes, but at least `least`
    seconds.
    """
    if refused_for >= give_up_after:
        return None
    delay = (0.5 + 0.5 * jitter) * min(_REFUSED_CAP, max(_REFUSED_FIRST, 2 * refused_for))
    # The last attempt is at the deadline, not after it.
    return min(max(delay, least), give_up_after - refused_for)


def poll_delay(polls: int, *, overdue: float, has_webhook: bool, watched: bool) -> float:
    """Return the seconds until the next poll of a job, after `polls` polls.

    If the job has a webhook, the first poll is after `overdue` seconds. If a caller waits for the job
    (`watched`), it is polled as often as Clipia's documentation allows.
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
    """Return the seconds of a Retry-After header (0 to a day), None if it is invalid."""
    if _SECONDS.fullmatch(value):
        seconds = max(float(each) for each in value.split(","))
    else:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            # OverflowError: a year or a zone of twenty digits.
            return None
        # An HTTP date is in GMT even if it has no zone.
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def longest_wait(values: Iterable[str], *, now: datetime) -> float | None:
    """Return the longest wait of several Retry-After headers, None if all are invalid."""
    waits = (parse_retry_after(value.strip(), now=now) for value in values)
    return max((wait for wait in waits if wait is not None), default=None)
