"""Export and import: events with the rows that refer to them, jobs and replays.

The import skips a row if one of its unique keys is in the database already, so it can be interrupted and
repeated. Leases are left out, because they belong to workers of the exported database.
"""

import base64
import re
import uuid
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

from sqlalchemy import JSON, Boolean, Column, Double, LargeBinary, String, Table, Text, func, insert, select

from receiver.db import outbox, sources
from receiver.db.connection import SqlConnection
from receiver.db.receipts import FIRST_COLUMNS, receipts_of
from receiver.db.rows import event_id
from receiver.db.statements import between, count_rows, insert_unless_taken
from receiver.db.tables import (
    PlainUuid,
    Sha256,
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
"""The most ids in one statement."""
_ATTEMPTS: Final = "tries"
"""The key of the attempts in version 1."""
CHILDREN: Final = {"receipts": receipts, "media": media, "deliveries": deliveries}

_TYPES: Final[Mapping[type, type | tuple[type, ...]]] = {
    String: str,
    Text: str,
    Boolean: bool,
    Double: (int, float),
}
"""The JSON types of a column type; other columns hold integers."""
_LEFT_OUT: Final = {"seq", "event_seq", "lease"}

_HEX_DIGITS: Final = re.compile("([0-9a-fA-F]{2})*")

Line = dict[str, Any]
"""One JSON object: `type`, the columns of the row, and lists of the rows that refer to it."""


async def count(
    connection: SqlConnection, *, since: datetime | None, until: datetime | None
) -> dict[str, int]:
    """Return the number of lines of an export, by their type."""
    return {
        name: await count_rows(connection, table, *between(column, since, until))
        for name, table, column in _TOP
    }


async def read(
    connection: SqlConnection,
    kind: str,
    *,
    after: int,
    limit: int,
    since: datetime | None,
    until: datetime | None,
) -> tuple[list[Line], int]:
    """Return the next lines of a type (`event`, `job`, `replay`) and the `after` of the next page."""
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
        made = await _read_attempts(connection, [row["id"] for row in rows])
        for line, row in zip(lines, rows, strict=True):
            line[_ATTEMPTS] = made[row["id"]]
    return lines, rows[-1]["seq"] if rows else after


async def write(connection: SqlConnection, lines: Sequence[Line]) -> Counter[str]:
    """Insert lines; return the numbers of `event new`, `event known` and so on.

    Raises AttributeError, KeyError, TypeError or ValueError if a line is not from an export.
    """
    done: Counter[str] = Counter()
    for line in lines:
        kind = line["type"]
        new = await {"event": _write_event, "job": _write_job, "replay": _write_replay}[kind](
            connection, line
        )
        done[f"{kind} {'new' if new else 'known'}"] += 1
    # After all events, as in the webhooks' transactions: in another order the two could deadlock.
    for source in sorted({line["source"] for line in lines if line["type"] == "event"}):
        await sources.add(connection, source)
    return done


async def _write_event(connection: SqlConnection, line: Line) -> bool:
    values = _load(events, line)
    first, others = _split_receipts(values, [_load(receipts, each) for each in line["receipts"]])
    values |= first
    if values["id"] != event_id(values["source"], values["request_id"]):
        raise ValueError("events.id does not belong to this source and request_id")
    seq = await insert_unless_taken(connection, events, values)
    if seq is None:
        return False
    for receipt in others:
        await connection.execute(insert(receipts).values(event_seq=seq, **receipt))
    for table in (media, deliveries):
        for child in line[table.name]:
            await connection.execute(insert(table).values(event_seq=seq, **_load(table, child)))
            await _write_attempts(connection, child)
    if values["state"] == "fetching":
        # The export reads an event before its files, and the last file may have finished in between.
        await outbox.release_held(connection, seq)
    return True


def _split_receipts(event: Line, found: list[Line]) -> tuple[Line, list[Line]]:
    """Return the first receipt as columns of the event, and the receipts that are no part of it."""
    if not found or not _is_first(found[0], event):
        return {}, found
    first = found[0]
    follows = "accepted" if event.get("status") is not None else "unrecognized"
    columns = {name: first.get(name) for name in FIRST_COLUMNS}
    columns["first_outcome"] = None if first["outcome"] == follows else first["outcome"]
    return columns, found[1:]


def _is_first(receipt: Line, event: Line) -> bool:
    """Tell whether a receipt can be part of the event's row; migration 0013 has the same condition."""
    return (
        receipt["outcome"] in ("accepted", "unrecognized")
        and receipt.get("body") is None
        and not receipt.get("repeated")
        and event["origin"] == "webhook"
        and all(receipt[name] == event[name] for name in ("received_at", "body_sha256"))
    )


async def _write_job(connection: SqlConnection, line: Line) -> bool:
    if await insert_unless_taken(connection, jobs, _load(jobs, line)) is None:
        return False
    await _write_attempts(connection, line)
    return True


async def _write_replay(connection: SqlConnection, line: Line) -> bool:
    values = _load(replays, line)
    if values["state"] == "pending":
        # The events have other numbers here, so the replay starts again; it skips deliveries that exist.
        highest = select(func.coalesce(func.max(events.c.seq), 0)).scalar_subquery()
        values |= {"after_seq": 0, "handled": 0, "until_seq": highest}
    return await insert_unless_taken(connection, replays, values) is not None


async def _write_attempts(connection: SqlConnection, line: Line) -> None:
    if made := line.get(_ATTEMPTS):
        # An INSERT of many rows has the columns of the first one, so all rows get all columns.
        same = {"error": None, "work_id": uuid.UUID(line["id"])}
        await connection.execute(insert(attempts), [same | _load(attempts, each) for each in made])


async def _add_children(connection: SqlConnection, lines: Sequence[Line], seqs: Sequence[int]) -> None:
    by_seq = dict(zip(seqs, lines, strict=True))
    works: list[Line] = []
    for name, table in CHILDREN.items():
        for line in lines:
            line[name] = []
        found = receipts_of(lambda seq: seq.in_(seqs)) if table is receipts else table
        order = found.c.seq if "seq" in found.c else found.c.id
        statement = select(found).where(found.c.event_seq.in_(seqs)).order_by(order)
        for row in (await connection.execute(statement)).mappings():
            child = _dump(table, row)
            by_seq[row["event_seq"]][name].append(child)
            if "id" in child:
                works.append(child)
    made = await _read_attempts(connection, [uuid.UUID(work["id"]) for work in works])
    for work in works:
        work[_ATTEMPTS] = made[uuid.UUID(work["id"])]


async def _read_attempts(
    connection: SqlConnection, work_ids: Collection[uuid.UUID]
) -> dict[uuid.UUID, list[Line]]:
    found: dict[uuid.UUID, list[Line]] = defaultdict(list)
    ids = list(work_ids)
    # A statement may have up to 32,767 parameters.
    for start in range(0, len(ids), IDS):
        some = attempts.c.work_id.in_(ids[start : start + IDS])
        statement = select(attempts).where(some).order_by(attempts.c.seq)
        for row in (await connection.execute(statement)).mappings():
            found[row["work_id"]].append(_dump(attempts, row))
    return found


def _dump(table: Table, row: Mapping[Any, Any]) -> Line:
    # SQLAlchemy's names are a subclass of str that orjson rejects.
    return {str(column.name): _to_json(column, row[column.name]) for column in _exported(table)}


def _load(table: Table, line: Line) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for column in _exported(table):
        value = line.get(column.name)
        # NULL is left out: a JSON column would store it as the JSON null.
        if value is not None:
            values[column.name] = _from_json(column, value)
        elif not column.nullable and column.server_default is None:
            raise KeyError(f"{table.name}.{column.name}")
    return values


def _exported(table: Table) -> list[Column[Any]]:
    left_out = FIRST_COLUMNS if table is events else ("work_id",)
    return [each for each in table.c if each.name not in _LEFT_OUT and each.name not in left_out]


def _to_json(column: Column[Any], value: Any) -> Any:
    if isinstance(column.type, Sha256):
        return value.hex()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, uuid.UUID) else value


def _from_json(column: Column[Any], value: Any) -> Any:
    if isinstance(column.type, Sha256):
        # The import of an earlier release took any text. Migration 0013 stores no bytes for those, too.
        return bytes.fromhex(value) if _HEX_DIGITS.fullmatch(value) else b""
    if isinstance(column.type, LargeBinary):
        return base64.b64decode(value, validate=True)
    if isinstance(column.type, UtcDateTime):
        return datetime.fromisoformat(value)
    if isinstance(column.type, PlainUuid):
        return uuid.UUID(value)
    if not isinstance(column.type, JSON) and not isinstance(value, _TYPES.get(type(column.type), int)):
        raise TypeError(f"{column.table.name}.{column.name}: {type(value).__name__}")
    return value


_TOP: Final = (
    ("event", events, events.c.received_at),
    ("job", jobs, jobs.c.created_at),
    ("replay", replays, replays.c.created_at),
)
KINDS: Final = tuple(name for name, _, _ in _TOP)
