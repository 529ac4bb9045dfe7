"""How many tries a destination's `rate` allows at a time: a token bucket; pure."""

from typing import Final

BURST: Final = 0.05
"""Seconds whose tries may begin together: many at once cost the database less than one by one."""
_ROUNDING: Final = 1e-6


class TokenBucket:
    """Allows `rate` tries per second. `now` is in seconds of a monotonic clock."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._size = self._tokens = max(1.0, rate * BURST)
        # A quarter of the bucket, so that a fast lane does not claim row by row.
        self._least = max(1.0, self._size / 4)
        self._filled_at: float | None = None

    def available(self, now: float) -> int:
        """Return how many tries may begin now."""
        self._fill(now)
        return int(self._tokens + _ROUNDING) if self._tokens + _ROUNDING >= self._least else 0

    def take(self, count: int) -> None:
        """Count tries that begin."""
        self._tokens -= count

    def wait(self, now: float) -> float:
        """Return the seconds until more tries may begin, 0 if they may now."""
        self._fill(now)
        return max(0.0, (self._least - self._tokens) / self._rate)

    def _fill(self, now: float) -> None:
        if self._filled_at is not None:
            self._tokens = min(self._size, self._tokens + max(0.0, now - self._filled_at) * self._rate)
        self._filled_at = now
