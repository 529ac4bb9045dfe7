"""Downloads of events' files, as work that is claimed by lease."""

import hashlib
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final
from uuid import UUID

import structlog
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.core.retry import DAY, MEDIA_DOUBTFUL, media_policy
from receiver.db import inbox, leases, outbox
from receiver.db.database import Database
from receiver.db.rows import Attempt, EventClaim, MediaRow, StoredEvent
from receiver.db.tables import media
from receiver.errors import (
    MediaBlocked,
    MediaDoubtful,
    MediaMissing,
    NotMedia,
    StorageUnavailable,
    TransientError,
)
from receiver.lanes.base import (
    LEASE,
    MAX_LOST,
    MEDIA_LANE,
    Record,
    Work,
    WorkLane,
    describe,
    destination_lane,
    jitter,
    log_failure,
    start_attempt,
)
from receiver.media import Downloader, StoredFile
from receiver.metrics import MEDIA_BYTES, MEDIA_FILES

FreshUrl = Callable[[StoredEvent, MediaRow], Awaitable[str | None]]

FRESH_URLS: Final = 3
"""Tries at a file after which Clipia is no longer asked whether it has moved."""
ASK_AGAIN: Final = 15.0
"""Seconds until Clipia is asked again where a file is, if it could not be asked."""
ASK_FOR: Final = 3 * DAY
"""Age of a download, in seconds, from which that is no reason to wait any more."""
STORAGE_PAUSE: Final = 15.0
"""Seconds without new downloads after our storage refused a file that it had not refused before."""

log = structlog.get_logger()


class MediaLane(WorkLane):
    """Downloads the files of events."""

    def __init__(
        self,
        database: Database,
        downloader: Downloader,
        *,
        wake: Callable[[str], None],
        fresh_url: FreshUrl | None = None,
        concurrency: int = 8,
    ) -> None:
        """`fresh_url` tells where Clipia has a file now, for one that is no longer where it was."""
        super().__init__(database, media, name=MEDIA_LANE, concurrency=concurrency, wake=wake)
        self._downloader = downloader
        self._fresh_url = fresh_url
        self._paused_until = 0.0
        self._refused = set[UUID]()

    async def claim(self, limit: int) -> list[Work]:
        """Claim files that are due. Raises DatabaseUnavailable."""
        if time.monotonic() < self._paused_until:
            return []

        async def work(connection: AsyncConnection) -> list[Work]:
            claims = await leases.claim_media(connection, limit=limit, lease=LEASE)
            if not claims:
                return []
            seqs = {claim.event_seq for claim in claims}
            events = await inbox.load_events(connection, seqs)
            rows = await outbox.load_files(connection, {claim.id for claim in claims})
            return [
                Work(claim=claim, run=partial(self._save, claim, events[claim.event_seq], rows[claim.id]))
                for claim in claims
            ]

        return await self._database.run_transaction(work)

    async def _save(self, claim: EventClaim, event: StoredEvent, row: MediaRow) -> None:
        attempt = start_attempt(claim)
        if claim.lost >= MAX_LOST:
            failed = attempt("failed", f"its download ended {claim.lost} workers")
            await self._give_up(claim, failed, row, "gone")
            return
        try:
            stored = await self._downloader.save(
                url=row.url,
                kind=row.kind,
                field=row.field,
                stem=storage_stem(event, row),
                seen_sha256=row.seen_sha256,
                # What is intact gives way to nothing that is in doubt.
                keep_doubtful=claim.age >= MEDIA_DOUBTFUL.give_up_after and row.storage_key is None,
            )
        except Exception as error:  # noqa: BLE001 - whatever happened belongs to this row, not to its lane
            await self._failed(claim, attempt, event, row, error)
            return
        await self._stored(claim, attempt, event, row, stored)

    async def _stored(
        self, claim: EventClaim, attempt: Record, event: StoredEvent, row: MediaRow, stored: StoredFile
    ) -> None:
        self._refused.discard(claim.id)
        refused = None if stored.is_media else f"the host sends a page or a text in place of the {row.kind}"
        if await self._finish(
            claim,
            attempt("failed", refused) if refused else attempt("succeeded"),
            state="not_media" if refused else "stored",
            error=refused,
            warning=stored.warning,
            size=stored.size,
            sha256=stored.sha256,
            content_type=stored.content_type,
            storage_key=stored.key,
            uri=stored.uri,
        ):
            MEDIA_FILES.labels("not_media" if refused else "flagged" if stored.warning else "stored").inc()
            MEDIA_BYTES.inc(stored.size)
            log.log(
                logging.WARNING if refused or stored.warning else logging.INFO,
                "media stored",
                refused=refused,
                warning=stored.warning,
                event_id=str(event.id),
                request_id=event.request_id,
                variant=row.variant,
                uri=stored.uri,
                size=stored.size,
                sha256=stored.sha256,
                content_type=stored.content_type,
            )

    async def _failed(
        self, claim: EventClaim, attempt: Record, event: StoredEvent, row: MediaRow, error: Exception
    ) -> None:
        is_absent = isinstance(error, (MediaMissing, NotMedia))
        if is_absent and claim.attempt <= FRESH_URLS and self._fresh_url is not None:
            try:
                url = await self._fresh_url(event, row)
            except TransientError as unknown:
                if claim.age < ASK_FOR:
                    await self._ask_again(claim, attempt("retry", f"{describe(error)}; {unknown}"), unknown)
                    return
                url = None
            if url not in (None, row.url):
                log.info("media moved", work_id=str(claim.id), request_id=event.request_id)
                await self._put_back(claim, attempt("retry", describe(error)), delay=1.0, url=url)
                return
        message = describe(error)
        if isinstance(error, StorageUnavailable):
            # A file that the storage refuses again and again is no reason to keep the others waiting.
            if claim.id not in self._refused:
                self._paused_until = time.monotonic() + STORAGE_PAUSE
            self._refused.add(claim.id)
        delay = media_policy(error).next_delay(error, attempt=claim.attempt, age=claim.age, jitter=jitter())
        ids = {"event_id": str(event.id), "request_id": event.request_id, "variant": row.variant}
        log_failure("media not stored", claim, error, message, delay=delay, **ids)
        if delay is None:
            state = "blocked" if isinstance(error, MediaBlocked) else "gone"
            await self._give_up(claim, attempt("failed", message), row, state)
        elif await self._put_back(
            claim,
            attempt("retry", message),
            delay=delay,
            seen_sha256=error.sha256 if isinstance(error, MediaDoubtful) else row.seen_sha256,
        ):
            MEDIA_FILES.labels("retry").inc()

    async def _ask_again(self, claim: EventClaim, attempt: Attempt, unknown: TransientError) -> None:
        """Put a file back whose present URL cannot be asked for now; the try counts for nothing."""
        delay = max(ASK_AGAIN, unknown.retry_after or 0.0) * (1.0 + jitter())
        log.info("fresh URL not to be had yet", work_id=str(claim.id), reason=unknown.reason, retry_in=delay)
        await self._put_back(claim, attempt, delay=delay, attempts=media.c.attempts - 1)

    async def _give_up(self, claim: EventClaim, attempt: Attempt, row: MediaRow, state: str) -> None:
        if row.storage_key is not None:
            # It was intact before somebody wanted it again, and it still is.
            warning = f"not downloaded again: {attempt.error}"
            if await self._finish(claim, attempt, state="stored", warning=warning):
                MEDIA_FILES.labels("flagged").inc()
        elif await self._finish(claim, attempt, state=state, error=attempt.error):
            MEDIA_FILES.labels(state).inc()

    async def _finish(
        self, claim: EventClaim, attempt: Attempt, *, state: str, error: str | None = None, **values: Any
    ) -> bool:
        """Record the last result of a file; False if its lease was lost meanwhile."""
        names: list[str] = []

        async def write(connection: AsyncConnection) -> bool:
            held = await leases.finish(connection, media, claim, state=state, error=error, **values)
            if held:
                await leases.record_attempt(connection, claim.id, attempt)
                # With the event's last file the deliveries that waited for it become due.
                names[:] = await outbox.release_held(connection, claim.event_seq)
            return held

        held = await self._record(claim, write)
        for name in names:
            self._wake(destination_lane(name))
        return held

    async def _put_back(self, claim: EventClaim, attempt: Attempt, *, delay: float, **values: Any) -> bool:
        """Record a failed try and when the next one is due; False if the lease was lost meanwhile."""

        async def write(connection: AsyncConnection) -> bool:
            held = await leases.retry(connection, media, claim, delay=delay, error=attempt.error, **values)
            if held:
                await leases.record_attempt(connection, claim.id, attempt)
            return held

        return await self._record(claim, write)


def storage_stem(event: StoredEvent, row: MediaRow) -> str:
    """Return the storage key of a file without its extension.

    It is ours, never the URL's or the payload's, and always the same: a download that is repeated after a
    crash meets its own file.
    """
    digest = hashlib.sha256(f"{event.source}\n{event.request_id}".encode()).hexdigest()
    return f"{digest[:2]}/{digest}/{row.position:02d}-{row.variant}"
