"""SQL of where jobs and events meet: a job ends with its event, and an event's message names its job."""

import uuid
from collections.abc import Collection
from typing import Any, Final

import orjson
from sqlalchemy import and_, case, exists, or_, select, union, update
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.core.payload import Generation
from receiver.db import prices
from receiver.db.arrays import among
from receiver.db.clock import db_time
from receiver.db.rows import JobRef, JobState, event_id
from receiver.db.tables import events, in_state, jobs
from receiver.price import Credits

_RESERVED: Final = {"charged": jobs.c.cost, "charged_micros": jobs.c.cost_micros}
OPEN: Final = ("pending", "submitted", "unsure")
"""States that an event still changes."""

ANSWER_WAIT_SECONDS: Final = 60.0
"""Seconds that an event on a job's own path waits for the answer to the job's submission.

It has room for a call that is under way and for another try. If no answer comes, the path's token decides: a
result that is paid for must not wait until an outage is over.
"""

# Jobs of releases before 0006 have a path without a token.
_PATH_FITS: Final = or_(jobs.c.path_token.is_(None), jobs.c.path_token == events.c.path_token)
_others: Final = jobs.alias()
ANSWER_IS_DUE: Final = and_(
    exists().where(
        jobs.c.source == events.c.source,
        jobs.c.id == events.c.job_id,
        _PATH_FITS,
        in_state(jobs, "pending"),
        jobs.c.sent_at.is_not(None),
        jobs.c.request_id.is_(None),
    ),
    # Beside the other one and not in it: a subquery of a subquery gets a FROM of its own for `events`.
    ~exists().where(_others.c.source == events.c.source, _others.c.request_id == events.c.request_id),
)
"""Whether an event came on the path of a job that was sent and is not answered, and is no other job's."""

# Made once: to make one takes as long as to run it.
_SAME_REQUEST: Final = and_(jobs.c.source == events.c.source, jobs.c.request_id == events.c.request_id)
_AMONG: Final = among(events.c.seq, "seqs")
_WITH_OPEN_JOBS: Final = union(
    *(
        select(events.c.seq).join(jobs, same).where(_AMONG, jobs.c.state.in_(OPEN))
        # Apart: for an OR of both no index would serve.
        for same in (
            _SAME_REQUEST,
            and_(jobs.c.source == events.c.source, jobs.c.id == events.c.job_id, _PATH_FITS),
        )
    )
)
_REFS: Final = (
    select(events.c.seq, jobs.c.id, jobs.c.caller, jobs.c.idempotency_key, jobs.c.metadata)
    .join(jobs, _SAME_REQUEST)
    .where(_AMONG)
)


async def finish_job(
    connection: AsyncConnection,
    source: str,
    generation: Generation,
    *,
    job_id: uuid.UUID | None = None,
    path_token: str | None = None,
) -> uuid.UUID | None:
    """Bring the job of an event to its last state, as `_end_job` does."""
    done = generation.status == "OK"
    return await _end_job(
        connection,
        source=source,
        request_id=generation.request_id,
        job_id=job_id,
        path_token=path_token,
        state="completed" if done else "canceled" if generation.canceled else "failed",
        # A failure is refunded in full.
        charged=generation.cost if done else 0,
        error=generation.error,
    )


async def _end_job(
    connection: AsyncConnection,
    *,
    source: str,
    request_id: str,
    job_id: uuid.UUID | None,
    path_token: str | None,
    state: JobState,
    charged: Credits | None,
    error: Any,
) -> uuid.UUID | None:
    """Bring the job of an event, if there is one, to its last state; return its id.

    It is found by `request_id`, and by the id and the token in the callback's path if its `request_id` is not
    known. If the update meets the transaction that records it, it waits for that and looks again. The path is
    not signed: it finds only a job that was sent, for a request that is no other job's; and an answer to the
    submission that comes later decides after all (`jobs.record_submitted`).
    """
    mine = and_(jobs.c.request_id == request_id, jobs.c.state.in_(OPEN))
    if job_id is not None:
        others = jobs.alias()
        taken = exists().where(others.c.source == source, others.c.request_id == request_id)
        mine = or_(
            mine,
            and_(
                jobs.c.id == job_id,
                or_(jobs.c.path_token.is_(None), jobs.c.path_token == path_token),
                jobs.c.request_id.is_(None),
                jobs.c.sent_at.is_not(None),
                jobs.c.state.in_(OPEN),
                ~taken,
            ),
        )
    # Where the event says nothing of it, what was reserved is what was charged.
    final = prices.split(charged=charged) if charged is not None else _RESERVED
    is_test = jobs.c.account.like("test-%")
    statement = (
        update(jobs)
        .where(jobs.c.source == source, mine)
        .values(
            state=state,
            request_id=request_id,
            **{name: case((is_test, 0), else_=value) for name, value in final.items()},
            # The event may know what the lost answer said.
            **{
                name: case((jobs.c.cost.is_(None), value), else_=jobs.c[name])
                for name, value in prices.split(cost=charged).items()
            },
            progress=100 if state == "completed" else None,
            error=None if error is None else orjson.dumps(error).decode(),
            lease=None,
            next_attempt_at=None,
            finished_at=db_time(0.0),
            updated_at=db_time(0.0),
        )
        .returning(jobs.c.id)
    )
    found: uuid.UUID | None = (await connection.execute(statement)).scalar_one_or_none()
    return found


async def find_event_body(connection: AsyncConnection, source: str, request_id: str) -> bytes | None:
    """Return the body of a request's event, if it has come already."""
    statement = select(events.c.body).where(
        events.c.id == event_id(source, request_id), events.c.state != "unrecognized"
    )
    body: bytes | None = (await connection.execute(statement)).scalar_one_or_none()
    return body


async def find_with_open_jobs(connection: AsyncConnection, event_seqs: Collection[int]) -> set[int]:
    """Return the `seq` of those events that `finish_job` may find an open job for."""
    return set((await connection.execute(_WITH_OPEN_JOBS, {"seqs": event_seqs})).scalars())


async def load_refs(connection: AsyncConnection, event_seqs: Collection[int]) -> dict[int, JobRef]:
    """Return the jobs of events, by the event's `seq`."""
    return {
        values.pop("seq"): JobRef(**values)
        for values in map(dict, (await connection.execute(_REFS, {"seqs": event_seqs})).mappings())
    }


async def find_finished(connection: AsyncConnection, job_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
    """Return which of these jobs have ended, their files settled too."""
    statement = select(jobs.c.id, jobs.c.source, jobs.c.request_id).where(
        jobs.c.id.in_(job_ids), jobs.c.state.not_in(("pending", "submitted"))
    )
    ended = (await connection.execute(statement)).all()
    by_event = {event_id(row.source, row.request_id): row.id for row in ended if row.request_id is not None}
    busy = select(events.c.id).where(events.c.id.in_(by_event), events.c.state.in_(("received", "fetching")))
    unsettled = {by_event[id_] for id_ in (await connection.execute(busy)).scalars()}
    return {row.id for row in ended} - unsettled
