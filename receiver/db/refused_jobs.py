"""SQL of jobs that Clipia refuses for now (402, 403): they hold up no other job.

A refusal is about one job's price or model. While there are such jobs, all that are due are of three classes:
those whose caller and model have no refused job, other new ones, and the refused ones. Each class has a share
of the submissions, and gives away what it does not use.
"""

import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import ColumnElement, FromClause, and_, case, func, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db import prices
from receiver.db.clock import db_time
from receiver.db.tables import in_state, is_refused, jobs

SEVERAL: Final = 3
"""Refusals of so many models and prices with no success between are about the account."""


SHARES: Final = ("sure", "newest", "sure", "oldest", "sure", "newest", "sure", "refused")
"""Whose turn it is, again and again.

New jobs that may be refused go from both ends of their line. One that was just made may be a cheaper one, and
would wait until all before it are refused; the oldest must not wait for as long as others are made after it.
"""
LAST_TRY_WAIT: Final = 300.0
"""Seconds that a refused job's last try may be late, as while no generation more may be in flight."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Which of the due jobs are claimed, how many of them, and whether the newest first."""

    where: tuple[ColumnElement[bool], ...] = ()
    most: int
    newest_first: bool = False


@dataclass(frozen=True, kw_only=True)
class Expired:
    """A refused job that ended because its time was over."""

    id: uuid.UUID
    state: str
    error: str | None


def same_environment(account: str, table: FromClause = jobs) -> ColumnElement[bool]:
    """Tell live from test: what was asked for under a test key must never be charged, nor the reverse."""
    environment = account.partition("-")[0]
    return table.c.account.like(f"{environment}-%")


async def turns(connection: AsyncConnection, account: str, *, limit: int, start: int) -> list[Turn]:
    """Return how up to `limit` due jobs are claimed, if `start` of them were claimed before."""
    if not await count(connection, account):
        return [Turn(most=limit)]
    is_new = jobs.c.refused_at.is_(None)
    refused = jobs.alias()
    is_doubtful = tuple_(jobs.c.caller, jobs.c.model).in_(
        select(refused.c.caller, refused.c.model).where(
            in_state(refused, "pending"),
            refused.c.refused_at.is_not(None),
            same_environment(account, refused),
        )
    )
    which = {
        "sure": (is_new, ~is_doubtful),
        "newest": (is_new, is_doubtful),
        "oldest": (is_new, is_doubtful),
        "refused": (~is_new,),
    }
    shares = Counter(SHARES[(start + place) % len(SHARES)] for place in range(limit))
    shared = [
        Turn(where=which[name], most=most, newest_first=name == "newest") for name, most in shares.items()
    ]
    # What a class does not use is the others'.
    rest = [Turn(where=which[name], most=limit) for name in ("sure", "oldest", "refused")]
    return shared + rest


async def count(connection: AsyncConnection, account: str | None = None) -> int:
    """Return how many jobs Clipia refuses for now: those of one account, or all of them."""
    statement = select(func.count()).select_from(jobs).where(is_refused)
    if account is not None:
        statement = statement.where(same_environment(account))
    return int((await connection.execute(statement)).scalar_one())


async def release(connection: AsyncConnection, account: str) -> None:
    """Make the refused jobs due: one of them was accepted, so something has changed."""
    # Locked rows are skipped: two transactions that wait for each other's rows would be a deadlock.
    waiting = (
        select(jobs.c.id)
        .where(is_refused, same_environment(account), jobs.c.lease.is_(None))
        .with_for_update(skip_locked=True)
        .cte("waiting")
    )
    await connection.execute(
        update(jobs)
        .where(jobs.c.id.in_(select(waiting.c.id)), jobs.c.lease.is_(None))
        .values(next_attempt_at=db_time(0.0))
    )


async def expire(connection: AsyncConnection, account: str, *, give_up_after: float) -> list[Expired]:
    """End refused jobs whose time is over and whose last try does not come; return them."""
    due = (
        select(jobs.c.id)
        .where(
            is_refused,
            same_environment(account),
            jobs.c.refused_at <= db_time(-give_up_after),
            # A job that is being tried is due later than that.
            jobs.c.next_attempt_at <= db_time(-LAST_TRY_WAIT),
        )
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    # An earlier try that was not answered may have arrived.
    was_sent = jobs.c.sent_at.is_not(None)
    charged = {name: case((was_sent, jobs.c[name]), else_=0) for name in prices.split(charged=0)}
    statement = (
        update(jobs)
        .where(jobs.c.id.in_(select(due.c.id)))
        .values(
            **dict.fromkeys(("lease", "next_attempt_at")),
            **charged,
            state=case((was_sent, "unsure"), else_="failed"),
            finished_at=db_time(0.0),
            updated_at=db_time(0.0),
        )
        .returning(jobs.c.id, jobs.c.state, jobs.c.error)
    )
    return [Expired(**row) for row in (await connection.execute(statement)).mappings()]


async def find_account_refusal(
    connection: AsyncConnection, account: str, *, accepted_at: float
) -> str | None:
    """Return the last refusal if Clipia refuses several models and prices, and has accepted nothing since.

    `accepted_at` is the moment in unix seconds at which it last accepted a submission. Prices that are not
    known count as one of their model.
    """
    is_since = jobs.c.updated_at > datetime.fromtimestamp(accepted_at, UTC)
    since = and_(is_refused, same_environment(account), is_since)
    kinds = select(jobs.c.model, jobs.c.cost, jobs.c.cost_micros).where(since).distinct()
    found = (await connection.execute(kinds)).all()
    if len(found) < SEVERAL or len({row.model for row in found}) < 2:
        return None
    last = select(jobs.c.error).where(since).order_by(jobs.c.updated_at.desc()).limit(1)
    error: str | None = (await connection.execute(last)).scalar_one_or_none()
    return error
