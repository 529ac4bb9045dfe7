"""Claims rows by lease, in each table with the work columns.

The claim and the result are two short transactions, and the work runs between them outside any transaction.
The lease is a fencing token: a result is recorded only if the row still has the lease of its claim. If a
process was suspended for longer than its lease, another one may have claimed the row, and the late result is
dropped.
"""

import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from typing import Any, Final

from sqlalchemy import (
    Column,
    ColumnElement,
    Float,
    Integer,
    Row,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    case,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.sql.dml import ReturningUpdate

from receiver.db.arrays import DIALECTS, Rows, among
from receiver.db.clock import db_time, seconds_since, statement_time
from receiver.db.rows import Attempt, Backlog, Claim, DeliveryClaim, EventClaim, new_id
from receiver.db.tables import PlainUuid, attempts, deliveries, in_state, is_live, is_replayed, media

ENDED: Final[Mapping[str, Any]] = {"lease": None, "next_attempt_at": None, "finished_at": db_time(0.0)}
"""Columns of a row in a final state."""
RESTARTED: Final[Mapping[str, Any]] = {
    "state": "pending",
    **dict.fromkeys(("lease", "error", "finished_at")),
    **dict.fromkeys(("attempts", "lost"), 0),
    **dict.fromkeys(("next_attempt_at", "restarted_at"), db_time(0.0)),
}
"""Columns of a row that starts again, with all attempts and all its time."""


def _claim_statement(
    table: Table,
    *columns: Column[Any],
    where: Sequence[ColumnElement[bool]] = (),
    state: str = "pending",
    newest_first: bool = False,
) -> ReturningUpdate[Any]:
    """Return the statement that claims up to `most` due rows for `seconds`, ordered by due time.

    The claim counts the attempt, because work that kills its process has to run out of attempts too.
    """
    # Rows may have the same time, and ids are made in order.
    newest = (table.c.next_attempt_at.desc(), table.c.id.desc())
    due = (
        select(table.c.id)
        .where(in_state(table, state), table.c.next_attempt_at <= statement_time(), *where)
        .order_by(*(newest if newest_first else (table.c.next_attempt_at,)))
        .limit(bindparam("most", type_=Integer))
        .with_for_update(skip_locked=True)
        # A CTE with row locks is evaluated once; a subquery may be evaluated again and claim too many rows.
        .cte("due")
    )
    began = (
        func.coalesce(table.c.restarted_at, table.c.created_at)
        if "restarted_at" in table.c
        else table.c.created_at
    )
    return (
        update(table)
        .where(table.c.id.in_(select(due.c.id)))
        .values(
            next_attempt_at=db_time(bindparam("seconds", type_=Float)),
            lease=bindparam("new_lease", type_=PlainUuid),
            attempts=table.c.attempts + 1,
            lost=case((table.c.lease.is_not(None), table.c.lost + 1), else_=table.c.lost),
        )
        .returning(
            table.c.id,
            table.c.lease,
            table.c.attempts,
            table.c.lost,
            seconds_since(began).label("age"),
            *columns,
        )
    )


# Built once: building a statement takes as long as running it.
_CLAIM_MEDIA: Final = _claim_statement(media, media.c.event_seq)
_CLAIM_DELIVERIES: Final = {
    replayed: _claim_statement(
        deliveries,
        deliveries.c.event_seq,
        deliveries.c.replay_id,
        where=[
            deliveries.c.destination == bindparam("to"),
            is_replayed if replayed else is_live,
        ],
    )
    for replayed in (False, True)
}


async def claim_media(connection: AsyncConnection, *, limit: int, lease: float) -> list[EventClaim]:
    """Claim files, as `claim` does."""
    rows = await _claim(connection, _CLAIM_MEDIA, limit=limit, lease=lease)
    return [EventClaim(event_seq=row.event_seq, **_claimed(row)) for row in rows]


async def claim_deliveries(
    connection: AsyncConnection, destination: str, *, limit: int, lease: float, replayed: bool
) -> list[DeliveryClaim]:
    """Claim deliveries to a destination, as `claim` does: those of replays or the live ones."""
    statement = _CLAIM_DELIVERIES[replayed]
    rows = await _claim(connection, statement, limit=limit, lease=lease, to=destination)
    return [DeliveryClaim(event_seq=row.event_seq, replay_id=row.replay_id, **_claimed(row)) for row in rows]


async def claim(
    connection: AsyncConnection,
    table: Table,
    *,
    limit: int,
    lease: float,
    where: Sequence[ColumnElement[bool]] = (),
    state: str = "pending",
    newest_first: bool = False,
) -> list[Claim]:
    """Claim up to `limit` due rows in `state` for `lease` seconds, ordered by due time."""
    statement = _claim_statement(table, where=where, state=state, newest_first=newest_first)
    rows = await _claim(connection, statement, limit=limit, lease=lease)
    return [Claim(**_claimed(row)) for row in rows]


async def _claim(
    connection: AsyncConnection, statement: ReturningUpdate[Any], *, limit: int, lease: float, **values: Any
) -> Sequence[Row[Any]]:
    given = {"most": limit, "seconds": lease, "new_lease": uuid.uuid4(), **values}
    rows: Sequence[Row[Any]] = (await connection.execute(statement, given)).all()
    return rows


def _claimed(row: Row[Any]) -> dict[str, Any]:
    return {"id": row.id, "lease": row.lease, "attempt": row.attempts, "lost": row.lost, "age": row.age}


async def renew(
    connection: AsyncConnection, table: Table, claims: Collection[Claim], *, lease: float
) -> set[uuid.UUID]:
    """Extend the leases to `lease` seconds from now; return the ids of the rows that still have them."""
    await lock(connection, table, claims)
    found = set()
    for given in _held_values(claims):
        rows = await connection.execute(_renewal(table), given | {"seconds": lease})
        found.update(rows.scalars())
    return found


async def lock(connection: AsyncConnection, table: Table, claims: Collection[Claim]) -> None:
    """Lock the rows of claims in the order of their ids, so that transactions do not deadlock."""
    for given in _held_values(claims):
        await connection.execute(_locking(table), given)


async def release(connection: AsyncConnection, table: Table, claims: Collection[Claim]) -> None:
    """Make rows due again without counting the attempt."""
    for given in _held_values(claims):
        await connection.execute(_release(table), given)


async def retry(
    connection: AsyncConnection, table: Table, held: Claim, *, delay: float, error: str | None, **values: Any
) -> bool:
    """Schedule the next attempt in `delay` seconds; False if the row has another lease."""
    result = await connection.execute(
        update(table)
        .where(table.c.id == held.id, table.c.lease == held.lease)
        .values(next_attempt_at=db_time(delay), lease=None, lost=0, error=error, **values)
    )
    return result.rowcount == 1


async def finish(
    connection: AsyncConnection,
    table: Table,
    held: Claim,
    *,
    state: str,
    error: str | None = None,
    **values: Any,
) -> bool:
    """Move a row to a final state; False if the row has another lease."""
    result = await connection.execute(
        update(table)
        .where(table.c.id == held.id, table.c.lease == held.lease)
        .values(state=state, error=error, **ENDED, **values)
    )
    return result.rowcount == 1


async def finish_all(
    connection: AsyncConnection, table: Table, claims: Collection[Claim], *, state: str, error: str | None
) -> set[uuid.UUID]:
    """Move rows to a final state; return the ids of the rows that still had the lease."""
    found = set()
    for given in _held_values(claims):
        rows = await connection.execute(_finish(table), given | {"new_state": state, "new_error": error})
        found.update(rows.scalars())
    return found


async def record_attempt(connection: AsyncConnection, work_id: uuid.UUID, attempt: Attempt) -> None:
    """Record one attempt."""
    await record_attempts(connection, [(work_id, attempt)])


async def record_attempts(connection: AsyncConnection, made: Collection[tuple[uuid.UUID, Attempt]]) -> None:
    """Record attempts, each with the id of its row."""
    rows = [{"work_id": work_id, **vars(attempt)} for work_id, attempt in made]
    if rows:
        dialect_name = connection.dialect.name
        await connection.execute(_INSERT_ATTEMPTS[dialect_name], _ATTEMPT_ROWS.parameters(dialect_name, rows))


_ATTEMPT_ROWS: Final = Rows(*(column for column in attempts.c if column.name != "seq"))
_INSERT_ATTEMPTS: Final = {
    name: insert(attempts).from_select(_ATTEMPT_ROWS.columns, _ATTEMPT_ROWS.select(name)) for name in DIALECTS
}


def is_unclaimed(table: Table) -> ColumnElement[bool]:
    """Return the condition that no worker has a valid lease on a row."""
    return or_(table.c.lease.is_(None), table.c.next_attempt_at <= statement_time())


async def read_backlog(connection: AsyncConnection, made_at: Column[Any], state: str) -> Backlog:
    """Count the rows of a table in a state; the column `made_at` tells the age of the oldest one."""
    oldest = seconds_since(func.min(made_at))
    row = (await connection.execute(select(func.count(), oldest).where(in_state(made_at.table, state)))).one()
    return Backlog(rows=row[0], oldest=row[1] or 0.0)


def work_values(state: str = "pending", *, due: bool = True) -> dict[str, Any]:
    """Return the work columns of a new row; if it is not due, a later UPDATE has to set its time."""
    return {
        "id": new_id(),
        "state": state,
        "next_attempt_at": db_time(0.0) if due else None,
        "created_at": db_time(0.0),
    }


def _held_values(claims: Collection[Claim]) -> list[dict[str, Any]]:
    """Return the parameters of `_held` for each lease, in the order that all transactions use."""
    by_lease: dict[uuid.UUID, list[uuid.UUID]] = defaultdict(list)
    for held in claims:
        by_lease[held.lease].append(held.id)
    return [{"held_lease": lease, "held_ids": ids} for lease, ids in sorted(by_lease.items())]


def _held(table: Table) -> ColumnElement[bool]:
    return and_(table.c.lease == bindparam("held_lease"), among(table.c.id, "held_ids"))


@cache
def _locking(table: Table) -> Select[Any]:
    return select(table.c.id).where(_held(table)).order_by(table.c.id).with_for_update()


@cache
def _renewal(table: Table) -> ReturningUpdate[Any]:
    until = db_time(bindparam("seconds", type_=Float))
    return update(table).where(_held(table)).values(next_attempt_at=until).returning(table.c.id)


@cache
def _release(table: Table) -> Update:
    due = {"next_attempt_at": db_time(0.0), "lease": None, "attempts": table.c.attempts - 1}
    return update(table).where(_held(table)).values(due)


@cache
def _finish(table: Table) -> ReturningUpdate[Any]:
    values: dict[str, Any] = {"state": bindparam("new_state"), "error": bindparam("new_error"), **ENDED}
    return update(table).where(_held(table)).values(values).returning(table.c.id)
