"""Credits as two columns: the whole ones, and the millionths beyond them.

The column of the whole ones is the one that earlier releases know, and they can run on the same schema.
"""

from collections.abc import Mapping
from typing import Any, Final

from receiver.price import MICROS, Credits, from_micros, to_micros

REST: Final = "_micros"


def split(**prices: Credits | None) -> dict[str, Any]:
    """Return the values of the columns of prices, by the names of their columns."""
    values: dict[str, Any] = {}
    for name, price in prices.items():
        whole, rest = (None, 0) if price is None else divmod(to_micros(price), MICROS)
        values |= {name: whole, name + REST: rest}
    return values


def join(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Return a row in which each price is one number."""
    found = dict(row)
    for column in [name for name in found if name.endswith(REST)]:
        rest, name = found.pop(column), column.removesuffix(REST)
        # A sum is another kind of number to PostgreSQL.
        found[name] = None if found[name] is None else from_micros(int(found[name]) * MICROS + int(rest))
    return found
