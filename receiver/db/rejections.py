"""SQL for rejected requests: evidence that is kept for a while, in a table of limited size."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final, cast

from sqlalchemy import delete, func, or_, select
from sqlalchemy import insert as insert_into
from typing_extensions import TypedDict

from receiver.core.diagnosis import Cause
from receiver.db.connection import SqlConnection
from receiver.db.statements import between, count_rows, equal
from receiver.db.tables import events, rejections

RECENT_EVENTS: Final = 500
"""Events that are searched for the last use of each secret: a scan of all events would cost too much."""

CAUSE_SHARE: Final = 4
"""One cause may take a quarter of the table."""
LEAST_OF_CAUSE: Final = 10
"""Rows of one cause that a small table may have."""
_HEAD: Final = [column for column in rejections.c if column.name not in {"headers", "body", "size"}]


@dataclass(frozen=True, kw_only=True)
class NewRejection:
    """A rejected request to store. It holds no secret."""

    received_at: datetime
    source: str
    reason: str
    cause: str
    diagnosis: str
    path: str
    peer: str | None
    headers: list[list[str]]
    body_size: int | None
    size: int
    body: bytes | None


class ListedRejection(TypedDict):
    """A rejected request to the callback without its headers and its body."""

    id: int
    received_at: datetime
    source: str
    reason: str
    """As in `receiver_rejections_total`."""
    cause: Cause
    diagnosis: str
    """The cause in words."""
    path: str
    """Long segments are cut."""
    peer: str | None
    """The address of the client, or of the proxy in front."""
    body_size: int | None
    """Bytes of the whole body; null if it was not read."""


class RejectionGroup(TypedDict):
    """Kept requests to one source that were rejected for one cause."""

    source: str
    """`-` if the path names no source."""
    cause: Cause
    count: int
    first: datetime
    last: datetime
    example: int
    """The id of the newest of them."""
    diagnosis: str
    """Of the newest of them."""


class Rejection(ListedRejection):
    """A rejected request."""

    headers: list[list[str]]
    body: bytes | None


async def insert(connection: SqlConnection, rows: Sequence[NewRejection]) -> None:
    """Store rejected requests."""
    if rows:
        await connection.execute(insert_into(rejections), [asdict(row) for row in rows])


async def trim(connection: SqlConnection, *, rows: int, size: int) -> None:
    """Delete the oldest requests until at most `rows` of at most `size` bytes are left.

    First each cause is limited to a share of both: forged requests must not crowd out the others.
    """
    share_rows, share_size = max(rows // CAUSE_SHARE, LEAST_OF_CAUSE), size // CAUSE_SHARE
    for of, most_rows, most_size in (([rejections.c.cause], share_rows, share_size), (None, rows, size)):
        order = rejections.c.id.desc()
        number = func.row_number().over(partition_by=of, order_by=order).label("number")
        total = func.sum(rejections.c.size).over(partition_by=of, order_by=order).label("total")
        counted = select(rejections.c.id, number, total).subquery()
        beyond = or_(counted.c.number > most_rows, counted.c.total > most_size)
        surplus = select(counted.c.id).where(beyond)
        await connection.execute(delete(rejections).where(rejections.c.id.in_(surplus)))


async def read_last_used(connection: SqlConnection) -> dict[tuple[str, str], datetime]:
    """Return the time of the last recent event for each source and secret."""
    columns = (events.c.source, events.c.secret_id, events.c.received_at)
    recent = select(*columns).order_by(events.c.seq.desc()).limit(RECENT_EVENTS).subquery()
    statement = (
        select(recent.c.source, recent.c.secret_id, func.max(recent.c.received_at))
        .where(recent.c.secret_id.is_not(None))
        .group_by(recent.c.source, recent.c.secret_id)
    )
    rows = (await connection.execute(statement)).all()
    return {(source, secret_id): at for source, secret_id, at in rows}


async def list_rejections(
    connection: SqlConnection,
    *,
    limit: int,
    before: int | None = None,
    source: str | None = None,
    reason: str | None = None,
    cause: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[ListedRejection]:
    """Return rejected requests, newest first. `before` is the `id` of the last row of the previous page."""
    where = equal(rejections, {"source": source, "reason": reason, "cause": cause})
    where += between(rejections.c.received_at, since, until)
    if before is not None:
        where.append(rejections.c.id < before)
    statement = select(*_HEAD).where(*where).order_by(rejections.c.id.desc()).limit(limit)
    return cast("list[ListedRejection]", _plain(await connection.execute(statement)))


async def group(connection: SqlConnection, *, since: datetime | None = None) -> list[RejectionGroup]:
    """Return kept requests by source and cause, the cause of the newest one first."""
    counted = (
        select(
            rejections.c.source,
            rejections.c.cause,
            func.count().label("count"),
            func.min(rejections.c.received_at).label("first"),
            func.max(rejections.c.received_at).label("last"),
            func.max(rejections.c.id).label("example"),
        )
        .where(*between(rejections.c.received_at, since, None))
        .group_by(rejections.c.source, rejections.c.cause)
        .subquery()
    )
    statement = (
        select(counted, rejections.c.diagnosis)
        .join(rejections, rejections.c.id == counted.c.example)
        .order_by(counted.c.example.desc())
    )
    return cast("list[RejectionGroup]", _plain(await connection.execute(statement)))


async def find(connection: SqlConnection, rejection_id: int) -> Rejection | None:
    """Return one rejected request."""
    columns = (*_HEAD, rejections.c.headers, rejections.c.body)
    found = _plain(await connection.execute(select(*columns).where(rejections.c.id == rejection_id)))
    return cast("Rejection", found[0]) if found else None


async def find_with(
    connection: SqlConnection, texts: Collection[str], *, limit: int
) -> list[ListedRejection]:
    """Return the newest requests with one of some texts in their path or the kept part of their body."""
    # As in `erase`, bytes are searched here.
    columns = (rejections.c.id, rejections.c.path, rejections.c.body)
    rows = await connection.execute(select(*columns).order_by(rejections.c.id.desc()))
    wanted = [(text, text.encode(errors="replace")) for text in texts if text]
    ids = [
        row.id
        for row in rows
        if any(text in row.path or (row.body is not None and raw in row.body) for text, raw in wanted)
    ]
    statement = select(*_HEAD).where(rejections.c.id.in_(ids[:limit])).order_by(rejections.c.id.desc())
    return cast("list[ListedRejection]", _plain(await connection.execute(statement)))


async def count_since(connection: SqlConnection, since: datetime) -> dict[str, int]:
    """Return the number of kept requests at or after a time, by cause."""
    statement = (
        select(rejections.c.cause, func.count())
        .where(rejections.c.received_at >= since)
        .group_by(rejections.c.cause)
    )
    rows = (await connection.execute(statement)).all()
    return {row[0]: row[1] for row in rows}


async def prune(connection: SqlConnection, before: datetime, *, dry_run: bool) -> int:
    """Delete the requests received before a time, or only count them; return their number."""
    is_old = rejections.c.received_at < before
    if dry_run:
        return await count_rows(connection, rejections, is_old)
    return (await connection.execute(delete(rejections).where(is_old))).rowcount


async def erase(connection: SqlConnection, request_id: str) -> None:
    """Delete the requests with this `request_id` in the kept part of their body."""
    # Bytes are searched here, because the databases have no common function for it. The table is small.
    rows = await connection.execute(
        select(rejections.c.id, rejections.c.body).where(rejections.c.body.is_not(None))
    )
    ids = [row.id for row in rows if request_id.encode() in row.body]
    await connection.execute(delete(rejections).where(rejections.c.id.in_(ids)))


def _plain(result: Any) -> list[Mapping[str, Any]]:
    return [dict(row) for row in result.mappings()]
