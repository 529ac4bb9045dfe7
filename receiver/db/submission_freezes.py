"""SQL for the freeze: while its row exists, no job is accepted or submitted."""

import uuid
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from sqlalchemy import delete, select, update

from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.leases import ENDED
from receiver.db.statements import insert_for
from receiver.db.tables import freezes, in_state, jobs
from receiver.errors import ClipiaUnavailable

_NAME: Final = "jobs"


@dataclass(frozen=True, kw_only=True)
class Freeze:
    """The freeze of submissions: its author, reason and time."""

    by: str
    reason: str
    restored: bool
    """Whether the database was restored from a dump."""
    frozen_at: datetime


async def find(connection: SqlConnection) -> Freeze | None:
    """Return the freeze, or None if submissions are not frozen."""
    columns = [freezes.c[name] for name in Freeze.__dataclass_fields__]
    row = (await connection.execute(select(*columns).where(freezes.c.name == _NAME))).mappings().first()
    return None if row is None else Freeze(**row)


async def require_none(connection: SqlConnection) -> None:
    """Raise ClipiaUnavailable if submissions are frozen, which rolls back the new job."""
    if await find(connection) is not None:
        raise ClipiaUnavailable(
            "submissions are frozen and this key is new, so no job was made; try again with the same key "
            "after `receiver jobs thaw`",
            reason="submissions_frozen",
            may_have_arrived=False,
            retry_after=60.0,
        )


async def freeze(connection: SqlConnection, *, by: str, reason: str, restored: bool) -> None:
    """Freeze submissions; an existing freeze is kept, but a restore replaces its author and reason."""
    statement = insert_for(connection.dialect.name, freezes).values(
        name=_NAME, by=by, reason=reason, restored=restored, frozen_at=db_time(0.0)
    )
    await connection.execute(statement.on_conflict_do_nothing())
    if restored:
        await connection.execute(
            update(freezes).where(freezes.c.name == _NAME).values(restored=True, by=by, reason=reason)
        )


async def thaw(connection: SqlConnection, *, key_holds: float, error: str) -> list[uuid.UUID] | None:
    """End the freeze; return the jobs that become `unsure`, or None if there is no freeze.

    If the database was restored, a pending job of the dump may have been sent at any time after it was made.
    If it was made more than `key_holds` seconds ago, Clipia may have forgotten its key, so it becomes unsure.
    A younger job counts as sent when it was made: if it counted from now, its attempts would go on for longer
    than the key is valid.
    """
    found = await find(connection)
    if found is None:
        return None
    await connection.execute(delete(freezes).where(freezes.c.name == _NAME))
    if not found.restored:
        return []
    statement = (
        update(jobs)
        .where(
            in_state(jobs, "pending"),
            jobs.c.created_at < found.frozen_at,
            jobs.c.created_at < db_time(-key_holds),
        )
        .values(state="unsure", error=error, **ENDED, updated_at=db_time(0.0))
        .returning(jobs.c.id)
    )
    unsure = list((await connection.execute(statement)).scalars())
    await connection.execute(
        update(jobs)
        .where(in_state(jobs, "pending"), jobs.c.created_at < found.frozen_at, jobs.c.sent_at.is_(None))
        .values(sent_at=jobs.c.created_at)
    )
    return unsure
