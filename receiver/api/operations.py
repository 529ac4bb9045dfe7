"""`/livez`, `/readyz` and `/metrics`."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.requests import Request
from starlette.responses import Response

from receiver.api.answers import error_body, error_response
from receiver.api.auth import Tokens
from receiver.db.rows import Backlog
from receiver.errors import ReceiverError, RequestError
from receiver.metrics import (
    BACKLOG,
    BACKLOG_OLDEST,
    DEAD_LETTERS,
    JOBS_REFUSED,
    SUBMISSIONS_PAUSED,
    UNRECOGNIZED,
)

PROBE_SECONDS: Final = 4.0
"""How long a query for a health check or for the metrics may take."""
PROBE_CACHE_SECONDS: Final = 1.0
"""How long a probe's answer is reused: a flood of health checks must not load the database.

On PostgreSQL each probe leaves four dead rows for autovacuum.
"""

log = structlog.get_logger()


async def livez(_request: Request) -> Response:
    """Answer 200: the process runs. Uses neither the database nor any other service."""
    return Response(b'{"status":"ok"}', media_type="application/json")


class Readiness:
    """Tells whether an event can be stored now: it inserts one, rolls that back, and commits another row."""

    def __init__(self, probe: Callable[[], Awaitable[None]]) -> None:
        self._probe = probe
        self._lock = asyncio.Lock()
        self._checked_at = float("-inf")
        self._problem: str | None = None

    async def __call__(self, request: Request) -> Response:
        """Answer 200, or 503 with the reason."""
        if request.app.state.draining:
            return _not_ready("This process is shutting down.")
        async with self._lock:
            if time.monotonic() - self._checked_at > PROBE_CACHE_SECONDS:
                self._problem = await self._check()
                self._checked_at = time.monotonic()
        if self._problem is None:
            return Response(b'{"status":"ok"}', media_type="application/json")
        return _not_ready(self._problem)

    async def _check(self) -> str | None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await self._probe()
        except (ReceiverError, TimeoutError) as error:
            log.warning("not ready", error=str(error))
        except Exception:
            log.exception("not ready")
        else:
            return None
        # The endpoint is public, and the database's own message may name hosts and users.
        return "The database cannot store an event now; see the server's log."


def _not_ready(problem: str) -> Response:
    body = error_body("api_error", "service_unavailable", problem)
    return Response(body, 503, {"retry-after": "5"}, "application/json")


@dataclass(kw_only=True)
class Metrics:
    """The Prometheus endpoint; it reads the backlog from the database at each scrape."""

    backlog: Callable[[], Awaitable[dict[str, Backlog]]]
    dead: Callable[[], Awaitable[dict[str, int]]]
    paused: Callable[[], Awaitable[bool]]
    refused: Callable[[], Awaitable[int]]
    unrecognized: Callable[[], Awaitable[dict[bool, int]]]
    tokens: Tokens
    multiprocess: bool
    _lanes: set[str] = field(default_factory=set, init=False)
    _destinations: set[str] = field(default_factory=set, init=False)

    async def __call__(self, request: Request) -> Response:
        """Answer in Prometheus' text format; needs the scope `read` if any token is configured."""
        if self.tokens:
            try:
                self.tokens.require(request.headers, "read")
            except RequestError as error:
                return error_response(error)
        await self._update_gauges()
        registry = REGISTRY
        if self.multiprocess:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    async def _update_gauges(self) -> None:
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                backlog, dead, paused = await self.backlog(), await self.dead(), await self.paused()
                unrecognized, refused = await self.unrecognized(), await self.refused()
        except (ReceiverError, TimeoutError) as error:
            # The counters are still served: they matter most while the database is unavailable.
            log.warning("backlog unknown", error=str(error))
            return
        SUBMISSIONS_PAUSED.set(paused)
        JOBS_REFUSED.set(refused)
        for recoverable, count in unrecognized.items():
            UNRECOGNIZED.labels(str(recoverable).lower()).set(count)
        self._destinations |= dead.keys()
        for name in self._destinations:
            DEAD_LETTERS.labels(name).set(dead.get(name, 0))
        self._lanes |= backlog.keys()
        empty = Backlog(rows=0, oldest=0.0)
        for lane in self._lanes:
            BACKLOG.labels(lane).set(backlog.get(lane, empty).rows)
            BACKLOG_OLDEST.labels(lane).set(backlog.get(lane, empty).oldest)
