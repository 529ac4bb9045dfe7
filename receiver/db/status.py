"""SQL of the status: deliveries that fail, the rate of each destination, and the last webhook."""

from datetime import datetime
from typing import NamedTuple

from sqlalchemy import case, func, select

from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.reads import PENDING
from receiver.db.tables import attempts, deliveries, events, in_state, is_live, jobs

RECENT_SECONDS = 300.0
"""The time whose attempts make a rate."""
MAX_RECENT_ATTEMPTS = 5000
"""The most attempts that are read for the rates; if there are more, the rates are of a shorter time."""
MAX_NEWEST_EVENTS = 100
"""The newest events among which the last webhook is searched; the others were polled."""


class Rate(NamedTuple):
    """Attempts at a destination, per minute."""

    delivered: float
    failed: float


async def count_failing(connection: SqlConnection) -> dict[str, int]:
    """Count the unfinished deliveries whose last attempt failed, by destination."""
    statement = (
        select(deliveries.c.destination, func.count())
        # Two partial indexes have the pending ones, and none of them serves the condition alone.
        .where(deliveries.c.id.in_(PENDING), deliveries.c.error.is_not(None))
        .group_by(deliveries.c.destination)
    )
    return {row[0]: row[1] for row in await connection.execute(statement)}


async def find_last_error(connection: SqlConnection, destination: str) -> str | None:
    """Return the error of an unfinished delivery to a destination, or else of its latest dead letter.

    A failed delivery waits for its next attempt, so it stands behind those that are due.
    """
    failed = (deliveries.c.destination == destination, deliveries.c.error.is_not(None))
    pending = (
        select(deliveries.c.error)
        .where(in_state(deliveries, "pending"), is_live, *failed)
        .order_by(deliveries.c.next_attempt_at.desc())
        .limit(1)
    )
    dead = (
        select(deliveries.c.error)
        .where(in_state(deliveries, "dead"), *failed)
        .order_by(deliveries.c.finished_at.desc())
        .limit(1)
    )
    return await connection.scalar(pending) or await connection.scalar(dead)


async def read_rates(connection: SqlConnection) -> dict[str, Rate]:
    """Return the rates by destination; those without recent attempts are left out."""
    newest = (
        select(attempts.c.work_id, attempts.c.outcome, attempts.c.started_at)
        .order_by(attempts.c.seq.desc())
        .limit(MAX_RECENT_ATTEMPTS)
        .subquery()
    )
    statement = (
        select(
            deliveries.c.destination,
            func.count(case((newest.c.outcome == "succeeded", 1))),
            func.count(case((newest.c.outcome.in_(["retry", "failed"]), 1))),
            seconds_since(func.min(newest.c.started_at)),
        )
        .select_from(newest.join(deliveries, deliveries.c.id == newest.c.work_id))
        .where(newest.c.started_at >= db_time(-RECENT_SECONDS))
        .group_by(deliveries.c.destination)
    )
    rates = {}
    for destination, delivered, failed, seconds in await connection.execute(statement):
        minutes = max(seconds, 60.0) / 60
        rates[destination] = Rate(delivered / minutes, failed / minutes)
    return rates


async def find_last_webhook(connection: SqlConnection) -> datetime | None:
    """Return the time of the newest event that a webhook brought."""
    newest = select(events.c.received_at, events.c.origin).order_by(events.c.seq.desc())
    among = newest.limit(MAX_NEWEST_EVENTS).subquery()
    statement = select(func.max(among.c.received_at)).where(among.c.origin == "webhook")
    found: datetime | None = await connection.scalar(statement)
    return found


async def count_jobs(connection: SqlConnection, since: datetime) -> dict[str, int]:
    """Count the jobs made at or after a time, by state."""
    statement = select(jobs.c.state, func.count()).where(jobs.c.created_at >= since).group_by(jobs.c.state)
    return {row[0]: row[1] for row in await connection.execute(statement)}
