"""Credits: prices and budgets, exact to a millionth; pure.

Clipia's prices are whole numbers so far; JSON may have 12 or 12.0. Fractions are kept: if they were cut off,
a job could be free, and if they were rounded, the price would differ from Clipia's.
"""

from collections.abc import Iterable
from decimal import Decimal
from typing import Final

Credits = int | float
"""An int if it is a whole number, so that JSON has 12 and never 12.0."""
MICROS: Final = 1_000_000
MAX_CREDITS: Final = 10**12
"""A larger number is not a price."""


def read_credits(value: object) -> Credits | None:
    """Return a number of credits, rounded to millionths.

    Return None if the value is not a number from 0 to `MAX_CREDITS`, or if it is NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_CREDITS:
        return None
    return value if isinstance(value, int) else from_micros(to_micros(value))


def to_micros(value: Credits) -> int:
    """Return credits as millionths."""
    if isinstance(value, int):
        return value * MICROS
    # The decimal digits, because 12.1 is a little less than that in binary.
    return int((Decimal(repr(value)) * MICROS).to_integral_value())


def from_micros(micros: int) -> Credits:
    """Return millionths as credits."""
    whole, rest = divmod(micros, MICROS)
    return micros / MICROS if rest else whole


def total(values: Iterable[Credits]) -> Credits:
    """Return the exact sum; as floats, 0.1 + 0.2 would be more than 0.3."""
    return from_micros(sum(map(to_micros, values)))
