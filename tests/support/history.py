"""A long history: many events that were delivered long ago."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from sqlalchemy import bindparam, func, insert, select, text

from receiver.db import sources
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.rows import event_id
from receiver.db.tables import UtcDateTime, attempts, deliveries, events, media

DAY: Final = 86_400.0

_ID: Final = {
    "sqlite": "printf('{start}%020x', i)",
    "postgresql": "('{start}' || lpad(to_hex(i), 20, '0'))::uuid",
}
_SHA256: Final = bytes(32)


async def fill(database: Database, count: int, *, days: float = 100.0) -> None:
    """Add events, each with two receipts, a file, a delivery and an attempt at either, `days` old."""
    old = datetime.now(UTC) - timedelta(days=days)
    # The ids are ordered by time, as real ones are.
    file, delivery = (
        _ID[database.dialect_name].format(start=f"{round(old.timestamp() * 1000) + kind:012x}")
        for kind in range(2)
    )
    async with database.write() as connection:
        await connection.execute(insert(events), [_event(f"r-{i}", old, i) for i in range(1, count + 1)])
        await sources.add(connection, "clipia")
    work = "state, attempts, created_at"
    for statement in (
        """INSERT INTO receipts (event_seq, secret_id, signed_at, received_at, body_sha256, outcome)
            SELECT seq, 'one', :old, :old, body_sha256, 'duplicate' FROM events""",
        f"""INSERT INTO media (id, event_seq, position, variant, kind, url, {work})
            SELECT {file}, i, 0, 'original', 'image', 'https://media.clipia.ai/a.png', 'stored', 1, :old
            FROM (SELECT seq AS i FROM events) AS n""",
        f"""INSERT INTO deliveries (id, event_seq, destination, {work})
            SELECT {delivery}, i, 'main', 'delivered', 1, :old FROM (SELECT seq AS i FROM events) AS n""",
        *(
            f"""INSERT INTO attempts (work_id, number, started_at, duration_ms, outcome)
                SELECT id, 1, :old, 1, 'succeeded' FROM {table}"""
            for table in ("media", "deliveries")
        ),
    ):
        async with database.write() as connection:
            await connection.execute(text(statement).bindparams(bindparam("old", old, UtcDateTime)))


def _event(request_id: str, old: datetime, number: int) -> dict[str, Any]:
    return {
        "id": event_id("clipia", request_id),
        "source": "clipia",
        "request_id": request_id,
        "origin": "webhook",
        "state": "ready",
        "status": "OK",
        "body": b"{}",
        "body_sha256": _SHA256,
        "received_at": old + timedelta(milliseconds=number),
        "secret_id": "one",
        "signed_at": old,
    }


async def fill_jobs(database: Database) -> None:
    """Add a completed job for each event."""
    columns = "caller, idempotency_key, fingerprint, model, has_webhook, metadata, state"
    of_event = "id, source, request_id"
    statement = f"""
        INSERT INTO jobs ({of_event}, {columns}, request, provider_key, created_at, updated_at)
        SELECT {of_event}, 'shop', request_id, '', 'm', true, '{{}}', 'completed',
               body, id, received_at, received_at
        FROM events
    """
    async with database.write() as connection:
        await connection.execute(text(statement))


async def count_rows(database: Database) -> dict[str, int]:
    """Count the events and the rows that refer to them."""
    async with database.read() as connection:
        return {
            name: (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for name, table in _COUNTED.items()
        }


_COUNTED: Final = {
    "events": events,
    "receipts": all_receipts,
    "media": media,
    "deliveries": deliveries,
    "attempts": attempts,
}


def whole(count: int) -> dict[str, int]:
    """Return the number of rows of `count` such events."""
    return dict.fromkeys(("events", "media", "deliveries"), count) | dict.fromkeys(
        ("receipts", "attempts"), 2 * count
    )
