"""Downloads of events' files."""

import hashlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final, Literal
from uuid import UUID

import structlog

from receiver.core.lane_names import MEDIA_LANE, Wake, destination_lane
from receiver.core.retry import DAY, MEDIA_DOUBTFUL, media_policy
from receiver.db import inbox, job_events, leases, outbox
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import Attempt, EventClaim, JobRef, MediaRow, StoredEvent
from receiver.db.tables import media
from receiver.errors import (
    MediaBlocked,
    MediaDoubtful,
    MediaMissing,
    NotMedia,
    StorageUnavailable,
    TransientError,
)
from receiver.lanes.attempts import StartedAttempt, crash_error, jitter, log_failure, stored_text
from receiver.lanes.base import Lane, Work
from receiver.lanes.spans import start_download
from receiver.media import Downloader, StoredFile
from receiver.metrics import MEDIA_BYTES, MEDIA_FILES
from receiver.tracing import NO_SPAN, OFF, Span, Tracer

FreshUrl = Callable[[StoredEvent, MediaRow], Awaitable[str | None]]
"""Returns the present URL of a file, None if Clipia has none. Raises TransientError if it cannot tell now."""

MAX_FRESH_URLS: Final = 3
"""After this many attempts at a file, Clipia is no longer asked for a fresh URL."""
FRESH_URL_PAUSE_SECONDS: Final = 15.0
"""Shortest time until Clipia is asked again for a fresh URL, if it could not answer."""
FRESH_URL_PATIENCE_SECONDS: Final = 3 * DAY
"""A download of this age no longer waits for an answer about a fresh URL."""
STORAGE_PAUSE_SECONDS: Final = 15.0
"""Pause of all downloads after the storage fails for a file for the first time."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _Download:
    """A claimed file and the attempt at it."""

    claim: EventClaim
    event: StoredEvent
    row: MediaRow
    attempt: StartedAttempt
    span: Span = NO_SPAN

    @property
    def ids(self) -> dict[str, Any]:
        """The fields of its log lines."""
        ids = {"event_id": str(self.event.id), "request_id": self.event.request_id}
        return ids | {"variant": self.row.variant}


class MediaLane(Lane):
    """Downloads the files of events."""

    def __init__(
        self,
        database: Database,
        downloader: Downloader,
        *,
        wake: Wake,
        fresh_url: FreshUrl | None = None,
        concurrency: int = 8,
        storage_pause_seconds: float = STORAGE_PAUSE_SECONDS,
        tracer: Tracer = OFF,
    ) -> None:
        """`fresh_url` is called if a file is missing at its URL."""
        super().__init__(database, media, name=MEDIA_LANE, concurrency=concurrency, wake=wake)
        self._downloader = downloader
        self._fresh_url = fresh_url
        self._storage_pause_seconds = storage_pause_seconds
        self._tracer = tracer
        self._paused_until = 0.0
        self._unstorable = set[UUID]()
        """The files that the storage has failed for."""

    async def claim(self, limit: int) -> list[Work]:
        """Claim files that are due. Raises DatabaseUnavailable."""
        if time.monotonic() < self._paused_until:
            return []
        return await self._database.run_transaction(partial(self._claim, limit=limit))

    async def _claim(self, connection: SqlConnection, *, limit: int) -> list[Work]:
        claims = await leases.claim_media(connection, limit=limit, lease=self.lease_seconds)
        if not claims:
            return []
        events = await inbox.load_events(connection, {claim.event_seq for claim in claims})
        rows = await outbox.load_files(connection, {claim.id for claim in claims})
        # The job names the trace.
        jobs = await job_events.load_refs(connection, events) if self._tracer.is_on else {}
        found = [
            (claim, events[claim.event_seq], rows[claim.id], jobs.get(claim.event_seq)) for claim in claims
        ]
        return [Work(claim=parts[0], run=partial(self._save, *parts)) for parts in found]

    async def _save(self, claim: EventClaim, event: StoredEvent, row: MediaRow, job: JobRef | None) -> None:
        span = start_download(self._tracer, claim, event, row, job)
        this = _Download(claim=claim, event=event, row=row, attempt=StartedAttempt.of(claim), span=span)
        if crashed := crash_error(claim, "downloading this file"):
            await self._give_up(this, crashed, state="gone")
            return
        try:
            stored = await self._downloader.save(
                url=row.url,
                kind=row.kind,
                field=row.field,
                stem=storage_stem(event, row),
                seen_sha256=row.seen_sha256,
                # A doubtful file is kept in the end, but it does not replace an intact one.
                keep_doubtful=claim.age >= MEDIA_DOUBTFUL.give_up_after and row.storage_key is None,
            )
        except Exception as error:  # noqa: BLE001 - any error belongs to this row, not to its lane
            span.end(error)
            await self._failed(this, error)
            return
        span.end(clipia__media__size=stored.size, clipia__media__content_type=stored.content_type)
        await self._stored(this, stored)

    async def _stored(self, this: _Download, stored: StoredFile) -> None:
        self._unstorable.discard(this.claim.id)
        kind = this.row.kind
        error = None if stored.is_media else f"the host sends a page or a text in place of the {kind}"
        state = "stored" if stored.is_media else "not_media"
        values = asdict(stored) | {"error": error}
        key, _ = values.pop("key"), values.pop("is_media")
        attempt = this.attempt.end("failed" if error else "succeeded", error)
        if await self._finish(this, attempt, state=state, storage_key=key, **values):
            MEDIA_FILES.labels("flagged" if stored.warning and not error else state).inc()
            MEDIA_BYTES.inc(stored.size)
            emit = log.warning if error or stored.warning else log.info
            emit("media stored", **values, **this.ids)

    async def _failed(self, this: _Download, error: Exception) -> None:
        """Record a failed attempt, and try again at a fresh URL, try again later, or give up."""
        is_missing = isinstance(error, (MediaMissing, NotMedia))
        if is_missing and await self._follow(this, error):
            return
        if isinstance(error, StorageUnavailable):
            self._pause(this.claim)
        attempt = this.claim.attempt
        delay = media_policy(error).next_delay(error, attempt=attempt, age=this.claim.age, jitter=jitter())
        work_id = str(this.claim.id)
        log_failure("media not stored", error, work_id=work_id, attempt=attempt, retry_in=delay, **this.ids)
        text = stored_text(error)
        if delay is None:
            await self._give_up(this, text, state="blocked" if isinstance(error, MediaBlocked) else "gone")
            return
        seen = error.sha256 if isinstance(error, MediaDoubtful) else this.row.seen_sha256
        if await self._put_back(this, text, delay=delay, seen_sha256=seen):
            MEDIA_FILES.labels("retry").inc()

    async def _follow(self, this: _Download, error: Exception) -> bool:
        """Put a file back, with its fresh URL or until Clipia can tell it; False if there is none."""
        if self._fresh_url is None or this.claim.attempt > MAX_FRESH_URLS:
            return False
        try:
            url = await self._fresh_url(this.event, this.row)
        except TransientError as unknown:
            if this.claim.age >= FRESH_URL_PATIENCE_SECONDS:
                return False
            delay = max(FRESH_URL_PAUSE_SECONDS, unknown.retry_after or 0.0) * (1.0 + jitter())
            log.info(
                "fresh URL not known yet", work_id=str(this.claim.id), reason=unknown.reason, retry_in=delay
            )
            # The attempt does not count, because the file's present URL was not tried.
            uncounted = media.c.attempts - 1
            await self._put_back(this, f"{stored_text(error)}; {unknown}", delay=delay, attempts=uncounted)
            return True
        if url in (None, this.row.url):
            return False
        log.info("media moved", work_id=str(this.claim.id), request_id=this.event.request_id)
        await self._put_back(this, stored_text(error), delay=1.0, url=url)
        return True

    def _pause(self, claim: EventClaim) -> None:
        """Pause downloads after the storage failed, but only once for each file.

        A file that the storage can never take, such as one that is too large, must not block the others.
        """
        if claim.id not in self._unstorable:
            self._paused_until = time.monotonic() + self._storage_pause_seconds
        self._unstorable.add(claim.id)

    async def _give_up(self, this: _Download, error: str, *, state: str) -> None:
        attempt = this.attempt.end("failed", error)
        if this.row.storage_key is not None:
            # A replay ordered the download again; the stored file is still intact.
            if await self._finish(this, attempt, state="stored", warning=f"not downloaded again: {error}"):
                MEDIA_FILES.labels("flagged").inc()
        elif await self._finish(this, attempt, state=state, error=error):
            MEDIA_FILES.labels(state).inc()

    async def _finish(
        self, this: _Download, attempt: Attempt, *, state: str, error: str | None = None, **values: Any
    ) -> bool:
        """Record the last result of a file; False if its lease was lost."""

        async def write(connection: SqlConnection) -> list[str] | Literal[False]:
            if not await leases.finish(connection, media, this.claim, state=state, error=error, **values):
                return False
            await leases.record_attempt(connection, this.claim.id, attempt)
            # With the event's last file, its held deliveries become due.
            return list(await outbox.release_held(connection, this.claim.event_seq))

        destinations = await self._record(this.claim, write, this.span)
        for name in destinations or ():
            self._wake(destination_lane(name))
        return destinations is not False

    async def _put_back(self, this: _Download, error: str, *, delay: float, **values: Any) -> bool:
        """Record a failed attempt and when the next one is due; False if the lease was lost."""
        attempt = this.attempt.end("retry", error)

        async def write(connection: SqlConnection) -> bool:
            held = await leases.retry(connection, media, this.claim, delay=delay, error=error, **values)
            if held:
                await leases.record_attempt(connection, this.claim.id, attempt)
            return held

        return await self._record(this.claim, write, this.span)


def storage_stem(event: StoredEvent, row: MediaRow) -> str:
    """Return the storage key of a file without its extension.

    It is made from a hash, never from the URL or the payload, and it is always the same: a download that is
    repeated after a crash replaces its own file.
    """
    digest = hashlib.sha256(f"{event.source}\n{event.request_id}".encode()).hexdigest()
    return f"{digest[:2]}/{digest}/{row.position:02d}-{row.variant}"
