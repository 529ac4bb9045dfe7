"""Credits: values that are prices, and exact sums."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from receiver.price import MAX_CREDITS, MICROS, from_micros, read_credits, to_micros, total


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (12, "12"),
        (12.0, "12"),
        (12.5, "12.5"),
        (0, "0"),
        (-0.0, "0"),
        (0.1, "0.1"),
        (12.345678, "12.345678"),
        (12.3456789, "12.345679"),
        (1e-9, "0"),
        (5e-324, "0"),
        (1e3, "1000"),
        (MAX_CREDITS, str(MAX_CREDITS)),
        (999_999_999_999.5, "999999999999.5"),
    ],
)
def test_a_price(value: Any, read: str) -> None:
    """B10: 12.0 is 12, a fraction is kept to the millionth, and JSON has the same digits."""
    assert json.dumps(read_credits(value)) == read


@pytest.mark.parametrize(
    "value",
    [
        -1,
        -0.5,
        MAX_CREDITS + 1,
        1e300,
        2**63,
        math.inf,
        -math.inf,
        math.nan,
        True,
        False,
        None,
        "12",
        "12.5",
        [],
        {},
    ],
    ids=repr,
)
def test_no_price(value: Any) -> None:
    """B10: a value is not a price if it is negative, infinite, not a number, or too large."""
    assert read_credits(value) is None


@given(st.integers(0, MAX_CREDITS * MICROS))
def test_millionths_stay(micros: int) -> None:
    """If a price fits into a double, it is the same after it was stored."""
    price = from_micros(micros)
    if isinstance(price, int) or micros < 10**15:
        assert to_micros(price) == micros


def test_sums_are_exact() -> None:
    """Sums and differences of tenths are exact."""
    assert total([0.1, 0.2]) == 0.3
    assert json.dumps(total([12.5, 12.5])) == "25"
    assert json.dumps(total([0.3, -0.1])) == "0.2"
    assert json.dumps(total([])) == "0"
