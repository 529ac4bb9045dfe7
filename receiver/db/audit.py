"""SQL for the record of operators' actions."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, cast

from sqlalchemy import delete, exists, insert, select, update
from typing_extensions import TypedDict

from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.operation_tables import actions
from receiver.db.statements import between, count_rows, equal

MAX_ROWS: Final = 100_000
"""Newest actions that are kept."""
PART_SECONDS: Final = 86_400.0
"""A call is a part of an action that has begun within this time."""


class Action(TypedDict):
    """An action of an operator."""

    id: int
    at: datetime
    by: str
    """The name of the token, or `NAME on the command line`."""
    operation: str
    """The operation's id in the specification."""
    target: str | None
    """The id in the path."""
    reason: str | None
    dry_run: bool
    """Whether it only counted."""
    status: int | None
    """Of the answer; null while the action is under way, or if its process died."""
    code: str | None
    """Of the error, if the action failed."""


async def begin(connection: SqlConnection, *, by: str, operation: str, **values: Any) -> int:
    """Record an action that is about to begin, and return its id; the oldest rows make room for it."""
    new = insert(actions).values(at=db_time(0.0), by=by, operation=operation, **values)
    found: int = (await connection.execute(new.returning(actions.c.id))).scalar_one()
    await connection.execute(delete(actions).where(actions.c.id <= found - MAX_ROWS))
    return found


async def end(connection: SqlConnection, action_id: int, values: Mapping[str, Any]) -> None:
    """Record the outcome of an action, and further values of it."""
    await connection.execute(update(actions).where(actions.c.id == action_id).values(**values))


async def merge(connection: SqlConnection, action_id: int, *, begun: int) -> bool:
    """Delete the record of a part that succeeded, if the action that it goes on with has begun lately.

    Otherwise it returns False: without that record the part must stay.
    """
    first = actions.alias("first")
    has_begun = exists().where(first.c.id == begun, first.c.at >= db_time(-PART_SECONDS))
    done = delete(actions).where(actions.c.id == action_id, has_begun)
    return (await connection.execute(done)).rowcount == 1


async def list_actions(
    connection: SqlConnection,
    *,
    limit: int,
    before: int | None = None,
    by: str | None = None,
    operation: str | None = None,
    target: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Sequence[Action]:
    """Return actions, newest first. `before` is the `id` of the last row of the previous page."""
    where = equal(actions, {"by": by, "operation": operation, "target": target})
    where += between(actions.c.at, since, until)
    if before is not None:
        where.append(actions.c.id < before)
    statement = select(actions).where(*where).order_by(actions.c.id.desc()).limit(limit)
    rows = (await connection.execute(statement)).mappings()
    return [cast("Action", dict(row)) for row in rows]


async def prune(connection: SqlConnection, before: datetime, *, dry_run: bool) -> int:
    """Delete the actions that began before a time, or only count them; return their number."""
    is_old = actions.c.at < before
    if dry_run:
        return await count_rows(connection, actions, is_old)
    return (await connection.execute(delete(actions).where(is_old))).rowcount
