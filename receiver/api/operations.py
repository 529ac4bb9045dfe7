"""`/livez` and `/readyz`."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from starlette.requests import Request
from starlette.responses import Response

from receiver.api.answers import error_body
from receiver.errors import ReceiverError

PROBE_SECONDS: Final = 4.0
"""How long a query for a health check may take."""
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
