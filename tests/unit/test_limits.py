"""The shared limits of an account, with the time in the test's hands."""

from bisect import bisect_left
from dataclasses import replace

import pytest

from receiver.limits import (
    FIRST_IN_FLIGHT,
    LAST_PROBE,
    PROBE_IN_FLIGHT,
    SHARES,
    Kind,
    Limits,
    RateHeaders,
)

NOW = 1_800_000_000.0


def drain(kind: Kind, rate: int, seconds: float) -> list[float]:
    """Call as often as the limits allow for `seconds`; return when the calls were made."""
    limits, calls, now = Limits(requests_per_minute=rate, in_flight_limit=10**6), [], NOW
    while now < NOW + seconds:
        room = limits.polls(now) if kind == "poll" else limits.submits(now, in_flight=0)
        limits = limits.taking(kind, room, now)
        calls += [now] * room
        now += 0.05
    return calls


@pytest.mark.parametrize("rate", [1, 10, 60, 120, 6000])
@pytest.mark.parametrize("kind", ["submit", "poll"])
def test_no_minute_exceeds_its_share(kind: Kind, rate: int) -> None:
    """F7: in no 60 seconds are there more calls than the share allows, but at least one gets through."""
    calls = drain(kind, rate, 300)
    most = max(bisect_left(calls, call + 60) - index for index, call in enumerate(calls))
    assert 1 <= most <= max(1, rate * SHARES[kind])


def test_the_share_is_used() -> None:
    """F7: a backlog drains at nine tenths of its share."""
    assert len(drain("submit", 120, 600)) == pytest.approx(10 * 120 * 0.8 * 0.9, rel=0.05)


def test_headers_teach_the_rate() -> None:
    """F7: the limit is the one that answers name; one that is not named changes nothing."""
    assert Limits().reading(RateHeaders(limit=600), NOW).requests_per_minute == 600
    assert Limits().reading(RateHeaders(), NOW) == Limits()


def test_somebody_else_uses_the_key() -> None:
    """F7: when next to nothing remains of a minute, everybody waits for the next one."""
    limits = Limits(requests_per_minute=600).reading(RateHeaders(limit=600, remaining=11, reset=30), NOW)
    assert limits.submits(NOW + 29, in_flight=0) == limits.polls(NOW + 29) == 0
    assert limits.submits(NOW + 30, in_flight=0) > 0
    assert Limits(requests_per_minute=600).reading(RateHeaders(remaining=12, reset=30), NOW).polls(NOW) > 0


def test_retry_after_is_kept() -> None:
    """F7: after `rate_limit_exceeded` nothing is sent until the time named is over; never earlier again."""
    limits = Limits().throttled(NOW, retry_after=20).throttled(NOW, retry_after=1)
    assert limits.polls(NOW + 19.9) == limits.submits(NOW + 19.9, in_flight=0) == 0
    assert limits.polls(NOW + 20) == 1


def test_the_window_grows_while_it_is_used() -> None:
    """F7: one more generation in flight for each that is accepted with the window full, none otherwise."""
    assert Limits().accepted(NOW, in_flight=FIRST_IN_FLIGHT).in_flight_limit == FIRST_IN_FLIGHT + 1
    assert Limits().accepted(NOW, in_flight=FIRST_IN_FLIGHT - 1).in_flight_limit == FIRST_IN_FLIGHT


def test_a_refusal_sets_the_window() -> None:
    """F7: to what was accepted; refusals of the same burst count once; polls go on."""
    limits = Limits(requests_per_minute=6000, in_flight_limit=16)
    once = limits.crowded(NOW, in_flight=10, sent_at=NOW - 1, retry_after=2)
    assert once.in_flight_limit == 10
    assert once.crowded(NOW, in_flight=10, sent_at=NOW - 1, retry_after=2).in_flight_limit == 10
    assert once.crowded(NOW + 5, in_flight=12, sent_at=NOW + 4, retry_after=2).in_flight_limit == 9
    assert once.submits(NOW + 1.9, in_flight=0) == 0
    assert once.submits(NOW + 2, in_flight=9) == 1
    assert once.polls(NOW) > 0


def test_the_window_is_never_closed() -> None:
    """F7: one generation may always be tried, or nobody would ever learn that there is room again."""
    limits = Limits(in_flight_limit=1).crowded(NOW, in_flight=0, sent_at=NOW, retry_after=None)
    assert limits.submits(NOW + 5, in_flight=0) == 1


def test_a_window_that_was_set_is_tried_at_times() -> None:
    """F7: one more is tried ten minutes after the last refusal, and not before."""
    limits = Limits(in_flight_limit=10, in_flight_refused_at=NOW)
    assert limits.accepted(NOW + PROBE_IN_FLIGHT - 1, in_flight=10).in_flight_limit == 10
    grown = limits.accepted(NOW + PROBE_IN_FLIGHT, in_flight=10)
    assert grown.in_flight_limit == 11
    assert grown.accepted(NOW + PROBE_IN_FLIGHT + 1, in_flight=11).in_flight_limit == 11


def test_a_refused_account_is_probed() -> None:
    """F6: one submission at a time, ever less often, until one is accepted."""
    limits = Limits(requests_per_minute=6000, in_flight_limit=50)
    waits, now = [], NOW
    for _ in range(9):
        limits = limits.refused(now, pause="{}")
        waits.append(limits.submits_after - now)
        now = limits.submits_after
        assert limits.submits(now - 0.1, in_flight=0) == 0
        assert limits.submits(now, in_flight=0) == 1
    assert waits[:4] == [5, 10, 20, 40]
    assert waits[-1] == LAST_PROBE
    assert limits.paused_at == NOW
    resumed = limits.accepted(now, in_flight=1)
    assert resumed == replace(resumed, paused_at=0.0, probes=0, pause=None)
    assert resumed.submits(now, in_flight=1) > 1
