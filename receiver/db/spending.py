"""SQL for the credits that a caller spends in a day."""

from datetime import UTC, datetime, timedelta

from sqlalchemy import and_, case, func, not_, select, text, union_all

from receiver.db import prices
from receiver.db.connection import SqlConnection
from receiver.db.tables import is_open, jobs
from receiver.price import Credits


async def spent_today(connection: SqlConnection, caller: str) -> Credits:
    """Return the charged, reserved or estimated credits of a caller's open jobs and of today's (UTC) jobs.

    A job without an answer counts on the day of its first attempt. The function locks the caller's spending
    until the transaction ends, so that two jobs do not both use the last of the budget. The sum is a second
    statement, because the snapshot of a statement that waits for a lock is older than the lock.
    """
    if connection.dialect.name == "postgresql":
        lock = text("SELECT pg_advisory_xact_lock(hashtextextended(:caller, 20041))")
        await connection.execute(lock, {"caller": caller})
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    # A key is valid for less than a day, so a job that was sent earlier cannot be accepted today.
    is_recent = and_(
        jobs.c.sent_at >= midnight - timedelta(days=1),
        func.coalesce(jobs.c.submitted_at, jobs.c.sent_at) >= midnight,
    )
    ended = jobs.c.charged.is_not(None)
    parts = [
        case((ended, charged), else_=cost).label(cost.name)
        for charged, cost in ((jobs.c.charged, jobs.c.cost), (jobs.c.charged_micros, jobs.c.cost_micros))
    ]
    # A union, because each condition has its own index.
    counted = union_all(
        *(
            select(*parts).where(jobs.c.caller == caller, which)
            for which in (is_open, and_(not_(is_open), is_recent))
        )
    ).subquery()
    statement = select(*(func.coalesce(func.sum(part), 0).label(part.name) for part in counted.c))
    found: Credits = prices.join((await connection.execute(statement)).mappings().one())["cost"]
    return found
