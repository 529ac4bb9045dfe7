"""Credits: prices and budgets, exact to a millionth; pure.

Clipia's prices are whole numbers so far, and JSON may write one as 12 or as 12.0. A fraction is kept: without
it a job may be free, and rounded it is another price than Clipia's.
"""

from collections.abc import Iterable
from decimal import Decimal
from typing import Final

Credits = int | float
"""An int if it is a whole number, so that it is written as 12 and never as 12.0."""
MICROS: Final = 1_000_000
MAX_CREDITS: Final = 10**12
"""A larger number is no price."""


def read_credits(value: object) -> Credits | None:
    """Return a number of credits, rounded to millionths; None for what is none.

    That is what is no number, a negative one, NaN, infinity, and one beyond `MAX_CREDITS`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_CREDITS:
        return None
    return value if isinstance(value, int) else from_micros(to_micros(value))


def to_micros(value: Credits) -> int:
    """Return credits as millionths."""
    if isinstance(value, int):
        return value * MICROS
    # As it is written: 12.1 is a little less than that in binary.
    return int((Decimal(repr(value)) * MICROS).to_integral_value())


def from_micros(micros: int) -> Credits:
    """Return millionths as credits."""
    whole, rest = divmod(micros, MICROS)
    return micros / MICROS if rest else whole


def total(values: Iterable[Credits]) -> Credits:
    """Return an exact sum: in binary 0.1 and 0.2 are more than 0.3."""
    return from_micros(sum(map(to_micros, values)))
