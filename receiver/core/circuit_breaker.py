"""A circuit breaker per destination; pure.

After several failures in a row the circuit opens: in place of all due deliveries, the destination gets one
probe at a time, at growing intervals. If a probe succeeds, the circuit is half-open: the limit of deliveries
in flight doubles with each success until it is back at its full value. Otherwise the whole backlog would hit
the destination as soon as it is back.
"""

from typing import Final

FAILURES_TO_OPEN: Final = 5
"""Failures in a row that open the circuit."""
FIRST_PROBE_SECONDS: Final = 1.0
"""Time from the opening to the first probe; it doubles with each failed probe."""
MAX_PROBE_SECONDS: Final = 60.0


class CircuitBreaker:
    """The state of one destination in one process. `now` is in seconds of a monotonic clock."""

    def __init__(self, concurrency: int) -> None:
        """`concurrency` is the in-flight limit while the circuit is closed."""
        self._concurrency = concurrency
        self._limit = concurrency
        self._failures = 0
        self._probes = 0
        self._opened_at = 0.0
        self._probe_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether only probes may be sent."""
        return self._limit == 0

    def available(self, now: float, *, under_way: int) -> int:
        """Return how many more deliveries may start while `under_way` are in flight."""
        if self.is_open:
            return 1 if now >= self._probe_at and not under_way else 0
        return max(0, self._limit - under_way)

    def succeeded(self) -> None:
        """Record an answer of the destination, even if it rejected the message."""
        self._failures = self._probes = 0
        self._limit = min(self._concurrency, max(1, self._limit * 2))

    def failed(self, now: float, *, started: float, retry_after: float = 0.0) -> bool:
        """Record a failed delivery that began at `started`. Return True if it opens the circuit.

        `retry_after` is the pause that the destination asked for, in seconds. Deliveries that were in flight
        when the circuit opened are ignored if they fail: they are not probes.
        """
        if self.is_open and started <= self._opened_at:
            return False
        self._failures += 1
        if self._limit == self._concurrency and self._failures < FAILURES_TO_OPEN:
            return False
        opens = not self.is_open
        self.open(now, retry_after=retry_after)
        return opens

    def suspect(self) -> None:
        """Ramp up from one delivery: another process has trouble. If it fails, the circuit opens.

        It is not opened now, because the destination may answer this process all the same.
        """
        if not self.is_open:
            self._limit, self._failures = 1, FAILURES_TO_OPEN - 1

    def probe_at_once(self, now: float) -> None:
        """Allow the next probe now: another process has reached the destination."""
        if self.is_open:
            self._probe_at = min(self._probe_at, now)

    def open(self, now: float, *, retry_after: float = 0.0) -> None:
        """Allow only probes from now on."""
        self._limit = 0
        self._opened_at = now
        pause = max(FIRST_PROBE_SECONDS * 2.0 ** min(self._probes, 16), retry_after)
        self._probe_at = now + min(MAX_PROBE_SECONDS, pause)
        self._probes += 1
