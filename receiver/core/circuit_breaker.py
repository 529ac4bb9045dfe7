"""A circuit per destination: after failures in a row it is left alone but for probes; pure.

A destination that is down gets one delivery at a time, at growing intervals, in place of all that are due.
When one comes through, the number under way doubles with each further success until it is back at its full
width: a destination that has just come back is not overrun by what has waited for it.
"""

from typing import Final

FAILURES_TO_OPEN: Final = 5
"""Failures in a row that open the circuit."""
FIRST_PROBE_SECONDS: Final = 1.0
MAX_PROBE_SECONDS: Final = 60.0
"""Bounds of the seconds between probes."""


class CircuitBreaker:
    """The state of one destination, as one process sees it. `now` is in seconds of a monotonic clock."""

    def __init__(self, width: int) -> None:
        """`width` is how many deliveries may be under way at once."""
        self._width = width
        self._allowed = width
        self._failures = 0
        self._probes = 0
        self._opened_at = 0.0
        self._probe_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether only probes are let through."""
        return self._allowed == 0

    def available(self, now: float, *, under_way: int) -> int:
        """Return how many more deliveries may be started."""
        if self.is_open:
            return 1 if now >= self._probe_at and not under_way else 0
        return max(0, self._allowed - under_way)

    def succeeded(self) -> None:
        """Count a delivery that the destination has dealt with, a refusal of its own included."""
        self._failures = self._probes = 0
        self._allowed = min(self._width, max(1, self._allowed * 2))

    def failed(self, now: float, *, started: float, retry_after: float = 0.0) -> bool:
        """Count a failure of a delivery that began at `started`; True where it opens the circuit.

        `retry_after` is how many seconds the destination asks to be left alone for.

        What was under way when the circuit opened fails along with it, and says nothing of a probe.
        """
        if self.is_open and started <= self._opened_at:
            return False
        self._failures += 1
        if self._allowed == self._width and self._failures < FAILURES_TO_OPEN:
            return False
        opens = not self.is_open
        self.open(now, retry_after=retry_after)
        return opens

    def open(self, now: float, *, retry_after: float = 0.0) -> None:
        """Let only probes through from now on."""
        self._allowed = 0
        self._opened_at = now
        pause = max(FIRST_PROBE_SECONDS * 2.0 ** min(self._probes, 16), retry_after)
        self._probe_at = now + min(MAX_PROBE_SECONDS, pause)
        self._probes += 1
