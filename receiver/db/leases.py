"""Claims rows by lease, in each table with the work columns.

The claim and the result are two short transactions, and the work runs between them outside any transaction.
The lease is a fencing token: a result is recorded only if the row still has the lease of its claim. If a
process was suspended for longer than its lease, another one may have claimed the row, and the late result is
dropped.
"""

import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, Final, TypeVar

from sqlalchemy import (
    Column,
    ColumnElement,
    Executable,
    Float,
    FromClause,
    Integer,
    Select,
    Table,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.sql.dml import ReturningUpdate

from receiver.db.array_parameters import DIALECTS, Rows, among
from receiver.db.clock import db_time, seconds_since, statement_time
from receiver.db.connection import SqlConnection
from receiver.db.rows import Attempt, Backlog, Claim, DeliveryClaim, EventClaim, new_id
from receiver.db.tables import (
    PlainUuid,
    UtcDateTime,
    attempts,
    deliveries,
    in_state,
    is_live,
    is_replayed,
    media,
)

ClaimT = TypeVar("ClaimT", bound=Claim)

ENDED: Final[Mapping[str, Any]] = {"lease": None, "next_attempt_at": None, "finished_at": db_time(0.0)}
"""Columns of a row in a final state."""
RESTARTED: Final[Mapping[str, Any]] = {
    "state": "pending",
    **dict.fromkeys(("lease", "error", "finished_at")),
    **dict.fromkeys(("attempts", "lost"), 0),
    **dict.fromkeys(("next_attempt_at", "restarted_at"), db_time(0.0)),
}
"""Columns of a row that starts again, with its full attempts and time."""


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
    # Rows may be due at the same time. Ids are made in order, so they break the tie.
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
            table.c.attempts.label("attempt"),
            table.c.lost,
            seconds_since(_began(table)).label("age"),
            *columns,
        )
    )


def _began(table: Table) -> ColumnElement[Any]:
    """Return the time at which a row has started, or started again."""
    made = table.c.created_at
    return func.coalesce(table.c.restarted_at, made) if "restarted_at" in table.c else made


# Built once: building a statement takes as long as running it.
_CLAIM_MEDIA: Final = _claim_statement(media, media.c.event_seq)
_CLAIM_DELIVERIES: Final = {
    replayed: _claim_statement(
        deliveries,
        deliveries.c.event_seq,
        deliveries.c.replay_id,
        where=[deliveries.c.destination == bindparam("to"), is_replayed if replayed else is_live],
    )
    for replayed in (False, True)
}


async def claim_media(connection: SqlConnection, *, limit: int, lease: float) -> list[EventClaim]:
    """Claim files, as `claim` does."""
    return await _claim(connection, _CLAIM_MEDIA, EventClaim, limit=limit, lease=lease)


async def claim_deliveries(
    connection: SqlConnection, destination: str, *, limit: int, lease: float, replayed: bool
) -> list[DeliveryClaim]:
    """Claim deliveries to a destination, as `claim` does: those of replays or the live ones."""
    made = uuid.uuid4()
    values = {"most": limit, "seconds": lease, "new_lease": made, "to": destination}
    rows = await connection.execute(_CLAIM_DELIVERIES[replayed], values)
    # Not by `_claim`: names as keys take twice as long.
    return [
        DeliveryClaim(
            id=id_, lease=made, attempt=attempt, lost=lost, age=age, event_seq=seq, replay_id=replay_id
        )
        for id_, attempt, lost, age, seq, replay_id in rows
    ]


async def claim(
    connection: SqlConnection,
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
    return await _claim(connection, statement, Claim, limit=limit, lease=lease)


async def _claim(
    connection: SqlConnection,
    statement: ReturningUpdate[Any],
    kind: type[ClaimT],
    *,
    limit: int,
    lease: float,
) -> list[ClaimT]:
    made = uuid.uuid4()
    values = {"most": limit, "seconds": lease, "new_lease": made}
    return [kind(lease=made, **row) for row in (await connection.execute(statement, values)).mappings()]


async def renew(
    connection: SqlConnection, table: Table, claims: Collection[Claim], *, lease: float
) -> set[uuid.UUID]:
    """Extend the leases to `lease` seconds from now; return the ids of the rows that still have them."""
    await lock(connection, table, claims)
    return await _execute(connection, _renewal(table), claims, seconds=lease)


async def lock(connection: SqlConnection, table: Table, claims: Collection[Claim]) -> None:
    """Lock the rows of claims in the order of their ids, so that transactions do not deadlock."""
    await _execute(connection, _locking(table), claims)


async def release(connection: SqlConnection, table: Table, claims: Collection[Claim]) -> None:
    """Make rows due again, before newer ones, without counting the attempt."""
    await _execute(connection, _release(table), claims)


async def retry(
    connection: SqlConnection, table: Table, held: Claim, *, delay: float, error: str | None, **values: Any
) -> bool:
    """Schedule the next attempt in `delay` seconds; False if the row has another lease."""
    due = {"next_attempt_at": db_time(delay), "lease": None, "lost": 0}
    return await _record(connection, table, held, error=error, **due, **values)


async def finish(
    connection: SqlConnection,
    table: Table,
    held: Claim,
    *,
    state: str,
    error: str | None = None,
    **values: Any,
) -> bool:
    """Move a row to a final state; False if the row has another lease."""
    return await _record(connection, table, held, state=state, error=error, **ENDED, **values)


async def _record(connection: SqlConnection, table: Table, held: Claim, **values: Any) -> bool:
    same = table.c.id == held.id, table.c.lease == held.lease
    return (await connection.execute(update(table).where(*same).values(values))).rowcount == 1


async def finish_all(
    connection: SqlConnection, table: Table, claims: Collection[Claim], *, state: str, error: str | None
) -> set[uuid.UUID]:
    """Move rows to a final state; return the ids of the rows that still had the lease."""
    return await _execute(connection, _finish(table), claims, new_state=state, new_error=error)


class LeaseLost(Exception):
    """A row has another lease; the transaction has to be rolled back."""


async def finish_delivered(
    connection: SqlConnection, claims: Collection[Claim], *, started_at: datetime, duration_ms: int
) -> None:
    """Record deliveries that were confirmed together, with their attempts. Raises LeaseLost.

    It does what `lock`, `finish_all` and `record_attempts` do, with one statement for each claim.
    """
    statements = _FINISH_DELIVERED[connection.dialect.name]
    attempt = {"began": started_at, "took": duration_ms}
    for lease, ids in _by_lease(claims):
        for statement in statements:
            result = await connection.execute(statement, {"held_lease": lease, "held_ids": ids, **attempt})
            if result.rowcount != len(ids):
                raise LeaseLost


async def record_attempt(connection: SqlConnection, work_id: uuid.UUID, attempt: Attempt) -> None:
    """Record one attempt."""
    await record_attempts(connection, [(work_id, attempt)])


async def record_attempts(connection: SqlConnection, made: Collection[tuple[uuid.UUID, Attempt]]) -> None:
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


async def read_backlog(connection: SqlConnection, made_at: Column[Any], state: str) -> Backlog:
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


async def _execute(
    connection: SqlConnection, statement: Executable, claims: Collection[Claim], **values: Any
) -> set[uuid.UUID]:
    """Execute a statement with `_held` for each lease; return the ids of the rows that still have it."""
    found = set[uuid.UUID]()
    for lease, ids in _by_lease(claims):
        rows = await connection.execute(statement, {"held_lease": lease, "held_ids": ids, **values})
        found.update(rows.scalars())
    return found


def _by_lease(claims: Collection[Claim]) -> list[tuple[uuid.UUID, list[uuid.UUID]]]:
    """Return the ids of the rows by lease; all transactions use this order, so that they do not deadlock."""
    by_lease: dict[uuid.UUID, list[uuid.UUID]] = defaultdict(list)
    for held in claims:
        by_lease[held.lease].append(held.id)
    return sorted(by_lease.items())


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
def _release(table: Table) -> ReturningUpdate[Any]:
    # Not now: the row would go behind all rows that are due.
    due = {"next_attempt_at": _began(table), "lease": None, "attempts": table.c.attempts - 1}
    return update(table).where(_held(table)).values(due).returning(table.c.id)


@cache
def _finish(table: Table) -> ReturningUpdate[Any]:
    values: dict[str, Any] = {"state": bindparam("new_state"), "error": bindparam("new_error"), **ENDED}
    return update(table).where(_held(table)).values(values).returning(table.c.id)


_DELIVERED: Final[Mapping[str, Any]] = {"state": "delivered", "error": None, **ENDED}
_ATTEMPT_COLUMNS: Final = ("work_id", "number", "started_at", "duration_ms", "outcome")


def _attempts_of(rows: FromClause) -> Select[Any]:
    began, took = bindparam("began", type_=UtcDateTime), bindparam("took", type_=Integer)
    return select(rows.c.id, rows.c.attempts, began, took, literal("succeeded"))


def _finish_delivered_at_once() -> Executable:
    # The rows are locked in the order of their ids, as `lock` does.
    locked = _locking(deliveries).cte("locked")
    done = (
        update(deliveries)
        .where(deliveries.c.id.in_(select(locked.c.id)))
        .values(_DELIVERED)
        .returning(deliveries.c.id, deliveries.c.attempts)
        .cte("done")
    )
    return insert(attempts).from_select(_ATTEMPT_COLUMNS, _attempts_of(done))


_FINISH_DELIVERED: Final[Mapping[str, Sequence[Executable]]] = {
    "postgresql": [_finish_delivered_at_once()],
    # SQLite has no UPDATE inside another statement. The first of these two checks the lease.
    "sqlite": [
        update(deliveries).where(_held(deliveries)).values(_DELIVERED),
        insert(attempts).from_select(
            _ATTEMPT_COLUMNS, _attempts_of(deliveries).where(among(deliveries.c.id, "held_ids"))
        ),
    ],
}
