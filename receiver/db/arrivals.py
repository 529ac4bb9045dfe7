"""SQL for the hot path: one statement stores a group of events, each with its first receipt.

The values go to the driver directly, because SQLAlchemy's processing of each value takes as long as SQLite
itself. On PostgreSQL each column is an array parameter, so the statement is planned once for groups of any
size.
"""

import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib import import_module
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import PoolProxiedConnection

from receiver.db.rows import NewEvent, raw_event_id
from receiver.db.sqlite_writer import ArrivalWriter, Statement

_FIELDS: Final = ("id", *NewEvent._fields[1:])
_KIND_START: Final = NewEvent._fields.index("source")
_KINDS: Final = _FIELDS[_KIND_START:]


def probe_event() -> NewEvent:
    """Return an event that is inserted and rolled back.

    Its name is unique, so that the INSERT does not wait for the uncommitted row of another process's probe.
    """
    name = f"probe-{uuid4().hex}"
    now = time.time()
    return NewEvent(
        raw_id=raw_event_id(name, name),
        request_id=name,
        model=None,
        cost=None,
        cost_micros=0,
        body=b"{}",
        body_sha256=bytes(32),
        received_at=now,
        job_id=None,
        path_token=None,
        webhook_id=None,
        signed_at=now,
        source=name,
        origin="webhook",
        state="received",
        reason=None,
        status=None,
        secret_id=name[:16],
    )


COMMIT_PROBE: Final = """
    INSERT INTO probes (name, at) VALUES ('write', {}) ON CONFLICT (name) DO UPDATE SET at = excluded.at
"""
_RECEIPT: Final = """
    INSERT INTO receipts (event_seq, webhook_id, secret_id, signed_at, received_at, body_sha256, outcome)
    SELECT seq, webhook_id, secret_id, signed_at, received_at, body_sha256, 'duplicate' FROM {}
"""


# PostgreSQL: each column is an array, or has an expression over the arrays. The columns from `source` on have
# few different values, so the arrays have each combination once, and `kind` is the combination's number. A
# cast to VARCHAR(n) would truncate a longer text; with `text` the INSERT raises an error instead.
_ARRAYS: Final = {
    "kind": "int2",
    "id": "uuid",
    "request_id": "text",
    "model": "text",
    "cost": "int8",
    "cost_micros": "int4",
    "body": "bytea",
    "body_sha256": "bytea",
    "received_at": "float8",
    "job_id": "uuid",
    "path_token": "text",
    "webhook_id": "text",
    "signed_at": "float8",
}
_VALUES: Final = {name: f"(${number}::text[])[kind]" for number, name in enumerate(_KINDS, 1)} | {
    name: f"to_timestamp({name})" for name in ("received_at", "signed_at")
}


def _insert(returning: str) -> str:
    arrays = (f"${number}::{of}[]" for number, of in enumerate(_ARRAYS.values(), len(_KINDS) + 1))
    values = (_VALUES.get(name, name) for name in _FIELDS)
    return f"""
        INSERT INTO events ({", ".join(_FIELDS)}) SELECT {", ".join(values)}
        FROM unnest({", ".join(arrays)}) AS arrays ({", ".join(_ARRAYS)})
        ON CONFLICT DO NOTHING RETURNING {returning}
    """


INSERT: Final = _insert("id")
ADD_SOURCES: Final = "INSERT INTO sources SELECT unnest($1::text[]) ON CONFLICT DO NOTHING"
PROBE: Final = f"""
    WITH new AS ({_insert("*")}),
    of_source AS ({ADD_SOURCES.replace("$1", f"${len(_KINDS) + len(_ARRAYS) + 1}")})
    {_RECEIPT.format("new")}
"""


def in_columns(events: Sequence[NewEvent]) -> tuple[Any, ...]:
    """Return the parameters of `_insert`."""
    numbers: dict[tuple[Any, ...], int] = {}
    kinds = [numbers.setdefault(event[_KIND_START:], len(numbers) + 1) for event in events]
    raw_ids, *columns = zip(*events, strict=True)
    return (
        *zip(*numbers, strict=True),
        kinds,
        list(map(_driver_uuid(), raw_ids)),
        *columns[: _KIND_START - 1],
    )


@cache
def _driver_uuid() -> Any:
    """Return asyncpg's own class, which it makes and encodes in a tenth of the time."""
    return import_module("asyncpg.pgproto.pgproto").UUID


# SQLite.
_COLUMNS: Final = ", ".join(_FIELDS)
_EXACT: Final = 64
"""A larger group is padded to a multiple of this."""
_RECEIVED: Final = ("id", "received_at", "body_sha256", "webhook_id", "secret_id", "signed_at")
_IS_OWN: Final = f"SELECT 1 FROM events WHERE {' AND '.join(f'{name} IS ?' for name in _RECEIVED)}"
_WRITER: Final = "writer"


def insert_statements(events: Sequence[NewEvent], new_sources: Sequence[str]) -> list[Statement]:
    """Return SQLite's statements for `ArrivalWriter`: sources first, then the events that are new."""
    rows = len(events)
    # Each number of rows is a statement that SQLite parses and keeps; those of large groups take memory.
    size = rows if rows <= _EXACT else -rows % _EXACT + rows
    values = [value for event in events for value in _in_row(event)]
    values += [None] * ((size - rows) * len(_FIELDS))
    insert = (_insert_many(size), values)
    if not new_sources:
        return [insert]
    names = ", ".join(["(?)"] * len(new_sources))
    return [(f"INSERT INTO sources VALUES {names} ON CONFLICT DO NOTHING", new_sources), insert]


def run(statements: Sequence[Statement], connection: PoolProxiedConnection) -> list[str]:
    """Run the statements of `insert_statements`; return the ids of the events that were stored before."""
    if _WRITER not in connection.info:
        driver: Any = connection.driver_connection
        connection.info[_WRITER] = ArrivalWriter(driver)
    writer: ArrivalWriter = connection.info[_WRITER]
    return writer.run(statements)


def run_again(
    statements: Sequence[Statement], events: Sequence[NewEvent], connection: PoolProxiedConnection
) -> list[str]:
    """Run the statements of a process that died, which may have committed the same events.

    An event whose first receipt is of the very request is new: the process stored it.
    """
    known = set(run(statements, connection))
    cursor = connection.cursor()
    # If nothing was inserted, nothing was flushed. This commit flushes the frames of the write-ahead log that
    # the process may have written and not flushed.
    cursor.execute(COMMIT_PROBE.format("?"), [_moment(time.time())])
    for event in events:
        row = dict(zip(_FIELDS, _in_row(event), strict=True))
        if row["id"] in known and cursor.execute(_IS_OWN, [row[name] for name in _RECEIVED]).fetchone():
            known.remove(row["id"])
    return list(known)


@cache
def _insert_many(rows: int) -> str:
    """Return the statement for a number of rows; a row of nulls is left out.

    `is_known` is called for each conflict and returns NULL, so no row is updated.
    """
    row = f"({', '.join('?' * len(_FIELDS))})"
    return f"""
        INSERT INTO events ({_COLUMNS}) SELECT * FROM (VALUES {", ".join([row] * rows)})
        WHERE column1 IS NOT NULL ON CONFLICT (id) DO UPDATE SET state = state WHERE is_known(excluded.id)
    """


def _in_row(event: NewEvent) -> list[Any]:
    """Return the values as the types of the tables write them."""
    values: list[Any] = [*event]
    values[0] = event.raw_id.hex()
    values[_RECEIVED_AT] = _moment(event.received_at)
    if event.job_id is not None:
        values[_JOB_ID] = event.job_id.hex
    if event.signed_at is not None:
        # Whole seconds: most webhooks of a second have the same.
        values[_SIGNED_AT] = _cached_moment(event.signed_at)
    return values


_RECEIVED_AT, _JOB_ID, _SIGNED_AT = (_FIELDS.index(name) for name in ("received_at", "job_id", "signed_at"))


def _moment(seconds: float) -> str:
    fraction, whole = math.modf(seconds)
    micros = round(fraction * 1_000_000)
    return f"{_second(whole + micros // 1_000_000)}.{micros % 1_000_000:06d}"


_cached_moment = lru_cache(maxsize=64)(_moment)


@lru_cache(maxsize=64)
def _second(whole: float) -> str:
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%d %H:%M:%S")


def try_rows(event: NewEvent, connection: PoolProxiedConnection) -> None:
    """Insert and roll back, and commit a row of another table, as `probe` does."""
    cursor = connection.cursor()
    cursor.execute("BEGIN IMMEDIATE")
    try:
        run(insert_statements([event], [event.source]), connection)
        cursor.execute(_RECEIPT.format("events WHERE id = ?"), [event.raw_id.hex()])
    finally:
        cursor.execute("ROLLBACK")
    cursor.execute(COMMIT_PROBE.format("?"), [_moment(time.time())])
