"""SQL of jobs that Clipia refuses for now (402, 403): they hold up no other job.

A refusal is about one job's price or model. So jobs are submitted in this order: first those whose caller and
model have no refused job, then other new ones, then the refused ones again.
"""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import ColumnElement, FromClause, and_, func, select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db.clock import db_time
from receiver.db.tables import in_state, is_refused, jobs

SEVERAL: Final = 3
"""Refusals of so many models and prices with no success between are about the account."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Which of the due jobs are claimed, and whether the newest of them first."""

    where: list[ColumnElement[bool]] = field(default_factory=list)
    newest_first: bool = False


def same_environment(account: str, table: FromClause = jobs) -> ColumnElement[bool]:
    """Tell live from test: what was asked for under a test key must never be charged, nor the reverse."""
    environment = account.partition("-")[0]
    return table.c.account.like(f"{environment}-%")


async def turns(connection: AsyncConnection, account: str) -> list[Turn]:
    """Return the order in which due jobs are submitted."""
    if not await count(connection, account):
        return [Turn()]
    is_new = jobs.c.refused_at.is_(None)
    refused = jobs.alias()
    doubtful = tuple_(jobs.c.caller, jobs.c.model).in_(
        select(refused.c.caller, refused.c.model).where(
            in_state(refused, "pending"),
            refused.c.refused_at.is_not(None),
            same_environment(account, refused),
        )
    )
    return [
        Turn(where=[is_new, ~doubtful]),
        # A job that was just made may be a cheaper one. In the order in which they came it would wait until
        # all that were made before it are refused.
        Turn(where=[is_new], newest_first=True),
        Turn(where=[~is_new]),
    ]


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


async def find_wide(connection: AsyncConnection, account: str, *, accepted_at: float) -> str | None:
    """Return the last refusal if Clipia refuses several models and prices, and has accepted nothing since.

    `accepted_at` is the moment in unix seconds at which it last accepted a submission. Prices that are not
    known count as one of their model.
    """
    is_since = jobs.c.updated_at > datetime.fromtimestamp(accepted_at, UTC)
    since = and_(is_refused, same_environment(account), is_since)
    kinds = select(jobs.c.model, jobs.c.cost, jobs.c.cost_micros).where(since).distinct()
    found = (await connection.execute(kinds)).all()
    if len(found) < SEVERAL or len({row.model for row in found}) < 2:  # noqa: PLR2004 - several models
        return None
    last = select(jobs.c.error).where(since).order_by(jobs.c.updated_at.desc()).limit(1)
    error: str | None = (await connection.execute(last)).scalar_one_or_none()
    return error
