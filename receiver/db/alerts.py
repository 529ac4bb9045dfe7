"""SQL for alerts: their rows, the messages that wait for a destination, and the rows that conditions need."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple

from sqlalchemy import ColumnElement, delete, exists, func, insert, select, tuple_, update
from typing_extensions import TypedDict

from receiver.core.alerting import RUNBOOKS, Alert, AlertKind
from receiver.core.retry import GIVE_UP_SECONDS
from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.leases import work_values
from receiver.db.operation_tables import alert_messages, alerts
from receiver.db.rows import Claim
from receiver.db.statements import equal, insert_for
from receiver.db.tables import deliveries, events, in_state, jobs, probes, rejections

KEPT_SECONDS: Final = 30 * 86_400.0
"""How long a resolved alert is kept."""
LEFT_SECONDS: Final = GIVE_UP_SECONDS + 3600.0
"""An older message has no lane: a lane gives up earlier."""
EXAMPLES: Final = 5
UNSURE_SECONDS: Final = 2 * 86_400.0
"""The age up to which jobs count: a job becomes unsure within a day."""
MISMATCH_SECONDS: Final = 900.0
GAP_SECONDS: Final = 15.0
"""A turn that begins later than this after it was due ends the time in which the conditions were watched."""

_TURN: Final = "alerts"
_WATCHED_SINCE: Final = "alerts_since"
_COLUMNS: Final = [alerts.c[name] for name in Alert.__dataclass_fields__]


AlertState = Literal["open", "resolved"]


class Occurrences(NamedTuple):
    """Objects of one kind and subject."""

    number: int
    first_at: datetime | None
    last_at: datetime | None
    examples: Sequence[str]


class ShownAlert(TypedDict):
    """An alert on record."""

    alert: AlertKind
    subject: str
    """The destination, source, lane, account or disk."""
    state: AlertState
    text: str
    command: str
    """The next command."""
    runbook: str
    """The path of a page in this repository."""
    count: int
    first_at: datetime
    last_at: datetime | None
    examples: list[str]
    """Ids of some of the objects."""
    id: uuid.UUID
    """The same in all messages from its start to its end."""
    raised_at: datetime
    resolved_at: datetime | None
    told_at: datetime | None
    """The time of the last message that it is raised."""


async def take_turn(connection: SqlConnection, *, seconds: float) -> bool:
    """Return whether this process reads the conditions now; the next turn is due in `seconds`."""
    for name in (_TURN, _WATCHED_SINCE):
        new = insert_for(connection.dialect.name, probes).values(name=name, at=db_time(0.0))
        await connection.execute(new.on_conflict_do_nothing())
    is_due = probes.c.name == _TURN, probes.c.at <= db_time(0.0)
    due = select(seconds_since(probes.c.at)).where(*is_due).with_for_update()
    late = (await connection.execute(due)).scalar_one_or_none()
    if late is None:
        return False
    await connection.execute(update(probes).where(probes.c.name == _TURN).values(at=db_time(seconds)))
    if late > GAP_SECONDS:
        begin = update(probes).where(probes.c.name == _WATCHED_SINCE)
        await connection.execute(begin.values(at=db_time(0.0)))
    return True


async def read_watched_since(connection: SqlConnection) -> datetime:
    """Return the time since which no turn was missed."""
    found: datetime = (
        await connection.execute(select(probes.c.at).where(probes.c.name == _WATCHED_SINCE))
    ).scalar_one()
    return found


async def lock(connection: SqlConnection) -> datetime:
    """Let no other process change alerts until the transaction ends; return the database's time."""
    new = insert_for(connection.dialect.name, probes).values(name=_TURN, at=db_time(0.0))
    await connection.execute(new.on_conflict_do_nothing())
    await connection.execute(select(probes.c.name).where(probes.c.name == _TURN).with_for_update())
    found: datetime = (await connection.execute(select(db_time(0.0)))).scalar_one()
    return found


async def load(connection: SqlConnection) -> dict[tuple[AlertKind, str], Alert]:
    """Return all alerts on record."""
    rows = (await connection.execute(select(*_COLUMNS))).mappings()
    found = [Alert(**{**row, "examples": tuple(row["examples"])}) for row in rows]
    return {alert.key: alert for alert in found}


async def save(connection: SqlConnection, alert: Alert) -> None:
    """Store an alert."""
    values = vars(alert) | {"examples": list(alert.examples)}
    new = insert_for(connection.dialect.name, alerts).values(**values)
    changed = {name: new.excluded[name] for name in values if name not in {"kind", "subject"}}
    await connection.execute(new.on_conflict_do_update(index_elements=["kind", "subject"], set_=changed))


async def delete_old(connection: SqlConnection) -> None:
    """Delete alerts that were resolved long ago, and messages for destinations that no worker has."""
    await connection.execute(delete(alerts).where(alerts.c.resolved_at < db_time(-KEPT_SECONDS)))
    is_left = alert_messages.c.created_at < db_time(-LEFT_SECONDS), alert_messages.c.lease.is_(None)
    await connection.execute(delete(alert_messages).where(*is_left))


async def add_messages(
    connection: SqlConnection,
    destinations: Collection[str],
    message: Mapping[str, Any],
    *,
    occurrence: uuid.UUID,
    told: str,
) -> None:
    """Add a message for each destination.

    It takes the place of an earlier one about the same state that no worker sends now, so that the
    messages for a destination that is away do not pile up.
    """
    same = alert_messages.c.occurrence == occurrence, alert_messages.c.told == told
    for name in destinations:
        mine = alert_messages.c.destination == name, alert_messages.c.lease.is_(None)
        await connection.execute(delete(alert_messages).where(*same, *mine))
        values = {"destination": name, "occurrence": occurrence, "told": told, "message": message}
        await connection.execute(insert(alert_messages).values(**work_values(), **values))


def is_next() -> ColumnElement[bool]:
    """Return the condition that no earlier message about the same alert waits for the same destination.

    Not the time at which a message is due: each that fails has a delay of its own.
    """
    mine, earlier = alert_messages.c, alert_messages.alias("earlier").c
    return ~exists().where(
        earlier.destination == mine.destination,
        earlier.occurrence == mine.occurrence,
        tuple_(earlier.created_at, earlier.id) < tuple_(mine.created_at, mine.id),
    )


async def load_messages(
    connection: SqlConnection, ids: Collection[uuid.UUID]
) -> dict[uuid.UUID, dict[str, Any]]:
    """Return the messages of rows."""
    columns = (alert_messages.c.id, alert_messages.c.message)
    rows = await connection.execute(select(*columns).where(alert_messages.c.id.in_(ids)))
    return {row.id: row.message for row in rows}


async def remove_message(connection: SqlConnection, held: Claim) -> bool:
    """Delete a message that was confirmed or given up; False if the row has another lease."""
    mine = alert_messages.c.id == held.id, alert_messages.c.lease == held.lease
    return (await connection.execute(delete(alert_messages).where(*mine))).rowcount == 1


async def list_alerts(
    connection: SqlConnection, *, limit: int, state: str | None = None, kind: str | None = None
) -> list[ShownAlert]:
    """Return alerts, open ones first, and the latest first."""
    where = equal(alerts, {"kind": kind})
    is_open = alerts.c.resolved_at.is_(None)
    if state is not None:
        where.append(is_open if state == "open" else ~is_open)
    order = is_open.desc(), alerts.c.raised_at.desc(), alerts.c.kind, alerts.c.subject
    rows = (await connection.execute(select(alerts).where(*where).order_by(*order).limit(limit))).mappings()
    return [
        ShownAlert(
            alert=row["kind"],
            state="open" if row["resolved_at"] is None else "resolved",
            id=row["occurrence"],
            subject=row["subject"],
            text=row["text"],
            command=row["command"],
            runbook=RUNBOOKS[row["kind"]],
            count=row["count"],
            first_at=row["first_at"],
            last_at=row["last_at"],
            examples=row["examples"],
            raised_at=row["raised_at"],
            resolved_at=row["resolved_at"],
            told_at=row["told_at"],
        )
        for row in rows
    ]


# --- rows that conditions need ---


async def find_dead_letters(connection: SqlConnection) -> dict[str, Occurrences]:
    """Return the dead letters by destination."""
    ended = deliveries.c.finished_at
    grouped = (
        select(deliveries.c.destination, func.count(), func.min(ended), func.max(ended))
        .where(in_state(deliveries, "dead"))
        .group_by(deliveries.c.destination)
    )
    found = {}
    for name, count, first_at, last_at in (await connection.execute(grouped)).all():
        newest = (
            select(deliveries.c.id)
            .where(in_state(deliveries, "dead"), deliveries.c.destination == name)
            .order_by(deliveries.c.id.desc())
            .limit(EXAMPLES)
        )
        ids = (await connection.execute(newest)).scalars()
        found[name] = Occurrences(count, first_at, last_at, [str(each) for each in ids])
    return found


async def find_unsure_jobs(connection: SqlConnection) -> Occurrences:
    """Return the unsure jobs that were made lately."""
    # As a value: the clock changes during a statement, so PostgreSQL would compare it with each row.
    since = (await connection.execute(select(db_time(-UNSURE_SECONDS)))).scalar_one()
    is_unsure = jobs.c.created_at >= since, jobs.c.state == "unsure"
    ended = jobs.c.finished_at
    counted = select(func.count(), func.min(ended), func.max(ended)).where(*is_unsure)
    row = (await connection.execute(counted)).one()
    newest = select(jobs.c.id).where(*is_unsure).order_by(jobs.c.created_at.desc()).limit(EXAMPLES)
    ids = (await connection.execute(newest)).scalars() if row[0] else ()
    return Occurrences(row[0], row[1], row[2], [str(each) for each in ids])


async def find_mismatches(connection: SqlConnection, sources: Collection[str]) -> dict[str, Occurrences]:
    """Return the rejected signatures of the last minutes, by source, unless others were right.

    If a webhook of the source was accepted after the first of them, the secret is right, and they are forged.
    """
    since = (await connection.execute(select(db_time(-MISMATCH_SECONDS)))).scalar_one()
    at = rejections.c.received_at
    grouped = (
        select(rejections.c.source, func.count(), func.min(at), func.max(at), func.max(rejections.c.id))
        .where(at >= since, rejections.c.reason == "mismatch", rejections.c.source.in_(sources))
        .group_by(rejections.c.source)
    )
    found = {}
    for name, count, first_at, last_at, newest in (await connection.execute(grouped)).all():
        accepted = exists().where(
            events.c.received_at >= first_at, events.c.source == name, events.c.origin == "webhook"
        )
        if not (await connection.execute(select(accepted))).scalar_one():
            found[name] = Occurrences(count, first_at, last_at, [str(newest)])
    return found
