"""Reading events forward by `seq`, up to a place before which no event can be added any more."""

import asyncio
from typing import Final

from sqlalchemy import Table, func, select, text

from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.tables import events

SPAN: Final = 20_000
"""The most events that one statement reads."""
SETTLE_SECONDS: Final = 5.0
"""How long a reader waits for transactions under way; then it reads nothing, and tries again."""
_PAUSE_SECONDS: Final = 0.005

_WRITERS: Final = text("""
    SELECT virtualtransaction FROM pg_locks
    WHERE locktype = 'relation' AND relation = CAST(:name AS regclass) AND mode = 'RowExclusiveLock'
      AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
""")


async def settle(
    database: Database, after: int, table: Table = events, *, restarts: bool = True
) -> tuple[int, int]:
    """Return the range to read, from a number (exclusive) to another (inclusive); it may be empty.

    The number is the first column of the table. On SQLite the rows after a pruned end get its numbers again:
    then the range begins anew, or without `restarts` at the present end.

    A transaction of PostgreSQL draws a `seq` before it commits, so a later `seq` can be visible first, and a
    reader that went on from there would never see the other one. But a transaction locks the table before it
    draws: once all that hold this lock now have ended, everything up to the present end is visible.
    """
    async with database.read() as connection:
        last = await connection.scalar(select(func.max(table.c[0]))) or 0
        if connection.dialect.name == "sqlite":
            # It has one writer at a time, but gives the numbers of pruned events to new ones.
            start = after if last >= after else 0 if restarts else last
            return start, min(last, start + SPAN)
        if last <= after:
            return after, after
        # After the query above: a writer that has drawn a smaller number holds its lock, or has ended.
        writers = await _find_writers(connection, table)
    deadline = asyncio.get_running_loop().time() + SETTLE_SECONDS
    while writers:
        if asyncio.get_running_loop().time() > deadline:
            return after, after
        await asyncio.sleep(_PAUSE_SECONDS)
        async with database.read() as connection:
            writers &= await _find_writers(connection, table)
    return after, min(last, after + SPAN)


async def _find_writers(connection: SqlConnection, table: Table) -> set[str]:
    return set((await connection.execute(_WRITERS, {"name": table.name})).scalars())
