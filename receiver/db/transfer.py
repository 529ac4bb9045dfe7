"""A ledger as rows that another database takes: events with all that hangs on them, jobs, and replays.

What is known there already (by the keys that are unique for ever) is left as it is, so an import can be
repeated, and can be interrupted. Leases stay behind: whoever held them works on the other database.
"""

import base64
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import (
    JSON,
    Boolean,
    Double,
    LargeBinary,
    String,
    Table,
    Text,
    func,
    insert,
    select,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db import outbox, sources
from receiver.db.rows import event_id
from receiver.db.statements import between, insert_unless_taken
from receiver.db.tables import (
    PlainUuid,
    UtcDateTime,
    attempts,
    deliveries,
    events,
    jobs,
    media,
    receipts,
    replays,
)

VERSION: Final = 1
IDS: Final = 10_000
CHILDREN: Final = {"receipts": receipts, "media": media, "deliveries": deliveries}

_TYPES: Final[Mapping[type, type | tuple[type, ...]]] = {
    String: str,
    Text: str,
    Boolean: bool,
    Double: (int, float),
}
"""What JSON has for a column; the others are whole numbers."""
_LEFT_BEHIND: Final = {"seq", "event_seq", "lease"}

Line = dict[str, Any]
"""One JSON object: `type`, the row's columns, and what hangs on it."""


async def count(
    connection: AsyncConnection, *, since: datetime | None, until: datetime | None
) -> dict[str, int]:
    """Return how many lines there will be, by their type."""
    found = {}
    for name, table, column in _TOP:
        statement = select(func.count()).select_from(table).where(*between(column, since, until))
        found[name] = int((await connection.execute(statement)).scalar_one())
    return found


async def read(
    connection: AsyncConnection,
    kind: str,
    *,
    after: int,
    limit: int,
    since: datetime | None,
    until: datetime | None,
) -> tuple[list[Line], int]:
    """Return the next lines of a type (`event`, `job`, `replay`) and the `after` of the page that follows."""
    _, table, column = next(each for each in _TOP if each[0] == kind)
    statement = (
        select(table)
        .where(table.c.seq > after, *between(column, since, until))
        .order_by(table.c.seq)
        .limit(limit)
    )
    rows = (await connection.execute(statement)).mappings().all()
    lines = [{"type": kind, **_dump(table, row)} for row in rows]
    if kind == "event":
        await _add_children(connection, lines, [row["seq"] for row in rows])
    elif kind == "job":
        tries = await _tries(connection, [row["id"] for row in rows])
        for line, row in zip(lines, rows, strict=True):
            line["tries"] = tries[row["id"]]
    return lines, rows[-1]["seq"] if rows else after


async def write(connection: AsyncConnection, lines: Sequence[Line]) -> Counter[str]:
    """Insert lines; return how many were new and how many known, such as `event new`.

    Raises AttributeError, KeyError, TypeError or ValueError for what no export has written.
    """
    done: Counter[str] = Counter()
    for line in lines:
        kind = line["type"]
        new = await {"event": _write_event, "job": _write_job, "replay": _write_replay}[kind](
            connection, line
        )
        done[f"{kind} {'new' if new else 'known'}"] += 1
    # After all events, as whoever stores webhooks does: else each would wait for the other.
    for source in sorted({line["source"] for line in lines if line["type"] == "event"}):
        await sources.remember(connection, source)
    return done


async def _write_event(connection: AsyncConnection, line: Line) -> bool:
    values = _load(events, line)
    if values["id"] != event_id(values["source"], values["request_id"]):
        raise ValueError("events.id is not that of this source and request_id")
    seq = await insert_unless_taken(connection, events, values)
    if seq is None:
        return False
    for name, table in CHILDREN.items():
        for child in line[name]:
            await connection.execute(insert(table).values(event_seq=seq, **_load(table, child)))
            await _write_tries(connection, child)
    if values["state"] == "fetching":
        # An export reads an event before its files: the last one may have ended in between.
        await outbox.release_held(connection, seq)
    return True


async def _write_job(connection: AsyncConnection, line: Line) -> bool:
    if await insert_unless_taken(connection, jobs, _load(jobs, line)) is None:
        return False
    await _write_tries(connection, line)
    return True


async def _write_replay(connection: AsyncConnection, line: Line) -> bool:
    values = _load(replays, line)
    if values["state"] == "pending":
        # Events have other numbers here: it starts over, and meets the deliveries that it has made.
        highest = select(func.coalesce(func.max(events.c.seq), 0)).scalar_subquery()
        values |= {"after_seq": 0, "handled": 0, "until_seq": highest}
    return await insert_unless_taken(connection, replays, values) is not None


async def _write_tries(connection: AsyncConnection, line: Line) -> None:
    if tries := line.get("tries"):
        # All with the same columns: a statement for many rows goes by those of the first.
        same = {"error": None, "work_id": uuid.UUID(line["id"])}
        await connection.execute(insert(attempts), [same | _load(attempts, each) for each in tries])


async def _add_children(connection: AsyncConnection, lines: Sequence[Line], seqs: Sequence[int]) -> None:
    by_seq = dict(zip(seqs, lines, strict=True))
    works: list[Line] = []
    for name, table in CHILDREN.items():
        for line in lines:
            line[name] = []
        order = table.c.seq if "seq" in table.c else table.c.id
        statement = select(table).where(table.c.event_seq.in_(seqs)).order_by(order)
        for row in (await connection.execute(statement)).mappings():
            child = _dump(table, row)
            by_seq[row["event_seq"]][name].append(child)
            if "id" in child:
                works.append(child)
    tries = await _tries(connection, [uuid.UUID(work["id"]) for work in works])
    for work in works:
        work["tries"] = tries[uuid.UUID(work["id"])]


async def _tries(connection: AsyncConnection, work_ids: Collection[uuid.UUID]) -> dict[uuid.UUID, list[Line]]:
    found: dict[uuid.UUID, list[Line]] = defaultdict(list)
    ids = list(work_ids)
    # A statement has room for 32,767 values.
    for start in range(0, len(ids), IDS):
        some = attempts.c.work_id.in_(ids[start : start + IDS])
        statement = select(attempts).where(some).order_by(attempts.c.seq)
        for row in (await connection.execute(statement)).mappings():
            found[row["work_id"]].append(_dump(attempts, row))
    return found


def _dump(table: Table, row: Mapping[Any, Any]) -> Line:
    line: Line = {}
    for column in table.c:
        value = row[column.name]
        if column.name in _LEFT_BEHIND or column is attempts.c.work_id:
            continue
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode("ascii")
        elif isinstance(value, datetime):
            value = value.isoformat()
        elif isinstance(value, uuid.UUID):
            value = str(value)
        # SQLAlchemy's names are a kind of str that no JSON writer knows.
        line[str(column.name)] = value
    return line


def _load(table: Table, line: Line) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for column in table.c:
        value = line.get(column.name)
        if column.name in _LEFT_BEHIND or column is attempts.c.work_id:
            continue
        # An absent value is left to the column: a null in a JSON column would be JSON's own.
        if value is None:
            if not column.nullable and column.server_default is None:
                raise KeyError(f"{table.name}.{column.name}")
            continue
        if isinstance(column.type, LargeBinary):
            value = base64.b64decode(value, validate=True)
        elif isinstance(column.type, UtcDateTime):
            value = datetime.fromisoformat(value)
        elif isinstance(column.type, PlainUuid):
            value = uuid.UUID(value)
        elif not isinstance(column.type, JSON) and not isinstance(value, _TYPES.get(type(column.type), int)):
            raise TypeError(f"{table.name}.{column.name}: {type(value).__name__}")
        values[column.name] = value
    return values


_TOP: Final = (
    ("event", events, events.c.received_at),
    ("job", jobs, jobs.c.created_at),
    ("replay", replays, replays.c.created_at),
)
KINDS: Final = tuple(name for name, _, _ in _TOP)
