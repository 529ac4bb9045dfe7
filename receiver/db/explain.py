"""SQL that finds the rows of any id: of an event, a request, a job, a delivery, a file, a key or a URL."""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sqlalchemy import ColumnElement, or_, select

from receiver.db import reads, rejections
from receiver.db.connection import SqlConnection
from receiver.db.event_filter import find_callers
from receiver.db.rejections import ListedRejection
from receiver.db.rows import event_id
from receiver.db.tables import deliveries, events, jobs, media, sources
from receiver.db.views import EventDetails, JobDetails

RECENT_FILES: Final = 100_000
"""Files that are searched for a URL: no index has URLs, and a scan of all files would cost too much."""
MAX_REJECTIONS: Final = 5
LEAST_KEY: Final = 6
"""A shorter text would be in many rejected requests by chance."""

_UUID: Final = re.compile("[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")


@dataclass(frozen=True, kw_only=True)
class Found:
    """The rows of an id."""

    job: JobDetails | None = None
    event: EventDetails | None = None
    delivery_id: uuid.UUID | None = None
    """The delivery, if the id is one of a delivery."""
    others: int = 0
    """Other jobs with this key: each caller has keys of its own."""
    rejections: Sequence[ListedRejection] = ()
    """Kept rejected requests that contain the id, if no event was found."""


async def find(connection: SqlConnection, key: str, *, default_source: str) -> Found:
    """Find the rows of an id. `default_source` is the source of jobs."""
    # No database stores these characters.
    if "\0" in key or not key.isprintable():
        return Found()
    delivery_id, seq = await _find_seq(connection, key)
    event = await _find_event(connection, key, seq)
    if event is not None:
        job = None if event["job_id"] is None else await reads.show_job(connection, event["job_id"])
        return Found(job=job, event=event, delivery_id=delivery_id)
    job_id, others = await _find_job(connection, key, default_source)
    job = None if job_id is None else await reads.show_job(connection, job_id)
    if job is not None and job["request_id"] is not None:
        of_job = event_id(job["source"], job["request_id"])
        event = await reads.show_event(connection, str(of_job))
    texts = _texts(job, key) if event is None else ()
    rejected = await rejections.find_with(connection, texts, limit=MAX_REJECTIONS) if texts else ()
    return Found(job=job, event=event, others=others, rejections=rejected)


async def _find_event(connection: SqlConnection, key: str, seq: int | None) -> EventDetails | None:
    """Return the event with this id or `request_id`, or else the one with this `seq`."""
    event = await reads.show_event(connection, key)
    if event is not None or seq is None:
        return event
    own_id = await connection.scalar(select(events.c.id).where(events.c.seq == seq))
    return None if own_id is None else await reads.show_event(connection, str(own_id))


def _texts(job: JobDetails | None, key: str) -> set[str]:
    """Return the texts by which a rejected request is found."""
    if job is None:
        return {key} if len(key) >= LEAST_KEY else set()
    return {str(job["id"]), *([job["request_id"]] if job["request_id"] else ())}


async def _find_seq(connection: SqlConnection, key: str) -> tuple[uuid.UUID | None, int | None]:
    """Return the delivery with this id, and the `seq` of the event of the delivery or the file."""
    ids = [uuid.UUID(text) for text in _UUID.findall(key)[-1:]]
    if ids and ids[0] == _as_uuid(key):
        of_delivery = select(deliveries.c.event_seq).where(deliveries.c.id == ids[0])
        seq: int | None = await connection.scalar(of_delivery)
        if seq is not None:
            return ids[0], seq
    if "://" in key:
        seq = await _find_by_url(connection, key)
        if seq is not None:
            return None, seq
    if ids:
        # The link of a file ends in its id.
        return None, await connection.scalar(select(media.c.event_seq).where(media.c.id == ids[0]))
    return None, None


async def _find_by_url(connection: SqlConnection, url: str) -> int | None:
    columns = (media.c.id, media.c.event_seq, media.c.url, media.c.uri)
    recent = select(*columns).order_by(media.c.id.desc()).limit(RECENT_FILES).subquery()
    same = or_(recent.c.url == url, recent.c.uri == url)
    newest = select(recent.c.event_seq).where(same).order_by(recent.c.id.desc()).limit(1)
    seq: int | None = await connection.scalar(newest)
    return seq


async def _find_job(connection: SqlConnection, key: str, default_source: str) -> tuple[uuid.UUID | None, int]:
    """Return the newest job with this id, `request_id` or key, and how many others have the key."""
    job_id = _as_uuid(key)
    if job_id is not None:
        found = await _find_ids(connection, jobs.c.id == job_id)
        if found:
            return found[0], 0
    names = (await connection.execute(select(sources.c.name))).scalars()
    found = await _find_ids(connection, jobs.c.source.in_({default_source, *names}), jobs.c.request_id == key)
    if not found:
        callers = await find_callers(connection)
        found = await _find_ids(connection, jobs.c.caller.in_(callers), jobs.c.idempotency_key == key)
    return (found[0], len(found) - 1) if found else (None, 0)


async def _find_ids(connection: SqlConnection, *where: ColumnElement[bool]) -> Sequence[uuid.UUID]:
    statement = select(jobs.c.id).where(*where).order_by(jobs.c.seq.desc()).limit(100)
    return (await connection.execute(statement)).scalars().all()


def _as_uuid(key: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(key)
    except ValueError:
        return None
