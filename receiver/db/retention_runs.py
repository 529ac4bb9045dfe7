"""SQL for the runs of retention: their record, and the claims of scheduled ones."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final, Literal, cast

from sqlalchemy import delete, func, insert, select, update
from typing_extensions import TypedDict

from receiver.db import leases, pruning
from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.operation_tables import RETENTION_COUNTS, retention_runs
from receiver.db.rows import Claim
from receiver.db.statements import insert_for

SCHEDULE: Final = "schedule"
"""The author of a run that no person began."""
DAY_BEGINS: Final = timedelta(hours=3)
"""A scheduled run is due at this time, UTC: nights are quiet in Europe and America."""
KEPT_SECONDS: Final = 400 * 86_400.0
"""How long the record of a run is kept."""
STALE_SECONDS: Final = 86_400.0
"""A run without progress for this long has failed: its process was killed."""

RunState = Literal["pending", "completed", "failed"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run deletes."""

    older_than_days: int
    media: bool = False
    dead_letters: bool = False


class RetentionRun(TypedDict):
    """A run of retention; the numbers are those until now."""

    id: uuid.UUID
    by: str
    """`schedule`, or the author of the first call."""
    state: RunState
    """`pending` until its end; a run that fails for now is tried again, and has an `error` meanwhile."""
    host: str | None
    """The machine of its last part."""
    older_than_days: int
    before: datetime
    """Events received before this moment are old."""
    media: bool
    dead_letters: bool
    events: int
    kept: int
    files: int
    files_elsewhere: int
    jobs: int
    rejections: int
    actions: int
    error: str | None
    created_at: datetime
    seen_at: datetime
    """The time of its last progress."""
    finished_at: datetime | None


_SHOWN: Final = [retention_runs.c[name] for name in RetentionRun.__annotations__]


async def schedule(connection: SqlConnection, plan: Plan) -> None:
    """Add the run of the day, unless it was added already, or an earlier one has not ended.

    Any number of processes may call this at once. The day is a unique key, and days are UTC by the database's
    clock: neither a clock that is set back nor daylight saving time makes a second run.
    """
    day = await _today(connection)
    is_ours = retention_runs.c.day.is_not(None), retention_runs.c.state == "pending"
    open_ = select(retention_runs.c.id).where(*is_ours).limit(1)
    if await connection.scalar(open_) is not None:
        return
    values = await _new_row(connection, plan, by=SCHEDULE)
    new = insert_for(connection.dialect.name, retention_runs).values(
        **leases.work_values() | values, day=day.isoformat()
    )
    await connection.execute(new.on_conflict_do_nothing())
    await connection.execute(
        delete(retention_runs).where(retention_runs.c.created_at < db_time(-KEPT_SECONDS))
    )


async def next_due(connection: SqlConnection) -> datetime:
    """Return the time of the next scheduled run; it may be past if no worker has begun it."""
    day = await _today(connection)
    begun = select(retention_runs.c.id).where(retention_runs.c.day == day.isoformat())
    if await connection.scalar(begun) is not None:
        day += timedelta(days=1)
    return datetime.combine(day, datetime.min.time(), UTC) + DAY_BEGINS


async def _today(connection: SqlConnection) -> date:
    now: datetime = (await connection.execute(select(db_time(0.0)))).scalar_one()
    return (now - DAY_BEGINS).date()


async def _new_row(connection: SqlConnection, plan: Plan, *, by: str) -> dict[str, Any]:
    before = await pruning.moment_ago(connection, seconds=plan.older_than_days * 86_400.0)
    return {**vars(plan), "by": by, "before": before, "seen_at": db_time(0.0)}


async def claim(connection: SqlConnection, *, limit: int, lease: float) -> list[tuple[Claim, dict[str, Any]]]:
    """Claim scheduled runs that are due; return each with its row."""
    claims = await leases.claim(connection, retention_runs, limit=limit, lease=lease)
    found = []
    for each in claims:
        row = select(retention_runs).where(retention_runs.c.id == each.id)
        found.append((each, dict((await connection.execute(row)).mappings().one())))
    return found


async def advance(
    connection: SqlConnection, held: Claim, *, host: str, position: str | None, counts: Mapping[str, int]
) -> bool:
    """Record the progress of a scheduled run; without a `position` it ends. False if its lease was lost."""
    values: dict[str, Any] = {**counts, "host": host, "position": position, "seen_at": db_time(0.0)}
    if position is None:
        return await leases.finish(connection, retention_runs, held, state="completed", **values)
    return await leases.retry(connection, retention_runs, held, delay=0.0, error=None, attempts=0, **values)


async def begin(connection: SqlConnection, plan: Plan, *, by: str, host: str, before: datetime) -> uuid.UUID:
    """Record a run that a caller begins; no lane claims it. Return its id."""
    values = leases.work_values(due=False) | await _new_row(connection, plan, by=by)
    values |= {"host": host, "before": before}
    await connection.execute(insert(retention_runs).values(**values))
    found: uuid.UUID = values["id"]
    return found


async def add_part(
    connection: SqlConnection, run_id: uuid.UUID, *, counts: Mapping[str, int], is_last: bool
) -> None:
    """Add the numbers of a part of a caller's run; nothing is changed if there is no such run."""
    sums = {name: retention_runs.c[name] + number for name, number in counts.items()}
    done = {"state": "completed" if is_last else "pending", "finished_at": db_time(0.0) if is_last else None}
    await _change_manual(connection, run_id, seen_at=db_time(0.0), error=None, **done, **sums)


async def fail_part(connection: SqlConnection, run_id: uuid.UUID, error: str) -> None:
    """Record that a part of a caller's run failed; a later part makes up for it."""
    await _change_manual(connection, run_id, state="failed", error=error, finished_at=db_time(0.0))


async def _change_manual(connection: SqlConnection, run_id: uuid.UUID, **values: Any) -> None:
    mine = retention_runs.c.id == run_id, retention_runs.c.day.is_(None)
    await connection.execute(update(retention_runs).where(*mine).values(**values))


async def list_runs(connection: SqlConnection, *, limit: int) -> Sequence[RetentionRun]:
    """Return runs, the newest first."""
    newest = select(*_SHOWN).order_by(retention_runs.c.created_at.desc()).limit(limit)
    return [cast("RetentionRun", dict(row)) for row in (await connection.execute(newest)).mappings()]


async def find_failed(connection: SqlConnection) -> RetentionRun | None:
    """Return the last run if it failed, fails for now, or has made no progress for a day."""
    is_stale = (seconds_since(retention_runs.c.seen_at) > STALE_SECONDS).label("is_stale")
    newest = select(*_SHOWN, is_stale).order_by(retention_runs.c.created_at.desc()).limit(1)
    row = (await connection.execute(newest)).mappings().one_or_none()
    if row is None or row["state"] == "completed":
        return None
    if row["error"] is None and not row["is_stale"]:
        return None
    return cast("RetentionRun", {name: row[name] for name in RetentionRun.__annotations__})


async def success_age(connection: SqlConnection) -> float:
    """Return the seconds since a run succeeded; if none has, since the first one began, or 0 without any."""
    is_done = retention_runs.c.state == "completed"
    done = select(seconds_since(func.max(retention_runs.c.finished_at))).where(is_done)
    begun = select(seconds_since(func.min(retention_runs.c.created_at)))
    age = await connection.scalar(done)
    return max(0.0, float(age if age is not None else await connection.scalar(begun) or 0.0))


def counts_of(values: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of a run."""
    return {name: values[name] for name in RETENTION_COUNTS}
