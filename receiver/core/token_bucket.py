"""A token bucket for the rate limit of a destination; pure."""

from typing import Final

BURST_SECONDS: Final = 0.05
"""The bucket holds the attempts of this many seconds: one claim of many rows costs the database less."""
_ROUNDING: Final = 1e-6


class TokenBucket:
    """Allows `rate` attempts per second. `now` is in seconds of a monotonic clock."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._size = self._tokens = max(1.0, rate * BURST_SECONDS)
        # A quarter of the bucket. If single tokens were given out, a fast lane would claim row by row.
        self._least = max(1.0, self._size / 4)
        self._filled_at: float | None = None

    def available(self, now: float) -> int:
        """Return how many attempts may begin now."""
        self._fill(now)
        return int(self._tokens + _ROUNDING) if self._tokens + _ROUNDING >= self._least else 0

    def take(self, count: int) -> None:
        """Take the tokens of `count` attempts; the balance may become negative."""
        self._tokens -= count

    def wait(self, now: float) -> float:
        """Return the seconds until the next attempts may begin, 0 if they may begin now."""
        self._fill(now)
        return max(0.0, (self._least - self._tokens) / self._rate)

    def _fill(self, now: float) -> None:
        if self._filled_at is not None:
            self._tokens = min(self._size, self._tokens + max(0.0, now - self._filled_at) * self._rate)
        self._filled_at = now
