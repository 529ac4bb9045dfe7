"""The quota of a Clipia account and its use; pure.

Clipia limits the requests per minute and the generations in flight of a key. One row of the database has
these limits and their use by all processes, so that together they stay within the limits.

Requests are spaced by the generic cell rate algorithm: a part of a minute's requests may be sent at once, the
rest at a steady rate. In any 60 seconds both together stay within the limit, whenever Clipia's minutes begin.
Submissions, polls and queries (models, prices, the account) have a share each, so that none can starve
another.

Clipia does not publish the in-flight limit. It is found like the congestion window of TCP: it grows by one
if a submission is accepted while the window is full, and shrinks by an eighth if Clipia refuses. After that
it grows by one at long intervals.
"""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

CallKind = Literal["submit", "poll", "query"]


@dataclass(frozen=True, kw_only=True)
class Share:
    """Parts of the requests per minute: `burst` may be used at once, `steady` evenly over the minute."""

    burst: float
    steady: float


SHARES: Final[dict[CallKind, Share]] = {
    # The rest is a margin for calls that arrive closer together than they were sent.
    "submit": Share(burst=0.035, steady=0.63),
    "poll": Share(burst=0.01, steady=0.18),
    # Queries come in small bursts.
    "query": Share(burst=0.05, steady=0.05),
}
LOW_WATER: Final = 0.02
"""If less than this part of the limit remains, others use the key too: wait for the next minute."""
FIRST_RATE: Final = 60
"""Assumed requests per minute, until an answer has the real limit."""
FIRST_IN_FLIGHT: Final = 4
RAISE_AFTER_SECONDS: Final = 120.0
"""Time after a refusal until the in-flight limit is raised by one."""
REFUSED_SHARE: Final = 0.1
"""The part of the requests per minute for jobs that Clipia refuses for now (402, 403)."""
MAX_RESET_SECONDS: Final = 120.0
"""A longer RateLimit-Reset counts as this many seconds."""
DEFAULT_WAIT_SECONDS: Final = 5.0
"""Pause after a 429 without Retry-After."""
FIRST_PROBE_SECONDS: Final = 5.0
"""Time until a paused account is probed by a single submission; it doubles with each refused probe."""
MAX_PROBE_SECONDS: Final = 300.0
PROBE_TIMEOUT_SECONDS: Final = 35.0
"""Time after a probe until the next one, if it gets no answer; longer than a call can take."""


@dataclass(frozen=True, kw_only=True)
class RateHeaders:
    """The `RateLimit-*` headers of an answer, None if absent."""

    limit: int | None = None
    """Requests per minute."""
    remaining: int | None = None
    reset: float | None = None
    """Seconds until the next minute begins."""


@dataclass(frozen=True, kw_only=True)
class Quota:
    """The state of one account. Times are in unix seconds of the database's clock; 0 is never."""

    requests_per_minute: int = FIRST_RATE
    submits_until: float = 0.0
    """The time at which all submissions so far would have been sent at the steady rate."""
    polls_until: float = 0.0
    asks_until: float = 0.0
    calls_after: float = 0.0
    """No calls before this time."""
    submits_after: float = 0.0
    in_flight_limit: int = FIRST_IN_FLIGHT
    in_flight_refused_at: float = 0.0
    paused_at: float = 0.0
    """The time since which Clipia refuses the account (401)."""
    probes: int = 0
    """Refused submissions since then."""
    pause: str | None = None
    """Clipia's error, as JSON."""
    accepted_at: float = 0.0
    """The time of the last accepted submission."""

    def allowed_submissions(self, now: float, *, in_flight: int) -> int:
        """Return how many submissions may be sent now."""
        if now < self.submits_after:
            return 0
        free = min(self._calls("submit", now), self.in_flight_limit - in_flight)
        return max(0, min(free, 1) if self.paused_at else free)

    def allowed_polls(self, now: float) -> int:
        """Return how many polls may be sent now."""
        return self._calls("poll", now)

    def query_delay(self, now: float) -> float:
        """Return the seconds until a query may be sent, 0 if it may be sent now."""
        if self._calls("query", now):
            return 0.0
        ahead = self.asks_until - now - (self._burst("query") - 1) * self._interval("query")
        return max(self.calls_after - now, ahead, 0.001)

    def after_calls(self, kind: CallKind, count: int, now: float) -> "Quota":
        """Return the state after `count` calls. If they were more than allowed, later calls are delayed."""
        until = max(self._until(kind), now) + count * self._interval(kind)
        if kind == "query":
            return replace(self, asks_until=until)
        if kind == "poll":
            return replace(self, polls_until=until)
        # One probe at a time: wait for its answer.
        after = max(self.submits_after, now + PROBE_TIMEOUT_SECONDS) if self.paused_at else self.submits_after
        return replace(self, submits_until=until, submits_after=after)

    def after_headers(self, headers: RateHeaders, now: float) -> "Quota":
        """Return the state after an answer with these headers."""
        quota = replace(self, requests_per_minute=headers.limit or self.requests_per_minute)
        if headers.remaining is not None and headers.reset is not None:
            low = math.ceil(quota.requests_per_minute * LOW_WATER)
            if headers.remaining < low:
                reset = min(headers.reset, MAX_RESET_SECONDS)
                quota = replace(quota, calls_after=max(quota.calls_after, now + reset))
        return quota

    def after_accepted(self, now: float, *, in_flight: int) -> "Quota":
        """Return the state after Clipia accepted a submission, which `in_flight` includes."""
        quota = replace(self.unpaused(now), accepted_at=now)
        refused_at = self.in_flight_refused_at
        # If the window was not full, the limit was not tested.
        if in_flight >= self.in_flight_limit and (not refused_at or now - refused_at >= RAISE_AFTER_SECONDS):
            refused_at = now if refused_at else refused_at
            quota = replace(quota, in_flight_limit=self.in_flight_limit + 1, in_flight_refused_at=refused_at)
        return quota

    def unpaused(self, now: float) -> "Quota":
        """Return the state after Clipia processed a submission: the account is no longer refused."""
        if not self.paused_at:
            return self
        return replace(self, paused_at=0.0, probes=0, pause=None, submits_after=now)

    def retry_interval(self, refused: int) -> float:
        """Return the minimum seconds between two attempts at a job if Clipia refuses `refused` jobs for now.

        Together these jobs use at most `REFUSED_SHARE` of the requests.
        """
        return refused * 60.0 / (self.requests_per_minute * REFUSED_SHARE)

    def after_rate_limit(self, now: float, *, retry_after: float | None) -> "Quota":
        """Return the state after `rate_limit_exceeded`."""
        wait = DEFAULT_WAIT_SECONDS if retry_after is None else retry_after
        return replace(self, calls_after=max(self.calls_after, now + wait))

    def after_concurrency_limit(self, now: float, *, sent_at: float, retry_after: float | None) -> "Quota":
        """Return the state after `concurrency_limit_exceeded` for a submission that was sent at `sent_at`.

        All refusals of one burst shrink the window once.
        """
        wait = DEFAULT_WAIT_SECONDS if retry_after is None else retry_after
        quota = replace(self, submits_after=max(self.submits_after, now + wait))
        if sent_at <= self.in_flight_refused_at:
            return quota
        fewer = max(1, self.in_flight_limit - max(1, self.in_flight_limit // 8))
        return replace(quota, in_flight_limit=fewer, in_flight_refused_at=now)

    def after_account_refused(self, now: float, *, sent_at: float, pause: str) -> "Quota":
        """Return the state after 401 for a submission that was sent at `sent_at`: the account is paused.

        During a pause one submission at a time is a probe. Submissions that were in flight when the pause
        began are not probes.
        """
        if self.paused_at and sent_at <= self.paused_at:
            return self
        wait = min(MAX_PROBE_SECONDS, FIRST_PROBE_SECONDS * 2.0 ** min(self.probes, 16))
        paused_at, probes = self.paused_at or now, self.probes + 1
        return replace(self, paused_at=paused_at, probes=probes, pause=pause, submits_after=now + wait)

    def _calls(self, kind: CallKind, now: float) -> int:
        if now < self.calls_after:
            return 0
        interval = self._interval(kind)
        ahead = max(self._until(kind) - now, 0.0)
        # A tiny surplus: without it a rounding error could hold back a due call.
        return max(0, math.floor((self._burst(kind) * interval - ahead) / interval + 1e-6))

    def _burst(self, kind: CallKind) -> int:
        return max(1, math.floor(self.requests_per_minute * SHARES[kind].burst))

    def _interval(self, kind: CallKind) -> float:
        return 60.0 / (self.requests_per_minute * SHARES[kind].steady)

    def _until(self, kind: CallKind) -> float:
        return {"submit": self.submits_until, "poll": self.polls_until, "query": self.asks_until}[kind]
