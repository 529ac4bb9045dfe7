"""The rate limit of a destination; the tests set the time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.core.token_bucket import BURST_SECONDS, TokenBucket

NOW = 5_000.0


def test_attempts_are_evenly_spaced() -> None:
    """E5: at 4 per second an attempt begins every 0.25 s, and idle time is not saved up."""
    bucket = TokenBucket(4)
    assert bucket.available(NOW) == 1
    bucket.take(1)
    assert (bucket.available(NOW), bucket.wait(NOW)) == (0, 0.25)
    assert bucket.available(NOW + 0.2) == 0
    assert (bucket.available(NOW + 0.25), bucket.wait(NOW + 0.25)) == (1, 0)
    assert bucket.available(NOW + 3600) == 1


@pytest.mark.parametrize(("rate", "chunk"), [(20, 1), (100, 1), (1000, 12), (0.1, 1)])
def test_fast_lanes_claim_several_at_once(rate: float, chunk: int) -> None:
    """E5: an empty bucket allows no attempt until it is a quarter full, so that lanes claim many rows."""
    bucket = TokenBucket(rate)
    bucket.take(bucket.available(NOW))
    delay = bucket.wait(NOW)
    assert bucket.available(NOW + 0.9 * delay) == 0
    assert bucket.available(NOW + delay) == chunk


@given(
    rate=st.floats(0.1, 5_000),
    steps=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 100)), max_size=60),
)
def test_no_stretch_of_time_exceeds_the_rate(rate: float, steps: list[tuple[float, int]]) -> None:
    """E5: at any times, no more attempts begin than the rate and one burst allow."""
    bucket, now = TokenBucket(rate), NOW
    begun: list[tuple[float, int]] = []
    for pause, wanted in steps:
        now += pause
        count = min(wanted, bucket.available(now))
        bucket.take(count)
        begun.append((now, count))
    for first, (start, _) in enumerate(begun):
        total = 0
        for at, count in begun[first:]:
            total += count
            assert total <= max(1.0, rate * BURST_SECONDS) + (at - start) * rate + 0.01
