"""The shared quota of an account; the tests set the time."""

from bisect import bisect_left
from dataclasses import replace

import pytest

from receiver.core.quota import (
    FIRST_IN_FLIGHT,
    MAX_PROBE_SECONDS,
    MAX_RESET_SECONDS,
    PROBE_TIMEOUT_SECONDS,
    RAISE_AFTER_SECONDS,
    SHARES,
    CallKind,
    Quota,
    RateHeaders,
)

NOW = 1_800_000_000.0


def drain(kind: CallKind, rate: int, seconds: float) -> list[float]:
    """Call as often as the quota allows for `seconds`; return the times of the calls."""
    quota, calls, now = Quota(requests_per_minute=rate, in_flight_limit=10**6), [], NOW
    while now < NOW + seconds:
        rooms = {
            "poll": quota.allowed_polls(now),
            "submit": quota.allowed_submissions(now, in_flight=0),
            "query": int(not quota.query_delay(now)),
        }
        room = rooms[kind]
        quota = quota.after_calls(kind, room, now)
        calls += [now] * room
        now += 0.05
    return calls


@pytest.mark.parametrize("rate", [1, 10, 60, 120, 6000])
@pytest.mark.parametrize("kind", ["submit", "poll", "query"])
def test_no_minute_exceeds_its_share(kind: CallKind, rate: int) -> None:
    """F7: in any 60 seconds there are no more calls than the share allows, but some are made."""
    calls = drain(kind, rate, 300)
    most = max(bisect_left(calls, call + 60) - index for index, call in enumerate(calls))
    # The first and the last one of 60 seconds may both belong to a burst.
    assert 1 <= most <= max(2, rate * (SHARES[kind].burst + SHARES[kind].steady) + 1)


def test_the_shares_are_within_the_limit() -> None:
    """F7: all shares together, bursts included, leave a margin."""
    assert sum(share.burst + share.steady for share in SHARES.values()) < 0.96


def test_the_share_is_used() -> None:
    """F7: a backlog drains at the steady part of its share."""
    assert len(drain("submit", 120, 600)) == pytest.approx(10 * 120 * SHARES["submit"].steady, rel=0.05)


def test_queries_wait_for_their_share() -> None:
    """F7: a few queries at once, then one by one; `query_delay` is the exact time until the next one."""
    quota = Quota(requests_per_minute=60)
    for _ in range(3):
        assert quota.query_delay(NOW) == 0
        quota = quota.after_calls("query", 1, NOW)
    wait = quota.query_delay(NOW)
    assert wait == pytest.approx(20, abs=0.1)
    assert quota.query_delay(NOW + wait - 0.1) > 0
    assert quota.query_delay(NOW + wait) == 0
    assert quota.allowed_submissions(NOW, in_flight=0) > 0
    assert quota.after_rate_limit(NOW, retry_after=90).query_delay(NOW) == 90


def test_a_reset_is_bounded() -> None:
    """F7: if RateLimit-Reset is absurd, the account is not blocked for years."""
    quota = Quota(requests_per_minute=600).after_headers(RateHeaders(remaining=0, reset=999_999_999), NOW)
    assert quota.allowed_polls(NOW + MAX_RESET_SECONDS) > 0


def test_headers_teach_the_rate() -> None:
    """F7: the limit is the one of the answers; if an answer has none, it stays the same."""
    assert Quota().after_headers(RateHeaders(limit=600), NOW).requests_per_minute == 600
    assert Quota().after_headers(RateHeaders(), NOW) == Quota()


def test_others_use_the_key_too() -> None:
    """F7: if too little of a minute's limit remains, all calls wait for the next minute."""
    quota = Quota(requests_per_minute=600).after_headers(RateHeaders(limit=600, remaining=11, reset=30), NOW)
    assert quota.allowed_submissions(NOW + 29, in_flight=0) == quota.allowed_polls(NOW + 29) == 0
    assert quota.allowed_submissions(NOW + 30, in_flight=0) > 0
    assert (
        Quota(requests_per_minute=600)
        .after_headers(RateHeaders(remaining=12, reset=30), NOW)
        .allowed_polls(NOW)
        > 0
    )


def test_retry_after_is_kept() -> None:
    """F7: after `rate_limit_exceeded` no calls are sent until the given time; it never becomes earlier."""
    quota = Quota().after_rate_limit(NOW, retry_after=20).after_rate_limit(NOW, retry_after=1)
    assert quota.allowed_polls(NOW + 19.9) == quota.allowed_submissions(NOW + 19.9, in_flight=0) == 0
    assert quota.allowed_polls(NOW + 20) == 1


def test_the_window_grows_while_it_is_used() -> None:
    """F7: if a submission is accepted with a full window, the limit grows by one, otherwise not."""
    assert Quota().after_accepted(NOW, in_flight=FIRST_IN_FLIGHT).in_flight_limit == FIRST_IN_FLIGHT + 1
    assert Quota().after_accepted(NOW, in_flight=FIRST_IN_FLIGHT - 1).in_flight_limit == FIRST_IN_FLIGHT


def test_a_refusal_narrows_the_window() -> None:
    """F7: the limit shrinks by an eighth or by one, once for each burst of refusals; polls go on."""
    quota = Quota(requests_per_minute=6000, in_flight_limit=11)
    once = quota.after_concurrency_limit(NOW, sent_at=NOW - 1, retry_after=2)
    assert once.in_flight_limit == 10
    assert once.after_concurrency_limit(NOW, sent_at=NOW - 1, retry_after=2).in_flight_limit == 10
    assert once.after_concurrency_limit(NOW + 5, sent_at=NOW + 4, retry_after=2).in_flight_limit == 9
    assert (
        Quota(in_flight_limit=80).after_concurrency_limit(NOW, sent_at=NOW, retry_after=2).in_flight_limit
        == 70
    )
    assert once.allowed_submissions(NOW + 1.9, in_flight=0) == 0
    assert once.allowed_submissions(NOW + 2, in_flight=9) == 1
    assert once.allowed_polls(NOW) > 0


def test_the_window_is_never_closed() -> None:
    """F7: one generation is always allowed; otherwise the limit could never grow again."""
    quota = Quota(in_flight_limit=1).after_concurrency_limit(NOW, sent_at=NOW, retry_after=None)
    assert quota.allowed_submissions(NOW + 5, in_flight=0) == 1


def test_a_window_that_was_set_is_tried_at_times() -> None:
    """F7: the limit grows by one if two minutes have passed since the last refusal."""
    quota = Quota(in_flight_limit=10, in_flight_refused_at=NOW)
    assert quota.after_accepted(NOW + RAISE_AFTER_SECONDS - 1, in_flight=10).in_flight_limit == 10
    grown = quota.after_accepted(NOW + RAISE_AFTER_SECONDS, in_flight=10)
    assert grown.in_flight_limit == 11
    assert grown.after_accepted(NOW + RAISE_AFTER_SECONDS + 1, in_flight=11).in_flight_limit == 11


def test_a_refused_account_is_probed() -> None:
    """F6: one submission at a time, at growing intervals, until one is accepted."""
    quota = Quota(requests_per_minute=6000, in_flight_limit=50)
    waits, now, sent_at = [], NOW, NOW - 1
    for _ in range(9):
        quota = quota.after_account_refused(now, sent_at=sent_at, pause="{}")
        waits.append(quota.submits_after - now)
        now = sent_at = quota.submits_after
        assert quota.allowed_submissions(now - 0.1, in_flight=0) == 0
        assert quota.allowed_submissions(now, in_flight=0) == 1
        quota = quota.after_calls("submit", 1, now)
    assert waits[:4] == [5, 10, 20, 40]
    assert waits[-1] == MAX_PROBE_SECONDS
    assert quota.paused_at == NOW
    resumed = quota.after_accepted(now + 1, in_flight=1)
    assert resumed == replace(resumed, paused_at=0.0, probes=0, pause=None)
    assert resumed.allowed_submissions(now + 1, in_flight=1) > 1


def test_a_processed_submission_ends_the_pause() -> None:
    """F6: if Clipia refuses only the job, it has accepted the key; only an acceptance counts as one."""
    paused = Quota(requests_per_minute=6000).after_account_refused(NOW, sent_at=NOW - 1, pause="{}")
    resumed = paused.unpaused(NOW + 5)
    assert (resumed.paused_at, resumed.pause, resumed.accepted_at) == (0.0, None, 0.0)
    assert resumed.allowed_submissions(NOW + 5, in_flight=0) > 1
    assert resumed.unpaused(NOW + 6) is resumed
    assert paused.after_accepted(NOW + 5, in_flight=1) == replace(resumed, accepted_at=NOW + 5)


def test_refused_jobs_share_a_tenth_of_the_requests() -> None:
    """F7: the time between two attempts at a job grows with the number of refused jobs."""
    quota = Quota(requests_per_minute=120)
    assert [quota.retry_interval(count) for count in (1, 12, 1000)] == pytest.approx([5, 60, 5000])


def test_a_burst_of_refusals_is_one() -> None:
    """F6: submissions that were in flight when the pause began do not extend it."""
    first = Quota(requests_per_minute=6000).after_account_refused(NOW, sent_at=NOW - 1, pause="{}")
    quota = first
    for number in range(16):
        quota = quota.after_account_refused(NOW + number / 10, sent_at=NOW - 1, pause="{}")
    assert quota == first


def test_there_is_one_probe_at_a_time() -> None:
    """F6: if a probe is not answered, the next one waits as long as a call may take."""
    quota = Quota(requests_per_minute=6000).after_account_refused(NOW, sent_at=NOW - 1, pause="{}")
    quota = quota.after_calls("submit", 1, NOW + 5)
    assert quota.allowed_submissions(NOW + 5 + PROBE_TIMEOUT_SECONDS - 1, in_flight=0) == 0
    assert quota.allowed_submissions(NOW + 5 + PROBE_TIMEOUT_SECONDS, in_flight=0) == 1
