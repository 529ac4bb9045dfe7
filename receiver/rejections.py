"""Rejected requests to the callback: each is counted, one per reason and second is logged, and some are kept.

A kept request is evidence for the operator, and never becomes an event. While it is answered, it only goes
to a list in memory. A background task diagnoses the list and writes it to the database, once a second at
most. If requests come faster than the rate limit, or if the database is down, they are not kept, and counted.
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import Final, NamedTuple

import structlog

from receiver.background import wait_for
from receiver.core.diagnosis import Known, LastUsed, RejectedRequest, diagnose
from receiver.db import rejections
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rejections import NewRejection
from receiver.errors import DatabaseUnavailable
from receiver.masking import mask
from receiver.metrics import REJECTIONS, REJECTIONS_KEPT

NO_SOURCE: Final = "-"
"""The source label if a path names no configured source; a source cannot have this name."""
MAX_SEGMENT_LENGTH: Final = 15
"""Longer segments of a path are cut: they may be a secret, such as a token."""
MAX_PATH_LENGTH: Final = 120

MAX_BODY_BYTES: Final = 16 * 1024
"""The start of a body that is kept."""
MAX_VALUE_BYTES: Final = 2048
"""The start of a header's value that is kept."""
MAX_HEADERS: Final = 32
BURST: Final = 20
"""Requests of one reason that are kept at once."""
RATE: Final = 1.0
"""Requests of one reason that are kept per second after that."""
MAX_WAITING_BYTES: Final = 1024 * 1024
"""Requests that wait in memory for the next write."""
MAX_STORED_BYTES: Final = 4 * 1024 * 1024
"""Rows of the table; the oldest are deleted first."""
GATHER_SECONDS: Final = 1.0
"""The time from a rejection to the write that takes it and the others of that time."""
STOP_SECONDS: Final = 2.0
"""How long the last write of a stopping process may take."""
REFRESH_SECONDS: Final = 60.0
"""How long the times at which the secrets were last used are reused."""

_KEPT_HEADERS: Final = frozenset(
    b"host content-type content-length content-encoding transfer-encoding user-agent via forwarded "
    b"x-forwarded-for x-forwarded-host x-forwarded-proto x-request-id x-clipia-signature x-clipia-timestamp "
    b"x-clipia-webhook-id".split()
)
"""Headers that are kept; others may hold a secret, such as a cookie or a token."""

log = structlog.get_logger()


class RawRequest(NamedTuple):
    """A rejected request as the server has it; `body` is None if it was not read."""

    path: str
    headers: Sequence[tuple[bytes, bytes]]
    peer: str | None
    body: bytes | None = None


class Rejections:
    """Counts, logs and keeps rejected requests; a flood of them fills neither disk nor memory."""

    def __init__(self, database: Database, known: Known, *, kept: int, clock: Callable[[], float]) -> None:
        """`kept` is the most rows in the table; with 0 no request is kept. `clock` returns unix seconds."""
        self._database = database
        self._known = known
        self._kept = kept
        self._clock = clock
        self._logged: dict[str, float] = {}
        self._allowances: dict[str, _Allowance] = {}
        self._waiting: list[RejectedRequest] = []
        self._waiting_bytes = 0
        self._outcomes = Counter[str]()
        self._arrived = asyncio.Event()
        self._last_used: LastUsed = {}
        self._refresh_at = float("-inf")

    def note(self, source: str, reason: str, request: RawRequest) -> None:
        """Count a rejection. `source` has to be a configured one or `NO_SOURCE`, so that labels stay few."""
        REJECTIONS.labels(source, reason).inc()
        now = time.monotonic()
        if now - self._logged.get(reason, float("-inf")) >= 1.0:
            self._logged[reason] = now
            shown = {"path": readable_path(request.path)} if source == NO_SOURCE else {}
            log.warning("webhook rejected", source=source, reason=reason, **shown)
        if self._kept:
            self._offer(source, reason, request, now)
            self._arrived.set()

    def _offer(self, source: str, reason: str, request: RawRequest, now: float) -> None:
        """Keep a request, unless there are too many."""
        allowance = self._allowances.get(reason)
        if allowance is None:
            allowance = self._allowances[reason] = _Allowance(now)
        if not allowance.take(now):
            # Counted later: a metric takes a lock, and a flood brings thousands a second.
            self._outcomes["rate"] += 1
            return
        body = request.body
        kept = RejectedRequest(
            source,
            reason,
            self._clock(),
            request.path[:MAX_VALUE_BYTES],
            request.peer,
            _kept_headers(request.headers),
            None if body is None else body[:MAX_BODY_BYTES],
            None if body is None else len(body),
        )
        if self._waiting_bytes + kept.size > MAX_WAITING_BYTES:
            self._outcomes["memory"] += 1
            return
        self._waiting.append(kept)
        self._waiting_bytes += kept.size

    @asynccontextmanager
    async def recorded(self) -> AsyncIterator[None]:
        """Write kept requests to the database inside the block, and the last ones at its end."""
        stopping = asyncio.Event()
        task = asyncio.create_task(self._record(stopping), name="rejections")
        try:
            yield
        finally:
            stopping.set()
            self._arrived.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await task

    async def _record(self, stopping: asyncio.Event) -> None:
        if not self._kept:
            # Those of an earlier setting are deleted.
            await self._write([])
            return
        while not stopping.is_set():
            await self._arrived.wait()
            await wait_for(stopping, GATHER_SECONDS)
            self._arrived.clear()
            await self._write_waiting()

    async def _write_waiting(self) -> None:
        group, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if group:
            await self._write(group)
        for outcome, number in self._outcomes.items():
            REJECTIONS_KEPT.labels(outcome).inc(number)
        self._outcomes.clear()

    async def _write(self, group: Sequence[RejectedRequest]) -> None:
        """Diagnose requests and store them. If that fails they are dropped: evidence must not pile up."""
        outcome, number = "kept", len(group)
        try:
            last_used = await self._read_last_used() if group else {}
            rows = await self._diagnose(group, last_used)
            number = len(rows)
            await self._database.run_transaction(partial(_store, rows=rows, kept=self._kept))
        except DatabaseUnavailable as error:
            outcome = "database"
            log.warning("rejected requests not kept", error=str(error), count=number)
        except Exception:
            outcome = "error"
            log.exception("rejected requests not kept", count=number)
        self._outcomes[outcome] += number

    async def _diagnose(self, group: Sequence[RejectedRequest], last_used: LastUsed) -> list[NewRejection]:
        """Return the rows of a group; a request that cannot be diagnosed takes no other with it."""
        rows = []
        for each in group:
            try:
                # One by one in a thread: the event loop answers webhooks in between.
                rows.append(await asyncio.to_thread(_diagnosed, each, self._known, last_used))
            except Exception:
                self._outcomes["error"] += 1
                log.exception("a rejected request not kept", reason=each.reason)
        return rows

    async def _read_last_used(self) -> LastUsed:
        now = time.monotonic()
        if now >= self._refresh_at:
            async with self._database.read() as connection:
                self._last_used = await rejections.read_last_used(connection)
            self._refresh_at = now + REFRESH_SECONDS
        return self._last_used


def _kept_headers(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers to keep; Clipia's come first, so that others cannot crowd them out."""
    kept = [(name, value[:MAX_VALUE_BYTES]) for name, value in headers if name in _KEPT_HEADERS]
    return sorted(kept, key=lambda header: not header[0].startswith(b"x-clipia-"))[:MAX_HEADERS]


class _Allowance:
    """A token bucket with a burst; `TokenBucket` spreads its tokens evenly instead."""

    __slots__ = ("_filled_at", "_tokens")

    def __init__(self, now: float) -> None:
        self._tokens = float(BURST)
        self._filled_at = now

    def take(self, now: float) -> bool:
        """Take a token if there is one."""
        tokens = min(BURST, self._tokens + (now - self._filled_at) * RATE)
        self._filled_at = now
        is_allowed = tokens >= 1.0
        self._tokens = tokens - is_allowed
        return is_allowed


def _diagnosed(request: RejectedRequest, known: Known, last_used: LastUsed) -> NewRejection:
    cause, text = diagnose(request, known, last_used)
    body = None if request.body is None else _masked_bytes(request.body)
    return NewRejection(
        received_at=datetime.fromtimestamp(request.received_at, UTC),
        source=request.source,
        reason=request.reason,
        cause=cause,
        diagnosis=text,
        path=mask(readable_path(request.path)),
        peer=request.peer,
        headers=[
            [name.decode("latin-1"), _readable(mask(value.decode("latin-1")))]
            for name, value in request.headers
        ],
        body_size=request.body_size,
        size=request.size,
        body=body,
    )


async def _store(connection: SqlConnection, rows: Sequence[NewRejection], kept: int) -> None:
    await rejections.insert(connection, rows)
    await rejections.trim(connection, rows=kept, size=MAX_STORED_BYTES)


def _masked_bytes(body: bytes) -> bytes:
    return mask(body.decode("utf-8", "surrogateescape")).encode("utf-8", "surrogateescape")


def readable_path(path: str) -> str:
    """Return a path without control characters, and without segments that may be a secret."""
    segments = [
        segment if len(segment) <= MAX_SEGMENT_LENGTH else f"{segment[:4]}…" for segment in path.split("/")
    ]
    return _readable("/".join(segments)[:MAX_PATH_LENGTH])


def _readable(text: str) -> str:
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
