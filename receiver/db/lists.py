"""Lists in statements."""

from collections.abc import Collection
from typing import TypeVar

T = TypeVar("T")


def padded(values: Collection[T]) -> list[T]:
    """Return values for an IN, the last one repeated up to a power of two.

    A list of each length is a statement of its own to the database, which would prepare it anew; so there are
    few lengths.
    """
    found = list(values)
    if not found:
        return found
    length = 1 << (len(found) - 1).bit_length()
    return found + found[-1:] * (length - len(found))
