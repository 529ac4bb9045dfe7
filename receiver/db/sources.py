"""By which ids somebody may mean an event.

An event's `id` is made of its source and its `request_id`. So nothing but `id` has to be unique, and finding
a `request_id` takes the names of the sources, and no index of its own, which would cost every webhook a page.
"""

import contextlib
from collections.abc import Collection
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.arrays import DIALECTS
from receiver.db.rows import event_id
from receiver.db.statements import insert_for
from receiver.db.tables import sources


async def remember(connection: AsyncConnection, source: str) -> None:
    """Note that there are events of a source; in the transaction that inserts one, after it."""
    await connection.execute(_REMEMBER[connection.dialect.name], {"name": source})


# Made once: to make one takes as long as to run it.
_REMEMBER = {name: insert_for(name, sources).on_conflict_do_nothing() for name in DIALECTS}


async def find_event_ids(connection: AsyncConnection, keys: Collection[str]) -> dict[str, set[UUID]]:
    """Return the ids that the event of each key may have; a key is an event's id or Clipia's `request_id`."""
    names = (await connection.execute(select(sources.c.name))).scalars().all()
    return {key: _event_ids(names, key) for key in keys}


def _event_ids(names: Collection[str], key: str) -> set[UUID]:
    found = set()
    # What is no Unicode is nobody's `request_id`.
    with contextlib.suppress(UnicodeEncodeError):
        found = {event_id(name, key) for name in names}
    with contextlib.suppress(ValueError):
        found.add(UUID(key))
    return found
