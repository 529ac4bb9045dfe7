"""SQL for jobs: inserting, claiming, and recording the result of each step."""

import uuid
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from sqlalchemy import Select, Update, and_, case, false, func, not_, or_, select, update
from sqlalchemy.exc import IntegrityError

from receiver.db import leases, prices, refused_jobs
from receiver.db.clock import db_time, seconds_since, statement_time
from receiver.db.connection import SqlConnection
from receiver.db.refused_jobs import Share, same_environment
from receiver.db.rows import Claim, JobState, NewJob, OpenRequest, Submission
from receiver.db.statements import count_rows, insert_unless_taken
from receiver.db.tables import in_state, jobs
from receiver.price import Credits

IN_FLIGHT_SECONDS: Final = 3600.0
"""A generation without a known end counts as in flight for this long."""


async def insert(connection: SqlConnection, job: NewJob) -> bool:
    """Insert a job, due at once; False if (caller, idempotency_key) is taken."""
    price = prices.split(cost=job.cost, max_cost=job.max_cost)
    values = leases.work_values() | asdict(job) | price | {"updated_at": db_time(0.0)}
    return await insert_unless_taken(connection, jobs, values) is not None


async def find_by_request(connection: SqlConnection, source: str, request_id: str) -> uuid.UUID | None:
    """Return the id of the job of a `request_id`."""
    statement = select(jobs.c.id).where(jobs.c.source == source, jobs.c.request_id == request_id)
    return await connection.scalar(statement)


async def is_due(connection: SqlConnection, account: str, state: JobState) -> bool:
    """Tell whether any job in `state` that this account may submit or poll is due."""
    return (await connection.execute(_due(account, state))).first() is not None


async def is_next(connection: SqlConnection, account: str, job_id: uuid.UUID) -> bool:
    """Tell whether a new job may be submitted now: no other is due but those that Clipia refuses for now."""
    others = _due(account, "pending").where(jobs.c.id != job_id, jobs.c.refused_at.is_(None))
    return (await connection.execute(others)).first() is None


def _due(account: str, state: JobState) -> Select[tuple[uuid.UUID]]:
    return (
        select(jobs.c.id)
        .where(in_state(jobs, state), jobs.c.next_attempt_at <= statement_time(), same_environment(account))
        .limit(1)
    )


@dataclass(frozen=True, kw_only=True)
class InFlight:
    """Generations that an account has in flight, as far as the database knows."""

    accepted: int
    under_way: int
    """Submissions that Clipia has not answered yet."""

    @property
    def total(self) -> int:
        """The number that counts against the in-flight limit."""
        return self.accepted + self.under_way


async def in_flight(connection: SqlConnection, account: str) -> InFlight:
    """Count the generations that an account has in flight."""
    accepted = and_(
        in_state(jobs, "submitted"),
        jobs.c.submitted_at > db_time(-IN_FLIGHT_SECONDS),
        jobs.c.account == account,
    )
    under_way = and_(
        in_state(jobs, "pending"),
        jobs.c.lease.is_not(None),
        jobs.c.next_attempt_at > statement_time(),
        jobs.c.account == account,
    )
    return InFlight(
        accepted=await count_rows(connection, jobs, accepted),
        under_way=await count_rows(connection, jobs, under_way),
    )


async def claim_to_submit(
    connection: SqlConnection,
    account: str,
    *,
    limit: int,
    lease: float,
    job_id: uuid.UUID | None = None,
    start: int = 0,
) -> list[tuple[Claim, Submission]]:
    """Claim jobs that are due to be submitted, and record before the attempt that it may reach Clipia.

    `start` is the number of jobs that were claimed before; it selects the place in `refused_jobs.ROTATION`.
    """
    claims: list[Claim] = []
    shares = (
        await refused_jobs.plan(connection, account, limit=limit, start=start)
        if job_id is None
        else [Share(where=(jobs.c.id == job_id,), most=limit)]
    )
    for share in shares:
        if len(claims) == limit:
            break
        claims += await leases.claim(
            connection,
            jobs,
            limit=min(share.most, limit - len(claims)),
            lease=lease,
            where=[same_environment(account), *share.where],
            newest_first=share.newest_first,
        )
    if not claims:
        return []
    found = await _load_submissions(connection, [claim.id for claim in claims])
    fresh = [id_ for id_, submission in found.items() if submission.sent_for is None]
    await connection.execute(
        update(jobs).where(jobs.c.id.in_(fresh)).values(sent_at=db_time(0.0), account=account)
    )
    return [(claim, found[claim.id]) for claim in claims]


async def _load_submissions(
    connection: SqlConnection, ids: Collection[uuid.UUID]
) -> dict[uuid.UUID, Submission]:
    statement = select(
        jobs.c.id,
        jobs.c.model,
        jobs.c.request,
        jobs.c.provider_key,
        jobs.c.source,
        jobs.c.has_webhook,
        case((jobs.c.sent_at.is_not(None), jobs.c.account), else_=None).label("account"),
        seconds_since(jobs.c.sent_at).label("sent_for"),
        seconds_since(jobs.c.refused_at).label("refused_for"),
        jobs.c.warnings,
        jobs.c.max_cost,
        jobs.c.max_cost_micros,
        jobs.c.traceparent,
        jobs.c.tracestate,
    ).where(jobs.c.id.in_(ids))
    rows = (await connection.execute(statement)).mappings()
    return {row["id"]: Submission(**prices.join(row)) for row in rows}


async def claim_to_poll(
    connection: SqlConnection, account: str, *, limit: int, lease: float
) -> list[tuple[Claim, OpenRequest]]:
    """Claim submitted jobs that are due to be polled."""
    claims = await leases.claim(
        connection, jobs, limit=limit, lease=lease, where=[same_environment(account)], state="submitted"
    )
    if not claims:
        return []
    watched = func.coalesce(jobs.c.watched_until > db_time(0.0), false()).label("watched")
    open_for = func.coalesce(seconds_since(jobs.c.submitted_at), 0.0).label("open_for")
    names = ("id", "source", "request_id", "has_webhook", "error", "traceparent", "tracestate")
    statement = select(*(jobs.c[name] for name in names), watched, open_for).where(
        jobs.c.id.in_([claim.id for claim in claims])
    )
    found = {row["id"]: OpenRequest(**row) for row in (await connection.execute(statement)).mappings()}
    return [(claim, found[claim.id]) for claim in claims]


async def record_submitted(
    connection: SqlConnection,
    held: Claim,
    *,
    source: str,
    provider_key: uuid.UUID,
    request_id: str,
    cost: Credits | None,
    warnings: list[dict[str, Any]],
    poll_after: float,
) -> Literal["recorded", "lost", "taken"]:
    """Move a job to `submitted`; return `lost` if the lease was lost or the job's event came first.

    Clipia's answer overrules the callback path. If an event finished the job by its path and the answer names
    another generation, the job is reopened. If another job has the `request_id` from its path only, that job
    loses it and is reopened. `taken` means that an answer of Clipia gave the `request_id` to another job.
    """
    ended_by_path = and_(
        jobs.c.provider_key == provider_key,
        jobs.c.state.in_(("completed", "failed", "canceled")),
        jobs.c.request_id != request_id,
        jobs.c.submitted_at.is_(None),
    )
    statement = (
        update(jobs)
        .where(
            jobs.c.id == held.id,
            or_(and_(jobs.c.lease == held.lease, jobs.c.state == "pending"), ended_by_path),
        )
        .values(
            **dict.fromkeys(("progress", "finished_at", "refused_at")),
            **prices.split(charged=None),
            state="submitted",
            request_id=request_id,
            **({} if cost is None else prices.split(cost=cost)),
            warnings=warnings,
            submitted_at=db_time(0.0),
            updated_at=db_time(0.0),
            next_attempt_at=db_time(poll_after),
            lease=None,
            lost=0,
            attempts=0,  # from now on the polls are counted
            error=None,
        )
    )
    recorded = await _unless_taken(connection, statement)
    if recorded is None and await _reopen(connection, source, request_id):
        recorded = await _unless_taken(connection, statement)
    return "taken" if recorded is None else "recorded" if recorded else "lost"


async def _unless_taken(connection: SqlConnection, statement: Update) -> bool | None:
    """Return whether a row was updated; None if another job has its `request_id`."""
    try:
        # A savepoint, because the violation would abort the whole transaction.
        async with connection.begin_nested():
            return (await connection.execute(statement)).rowcount == 1
    except IntegrityError:
        return None


async def _reopen(connection: SqlConnection, source: str, request_id: str) -> bool:
    """Remove a `request_id` from a job that has it from its path and not from an answer; reopen the job."""
    result = await connection.execute(
        update(jobs)
        .where(jobs.c.source == source, jobs.c.request_id == request_id, jobs.c.submitted_at.is_(None))
        .values(
            **dict.fromkeys(("request_id", "progress", "error", "finished_at", "lease")),
            **prices.split(charged=None),
            state="pending",
            next_attempt_at=db_time(0.0),
            updated_at=db_time(0.0),
        )
    )
    return result.rowcount == 1


async def add_answer(
    connection: SqlConnection,
    job_id: uuid.UUID,
    *,
    request_id: str,
    cost: Credits | None,
    warnings: list[dict[str, Any]],
) -> bool:
    """Add the answer to a submission to a job that its event has finished; False if there is none."""
    result = await connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.request_id == request_id)
        .values(
            **({} if cost is None else prices.split(cost=cost)), warnings=warnings, submitted_at=db_time(0.0)
        )
    )
    return result.rowcount == 1


async def is_still_sent(connection: SqlConnection, job_id: uuid.UUID, provider_key: uuid.UUID) -> bool:
    """Tell whether a job is still to be submitted with a key, by this worker or by another one."""
    statement = select(jobs.c.id).where(
        jobs.c.id == job_id, jobs.c.state == "pending", jobs.c.provider_key == provider_key
    )
    return (await connection.execute(statement)).first() is not None


async def put_back(
    connection: SqlConnection,
    held: Claim,
    *,
    delay: float,
    error: str,
    never_sent: bool,
    refused: bool = False,
) -> bool:
    """Schedule the next attempt at a job.

    `never_sent` means that certainly no attempt has reached Clipia; `refused` means that Clipia refuses the
    job for now (402, 403).
    """
    values: dict[str, Any] = {"sent_at": None} if never_sent else {}
    if refused:
        values["refused_at"] = func.coalesce(jobs.c.refused_at, db_time(0.0))
    return await leases.retry(
        connection, jobs, held, delay=delay, error=error, updated_at=db_time(0.0), **values
    )


async def watch(connection: SqlConnection, job_ids: Collection[uuid.UUID], *, seconds: float) -> None:
    """Poll the state of jobs more often while their callers wait for them."""
    soon = db_time(2.0)
    await connection.execute(
        update(jobs)
        .where(jobs.c.id.in_(job_ids), jobs.c.state == "submitted")
        .values(
            watched_until=db_time(seconds),
            next_attempt_at=case(
                (and_(jobs.c.lease.is_(None), jobs.c.next_attempt_at > soon), soon),
                else_=jobs.c.next_attempt_at,
            ),
        )
    )


async def count_unserved(connection: SqlConnection, account: str | None) -> int:
    """Count the open jobs that this process does not serve: those of other accounts, or all without one."""
    others = () if account is None else (or_(jobs.c.account.is_(None), not_(same_environment(account))),)
    # Two statements, because each state has its own partial index.
    states = [in_state(jobs, state) for state in ("pending", "submitted")]
    return sum([await count_rows(connection, jobs, state, *others) for state in states])
