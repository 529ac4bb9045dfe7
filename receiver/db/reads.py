"""Queries of the API and the commands: events, deliveries and jobs with the rows that refer to them."""

import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar, cast

from sqlalchemy import ColumnElement, Select, Table, and_, case, func, select, tuple_, union_all

from receiver.db import prices, unrecognized
from receiver.db.connection import SqlConnection
from receiver.db.event_filter import EVERY_EVENT, EventFilter, has_metadata
from receiver.db.receipts import FIRST_COLUMNS, receipts_of
from receiver.db.rows import CostGroup, event_id, least_id
from receiver.db.sources import find_event_ids
from receiver.db.statements import between, count_rows, equal, readable
from receiver.db.tables import (
    attempts,
    deliveries,
    events,
    in_state,
    is_live,
    is_replayed,
    jobs,
    media,
)
from receiver.db.views import (
    EventDetails,
    EventSummary,
    EventWithBody,
    FileToVerify,
    JobCosts,
    JobDetails,
    ListedDelivery,
    Receipt,
)

Row = dict[str, Any]
EventT = TypeVar("EventT", bound=EventWithBody)
EventFinder = Callable[[SqlConnection, str], Awaitable[EventT | None]]

# The job of the event's `request_id`. The callback's path may name another one, and it is not signed.
_JOB_ID: Final = (
    select(jobs.c.id)
    .where(jobs.c.source == events.c.source, jobs.c.request_id == events.c.request_id)
    .scalar_subquery()
    .label("job_id")
)

_UNSHOWN: Final = ("body", "job_id", "path_token", *FIRST_COLUMNS)
_EVENT: Final = [
    *(readable(column) for column in events.c if column.name not in _UNSHOWN),
    _JOB_ID,
]
PENDING: Final = union_all(
    *(select(deliveries.c.id).where(in_state(deliveries, "pending"), half) for half in (is_live, is_replayed))
)
"""The ids of all pending deliveries."""
CLOCKS_APART: Final = timedelta(days=1)
"""The largest difference that is expected between the clock in a row's id and the database's clock."""
_HIDDEN = {"event_seq", "lease", "lost", "seen_sha256"}
SHOWN_RECEIPTS: Final = 50
"""Receipts that are shown with their event; earlier releases kept any number of them."""


async def list_events(
    connection: SqlConnection,
    *,
    limit: int,
    before: int | None = None,
    which: EventFilter = EVERY_EVENT,
) -> list[EventSummary]:
    """Return events, newest first, and the number of their files and deliveries in each state.

    `before` is the `seq` of the last row of the previous page.
    """
    place = tuple_(events.c.received_at, events.c.seq)
    where = await which.conditions(connection)
    if before is not None:
        last = select(events.c.received_at).where(events.c.seq == before)
        moment = (await connection.execute(last)).scalar_one_or_none()
        # If that row was pruned in the meantime, it was one of the oldest.
        where.append(events.c.seq < before if moment is None else place < tuple_(moment, before))
    statement = select(*_EVENT).where(*where).order_by(*(column.desc() for column in place)).limit(limit)
    return await _summaries(connection, statement)


async def read_events(
    connection: SqlConnection, *, limit: int, after: int, until: int, which: EventFilter = EVERY_EVENT
) -> list[EventSummary]:
    """Return the events from one `seq` (exclusive) to another (inclusive), oldest first."""
    where = [events.c.seq > after, events.c.seq <= until, *await which.conditions(connection)]
    return await _summaries(connection, select(*_EVENT).where(*where).order_by(events.c.seq).limit(limit))


async def _summaries(connection: SqlConnection, statement: Select[Any]) -> list[EventSummary]:
    found = [prices.join(row) for row in (await connection.execute(statement)).mappings()]
    seqs = [row["seq"] for row in found]
    for name, table in (("media", media), ("deliveries", deliveries)):
        counts = await _count_states(connection, table, seqs)
        for row in found:
            row[name] = counts[row["seq"]]
    return cast("list[EventSummary]", found)


async def find_event(connection: SqlConnection, key: str) -> EventWithBody | None:
    """Return one event by its id or `request_id`.

    An unrecognized event is also found by the `request_id` that this release reads in its body, if no other
    event has it.
    """
    # No database stores NUL.
    if "\0" in key:
        return None
    ids = (await find_event_ids(connection, [key]))[key]
    newest = select(*_EVENT, events.c.body).order_by(events.c.seq.desc()).limit(1)
    row = (await connection.execute(newest.where(events.c.id.in_(ids)))).mappings().one_or_none()
    if row is None:
        seqs = await unrecognized.find_seqs(connection, key)
        row = (await connection.execute(newest.where(events.c.seq.in_(seqs)))).mappings().one_or_none()
    if row is None:
        return None
    event = prices.join(row)
    if event["state"] == "unrecognized":
        event["recoverable"] = unrecognized.read_request_id(event["body"]) is not None
    return cast("EventWithBody", event)


async def show_event(connection: SqlConnection, key: str) -> EventDetails | None:
    """Return the event that `find_event` does, with its receipts, files, deliveries and attempts."""
    found = await find_event(connection, key)
    if found is None:
        return None
    event = cast("Row", found)
    seq = event["seq"]
    event["receipts"] = await list_receipts(connection, seq, limit=SHOWN_RECEIPTS)
    all_ = receipts_of(lambda column: column == seq)
    counted = select(func.coalesce(func.sum(1 + all_.c.repeated), 0))
    event["receipts_total"] = int((await connection.execute(counted)).scalar_one())
    await _add_work(connection, event)
    await _add_attempts(connection, [*event["media"], *event["deliveries"]])
    return cast("EventDetails", event)


async def list_receipts(
    connection: SqlConnection, event_seq: int, *, limit: int, after: int | None = None
) -> list[Receipt]:
    """Return receipts of an event, oldest first; `after` is the last `seq` of the previous page."""
    found = receipts_of(lambda seq: seq == event_seq)
    statement = select(*(readable(column) for column in found.c if column.name not in _HIDDEN))
    if after is not None:
        statement = statement.where(found.c.seq > after)
    statement = statement.order_by(found.c.seq).limit(limit)
    return cast("list[Receipt]", await _rows(connection, statement))


async def list_deliveries(
    connection: SqlConnection,
    *,
    limit: int,
    before: uuid.UUID | None = None,
    state: str | None = None,
    destination: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    errors: Collection[str] | None = None,
    delivery_id: uuid.UUID | None = None,
) -> list[ListedDelivery]:
    """Return deliveries, newest first; with `errors` those whose last error is one of these.

    `before` is the id of the last row of the previous page; `since` and `until` bound `created_at`.
    """
    where = equal(deliveries, {"destination": destination, "id": delivery_id})
    where += between(deliveries.c.created_at, since, until)
    # An id begins with its time, and its index finds a page without reading the rows of other times.
    where += between(
        deliveries.c.id,
        None if since is None else least_id(since - CLOCKS_APART),
        None if until is None else least_id(until + CLOCKS_APART),
    )
    if state == "pending":
        # Live and replayed deliveries have one partial index each, and none covers both.
        where.append(deliveries.c.id.in_(PENDING))
    elif state is not None:
        where.append(in_state(deliveries, state))
    if errors is not None:
        where.append(deliveries.c.error.in_(errors))
    if before is not None:
        where.append(deliveries.c.id < before)
    columns = [column for column in deliveries.c if column.name not in _HIDDEN]
    statement = (
        select(*columns, events.c.id.label("event_id"), events.c.request_id, events.c.status, events.c.model)
        .join(events, deliveries.c.event_seq == events.c.seq)
        .where(*where)
        .order_by(deliveries.c.id.desc())
        .limit(limit)
    )
    return cast("list[ListedDelivery]", await _rows(connection, statement))


async def count_stored(connection: SqlConnection, *, since: datetime | None) -> int:
    """Count the files that have an object in the storage, including pages that came in place of a file."""
    return await count_rows(connection, media, *_stored(since))


async def list_stored(
    connection: SqlConnection, *, limit: int, after: uuid.UUID | None, since: datetime | None
) -> list[FileToVerify]:
    """Return the files that `count_stored` counts, ordered by id."""
    where = _stored(since)
    if after is not None:
        where.append(media.c.id > after)
    names = ("id", "kind", "url", "field", "storage_key", "uri", "size", "sha256", "warning")
    columns = [media.c[name] for name in names]
    statement = (
        select(*columns, events.c.request_id)
        .join(events, media.c.event_seq == events.c.seq)
        .where(*where)
        .order_by(media.c.id)
        .limit(limit)
    )
    return cast("list[FileToVerify]", await _rows(connection, statement))


def _stored(since: datetime | None) -> list[ColumnElement[bool]]:
    return [media.c.state.in_(("stored", "not_media")), *between(media.c.finished_at, since, None)]


async def list_jobs(
    connection: SqlConnection,
    *,
    limit: int,
    before: int | None,
    caller: str | None,
    state: str | None,
    model: str | None,
    since: datetime | None,
    until: datetime | None,
    metadata: Mapping[str, str],
) -> list[JobDetails]:
    """Return jobs, newest first, each with its event but without files, deliveries and attempts.

    `before` is the `seq` of the last row of the previous page.
    """
    where = equal(jobs, {"caller": caller, "state": state, "model": model})
    where += between(jobs.c.created_at, since, until)
    where += [has_metadata(connection, key, value) for key, value in metadata.items()]
    if before is not None:
        where.append(jobs.c.seq < before)
    statement = select(jobs).where(*where).order_by(jobs.c.seq.desc()).limit(limit)
    found = [prices.join(row) for row in (await connection.execute(statement)).mappings()]
    heads = await _job_events(connection, found)
    for row in found:
        event = heads.get(row["id"])
        row["event"] = None if event is None else event | {"media": [], "deliveries": []}
        row["attempt_log"] = []
    return cast("list[JobDetails]", found)


async def show_job(
    connection: SqlConnection, job_id: uuid.UUID, *, caller: str | None = None
) -> JobDetails | None:
    """Return one job with its attempts, and its event with files and deliveries.

    If a `caller` is given, a job of another caller is not found. The query compares the caller, because
    loading the job first would take longer if the id exists, and so reveal the ids of other callers' jobs.
    """
    statement = select(jobs).where(jobs.c.id == job_id, *equal(jobs, {"caller": caller}))
    row = (await connection.execute(statement)).mappings().one_or_none()
    if row is None:
        return None
    job = prices.join(row)
    await _add_attempts(connection, [job])
    event = (await _job_events(connection, [job])).get(job_id)
    if event is not None:
        await _add_work(connection, event)
    job["event"] = event
    return cast("JobDetails", job)


async def job_costs(
    connection: SqlConnection,
    *,
    by: CostGroup,
    caller: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[JobCosts]:
    """Return credits by caller, model or UTC day of the job.

    Each credit of a job is in exactly one sum: reserved while the job is open, then charged or refunded. Jobs
    of test keys are free.
    """
    live = jobs.c.account.like("live-%")
    held = jobs.c.state.in_(("submitted", "unsure"))
    ended = jobs.c.charged.is_not(None) & jobs.c.request_id.is_not(None)
    group = _day(connection) if by == "day" else jobs.c[by]

    def total(value: ColumnElement[Any], *when: ColumnElement[bool]) -> ColumnElement[Any]:
        return func.coalesce(func.sum(case((and_(live, *when), value), else_=0)), 0)

    totals = []
    for rest in ("", prices.MICROS_SUFFIX):
        cost, charged = func.coalesce(jobs.c["cost" + rest], 0), jobs.c["charged" + rest]
        totals += [
            total(cost, held).label(f"reserved{rest}"),
            total(charged, ended).label(f"charged{rest}"),
            total(cost - charged, ended).label(f"refunded{rest}"),
        ]
    statement = (
        select(group.label(by), func.count().label("jobs"), *totals)
        .where(*equal(jobs, {"caller": caller}), *between(jobs.c.created_at, since, until))
        .group_by(group)
        .order_by(group)
    )
    rows = (await connection.execute(statement)).mappings()
    return cast("list[JobCosts]", [prices.join(row) for row in rows])


def _day(connection: SqlConnection) -> ColumnElement[str]:
    if connection.dialect.name == "sqlite":
        return func.strftime("%Y-%m-%d", jobs.c.created_at)
    return func.to_char(func.timezone("UTC", jobs.c.created_at), "YYYY-MM-DD")


async def _job_events(connection: SqlConnection, found: Sequence[Row]) -> dict[uuid.UUID, Row]:
    """Return the events of jobs, without bodies, by the job's id."""
    job_ids = {
        event_id(job["source"], job["request_id"]): job["id"]
        for job in found
        if job["request_id"] is not None
    }
    rows = await connection.execute(select(*_EVENT).where(events.c.id.in_(job_ids)))
    return {job_ids[row["id"]]: prices.join(row) for row in rows.mappings()}


async def _count_states(
    connection: SqlConnection, table: Table, seqs: Sequence[int]
) -> dict[int, dict[str, int]]:
    statement = (
        select(table.c.event_seq, table.c.state, func.count())
        .where(table.c.event_seq.in_(seqs))
        .group_by(table.c.event_seq, table.c.state)
    )
    counts: dict[int, dict[str, int]] = defaultdict(dict)
    for seq, state, count in await connection.execute(statement):
        counts[seq][state] = count
    return counts


async def _add_work(connection: SqlConnection, event: Row) -> None:
    """Add the files and deliveries of an event."""
    orders = {"media": (media.c.position, media.c.variant.desc()), "deliveries": (deliveries.c.destination,)}
    for table in (media, deliveries):
        columns = [column for column in table.c if column.name not in _HIDDEN]
        statement = select(*columns).where(table.c.event_seq == event["seq"]).order_by(*orders[table.name])
        event[table.name] = await _rows(connection, statement)


async def _rows(connection: SqlConnection, statement: Select[Any]) -> list[Row]:
    return [dict(row) for row in (await connection.execute(statement)).mappings()]


async def _add_attempts(connection: SqlConnection, works: Sequence[Row]) -> None:
    statement = (
        select(attempts)
        .where(attempts.c.work_id.in_([work["id"] for work in works]))
        .order_by(attempts.c.seq)
    )
    by_work: dict[uuid.UUID, list[Row]] = defaultdict(list)
    for attempt in await _rows(connection, statement):
        by_work[attempt.pop("work_id")].append(attempt)
    for work in works:
        work["attempt_log"] = by_work[work["id"]]
