"""Credits in two columns: whole credits, and millionths in a second column.

Earlier releases, which can run on the same schema, know the column with whole credits only.
"""

from collections.abc import Mapping
from typing import Any, Final

from receiver.price import MICROS, Credits, from_micros, to_micros

MICROS_SUFFIX: Final = "_micros"


def columns(price: Credits | None) -> tuple[int | None, int]:
    """Return the values of both columns of a price."""
    if price is None:
        return None, 0
    # A whole number, as all prices are so far, without the arithmetic.
    return (price, 0) if isinstance(price, int) else divmod(to_micros(price), MICROS)


def split(**prices: Credits | None) -> dict[str, Any]:
    """Return the values of both columns of each price, by their names."""
    values: dict[str, Any] = {}
    for name, price in prices.items():
        values[name], values[name + MICROS_SUFFIX] = columns(price)
    return values


def join(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a row with one number for each price."""
    found = dict(row)
    for column in [name for name in found if name.endswith(MICROS_SUFFIX)]:
        rest, name = found.pop(column), column.removesuffix(MICROS_SUFFIX)
        # PostgreSQL returns a sum as a Decimal.
        found[name] = None if found[name] is None else from_micros(int(found[name]) * MICROS + int(rest))
    return found
