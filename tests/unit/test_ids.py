"""Ids of rows: time-ordered UUIDs."""

import time
import uuid

from receiver.db.rows import new_id


def test_an_id_is_a_uuid_of_version_7() -> None:
    """RFC 9562, section 5.7: milliseconds since 1970 in the first 48 bits, then version and variant."""
    before = time.time_ns() // 1_000_000
    found = new_id()
    assert before <= found.int >> 80 <= time.time_ns() // 1_000_000
    assert (found.version, found.variant) == (7, uuid.RFC_4122)


def test_ids_are_in_the_order_in_which_they_were_made() -> None:
    """Rows of one insert are listed in the order of the insert."""
    ids = [new_id() for _ in range(1000)]
    assert ids == sorted(set(ids))
