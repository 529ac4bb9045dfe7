"""SQL of the operator's decisions about jobs: to submit one again, or to cancel it."""

import uuid
from datetime import UTC, datetime

from sqlalchemy import case, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.db import leases, prices
from receiver.db.clock import db_time
from receiver.db.job_events import OPEN
from receiver.db.rows import Attempt
from receiver.db.tables import jobs


async def find_request(connection: AsyncConnection, job_id: uuid.UUID) -> bytes | None:
    """Return the request of a job, as it was frozen when the job was made."""
    found: bytes | None = (
        await connection.execute(select(jobs.c.request).where(jobs.c.id == job_id))
    ).scalar_one_or_none()
    return found


async def resubmit(
    connection: AsyncConnection,
    job_id: uuid.UUID,
    *,
    request: bytes,
    has_webhook: bool,
    account: str,
    path_token: str,
    by: str,
) -> bool:
    """Make a job that ended without a result due again, with a new key; False if it is in another state.

    `by` and the former `request_id` go on record among the attempts.
    """
    was = (
        await connection.execute(select(jobs.c.request_id).where(jobs.c.id == job_id).with_for_update())
    ).scalar_one_or_none()
    result = await connection.execute(
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state.in_(("unsure", "failed", "canceled")))
        .values(
            **dict.fromkeys(("sent_at", "submitted_at", "request_id", "progress", "refused_at")),
            **dict.fromkeys(("warnings", "error", "finished_at", "lease")),
            **prices.split(charged=None),
            state="pending",
            request=request,
            has_webhook=has_webhook,
            account=account,
            path_token=path_token,
            provider_key=uuid.uuid4(),
            attempts=0,
            lost=0,
            next_attempt_at=db_time(0.0),
            updated_at=db_time(0.0),
        )
    )
    if result.rowcount != 1:
        return False
    record = Attempt(
        number=0,
        started_at=datetime.now(UTC),
        duration_ms=0,
        outcome="resubmitted",
        error=f"by {by}" + (f"; was {was}" if was else ""),
    )
    await leases.record_attempt(connection, job_id, record)
    return True


async def cancel(connection: AsyncConnection, job_id: uuid.UUID, *, error: str, by: str) -> str | None:
    """End a job and return its new state; None if it has ended already or an attempt is under way.

    The job is `canceled` if it was never sent, or if it was unsure. Otherwise there may be a paid generation,
    so the job becomes `unsure` and its event can still finish it. `by` goes on record among the attempts.
    """
    is_canceled = or_(jobs.c.state == "unsure", (jobs.c.state == "pending") & jobs.c.sent_at.is_(None))
    ended = {name: case((is_canceled, 0), else_=jobs.c[name]) for name in prices.split(charged=0)}
    statement = (
        update(jobs)
        .where(jobs.c.id == job_id, jobs.c.state.in_(OPEN), leases.is_unclaimed(jobs))
        .values(
            **leases.ENDED,
            **ended,
            progress=None,
            state=case((is_canceled, "canceled"), else_="unsure"),
            error=error,
            updated_at=db_time(0.0),
        )
        .returning(jobs.c.state)
    )
    state: str | None = (await connection.execute(statement)).scalar_one_or_none()
    if state is not None:
        record = Attempt(
            number=0,
            started_at=datetime.now(UTC),
            duration_ms=0,
            outcome="canceled",
            error=f"by {by}",
        )
        await leases.record_attempt(connection, job_id, record)
    return state
