"""SQL for jobs that Clipia refuses for now (402, 403), so that they do not delay other jobs.

A refusal is about the price or model of one job. While there are refused jobs, the due jobs fall into three
classes: new jobs if their caller and model have no refused job, other new jobs, and refused jobs. Each class
has a share of the submissions; the part that it does not use goes to the others.
"""

import uuid
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from sqlalchemy import ColumnElement, FromClause, and_, case, select, tuple_, update

from receiver.db import prices
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.leases import ENDED
from receiver.db.statements import count_rows
from receiver.db.tables import in_state, is_refused, jobs

ACCOUNT_REFUSALS: Final = 3
"""This many refused models and prices, without a success between them, mean that the account is refused."""
ROTATION: Final = ("sure", "newest", "sure", "oldest", "sure", "newest", "sure", "refused")
"""The classes of the submissions, one after the other and again from the start.

New jobs that may be refused are taken from both ends of their queue. The newest may be cheaper, and would
wait until all older ones are refused; the oldest would wait for as long as new ones are added.
"""
LAST_ATTEMPT_WAIT_SECONDS: Final = 300.0
"""How late a refused job's last attempt may be, for example while the in-flight limit is reached."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of the due jobs that one statement claims."""

    where: tuple[ColumnElement[bool], ...] = ()
    most: int
    newest_first: bool = False


@dataclass(frozen=True, kw_only=True)
class Expired:
    """A refused job that ended because it was refused for too long."""

    id: uuid.UUID
    state: str
    error: str | None


def same_environment(account: str, table: FromClause = jobs) -> ColumnElement[bool]:
    """Return the condition that a job is live or test as the account is: a test job must never be charged."""
    environment = account.partition("-")[0]
    return table.c.account.like(f"{environment}-%")


async def plan(connection: SqlConnection, account: str, *, limit: int, start: int) -> list[Share]:
    """Return the shares of up to `limit` due jobs; `start` jobs were claimed before."""
    if not await count(connection, account):
        return [Share(most=limit)]
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
    shares = Counter(ROTATION[(start + place) % len(ROTATION)] for place in range(limit))
    shared = [
        Share(where=which[name], most=most, newest_first=name == "newest") for name, most in shares.items()
    ]
    # The other classes get the rest of a share.
    rest = [Share(where=which[name], most=limit) for name in ("sure", "oldest", "refused")]
    return shared + rest


async def count(connection: SqlConnection, account: str | None = None) -> int:
    """Count the jobs that Clipia refuses for now: those of one account, or all of them."""
    mine = () if account is None else (same_environment(account),)
    return await count_rows(connection, jobs, is_refused, *mine)


async def release(connection: SqlConnection, account: str) -> None:
    """Make the refused jobs due, because Clipia has accepted one of them."""
    # Locked rows are skipped, because two transactions that wait for each other's rows would deadlock.
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


async def expire(connection: SqlConnection, account: str, *, give_up_after: float) -> list[Expired]:
    """End jobs that were refused for `give_up_after` seconds and missed the time of their last attempt."""
    due = (
        select(jobs.c.id)
        .where(
            is_refused,
            same_environment(account),
            jobs.c.refused_at <= db_time(-give_up_after),
            # A job with an attempt under way is due later than that.
            jobs.c.next_attempt_at <= db_time(-LAST_ATTEMPT_WAIT_SECONDS),
        )
        .with_for_update(skip_locked=True)
        .cte("due")
    )
    # An earlier attempt without an answer may have reached Clipia.
    was_sent = jobs.c.sent_at.is_not(None)
    charged = {name: case((was_sent, jobs.c[name]), else_=0) for name in prices.split(charged=0)}
    statement = (
        update(jobs)
        .where(jobs.c.id.in_(select(due.c.id)))
        .values(**ENDED, **charged, state=case((was_sent, "unsure"), else_="failed"), updated_at=db_time(0.0))
        .returning(jobs.c.id, jobs.c.state, jobs.c.error)
    )
    return [Expired(**row) for row in (await connection.execute(statement)).mappings()]


async def find_account_refusal(connection: SqlConnection, account: str, *, accepted_at: float) -> str | None:
    """Return the last refusal if Clipia seems to refuse the account and not single jobs.

    `accepted_at` is the time of the last accepted submission in unix seconds. Unknown prices of a model count
    as one price.
    """
    is_since = jobs.c.updated_at > datetime.fromtimestamp(accepted_at, UTC)
    since = and_(is_refused, same_environment(account), is_since)
    kinds = select(jobs.c.model, jobs.c.cost, jobs.c.cost_micros).where(since).distinct()
    found = (await connection.execute(kinds)).all()
    if len(found) < ACCOUNT_REFUSALS or len({row.model for row in found}) < 2:
        return None
    last = select(jobs.c.error).where(since).order_by(jobs.c.updated_at.desc()).limit(1)
    return await connection.scalar(last)
