"""Composition: what a process is made of, opened in order and closed in reverse."""

import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Any, Final, Literal, cast

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from receiver import recovery
from receiver.api.answers import error_body
from receiver.api.auth import Tokens
from receiver.api.events import Ledger
from receiver.api.jobs import Jobs
from receiver.api.operations import Metrics, Readiness, livez
from receiver.api.rejections import NO_SOURCE, Refusals
from receiver.api.webhook import Callback
from receiver.background import running
from receiver.core.output_files import FileRules
from receiver.core.retry import RetryPolicy
from receiver.core.signature import Secret
from receiver.db import arrivals, migrate
from receiver.db.database import Database
from receiver.db.requirements import require_usable
from receiver.db.signals import Signals, listen
from receiver.destination_settings import DestinationSettings
from receiver.destinations import Destination, open_for_work, started
from receiver.errors import StorageUnavailable
from receiver.failures import frames, sentence
from receiver.ingest import Ingest
from receiver.lanes.backlog import count_dead_letters, count_refused_jobs, read_backlog
from receiver.lanes.base import FAN_OUT_LANE, Target
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.fan_out import FanOut
from receiver.lanes.media import MediaLane
from receiver.lanes.poll import FreshUrls, PollLane
from receiver.lanes.presence import present
from receiver.lanes.unserved import giving_up
from receiver.lanes.worker import Lane, Wakeups, Worker
from receiver.logs import write_logs
from receiver.media import Downloader, MediaHosts, Storage, open_storage
from receiver.replays import ReplayLane, Replays
from receiver.settings import Settings, SourceSettings
from receiver.submitter import Submitter

Only = Literal["webhook", "internal"]

CALLBACK: Final = "/clipia/webhook"

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the worker needs beside the database; made from the settings without touching the network."""

    storage: Storage
    rules: FileRules
    downloader: Downloader
    destinations: dict[str, Destination]

    @classmethod
    def make(cls, settings: Settings) -> "Parts":
        """Raise SettingsError for whatever cannot be used."""
        storage = open_storage(settings.storage_url.get_secret_value())
        hosts = MediaHosts.parse(settings.media_hosts)
        return cls(
            storage=storage,
            rules=FileRules(
                refuse=hosts.refuse,
                max_files=settings.media_max_files,
                max_url_length=settings.media_max_url_length,
            ),
            downloader=Downloader(
                hosts=hosts,
                storage=storage,
                ca=settings.media_ca,
                proxy=settings.media_proxy.get_secret_value() if settings.media_proxy else None,
            ),
            destinations={each.name: open_for_work(each) for each in settings.all_destinations},
        )


async def prepare(settings: Settings) -> None:
    """Check at start what a running process relies on; bring an SQLite schema up to date.

    Raises SettingsError, which says what to do, and DatabaseUnavailable.
    """
    database = Database(settings.database_url.get_secret_value())
    try:
        await migrate.prepare(database, durable_without=settings.durable_without)
        if not database.is_sqlite and settings.durable_without:
            log.warning(
                "commits are as durable as the database's storage", without=list(settings.durable_without)
            )
        await arrivals.probe(database)
    finally:
        await database.close()


@asynccontextmanager
async def running_worker(
    settings: Settings, database: Database, wakeups: Wakeups, submitter: Submitter
) -> AsyncIterator[Worker]:
    """Open storage and destinations, run a worker inside the block, and drain it at its end."""
    async with AsyncExitStack() as stack:
        worker = await _open_worker(settings, database, wakeups, submitter, stack)
        if not database.is_sqlite:
            await stack.enter_async_context(running(listen(database, wakeups.wake), name="listen"))
        names = [each.name for each in settings.all_destinations]
        await stack.enter_async_context(giving_up(database, names))
        account = submitter.client.account if submitter.lane is not None else None

        async def work() -> None:
            # Around the work itself, so that a worker that has failed is not reported as running.
            async with present(database, worker.lanes, account=account):
                await worker.run()

        task = asyncio.create_task(work(), name="worker")
        try:
            yield worker
        finally:
            worker.stop()
            await task


async def _open_worker(
    settings: Settings, database: Database, wakeups: Wakeups, submitter: Submitter, stack: AsyncExitStack
) -> Worker:
    parts = Parts.make(settings)
    for origin in MediaHosts.parse(settings.media_hosts).development_origins:
        log.warning("media is fetched from a development origin, unguarded", origin=origin)
    stack.push_async_callback(parts.storage.close)
    try:
        await parts.storage.sweep()
    except StorageUnavailable as error:
        # Webhooks are taken all the same, and files wait until they can be stored.
        log.error("storage not cleaned up", error=str(error))
    stack.push_async_callback(parts.downloader.close)
    await parts.downloader.start()
    down = await stack.enter_async_context(started(parts.destinations))
    targets = [
        make_target(each, parts.destinations[each.name], is_down=each.name in down)
        for each in settings.all_destinations
    ]
    if not targets:
        log.warning("no destination is configured: events are stored and not forwarded")
    lanes: list[Lane] = [
        MediaLane(
            database,
            parts.downloader,
            wake=wakeups.wake,
            fresh_url=(
                FreshUrls(database, submitter.client, rules=parts.rules).find
                if submitter.lane is not None
                else None
            ),
        ),
        *(DeliveryLane(database, target, wake=wakeups.wake) for target in targets),
        ReplayLane(database, targets, parts.storage, wake=wakeups.wake, rules=parts.rules),
        *_job_lanes(settings, database, wakeups, submitter),
    ]
    return Worker(FanOut(database, targets, wake=wakeups.wake, rules=parts.rules), lanes, wakeups)


def _job_lanes(settings: Settings, database: Database, wakeups: Wakeups, submitter: Submitter) -> list[Lane]:
    if submitter.lane is None:
        return []
    # What is polled is not signed, so this needs no secret.
    ingest = _make_ingest(settings.all_sources, settings, database, wakeups, time.time)

    async def store(source: str, body: bytes) -> None:
        await ingest.record_result(source, body)

    poll = PollLane(
        database, submitter.client, store=store, wake=wakeups.wake, poll_after=settings.poll_after
    )
    return [submitter.lane, poll]


def _make_ingest(
    sources: Sequence[SourceSettings],
    settings: Settings,
    database: Database,
    wakeups: Wakeups,
    clock: Callable[[], float],
) -> Ingest:
    return Ingest(
        database,
        secrets={source.name: [Secret.from_text(text) for text in source.secrets] for source in sources},
        tolerance=settings.signature_tolerance,
        clock=clock,
        on_accepted=lambda: wakeups.wake(FAN_OUT_LANE),
    )


def make_target(settings: DestinationSettings, destination: Destination, *, is_down: bool = False) -> Target:
    """Return a destination as work needs it."""
    return Target(
        name=settings.name,
        destination=destination,
        waits_for_media=settings.when == "media_stored",
        retry=RetryPolicy(**settings.retry.model_dump()),
        filter=settings.filter,
        is_down=is_down,
        concurrency=settings.concurrency,
        rate=settings.rate,
    )


class _App(Starlette):
    """Starlette with the callback in front of it.

    On the way through the middleware that catches errors, and through the router, a webhook would spend as
    much time as in the check of its signature, its parsing and its storing together.

    A slash too many in the callback's path changes nothing. It would change what a proxy in front forbids by
    its path, and so this holds for the callback alone, which everybody may reach.
    """

    def __init__(self, callbacks: Mapping[str, ASGIApp], **options: Any) -> None:
        super().__init__(**options)
        self._callbacks = callbacks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "lifespan":
            send = _tells_failures(send)
        if scope["type"] == "http" and scope["method"] == "POST":
            callback = self._callbacks.get(scope["path"])
            if callback is not None:
                await callback(scope, receive, send)
                return
        if scope["type"] == "http" and self._callbacks:
            path = "/" + "/".join(part for part in scope["path"].split("/") if part)
            if f"{path}/".startswith(f"{CALLBACK}/"):
                scope["path"] = path
        await super().__call__(scope, receive, send)


def _tells_failures(send: Send) -> Send:
    """Log a failure at start or end in one sentence, in place of the traceback that Starlette sends."""

    async def tell(message: Message) -> None:
        if message["type"] in {"lifespan.startup.failed", "lifespan.shutdown.failed"}:
            error = sys.exception()
            if error is not None:
                log.error("the service fails", error=sentence(error))
                log.debug("where it fails", frames=frames(error))
            message = {"type": message["type"]}
        await send(message)

    return tell


def create_app(
    settings: Settings,
    *,
    only: Only | None = None,
    worker: bool = True,
    multiprocess: bool = False,
    clock: Callable[[], float] = time.time,
) -> Starlette:
    """Make the web application. `only` leaves out the public or the internal half; `worker` embeds one."""
    database = Database(settings.database_url.get_secret_value())
    signals = None if worker or database.is_sqlite else Signals(database)
    wakeups = Wakeups(signals.send) if signals else Wakeups()
    ingest = _make_ingest(settings.require_sources(), settings, database, wakeups, clock)
    submitter = Submitter.configured(settings, database, wake=wakeups.wake)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(write_logs)
            stack.push_async_callback(database.close)
            stack.push_async_callback(submitter.close)
            if signals:
                stack.push_async_callback(signals.close)
            if worker:
                await stack.enter_async_context(running_worker(settings, database, wakeups, submitter))
            yield

    async def probe() -> None:
        await arrivals.probe(database)
        await require_usable(database, durable_without=settings.durable_without)

    routes: list[BaseRoute] = [
        Route("/livez", livez, methods=["GET"]),
        Route("/readyz", Readiness(probe).__call__, methods=["GET"]),
    ]
    refusals = Refusals()
    callbacks: dict[str, ASGIApp] = {}
    if only != "internal":
        callback = Callback(ingest, refusals, max_body_bytes=settings.max_body_bytes)
        callbacks[CALLBACK] = callback
        routes += [
            Route(CALLBACK, callback, methods=["POST"]),
            Route(f"{CALLBACK}/{{source}}", callback, methods=["POST"]),
            Route(f"{CALLBACK}/{{source}}/{{job}}", callback, methods=["POST"]),
        ]
    if only != "webhook":
        tokens = Tokens(settings.api_tokens)
        metrics = Metrics(
            lambda: read_backlog(database, settings.all_destinations),
            dead=lambda: count_dead_letters(database, settings.all_destinations),
            paused=submitter.paused,
            refused=lambda: count_refused_jobs(database),
            unrecognized=recovery.Count(database),
            tokens=tokens,
            multiprocess=multiprocess,
        )
        routes.append(Route("/metrics", metrics.__call__, methods=["GET"]))
        routes += Jobs(submitter, tokens).routes()
        routes += Ledger(
            database,
            make_replays(settings, database, wake=wakeups.wake),
            tokens,
            open_storage=lambda: open_storage(settings.storage_url.get_secret_value()),
        ).routes()
    app = _App(
        callbacks,
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: partial(_http_error, refusals), Exception: _crash},
    )
    app.router.redirect_slashes = False
    app.state.draining = False
    return app


def make_replays(
    settings: Settings, database: Database, *, wake: Callable[[str], None] = lambda _lane: None
) -> Replays:
    """Make what orders replays to the destinations that are configured."""
    filters = {each.name: each.filter for each in settings.all_destinations}
    return Replays(database, filters, wake=wake)


def collect_garbage_less() -> None:
    """Let a process that has started look for cyclic garbage less often."""
    # What start-up made lives as long as the process; scanning it again and again costs tens of milliseconds.
    gc.collect()
    gc.freeze()
    # Webhooks and deliveries leave next to no cycles behind: to look for some every 700 objects takes as long
    # as the work itself.
    gc.set_threshold(50_000, 20, 100)


async def _crash(_request: Request, _exception: Exception) -> Response:
    # Starlette raises it again, so that the server logs it.
    body = error_body("api_error", "internal_error", "This is a mistake of ours; it is in the log.")
    return Response(body, 500, None, "application/json")


async def _http_error(refusals: Refusals, request: Request, exception: Exception) -> Response:
    error = cast("HTTPException", exception)
    if error.status_code == HTTPStatus.NOT_FOUND and request.method == "POST":
        # Most likely a webhook whose URL is wrong; Clipia tells nobody of it.
        refusals.note(NO_SOURCE, "unknown_path", path=request.scope["path"])
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    body = error_body("invalid_request_error", code, str(error.detail))
    return Response(body, error.status_code, error.headers, "application/json")
