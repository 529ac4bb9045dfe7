"""SQL that joins jobs and events: an event finishes its job, and the message of an event names the job."""

import uuid
from collections.abc import Collection
from typing import Any, Final, NamedTuple

import orjson
from sqlalchemy import ColumnElement, and_, case, exists, func, or_, select, union, update

from receiver.core.payload import Generation
from receiver.db import prices
from receiver.db.array_parameters import among
from receiver.db.clock import db_time, seconds_since
from receiver.db.connection import SqlConnection
from receiver.db.leases import ENDED
from receiver.db.rows import JobRef, event_id
from receiver.db.tables import events, in_state, jobs

_RESERVED: Final = {"charged": jobs.c.cost, "charged_micros": jobs.c.cost_micros}
OPEN: Final = ("pending", "submitted", "unsure")
"""States of a job that its event can finish."""

ANSWER_WAIT_SECONDS: Final = 60.0
"""An event with a job in its callback path waits this long for the answer to the job's submission.

That is enough for a call that is under way and for another attempt. After that the token in the path decides,
because a paid result must not wait until an outage is over.
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
    # Not nested in the first one: SQLAlchemy would add `events` to the FROM of a nested subquery.
    ~exists().where(_others.c.source == events.c.source, _others.c.request_id == events.c.request_id),
)
"""Whether the job in the path was sent and not answered yet, and no other job has the `request_id`."""

# Built once: building a statement takes as long as running it.
_SAME_REQUEST: Final = and_(jobs.c.source == events.c.source, jobs.c.request_id == events.c.request_id)
_AMONG: Final = among(events.c.seq, "seqs")
_WITH_OPEN_JOBS: Final = union(
    *(
        select(events.c.seq).join(jobs, same).where(_AMONG, jobs.c.state.in_(OPEN))
        # A union, because no index serves an OR of both conditions.
        for same in (
            _SAME_REQUEST,
            and_(jobs.c.source == events.c.source, jobs.c.id == events.c.job_id, _PATH_FITS),
        )
    )
)
_REFS: Final = (
    select(events.c.seq, *(jobs.c[name] for name in JobRef.__dataclass_fields__))
    .join(jobs, _SAME_REQUEST)
    .where(_AMONG)
)


class FinishedJob(NamedTuple):
    """A job that has got its result."""

    id: uuid.UUID
    model: str
    seconds: float | None
    """From its first submission until now; None for jobs of the oldest releases."""


async def finish_job(
    connection: SqlConnection,
    source: str,
    generation: Generation,
    *,
    job_id: uuid.UUID | None = None,
    path_token: str | None = None,
) -> FinishedJob | None:
    """Move the job of an event to its final state and return it, or None if no open job is found.

    The job is found by `request_id`. If the `request_id` of the job is not known yet, it is found by the id
    and token in the callback's path. The UPDATE waits for a transaction that records the `request_id`, and
    then reads the row again. The path is not signed, so it only finds a job that was sent, and only if no
    other job has the `request_id`. A later answer to the submission overrules it (`jobs.record_submitted`).
    """
    mine = and_(jobs.c.request_id == generation.request_id, jobs.c.state.in_(OPEN))
    if job_id is not None:
        mine = or_(mine, _is_on_path(source, generation.request_id, job_id, path_token))
    statement = (
        update(jobs)
        .where(jobs.c.source == source, mine)
        .values(_final_values(generation))
        .returning(jobs.c.id, jobs.c.model, seconds_since(jobs.c.sent_at))
    )
    found = (await connection.execute(statement)).one_or_none()
    return None if found is None else FinishedJob(*found)


async def revise_job(connection: SqlConnection, source: str, generation: Generation) -> None:
    """Give the job of an event the result of another body; it keeps the time of its end."""
    values = _final_values(generation)
    values["finished_at"] = func.coalesce(jobs.c.finished_at, db_time(0.0))
    mine = jobs.c.source == source, jobs.c.request_id == generation.request_id
    await connection.execute(update(jobs).where(*mine).values(values))


def _is_on_path(
    source: str, request_id: str, job_id: uuid.UUID, path_token: str | None
) -> ColumnElement[bool]:
    others = jobs.alias()
    return and_(
        jobs.c.id == job_id,
        or_(jobs.c.path_token.is_(None), jobs.c.path_token == path_token),
        jobs.c.request_id.is_(None),
        jobs.c.sent_at.is_not(None),
        jobs.c.state.in_(OPEN),
        ~exists().where(others.c.source == source, others.c.request_id == request_id),
    )


def _final_values(generation: Generation) -> dict[str, Any]:
    done = generation.status == "OK"
    # A failure is refunded in full.
    charged = generation.cost if done else 0
    # If the event does not name the cost, the reserved credits were charged.
    final = _RESERVED if charged is None else prices.split(charged=charged)
    is_test = jobs.c.account.like("test-%")
    values = {name: case((is_test, 0), else_=value) for name, value in final.items()}
    # If the answer to the submission was lost, the event may still name the cost.
    for name, value in prices.split(cost=charged).items():
        values[name] = case((jobs.c.cost.is_(None), value), else_=jobs.c[name])
    error = generation.error
    return values | {
        "state": "completed" if done else "canceled" if generation.canceled else "failed",
        "request_id": generation.request_id,
        "progress": 100 if done else None,
        "error": None if error is None else orjson.dumps(error).decode(),
        **ENDED,
        "updated_at": db_time(0.0),
    }


async def find_event_body(connection: SqlConnection, source: str, request_id: str) -> bytes | None:
    """Return the body of the event of a generation, or None if there is none yet."""
    statement = select(events.c.body).where(
        events.c.id == event_id(source, request_id), events.c.state != "unrecognized"
    )
    return await connection.scalar(statement)


async def find_with_open_jobs(connection: SqlConnection, event_seqs: Collection[int]) -> set[int]:
    """Return the `seq` of the events for which `finish_job` may find an open job."""
    return set((await connection.execute(_WITH_OPEN_JOBS, {"seqs": event_seqs})).scalars())


async def load_refs(connection: SqlConnection, event_seqs: Collection[int]) -> dict[int, JobRef]:
    """Return the jobs of events, by the event's `seq`."""
    return {
        values.pop("seq"): JobRef(**values)
        for values in map(dict, (await connection.execute(_REFS, {"seqs": event_seqs})).mappings())
    }


async def find_finished(connection: SqlConnection, job_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
    """Return the jobs that have ended and have no pending files."""
    statement = select(jobs.c.id, jobs.c.source, jobs.c.request_id).where(
        jobs.c.id.in_(job_ids), jobs.c.state.not_in(("pending", "submitted"))
    )
    ended = (await connection.execute(statement)).all()
    by_event = {event_id(row.source, row.request_id): row.id for row in ended if row.request_id is not None}
    busy = select(events.c.id).where(events.c.id.in_(by_event), events.c.state.in_(("received", "fetching")))
    unfinished = {by_event[id_] for id_ in (await connection.execute(busy)).scalars()}
    return {row.id for row in ended} - unfinished
