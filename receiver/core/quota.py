"""What a Clipia account lets us do, and how much of it is used up; pure.

Clipia limits the requests per minute and the generations in flight of a key. One row of the database holds
what is known of them and what all processes together have used, so that they keep within the limits as one.

Requests are spaced by the generic cell rate algorithm: a part of a minute's requests at once, and a steady
rate from there. In no 60 seconds do both together exceed the limit, however Clipia's own minutes fall.
Submissions, polls and questions (models, prices, the account) have a share each: none can starve another.

The limit of generations in flight is nowhere to be read. It is found like a window in TCP: one more for each
submission that is accepted while the window is full, an eighth less when Clipia refuses, one more at times.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

CallKind = Literal["submit", "poll", "query"]


@dataclass(frozen=True, kw_only=True)
class Share:
    """A part of the requests per minute: what of it may be spent at once, and what is spent evenly."""

    burst: float
    steady: float


SHARES: Final[dict[CallKind, Share]] = {
    # Margins beside them are for calls that bunch up on their way.
    "submit": Share(burst=0.035, steady=0.63),
    "poll": Share(burst=0.01, steady=0.18),
    # A person asks for a few things at once, and then for nothing.
    "query": Share(burst=0.05, steady=0.05),
}
LOW_WATER: Final = 0.02
"""The part of the limit that must remain; else somebody is using the key, too: wait for the next minute."""
FIRST_RATE: Final = 60
"""Requests per minute that are assumed until an answer says how many there are."""
FIRST_IN_FLIGHT: Final = 4
RAISE_AFTER_SECONDS: Final = 120.0
"""Seconds after a refusal until one more generation in flight is tried."""
REFUSED_SHARE: Final = 0.1
"""The part of the requests per minute that jobs have which Clipia refuses for now (402, 403)."""
MAX_RESET_SECONDS: Final = 120.0
"""Seconds that a minute may still last: whatever an answer says, the account is not blocked for longer."""
DEFAULT_WAIT_SECONDS: Final = 5.0
"""Seconds to wait after a 429 that does not say for how long."""
FIRST_PROBE_SECONDS: Final = 5.0
MAX_PROBE_SECONDS: Final = 300.0
"""Bounds of the seconds between the single submissions that find out whether a paused account works again."""
PROBE_TIMEOUT_SECONDS: Final = 35.0
"""Seconds that a probe has for its answer before there is another one: more than a call may take."""


@dataclass(frozen=True, kw_only=True)
class RateHeaders:
    """The `RateLimit-*` fields of an answer; None where it had none."""

    limit: int | None = None
    """Requests per minute."""
    remaining: int | None = None
    reset: float | None = None
    """Seconds until the next minute begins."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """The state of one account. Moments are unix seconds of the database's clock, and 0 is never."""

    requests_per_minute: int = FIRST_RATE
    submits_until: float = 0.0
    """When the submissions so far would have been sent at the steady rate."""
    polls_until: float = 0.0
    asks_until: float = 0.0
    calls_after: float = 0.0
    """No call before this moment."""
    submits_after: float = 0.0
    in_flight_limit: int = FIRST_IN_FLIGHT
    in_flight_refused_at: float = 0.0
    paused_at: float = 0.0
    """Since when Clipia refuses the account (401)."""
    probes: int = 0
    """Submissions that it has refused since."""
    pause: str | None = None
    """What it said, as JSON."""
    accepted_at: float = 0.0
    """When it last accepted a submission."""

    def allowed_submissions(self, now: float, *, in_flight: int) -> int:
        """Return how many submissions may be sent now."""
        if now < self.submits_after:
            return 0
        room = min(self._calls("submit", now), self.in_flight_limit - in_flight)
        return max(0, min(room, 1) if self.paused_at else room)

    def allowed_polls(self, now: float) -> int:
        """Return how many polls may be sent now."""
        return self._calls("poll", now)

    def query_delay(self, now: float) -> float:
        """Return the seconds until a question may be sent, 0 where that is now."""
        if self._calls("query", now):
            return 0.0
        ahead = self.asks_until - now - (self._burst("query") - 1) * self._interval("query")
        return max(self.calls_after - now, ahead, 0.001)

    def after_calls(self, kind: CallKind, count: int, now: float) -> "Quota":
        """Return the state after `count` calls were sent; more than there was room for delays later ones."""
        until = max(self._until(kind), now) + count * self._interval(kind)
        if kind == "query":
            return replace(self, asks_until=until)
        if kind == "poll":
            return replace(self, polls_until=until)
        # The answer to a probe decides; until then there is no other one.
        after = max(self.submits_after, now + PROBE_TIMEOUT_SECONDS) if self.paused_at else self.submits_after
        return replace(self, submits_until=until, submits_after=after)

    def after_headers(self, headers: RateHeaders, now: float) -> "Quota":
        """Return the state after an answer with these headers."""
        quota = self
        if headers.limit and headers.limit != self.requests_per_minute:
            quota = replace(quota, requests_per_minute=headers.limit)
        if headers.remaining is not None and headers.reset is not None:
            low = math.ceil(quota.requests_per_minute * LOW_WATER)
            if headers.remaining < low:
                reset = min(headers.reset, MAX_RESET_SECONDS)
                quota = replace(quota, calls_after=max(quota.calls_after, now + reset))
        return quota

    def after_accepted(self, now: float, *, in_flight: int) -> "Quota":
        """Return the state after Clipia accepted a submission; it is counted in `in_flight`."""
        quota = replace(self.unpaused(now), accepted_at=now)
        if not self.in_flight_refused_at:
            # Only a window that is used says anything about the limit.
            if in_flight >= self.in_flight_limit:
                quota = replace(quota, in_flight_limit=self.in_flight_limit + 1)
        elif in_flight >= self.in_flight_limit and now - self.in_flight_refused_at >= RAISE_AFTER_SECONDS:
            quota = replace(quota, in_flight_limit=self.in_flight_limit + 1, in_flight_refused_at=now)
        return quota

    def unpaused(self, now: float) -> "Quota":
        """Return the state after Clipia looked at a submission, whatever it said of it."""
        if not self.paused_at:
            return self
        return replace(self, paused_at=0.0, probes=0, pause=None, submits_after=now)

    def retry_interval(self, refused: int) -> float:
        """Return the least seconds between two tries of a job while Clipia refuses that many jobs for now.

        All of them together use no more than `REFUSED_SHARE` of the requests.
        """
        return refused * 60.0 / (self.requests_per_minute * REFUSED_SHARE)

    def after_rate_limit(self, now: float, *, retry_after: float | None) -> "Quota":
        """Return the state after `rate_limit_exceeded`."""
        wait = DEFAULT_WAIT_SECONDS if retry_after is None else retry_after
        return replace(self, calls_after=max(self.calls_after, now + wait))

    def after_concurrency_limit(self, now: float, *, sent_at: float, retry_after: float | None) -> "Quota":
        """Return the state after `concurrency_limit_exceeded` for a submission of the moment `sent_at`.

        Refusals of one burst count once.
        """
        wait = DEFAULT_WAIT_SECONDS if retry_after is None else retry_after
        quota = replace(self, submits_after=max(self.submits_after, now + wait))
        if sent_at <= self.in_flight_refused_at:
            return quota
        fewer = max(1, self.in_flight_limit - max(1, self.in_flight_limit // 8))
        return replace(quota, in_flight_limit=fewer, in_flight_refused_at=now)

    def after_account_refused(self, now: float, *, sent_at: float, pause: str) -> "Quota":
        """Return the state after 401 for a submission of the moment `sent_at`.

        One submission at a time finds out when it is over. What was under way when the pause began says
        nothing of that.
        """
        if self.paused_at and sent_at <= self.paused_at:
            return self
        wait = min(MAX_PROBE_SECONDS, FIRST_PROBE_SECONDS * 2.0 ** min(self.probes, 16))
        return replace(
            self,
            paused_at=self.paused_at or now,
            probes=self.probes + 1,
            pause=pause,
            submits_after=now + wait,
        )

    def _calls(self, kind: CallKind, now: float) -> int:
        if now < self.calls_after:
            return 0
        interval = self._interval(kind)
        ahead = max(self._until(kind) - now, 0.0)
        # A hair's breadth more, so that rounding cannot hold back a call that is due.
        return max(0, math.floor((self._burst(kind) * interval - ahead) / interval + 1e-6))

    def _burst(self, kind: CallKind) -> int:
        return max(1, math.floor(self.requests_per_minute * SHARES[kind].burst))

    def _interval(self, kind: CallKind) -> float:
        return 60.0 / (self.requests_per_minute * SHARES[kind].steady)

    def _until(self, kind: CallKind) -> float:
        return {"submit": self.submits_until, "poll": self.polls_until, "query": self.asks_until}[kind]
