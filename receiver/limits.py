"""What a Clipia account lets us do, and how much of it is used up; pure.

Clipia limits the requests per minute and the generations in flight of a key. One row of the database holds
what is known of them and what all processes together have used, so that they keep within the limits as one.

Requests are spaced by the generic cell rate algorithm: a burst of a twentieth of a minute's requests, and a
steady rate below the limit from there. In no 60 seconds does that exceed the limit, however Clipia's own
minutes fall. Submissions and polls have a share each, so that neither can starve the other.

The limit of generations in flight is nowhere to be read. It is found like a window in TCP: doubled while
submissions are accepted, set to what was in flight when one is refused, and tried again at times.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

Kind = Literal["submit", "poll"]

SHARES: Final = {"submit": 0.8, "poll": 0.2}
"""The parts of the requests per minute."""
STEADY: Final = 0.9
"""The part of a share that is spent evenly."""
BURST: Final = 0.05
"""The part of a share that may be spent at once; with `STEADY` it leaves a margin for calls that bunch up."""
LOW_WATER: Final = 0.02
"""The part of the limit that must remain; else somebody is using the key, too: wait for the next minute."""
FIRST_RATE: Final = 60
"""Requests per minute that are assumed until an answer says how many there are."""
FIRST_IN_FLIGHT: Final = 4
PROBE_IN_FLIGHT: Final = 600.0
"""Seconds after a refusal until one more generation in flight is tried."""
DEFAULT_WAIT: Final = 5.0
"""Seconds to wait after a 429 that does not say for how long."""
FIRST_PROBE: Final = 5.0
LAST_PROBE: Final = 300.0
"""Bounds of the seconds between the single submissions that find out whether a paused account works again."""


@dataclass(frozen=True, kw_only=True)
class RateHeaders:
    """The `RateLimit-*` fields of an answer; None where it had none."""

    limit: int | None = None
    """Requests per minute."""
    remaining: int | None = None
    reset: float | None = None
    """Seconds until the next minute begins."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The state of one account. Moments are unix seconds of the database's clock, and 0 is never."""

    requests_per_minute: int = FIRST_RATE
    submits_until: float = 0.0
    """When the submissions so far would have been sent at the steady rate."""
    polls_until: float = 0.0
    calls_after: float = 0.0
    """No call before this moment."""
    submits_after: float = 0.0
    in_flight_limit: int = FIRST_IN_FLIGHT
    in_flight_refused_at: float = 0.0
    paused_at: float = 0.0
    """Since when the account refuses every submission: 401, 402, 403."""
    probes: int = 0
    """Submissions that it has refused since."""
    pause: str | None = None
    """What it said, as JSON."""

    def submits(self, now: float, *, in_flight: int) -> int:
        """Return how many submissions may be sent now."""
        if now < self.submits_after:
            return 0
        room = min(self._calls("submit", now), self.in_flight_limit - in_flight)
        return max(0, min(room, 1) if self.paused_at else room)

    def polls(self, now: float) -> int:
        """Return how many polls may be sent now."""
        return self._calls("poll", now)

    def taking(self, kind: Kind, count: int, now: float) -> "Limits":
        """Return the state after `count` calls were sent; more than there was room for delays later ones."""
        until = max(self._until(kind), now) + count * self._interval(kind)
        return replace(self, submits_until=until) if kind == "submit" else replace(self, polls_until=until)

    def reading(self, headers: RateHeaders, now: float) -> "Limits":
        """Return the state after an answer with these headers."""
        limits = self
        if headers.limit and headers.limit != self.requests_per_minute:
            limits = replace(limits, requests_per_minute=headers.limit)
        if headers.remaining is not None and headers.reset is not None:
            low = math.ceil(limits.requests_per_minute * LOW_WATER)
            if headers.remaining < low:
                limits = replace(limits, calls_after=max(limits.calls_after, now + headers.reset))
        return limits

    def accepted(self, now: float, *, in_flight: int) -> "Limits":
        """Return the state after Clipia accepted a submission; it is counted in `in_flight`."""
        limits = replace(self, paused_at=0.0, probes=0, pause=None) if self.paused_at else self
        if not self.in_flight_refused_at:
            # Only a window that is used says anything about the limit.
            if in_flight >= self.in_flight_limit:
                limits = replace(limits, in_flight_limit=self.in_flight_limit + 1)
        elif in_flight >= self.in_flight_limit and now - self.in_flight_refused_at >= PROBE_IN_FLIGHT:
            limits = replace(limits, in_flight_limit=self.in_flight_limit + 1, in_flight_refused_at=now)
        return limits

    def throttled(self, now: float, *, retry_after: float | None) -> "Limits":
        """Return the state after `rate_limit_exceeded`."""
        wait = DEFAULT_WAIT if retry_after is None else retry_after
        return replace(self, calls_after=max(self.calls_after, now + wait))

    def crowded(self, now: float, *, in_flight: int, sent_at: float, retry_after: float | None) -> "Limits":
        """Return the state after `concurrency_limit_exceeded` for a submission of the moment `sent_at`.

        `in_flight` are the generations that were accepted. Refusals of one burst count once.
        """
        wait = DEFAULT_WAIT if retry_after is None else retry_after
        limits = replace(self, submits_after=max(self.submits_after, now + wait))
        if sent_at <= self.in_flight_refused_at:
            return limits
        fewer = max(1, min(self.in_flight_limit - 1, in_flight))
        return replace(limits, in_flight_limit=fewer, in_flight_refused_at=now)

    def refused(self, now: float, *, pause: str) -> "Limits":
        """Return the state after 401, 402 or 403: one submission at a time finds out when it is over."""
        wait = min(LAST_PROBE, FIRST_PROBE * 2.0 ** min(self.probes, 16))
        return replace(
            self,
            paused_at=self.paused_at or now,
            probes=self.probes + 1,
            pause=pause,
            submits_after=max(self.submits_after, now + wait),
        )

    def _calls(self, kind: Kind, now: float) -> int:
        if now < self.calls_after:
            return 0
        interval = self._interval(kind)
        burst = max(1, math.floor(self.requests_per_minute * SHARES[kind] * BURST))
        ahead = max(self._until(kind) - now, 0.0)
        # A hair's breadth more, so that rounding cannot hold back a call that is due.
        return max(0, math.floor((burst * interval - ahead) / interval + 1e-6))

    def _interval(self, kind: Kind) -> float:
        return 60.0 / (self.requests_per_minute * SHARES[kind] * STEADY)

    def _until(self, kind: Kind) -> float:
        return self.submits_until if kind == "submit" else self.polls_until
