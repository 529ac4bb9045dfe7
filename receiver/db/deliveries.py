"""SQL for single deliveries, and for those that fail, grouped by their cause."""

import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final, Literal, cast

from sqlalchemy import ColumnElement, Select, String, func, or_, select, update
from sqlalchemy import cast as cast_sql
from typing_extensions import TypedDict

from receiver.core.failure_causes import cause_of
from receiver.db import inbox, job_events, outbox, reads
from receiver.db.connection import SqlConnection
from receiver.db.leases import ENDED, is_unclaimed
from receiver.db.rows import DeliveryClaim, DeliveryState, JobRef, MediaRow, StoredEvent
from receiver.db.tables import attempts, deliveries, in_state, is_live, is_replayed
from receiver.db.views import ListedDelivery, LoggedAttempt

MAX_GROUPS: Final = 100
"""The most groups of failures that are returned, the largest first."""
MAX_COMPARED: Final = 100
"""The most errors of a group by which its last failure is found."""
MAX_ERRORS: Final = 2000
"""The most different errors that are grouped, the most frequent first."""


class ShownDelivery(ListedDelivery):
    """A delivery with the attempts at it."""

    attempt_log: list[LoggedAttempt]


class FailureGroup(TypedDict):
    """Deliveries to one destination that fail for one reason."""

    destination: str
    state: Literal["pending", "dead"]
    """`pending` ones are tried again, `dead` ones are not."""
    cause: str
    """The last error without addresses, ids and quoted text."""
    count: int
    first: datetime
    """The first failure of the oldest of them."""
    last: datetime
    """The last failure of the newest of them."""
    example: uuid.UUID
    """The id of the oldest of them."""


async def show(connection: SqlConnection, delivery_id: uuid.UUID) -> ShownDelivery | None:
    """Return a delivery with its attempts."""
    found = await reads.list_deliveries(connection, limit=1, delivery_id=delivery_id)
    if not found:
        return None
    return cast("ShownDelivery", found[0] | {"attempt_log": await _attempts(connection, delivery_id)})


async def _attempts(connection: SqlConnection, delivery_id: uuid.UUID) -> list[dict[str, Any]]:
    columns = [column for column in attempts.c if column.name != "work_id"]
    statement = select(*columns).where(attempts.c.work_id == delivery_id).order_by(attempts.c.seq)
    return [dict(row) for row in (await connection.execute(statement)).mappings()]


MessageParts = tuple[DeliveryClaim, StoredEvent, Sequence[MediaRow], JobRef | None]


async def load_message(connection: SqlConnection, delivery_id: uuid.UUID) -> MessageParts | None:
    """Return the parts of the message of a delivery's last attempt, as they are now."""
    columns = (deliveries.c.event_seq, deliveries.c.attempts, deliveries.c.replay_id)
    row = (await connection.execute(select(*columns).where(deliveries.c.id == delivery_id))).one_or_none()
    if row is None:
        return None
    seq, attempt, replay_id = row
    claim = DeliveryClaim(
        id=delivery_id,
        lease=delivery_id,
        attempt=max(attempt, 1),
        lost=0,
        age=0.0,
        event_seq=seq,
        replay_id=replay_id,
    )
    event = (await inbox.load_events(connection, [seq]))[seq]
    files = await outbox.load_media(connection, [seq])
    refs = await job_events.load_refs(connection, [seq])
    return claim, event, files.get(seq, ()), refs.get(seq)


async def discard(
    connection: SqlConnection, delivery_id: uuid.UUID, *, by: str, reason: str | None
) -> tuple[DeliveryState | None, bool]:
    """Cancel a dead delivery, or a pending one that no worker has claimed.

    Return its state, None if there is none, and whether it was canceled now.
    """
    mine = deliveries.c.id == delivery_id
    may_end = or_(deliveries.c.state == "dead", (deliveries.c.state == "pending") & is_unclaimed(deliveries))
    text = f"discarded by {by}" + (f": {reason}" if reason else "")
    statement = update(deliveries).where(mine, may_end).values(state="canceled", error=text, **ENDED)
    is_done = (await connection.execute(statement)).rowcount == 1
    if is_done:
        await outbox.record_change(connection, [delivery_id], outcome="canceled", error=text)
    return await connection.scalar(select(deliveries.c.state).where(mine)), is_done


async def list_failures(
    connection: SqlConnection, *, destination: str | None = None, limit: int = MAX_GROUPS
) -> list[FailureGroup]:
    """Return the deliveries that fail or are dead, grouped by destination, state and cause."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = {}
    for state in ("pending", "dead"):
        for row in await _count_errors(connection, state, destination):
            values = dict(row)
            error = values.pop("error")
            key = (values["destination"], state, cause_of(error))
            known = groups.setdefault(key, values | {"count": 0, "errors": []})
            known["count"] += values["count"]
            known["errors"].append(error)
            known["example"] = min(known["example"], values["example"])
            known["newest"] = max(known["newest"], values["newest"])
    largest = sorted(groups.items(), key=lambda item: -item[1]["count"])[:limit]
    return [await _complete(connection, key, found) for key, found in largest]


async def find_errors(connection: SqlConnection, cause: str, *, destination: str | None = None) -> set[str]:
    """Return the errors behind a cause of `list_failures`, of the failures to one destination or to all."""
    return {
        row["error"]
        for state in ("pending", "dead")
        for row in await _count_errors(connection, state, destination)
        if cause_of(row["error"]) == cause
    }


async def _count_errors(connection: SqlConnection, state: str, destination: str | None) -> Iterable[Any]:
    # PostgreSQL has no least UUID before version 18.
    text_id = cast_sql(deliveries.c.id, String)
    # Live and replayed deliveries have one partial index each, and none covers both.
    chosen = deliveries.c.id.in_(reads.PENDING) if state == "pending" else in_state(deliveries, state)
    where: list[ColumnElement[bool]] = [chosen, deliveries.c.error.is_not(None)]
    if destination is not None:
        where.append(deliveries.c.destination == destination)
    statement = (
        select(
            deliveries.c.destination,
            deliveries.c.error,
            func.count().label("count"),
            func.min(text_id).label("example"),
            func.max(text_id).label("newest"),
        )
        .where(*where)
        .group_by(deliveries.c.destination, deliveries.c.error)
        .order_by(func.count().desc())
        .limit(MAX_ERRORS)
    )
    return (await connection.execute(statement)).mappings()


async def _complete(
    connection: SqlConnection, key: tuple[str, str, str], found: dict[str, Any]
) -> FailureGroup:
    destination, state, cause = key
    oldest, newest = uuid.UUID(found["example"]), uuid.UUID(found["newest"])
    ids = {oldest, newest}
    for half in (is_live, is_replayed) if state == "pending" else ():
        # A delivery waits after its failure, so those that failed last are due last.
        latest = await connection.scalar(_last_due(destination, found["errors"]).where(half))
        ids |= set() if latest is None else {latest}
    failures = select(attempts.c.started_at).where(
        attempts.c.work_id.in_(ids), attempts.c.outcome.in_(("retry", "failed"))
    )
    times = sorted((await connection.execute(failures)).scalars())
    if not times:  # given up without an attempt
        made = select(func.coalesce(deliveries.c.finished_at, deliveries.c.created_at))
        times = sorted((await connection.execute(made.where(deliveries.c.id.in_(ids)))).scalars())
    return FailureGroup(
        destination=destination,
        state=cast("Literal['pending', 'dead']", state),
        cause=cause,
        count=found["count"],
        first=times[0],
        last=times[-1],
        example=oldest,
    )


def _last_due(destination: str, errors: Sequence[str]) -> Select[Any]:
    return (
        select(deliveries.c.id)
        .where(
            in_state(deliveries, "pending"),
            deliveries.c.destination == destination,
            deliveries.c.error.in_(errors[:MAX_COMPARED]),
        )
        .order_by(deliveries.c.next_attempt_at.desc())
        .limit(1)
    )
