"""`/metrics`, on the internal listener or on a port of its own.

Each process shows its own counters. The gauges that count rows are the same for all processes, so those with
the internal API and those that only work show them. While the database is away they keep their last values,
and `receiver_database_up` is 0; if they have never been read, they are absent.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from typing import ClassVar, Final

import structlog
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from receiver import unrecognized
from receiver.api.answers import error_response
from receiver.api.auth import Tokens
from receiver.api.endpoints import not_found
from receiver.api.memory_budget import MIB, MemoryBudget
from receiver.api.protocol import DeadlineHttpToolsProtocol
from receiver.db.database import Database
from receiver.db.rows import Backlog
from receiver.errors import ReceiverError, RequestError
from receiver.lanes.backlog import (
    count_dead_letters,
    count_refused_jobs,
    find_paused,
    ping,
    read_backlog,
    read_retention_age,
)
from receiver.metrics import (
    BACKLOG,
    BACKLOG_OLDEST,
    DATABASE_UP,
    DEAD_LETTERS,
    JOBS_REFUSED,
    PAUSED,
    RETENTION_AGE,
    ROWS,
    SUBMISSIONS_PAUSED,
    UNRECOGNIZED,
)
from receiver.settings import Settings
from receiver.submitter import Submitter

READ_SECONDS: Final = 4.0
"""How long the database may take for a scrape; Prometheus gives a scrape 10 s by default."""
KEEP_ALIVE: Final = 75
"""Seconds that a connection may be idle between two scrapes."""
_NO_ROWS: Final = Backlog(rows=0, oldest=0.0)

Read = Callable[[], Awaitable[None]]

log = structlog.get_logger()


class RowGauges:
    """The gauges that count rows of the database."""

    def __init__(self, settings: Settings, database: Database, submitter: Submitter) -> None:
        self._settings = settings
        self._database = database
        self._submitter = submitter
        self._unrecognized = unrecognized.RecoverableCounter(database)
        # A destination or a lane that has no rows any more is shown as 0, not with its last value.
        self._lanes: set[str] = set()
        self._names: set[str] = set()

    async def __call__(self) -> None:
        """Read all of them and then set them. Raises DatabaseUnavailable."""
        destinations = self._settings.all_destinations
        backlog = await read_backlog(self._database, destinations)
        dead = await count_dead_letters(self._database, destinations)
        paused_names = await find_paused(self._database)
        paused, refused = await self._submitter.paused(), await count_refused_jobs(self._database)
        retention_age = 0.0
        if self._settings.retention_days is not None:
            retention_age = await read_retention_age(self._database)
        by_recoverable = await self._unrecognized()
        SUBMISSIONS_PAUSED.set(paused)
        JOBS_REFUSED.set(refused)
        RETENTION_AGE.set(retention_age)
        for recoverable, count in by_recoverable.items():
            UNRECOGNIZED.labels(str(recoverable).lower()).set(count)
        self._names |= dead.keys() | paused_names
        for name in self._names:
            DEAD_LETTERS.labels(name).set(dead.get(name, 0))
            PAUSED.labels(name).set(name in paused_names)
        self._lanes |= backlog.keys()
        for lane in self._lanes:
            BACKLOG.labels(lane).set(backlog.get(lane, _NO_ROWS).rows)
            BACKLOG_OLDEST.labels(lane).set(backlog.get(lane, _NO_ROWS).oldest)


class Metrics:
    """The endpoint; it reads the database at each scrape."""

    def __init__(self, tokens: Tokens, read: Read) -> None:
        self._tokens = tokens
        self._read = read
        self._has_rows = False

    @classmethod
    def with_rows(cls, settings: Settings, database: Database, submitter: Submitter) -> "Metrics":
        """Make the endpoint of a process that shows the gauges of rows, too."""
        return cls(Tokens(settings.api_tokens), RowGauges(settings, database, submitter))

    @classmethod
    def without_rows(cls, settings: Settings, database: Database) -> "Metrics":
        """Make the endpoint of a process that only receives: counting rows would keep webhooks waiting."""
        return cls(Tokens(settings.api_tokens), partial(ping, database))

    async def __call__(self, request: Request) -> Response:
        """Answer in Prometheus' text format; needs the scope `read` if any token is configured."""
        if self._tokens:
            try:
                self._tokens.require(request.headers, "read")
            except RequestError as error:
                return error_response(error)
        await self._update()
        text = generate_latest() + (generate_latest(ROWS) if self._has_rows else b"")
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _update(self) -> None:
        try:
            async with asyncio.timeout(READ_SECONDS):
                await self._read()
        except (ReceiverError, TimeoutError) as error:
            # The counters are still served: they matter most while the database is unavailable.
            log.warning("database not read for the metrics", error=str(error) or f"not in {READ_SECONDS:g} s")
            DATABASE_UP.set(0)
        else:
            DATABASE_UP.set(1)
            self._has_rows = isinstance(self._read, RowGauges)


async def shared_metrics(_request: Request) -> Response:
    """Answer 404: this listener belongs to several processes, and a scrape would reach any one of them."""
    error = not_found("page: several processes share this listener, so each has its own --metrics-port")
    return error_response(error)


class _Protocol(DeadlineHttpToolsProtocol):
    # Its own budget: an attack on the webhooks must not keep the metrics from being read.
    budget: ClassVar[MemoryBudget] = MemoryBudget(4 * MIB)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process that this server is a part of."""
        yield


@contextlib.asynccontextmanager
async def serving_metrics(metrics: Metrics, listeners: Sequence[socket.socket]) -> AsyncIterator[None]:
    """Serve `/metrics`, and nothing else, on these listeners inside the block."""
    if not listeners:
        yield
        return
    app = Starlette(routes=[Route("/metrics", metrics.__call__, methods=["GET"])])
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=list(listeners)), name="metrics")
    try:
        yield
    finally:
        server.should_exit = True
        await task
