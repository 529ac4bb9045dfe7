"""Finds events by `id` or `request_id`.

An event's `id` is a hash of its source and `request_id`. So a `request_id` is found by computing the ids for
all sources. An index on `request_id` would be simpler, but each webhook would dirty one more B-tree page.
"""

import contextlib
from collections.abc import Collection
from uuid import UUID

from sqlalchemy import select

from receiver.db.array_parameters import DIALECTS
from receiver.db.connection import SqlConnection
from receiver.db.rows import event_id
from receiver.db.statements import insert_for
from receiver.db.tables import sources


async def add(connection: SqlConnection, source: str) -> None:
    """Add a source; call it in the transaction that inserts its event, after the event."""
    await connection.execute(_ADD[connection.dialect.name], {"name": source})


# Built once: building a statement takes as long as running it.
_ADD = {name: insert_for(name, sources).on_conflict_do_nothing() for name in DIALECTS}


async def find_event_ids(connection: SqlConnection, keys: Collection[str]) -> dict[str, set[UUID]]:
    """Return the possible event ids for each key, which is an event's id or Clipia's `request_id`."""
    names = (await connection.execute(select(sources.c.name))).scalars().all()
    return {key: _event_ids(names, key) for key in keys}


def _event_ids(names: Collection[str], key: str) -> set[UUID]:
    found = set()
    # A text with lone surrogates is no `request_id`.
    with contextlib.suppress(UnicodeEncodeError):
        found = {event_id(name, key) for name in names}
    with contextlib.suppress(ValueError):
        found.add(UUID(key))
    return found
