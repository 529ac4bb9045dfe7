"""How many deliveries of replays a destination may have under way beside its live ones; pure.

Replays may use a quarter of the places. While there is live traffic, they rest after each delivery for as
long as it took, so that they use at most half of the time too. If there is none, they do not rest.
"""

from collections.abc import Iterable
from typing import Final
from uuid import UUID

LIVE_SECONDS: Final = 1.0
"""How long a live delivery counts as live traffic."""
MAX_REST_SECONDS: Final = 0.25
"""Longest rest after a delivery, and the pause of claims after one that found no replays."""


class ReplayThrottle:
    """The replays of one destination, as one process sees them. `now` is in seconds of a monotonic clock."""

    def __init__(self, places: int, *, max_rest_seconds: float = MAX_REST_SECONDS) -> None:
        """`places` is the in-flight limit of live and replayed deliveries together."""
        self._share = max(1, places // 4)
        self._max_rest_seconds = max_rest_seconds
        self._started: dict[UUID, float] = {}
        self._live_until = self._rests_until = self._pauses_until = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether replays are under way."""
        return bool(self._started)

    def allowed(self, now: float, *, free: int, live: int) -> int:
        """Return how many replays may be claimed for `free` places, after `live` live ones were claimed."""
        if live:
            self._live_until = now + LIVE_SECONDS
        if now < self._rests_until or (live and now < self._pauses_until):
            return 0
        return max(0, min(free, self._share - len(self._started)))

    def found_none(self, now: float) -> None:
        """Pause: while there is live traffic, claims of replays that find none would only cost time."""
        self._pauses_until = now + self._max_rest_seconds

    def start(self, delivery_ids: Iterable[UUID], now: float) -> None:
        """Count replays that were claimed."""
        self._started |= dict.fromkeys(delivery_ids, now)

    def drop(self, delivery_id: UUID) -> None:
        """Forget a replay that was not delivered."""
        self._started.pop(delivery_id, None)

    def end(self, delivery_id: UUID, now: float) -> float | None:
        """Count the end of a delivery; return the seconds of the rest that begins now, None for no rest."""
        # It is missing if its lease was lost and this process has claimed it again since.
        started = self._started.pop(delivery_id, now)
        if not self._rests_until <= now < self._live_until:
            return None
        rest = min(self._max_rest_seconds, now - started)
        self._rests_until = now + rest
        return rest
