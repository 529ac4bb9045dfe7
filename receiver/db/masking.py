"""Masks secrets in stored errors: earlier releases could quote them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import orjson
from sqlalchemy import Column, Row, select, update

from receiver.db.database import Database
from receiver.db.tables import accounts, attempts, deliveries, jobs, media, replays
from receiver.masking import mask

PAGE: Final = 500
_TEXTS: Final[tuple[tuple[Column[Any], Column[Any]], ...]] = (
    (jobs.c.seq, jobs.c.error),
    (attempts.c.seq, attempts.c.error),
    (deliveries.c.id, deliveries.c.error),
    (media.c.id, media.c.error),
    (replays.c.seq, replays.c.error),
    (accounts.c.id, accounts.c.pause),
)
"""The primary key and the error column of each table that has one."""


async def mask_errors(database: Database) -> Counter[str]:
    """Mask this process's secrets, and texts that look like secrets, in all errors; count the rows by table.

    It works in pages with short transactions, so that it may run while the service does. Raises
    DatabaseUnavailable.
    """
    masked = Counter[str]()
    for key, column in _TEXTS:
        after = None
        while page := await _read(database, key, column, after=after):
            masked[column.table.name] += await _mask_page(database, key, column, page)
            after = page[-1][0]
    return +masked


async def _read(
    database: Database, key: Column[Any], column: Column[Any], *, after: Any
) -> Sequence[Row[Any, Any]]:
    statement = select(key, column).where(column.is_not(None)).order_by(key).limit(PAGE)
    if after is not None:
        statement = statement.where(key > after)
    async with database.read() as connection:
        return (await connection.execute(statement)).all()


async def _mask_page(
    database: Database, key: Column[Any], column: Column[Any], page: Sequence[Row[Any, Any]]
) -> int:
    changes = [(row[0], row[1], text) for row in page if (text := mask_error(row[1])) != row[1]]
    if not changes:
        return 0
    changed = 0
    async with database.write() as connection:
        for identity, before, after in changes:
            # A worker may have changed the error since it was read.
            same = key == identity, column == before
            done = await connection.execute(update(column.table).where(*same).values({column: after}))
            changed += done.rowcount
    return changed


def mask_error(text: str) -> str:
    """Return an error without secrets; it is a plain text or the JSON of an API error."""
    try:
        content = orjson.loads(text)
    except orjson.JSONDecodeError:
        content = None
    if not isinstance(content, dict):
        return mask(text)
    masked = {name: mask(value) if isinstance(value, str) else value for name, value in content.items()}
    return text if masked == content else orjson.dumps(masked).decode()
