"""SQL for the operator's decisions about jobs: to submit one again, or to cancel it."""

import uuid

from sqlalchemy import case, or_, select, update

from receiver.db import leases, outbox, prices
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.job_events import OPEN
from receiver.db.tables import jobs


async def find_request(connection: SqlConnection, job_id: uuid.UUID) -> bytes | None:
    """Return the request of a job, as it was frozen when the job was made."""
    return await connection.scalar(select(jobs.c.request).where(jobs.c.id == job_id))


async def resubmit(
    connection: SqlConnection,
    job_id: uuid.UUID,
    *,
    request: bytes,
    has_webhook: bool,
    account: str,
    path_token: str,
    by: str,
) -> bool:
    """Make a job that ended without a result due again, with a new key; False if it is in another state.

    `by` and the former `request_id` are recorded among the attempts.
    """
    was = await connection.scalar(select(jobs.c.request_id).where(jobs.c.id == job_id).with_for_update())
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
    error = f"by {by}; was {was}" if was else f"by {by}"
    await outbox.record_change(connection, [job_id], outcome="resubmitted", error=error)
    return True


async def cancel(connection: SqlConnection, job_id: uuid.UUID, *, error: str, by: str) -> str | None:
    """End a job and return its new state; None if it has ended already or an attempt is under way.

    The job is `canceled` if it was never sent, or if it was unsure. Otherwise there may be a paid generation,
    so the job becomes `unsure` and its event can still finish it. `by` is recorded among the attempts.
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
    state: str | None = await connection.scalar(statement)
    if state is not None:
        await outbox.record_change(connection, [job_id], outcome="canceled", error=f"by {by}")
    return state
