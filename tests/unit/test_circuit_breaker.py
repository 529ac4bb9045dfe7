"""The circuit breaker of a destination; the tests set the time."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.core.circuit_breaker import (
    FAILURES_TO_OPEN,
    FIRST_PROBE_SECONDS,
    MAX_PROBE_SECONDS,
    CircuitBreaker,
)

NOW = 5_000.0
WIDTH = 32

Step = Literal["start", "succeed", "fail", "wait"]


def opened(width: int = WIDTH, *, now: float = NOW) -> CircuitBreaker:
    """Return a circuit breaker that has just opened."""
    circuit = CircuitBreaker(width)
    assert [circuit.failed(now, started=now - 1) for _ in range(FAILURES_TO_OPEN)][-1]
    return circuit


def test_it_is_closed_at_first() -> None:
    """A new circuit breaker is closed: it allows the full concurrency."""
    circuit = CircuitBreaker(WIDTH)
    assert not circuit.is_open
    assert [circuit.available(NOW, under_way=n) for n in (0, 30, 32, 33)] == [32, 2, 0, 0]


def test_the_fifth_failure_in_a_row_opens_it() -> None:
    """E4: five failures in a row open the circuit, and only the fifth call returns True."""
    circuit = CircuitBreaker(WIDTH)
    for _ in range(3):
        assert [circuit.failed(NOW, started=NOW - 1) for _ in range(4)] == [False] * 4
        assert circuit.available(NOW, under_way=0) == WIDTH
        circuit.succeeded()
    said = [circuit.failed(NOW, started=NOW - 1) for _ in range(5)]
    assert said == [False, False, False, False, True]
    assert circuit.is_open


def test_only_one_probe_at_a_time_is_let_through() -> None:
    """E4: a probe is allowed if it is due and no other delivery is in flight."""
    circuit = opened()
    assert circuit.available(NOW + FIRST_PROBE_SECONDS - 0.01, under_way=0) == 0
    assert circuit.available(NOW + FIRST_PROBE_SECONDS, under_way=0) == 1
    assert circuit.available(NOW + 10 * MAX_PROBE_SECONDS, under_way=0) == 1
    assert circuit.available(NOW + 10 * MAX_PROBE_SECONDS, under_way=1) == 0


def test_a_probe_waits_as_long_as_the_destination_asks() -> None:
    """E5: Retry-After delays the next probe, but not beyond the longest pause."""
    for asked, pause in ((0.0, FIRST_PROBE_SECONDS), (7.0, 7.0), (86_400.0, MAX_PROBE_SECONDS)):
        circuit = CircuitBreaker(WIDTH)
        for _ in range(FAILURES_TO_OPEN):
            circuit.failed(NOW, started=NOW - 1, retry_after=asked)
        assert circuit.available(NOW + pause - 0.01, under_way=0) == 0
        assert circuit.available(NOW + pause, under_way=0) == 1


def test_probes_come_at_growing_intervals() -> None:
    """E4: each failed probe doubles the pause, up to a minute, without end."""
    circuit, now = opened(), NOW
    pauses = []
    for _ in range(2000):
        low, high = 0.0, 4 * MAX_PROBE_SECONDS
        while high - low > 0.01:
            middle = (low + high) / 2
            low, high = (low, middle) if circuit.available(now + middle, under_way=0) else (middle, high)
        pauses.append(round(high))
        now += high
        assert not circuit.failed(now, started=now), "it is open already"
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert set(pauses[6:]) == {60}


def test_earlier_deliveries_are_not_probes() -> None:
    """E4: deliveries that began before the opening and fail neither delay probes nor double the pause."""
    circuit = opened()
    for late in range(27):
        assert not circuit.failed(NOW + 0.02 * late, started=NOW - 1)
    assert circuit.available(NOW + FIRST_PROBE_SECONDS, under_way=0) == 1
    circuit.failed(NOW + FIRST_PROBE_SECONDS + 0.5, started=NOW + FIRST_PROBE_SECONDS)
    assert circuit.available(NOW + FIRST_PROBE_SECONDS + 0.5 + 2 * FIRST_PROBE_SECONDS, under_way=0) == 1


def test_recovery_doubles_with_each_success() -> None:
    """E5: if a destination is back, it gets one delivery, then two, then four, up to the full concurrency."""
    circuit = opened()
    widths = []
    for _ in range(7):
        circuit.succeeded()
        widths.append(circuit.available(NOW, under_way=0))
    assert widths == [1, 2, 4, 8, 16, 32, 32]
    assert circuit.available(NOW, under_way=20) == 12


@pytest.mark.parametrize("successes", [1, 3, 5])
def test_a_failure_during_recovery_opens_it_at_once(successes: int) -> None:
    """E5: if a destination fails again while half-open, the circuit opens, with short pauses first."""
    circuit = opened()
    for _ in range(6):
        circuit.failed(NOW + 5, started=NOW + 4)
    for _ in range(successes):
        circuit.succeeded()
    assert circuit.failed(NOW + 100, started=NOW + 99)
    assert circuit.is_open
    assert circuit.available(NOW + 100 + FIRST_PROBE_SECONDS, under_way=0) == 1


def test_once_recovered_it_takes_five_failures_again() -> None:
    """E4: if the circuit is closed again, single failures do not open it."""
    circuit = opened()
    for _ in range(6):
        circuit.succeeded()
    assert [circuit.failed(NOW, started=NOW - 1) for _ in range(5)] == [False] * 4 + [True]


def test_a_late_success_counts() -> None:
    """If a delivery that began before the opening succeeds, the circuit closes too."""
    circuit = opened()
    circuit.succeeded()
    assert not circuit.is_open
    assert circuit.available(NOW, under_way=0) == 1


def test_a_width_of_one_works() -> None:
    """A lane with a concurrency of one opens, probes and recovers like the others."""
    circuit = opened(1)
    assert circuit.available(NOW + FIRST_PROBE_SECONDS, under_way=0) == 1
    circuit.succeeded()
    assert circuit.available(NOW, under_way=0) == 1
    assert circuit.available(NOW, under_way=1) == 0


@given(
    width=st.integers(1, 40),
    steps=st.lists(
        st.tuples(st.sampled_from(["start", "succeed", "fail", "wait"]), st.floats(0, 90)), max_size=150
    ),
)
def test_starts_stay_within_the_limits(width: int, steps: list[tuple[Step, float]]) -> None:
    """E5: after any sequence of results, starts stay within the concurrency, the probes and the ramp."""
    circuit, now = CircuitBreaker(width), NOW
    under_way: list[float] = []
    since_it_opened: int | None = None
    for step, amount in steps:
        if step == "start":
            available = circuit.available(now, under_way=len(under_way))
            assert 0 <= available <= width - len(under_way)
            if since_it_opened is not None and available:
                most = 1 if since_it_opened == 0 else 2 ** (since_it_opened - 1)
                assert len(under_way) + available <= most
            if circuit.is_open and available:
                assert not under_way
            under_way += [now] * available
        elif step == "wait":
            now += amount
        elif under_way:
            started = under_way.pop(int(amount) % len(under_way))
            if step == "succeed":
                circuit.succeeded()
                since_it_opened = None if since_it_opened is None else since_it_opened + 1
            elif circuit.failed(now, started=started):
                since_it_opened = 0
                assert circuit.is_open
    assert circuit.available(now + MAX_PROBE_SECONDS, under_way=0) >= 1, (
        "it may be left alone, never given up"
    )


@pytest.mark.parametrize("width", [1, WIDTH])
def test_a_circuit_that_is_suspected_ramps_up_or_opens_at_once(width: int) -> None:
    """E4: if another process has trouble, one delivery decides: its failure opens, its success ramps up."""
    circuit = CircuitBreaker(width)
    circuit.suspect()
    assert circuit.available(NOW, under_way=0) == 1
    assert circuit.failed(NOW, started=NOW - 1)
    circuit = CircuitBreaker(width)
    circuit.suspect()
    circuit.succeeded()
    assert circuit.available(NOW, under_way=0) == min(2, width)
    assert not circuit.failed(NOW, started=NOW - 1) or width == WIDTH


def test_a_success_elsewhere_brings_the_next_probe_forward() -> None:
    """E4: an open circuit probes at once if another process has reached the destination."""
    circuit = opened()
    circuit.suspect()
    assert circuit.is_open
    assert not circuit.available(NOW, under_way=0)
    circuit.probe_at_once(NOW)
    assert circuit.available(NOW, under_way=0) == 1
