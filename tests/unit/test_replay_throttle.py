"""How many replays may be under way beside live deliveries."""

from uuid import UUID, uuid4

import pytest

from receiver.core.replay_throttle import LIVE_SECONDS, MAX_REST_SECONDS, ReplayThrottle

IDS = [uuid4() for _ in range(4)]


def throttle(*started: UUID, at: float = 100.0) -> ReplayThrottle:
    """Return a throttle for 16 places with replays under way."""
    made = ReplayThrottle(16)
    made.start(started, at)
    return made


@pytest.mark.parametrize(
    ("places", "under_way", "free", "allowed"),
    [
        (16, 0, 16, 4),
        (16, 0, 3, 3),
        (16, 0, 0, 0),
        (16, 1, 15, 3),
        (16, 4, 12, 0),
        (15, 0, 15, 3),
        (15, 4, 11, 0),
        (4, 0, 4, 1),
        (3, 0, 3, 1),
        (1, 0, 1, 1),
        (1, 1, 0, 0),
    ],
)
def test_replays_have_a_quarter_of_the_places(places: int, under_way: int, free: int, allowed: int) -> None:
    """E12: replays have a quarter of the places, at least one, whether there is live traffic or not."""
    for live in (0, 1):
        one = ReplayThrottle(places)
        one.start(IDS[:under_way], 100.0)
        assert one.is_busy == (under_way > 0)
        assert one.allowed(100.0, free=free, live=live) == allowed


@pytest.mark.parametrize(
    ("live_at", "ended_at", "rest"),
    [
        (None, 100.1, None),
        (100.0, 100.1, 0.1),
        (100.0, 100.0, 0.0),
        (100.0, 100.9, MAX_REST_SECONDS),
        (100.0, 100.0 + LIVE_SECONDS, None),
        (99.5, 100.6, None),
    ],
)
def test_replays_rest_beside_live_traffic(live_at: float | None, ended_at: float, rest: float | None) -> None:
    """E12: after a replay the others rest for as long as it took, if a live delivery was claimed lately."""
    one = throttle(IDS[0])
    if live_at is not None:
        one.allowed(live_at, free=16, live=1)
    one.allowed(100.0, free=16, live=0)
    found = one.end(IDS[0], ended_at)
    assert found == (None if rest is None else pytest.approx(rest))
    assert not one.is_busy
    if rest:
        assert one.allowed(ended_at + rest - 0.01, free=16, live=0) == 0
        assert one.allowed(ended_at + rest + 0.01, free=16, live=0) == 4


def test_a_rest_is_not_extended() -> None:
    """E12: a replay that ends during a rest does not begin another one."""
    one = throttle(*IDS)
    one.allowed(100.0, free=16, live=1)
    assert one.end(IDS[0], 100.2) == pytest.approx(0.2)
    assert one.end(IDS[1], 100.3) is None
    assert one.allowed(100.39, free=16, live=0) == 0
    assert one.allowed(100.41, free=16, live=0) == 2


def test_a_replay_that_was_forgotten_needs_no_rest() -> None:
    """E12: if a lease was lost and claimed anew, the first end counts and the second takes no time."""
    one = throttle(IDS[0])
    one.allowed(100.0, free=16, live=1)
    one.drop(IDS[0])
    assert not one.is_busy
    assert one.end(IDS[0], 100.5) == 0.0
    assert one.allowed(100.5, free=16, live=1) == 4


@pytest.mark.parametrize(
    ("live", "after", "allowed"),
    [(1, 0.0, 0), (1, MAX_REST_SECONDS - 0.01, 0), (1, MAX_REST_SECONDS, 4), (0, 0.0, 4)],
)
def test_replays_are_not_looked_for_all_the_time(live: int, after: float, allowed: int) -> None:
    """E12: after a claim without replays, a claim of live deliveries leaves them out for a while."""
    one = throttle()
    one.found_none(100.0)
    assert one.allowed(100.0 + after, free=16, live=live) == allowed
