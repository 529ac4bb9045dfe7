"""SQL that only reads, for people: events with their receipts, media, deliveries and attempts."""

import contextlib
import uuid
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Table, func, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.tables import attempts, deliveries, events, media, receipts

Row = dict[str, Any]

_EVENT = [column for column in events.c if column.name != "body"]
_HIDDEN = {"event_seq", "lease", "lost"}


async def list_events(
    connection: AsyncConnection,
    *,
    limit: int,
    before: int | None = None,
    source: str | None = None,
    state: str | None = None,
    status: str | None = None,
    model: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[Row]:
    """Return events, newest first, with how many of their files and deliveries are in which state.

    `before` is the `seq` of the last row of the page before.
    """
    exact = {"source": source, "state": state, "status": status, "model": model}
    where: list[ColumnElement[bool]] = [
        events.c[name] == value for name, value in exact.items() if value is not None
    ]
    if before is not None:
        where.append(events.c.seq < before)
    if since is not None:
        where.append(events.c.received_at >= since)
    if until is not None:
        where.append(events.c.received_at < until)
    statement = select(*_EVENT).where(*where).order_by(events.c.seq.desc()).limit(limit)
    found = [dict(row) for row in (await connection.execute(statement)).mappings()]
    seqs = [row["seq"] for row in found]
    for name, table in (("media", media), ("deliveries", deliveries)):
        counts = await _count_states(connection, table, seqs)
        for row in found:
            row[name] = counts[row["seq"]]
    return found


async def show_event(connection: AsyncConnection, key: str) -> Row | None:
    """Return one event by its id or `request_id`, with its body (bytes) and everything that hangs on it."""
    statement = select(events).where(or_(*_matches(key))).order_by(events.c.seq.desc()).limit(1)
    row = (await connection.execute(statement)).mappings().one_or_none()
    if row is None:
        return None
    event = dict(row)
    seq = event["seq"]
    event["receipts"] = await _children(connection, receipts, seq, receipts.c.seq)
    event["media"] = await _children(connection, media, seq, media.c.position, media.c.variant.desc())
    event["deliveries"] = await _children(connection, deliveries, seq, deliveries.c.destination)
    await _add_attempts(connection, [*event["media"], *event["deliveries"]])
    return event


def _matches(key: str) -> list[ColumnElement[bool]]:
    matches: list[ColumnElement[bool]] = [events.c.request_id == key]
    with contextlib.suppress(ValueError):
        matches.append(events.c.id == uuid.UUID(key))
    return matches


async def _count_states(
    connection: AsyncConnection, table: Table, seqs: Sequence[int]
) -> dict[int, dict[str, int]]:
    statement = (
        select(table.c.event_seq, table.c.state, func.count())
        .where(table.c.event_seq.in_(seqs))
        .group_by(table.c.event_seq, table.c.state)
    )
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    for seq, state, count in await connection.execute(statement):
        counts[seq][state] = count
    return counts


async def _children(
    connection: AsyncConnection, table: Table, seq: int, *order: ColumnElement[Any]
) -> list[Row]:
    columns = [column for column in table.c if column.name not in _HIDDEN]
    statement = select(*columns).where(table.c.event_seq == seq).order_by(*order)
    return [dict(row) for row in (await connection.execute(statement)).mappings()]


async def _add_attempts(connection: AsyncConnection, works: Sequence[Row]) -> None:
    statement = (
        select(attempts)
        .where(attempts.c.work_id.in_([work["id"] for work in works]))
        .order_by(attempts.c.seq)
    )
    by_work: dict[uuid.UUID, list[Row]] = defaultdict(list)
    for row in (await connection.execute(statement)).mappings():
        attempt = dict(row)
        by_work[attempt.pop("work_id")].append(attempt)
    for work in works:
        work["tries"] = by_work[work["id"]]
