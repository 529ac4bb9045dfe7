"""SQL of the status: failing deliveries, rates, the last webhook, and the last hour by minute."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, String, and_, case, func, select

from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.reads import PENDING
from receiver.db.statements import count_rows
from receiver.db.tables import attempts, deliveries, events, in_state, is_live, jobs, media

RECENT_SECONDS = 300.0
"""The time whose attempts make a rate."""
MAX_RECENT_ATTEMPTS = 5000
"""The most attempts that are read for the rates; if there are more, the rates are of a shorter time."""
MAX_NEWEST_EVENTS = 100
"""The newest events among which the last webhook is searched; the others were polled."""
MINUTES = 60
"""The minutes that are counted one by one."""
MAX_COUNTED_EVENTS = 50_000
"""The most events that are counted by minute; if there are more, fewer minutes are."""
MAX_COUNTED_ATTEMPTS = 10_000
"""The most attempts that are counted by minute, with those at files and jobs."""


class Rate(NamedTuple):
    """Attempts at a destination, per minute."""

    delivered: float
    failed: float


class FailingFile(NamedTuple):
    """A file that could not be downloaded yet, and the number of such files."""

    number: int
    request_id: str
    error: str


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


async def find_failing_file(connection: SqlConnection) -> FailingFile | None:
    """Return the file whose download failed last, among those that are tried again; None without one."""
    is_failing = in_state(media, "pending"), media.c.error.is_not(None)
    newest = (
        select(events.c.request_id, media.c.error)
        .join(events, events.c.seq == media.c.event_seq)
        .where(*is_failing)
        .order_by(media.c.next_attempt_at.desc())
        .limit(1)
    )
    row = (await connection.execute(newest)).one_or_none()
    if row is None:
        return None
    number = await count_rows(connection, media, *is_failing)
    return FailingFile(number=number, request_id=row.request_id, error=row.error)


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


async def count_events(connection: SqlConnection, now: datetime) -> list[int]:
    """Count the events received in each of the last minutes, the newest last; there may be fewer minutes."""
    newest = (
        select(events.c.received_at.label("at"))
        .where(events.c.received_at >= _first_minute(now))
        .order_by(events.c.received_at.desc(), events.c.seq.desc())
        .limit(MAX_COUNTED_EVENTS)
        .subquery()
    )
    minute = _minute(connection, newest.c.at)
    rows = (await connection.execute(select(minute, func.count()).group_by(minute))).all()
    is_cut = sum(row[1] for row in rows) == MAX_COUNTED_EVENTS
    (counts,) = _by_minute([(row[0], row[1]) for row in rows], now, is_cut=is_cut)
    return counts


async def count_attempts(connection: SqlConnection, now: datetime) -> tuple[list[int], list[int]]:
    """Count the deliveries that succeeded and the attempts that failed in each of the last minutes."""
    newest = (
        select(attempts.c.work_id, attempts.c.outcome, attempts.c.started_at)
        .order_by(attempts.c.seq.desc())
        .limit(MAX_COUNTED_ATTEMPTS)
        .subquery()
    )
    is_delivery = deliveries.c.id.is_not(None)
    minute = _minute(connection, newest.c.started_at)
    statement = (
        select(
            minute,
            func.count(case((and_(is_delivery, newest.c.outcome == "succeeded"), 1))),
            func.count(case((and_(is_delivery, newest.c.outcome.in_(["retry", "failed"])), 1))),
            func.count(),
        )
        .select_from(newest.outerjoin(deliveries, deliveries.c.id == newest.c.work_id))
        .where(newest.c.started_at >= _first_minute(now))
        .group_by(minute)
    )
    rows = (await connection.execute(statement)).all()
    is_cut = sum(row[3] for row in rows) == MAX_COUNTED_ATTEMPTS
    delivered, failed = _by_minute([tuple(row[:3]) for row in rows], now, is_cut=is_cut, figures=2)
    return delivered, failed


def _first_minute(now: datetime) -> datetime:
    return now.replace(second=0, microsecond=0) - timedelta(minutes=MINUTES - 1)


def _minute(connection: SqlConnection, time: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return the minute of a time; in SQLite as text, because its functions of time take much longer."""
    if connection.dialect.name == "sqlite":
        return func.substr(time, 1, len("2026-01-31 12:00"), type_=String)
    return func.date_trunc("minute", time)


def _by_minute(
    rows: Sequence[tuple[Any, ...]], now: datetime, *, is_cut: bool, figures: int = 1
) -> list[list[int]]:
    """Return each figure of rows by minute. If the rows were cut, their first minute is not complete."""
    found = {_read_minute(row[0]): row[1:] for row in rows}
    minutes = [_first_minute(now) + timedelta(minutes=number) for number in range(MINUTES)]
    if is_cut:
        minutes = [each for each in minutes if each > min(found)] or minutes[-1:]
    nothing = (0,) * figures
    return [[found.get(each, nothing)[index] for each in minutes] for index in range(figures)]


def _read_minute(value: str | datetime) -> datetime:
    if isinstance(value, str):
        return datetime.fromisoformat(value).replace(tzinfo=UTC)
    return value.astimezone(UTC)
