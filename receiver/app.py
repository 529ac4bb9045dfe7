"""The web application: its routes, and the worker that it may embed."""

import os
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import Any, Literal, cast

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Message, Receive, Scope, Send

from receiver.api import request_ids
from receiver.api.alerts import AlertEndpoints
from receiver.api.answers import error_body
from receiver.api.audit import AuditEndpoints
from receiver.api.auth import Caller, OneCaller, Tokens
from receiver.api.dead_letters import DeadLetterEndpoints
from receiver.api.deliveries import DeliveryEndpoints
from receiver.api.destinations import DestinationEndpoints
from receiver.api.direct import DirectDoor
from receiver.api.documents import Documents
from receiver.api.endpoints import Endpoint, guarded
from receiver.api.events import EventEndpoints
from receiver.api.explain import ExplainEndpoints
from receiver.api.files import FileEndpoints
from receiver.api.freezes import FreezeEndpoints
from receiver.api.jobs import JobEndpoints
from receiver.api.known_destinations import KnownDestinations
from receiver.api.media import MediaEndpoints
from receiver.api.metrics import Metrics, serving_metrics, shared_metrics
from receiver.api.operations import Readiness, livez
from receiver.api.promotions import PromotionEndpoints
from receiver.api.protocol import DIRECT_DOOR
from receiver.api.rejections import RejectionEndpoints
from receiver.api.removed_deliveries import RemovedDeliveryEndpoints
from receiver.api.replays import ReplayEndpoints
from receiver.api.result_fetch import ResultFetchEndpoints
from receiver.api.retention_runs import RetentionEndpoints
from receiver.api.routing import RoutingEndpoints
from receiver.api.settings import SettingsEndpoints
from receiver.api.status import StatusEndpoints
from receiver.api.tail import TailEndpoints
from receiver.api.upkeep import UpkeepEndpoints
from receiver.api.webhook import WebhookEndpoint, raw_request
from receiver.background import running
from receiver.client.local import LocalClients
from receiver.core.lane_names import Wake, wake_no_lane
from receiver.db.database import Database
from receiver.db.requirements import require_usable
from receiver.db.signals import Signals
from receiver.destination_control import DestinationControl
from receiver.destination_settings import ByName
from receiver.error_texts import error_text, traceback_lines
from receiver.lanes.worker import Wakeups
from receiver.logs import flush_logs
from receiver.media import open_storage
from receiver.metrics import show_source
from receiver.process import file_rules, make_ingest, make_rejections, make_replays, running_worker
from receiver.promotions import Promotions
from receiver.rejections import NO_SOURCE, Rejections
from receiver.reload import Reloader
from receiver.removed_deliveries import RemovedDeliveries
from receiver.result_fetch import ResultFetch
from receiver.setting_fields import SCOPES, ApiToken
from receiver.settings import CALLBACK_PATH, Settings
from receiver.settings_report import report
from receiver.status import read_status
from receiver.submitter import Submitter
from receiver.tracing import start_tracing

Only = Literal["webhook", "internal"]

log = structlog.get_logger()


def create_app(
    settings: Settings,
    *,
    only: Only | None = None,
    worker: bool = True,
    multiprocess: bool = False,
    metrics_listeners: Sequence[socket.socket] = (),
    mcp_allow_write: bool = False,
    clock: Callable[[], float] = time.time,
) -> Starlette:
    """Make the web application.

    `only` serves one half of the routes: the public callback, or the internal API. `worker` embeds a worker.
    `multiprocess` means that other processes serve the same listener, and `metrics_listeners` belong to this
    process alone. `mcp_allow_write` offers agents the tools that act. Raises SettingsError if there is no
    usable webhook secret.
    """
    settings.require_sources()
    database = Database(settings.database_url.get_secret_value())
    signals = Signals(database.statements) if database.statements and not worker else None
    wakeups = Wakeups(signals.send) if signals else Wakeups()
    tracer = start_tracing()
    submitter = Submitter.configured(settings, database, wake=wakeups.wake, tracer=tracer)

    rejections = make_rejections(settings, database, clock=clock, keep=only != "internal")
    callback = door = None
    if only != "internal":
        ingest = make_ingest(settings, database, wakeups, clock=clock, tracer=tracer)
        callback = WebhookEndpoint(ingest, rejections, max_body_bytes=settings.max_body_bytes)
        door = DirectDoor(callback)
        for source in ingest.sources:
            show_source(source)
    metrics = (
        Metrics.without_rows(settings, database)
        if only == "webhook" and not worker
        else Metrics.with_rows(settings, database, submitter)
    )

    reloader = Reloader(settings)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(flush_logs)
            stack.push_async_callback(tracer.close)
            stack.push_async_callback(database.close)
            if callback is not None:
                await stack.enter_async_context(rejections.recorded())
                # A client that has hung up has no open connection that uvicorn would wait for.
                stack.push_async_callback(callback.ingest.drain)
            stack.push_async_callback(submitter.close)
            if signals:
                stack.push_async_callback(signals.close)
            if worker:
                found = await stack.enter_async_context(
                    running_worker(settings, database, wakeups, submitter)
                )
                reloader.replace = found.replace
            await stack.enter_async_context(running(reloader.run(), name="reload"))
            await stack.enter_async_context(serving_metrics(metrics, metrics_listeners))
            yield

    internal = (
        []
        if only == "webhook"
        else [
            Route("/metrics", shared_metrics if multiprocess else metrics.__call__, methods=["GET"]),
            *_internal_routes(settings, database, wakeups, submitter, mcp_allow_write=mcp_allow_write),
        ]
    )
    app = _App(
        door,
        routes=[*_health_routes(settings, database), *_callback_routes(callback), *internal],
        lifespan=lifespan,
        exception_handlers={HTTPException: partial(_http_error, rejections), Exception: _crash},
    )
    app.router.redirect_slashes = False
    app.state.draining = False
    app.state.reload = reloader.request
    return app


def _health_routes(settings: Settings, database: Database) -> list[BaseRoute]:
    async def probe() -> None:
        await database.probe()
        await require_usable(database, durable_without=settings.durable_without)

    return [
        Route("/livez", livez, methods=["GET"]),
        Route("/readyz", Readiness(probe).__call__, methods=["GET"]),
    ]


def _callback_routes(callback: WebhookEndpoint | None) -> list[BaseRoute]:
    if callback is None:
        return []
    paths = (CALLBACK_PATH, f"{CALLBACK_PATH}/{{source}}", f"{CALLBACK_PATH}/{{source}}/{{job}}")
    return [Route(path, callback, methods=["POST"]) for path in paths]


def _internal_routes(
    settings: Settings,
    database: Database,
    wakeups: Wakeups,
    submitter: Submitter,
    *,
    mcp_allow_write: bool,
) -> list[BaseRoute]:
    # Jinja2 and the tools are not needed by commands that make calls in their process.
    from receiver.dashboard import dashboard_routes  # noqa: PLC0415
    from receiver.mcp.http import Agents  # noqa: PLC0415

    table = endpoint_table(settings, database, submitter, wake=wakeups.wake)
    tokens = Tokens(settings.api_tokens)
    clients = LocalClients(table, database)
    agents = Agents(clients, tokens, internal_url=settings.internal_url, allow_write=mcp_allow_write)
    return [
        *Documents(table).routes(),
        *guarded(table, tokens, database),
        *dashboard_routes(clients, tokens),
        *agents.routes(),
    ]


def endpoint_table(
    settings: Settings, database: Database, submitter: Submitter, *, wake: Wake
) -> list[Endpoint]:
    """Return the rows of the internal API."""
    filters = ByName(lambda: settings.all_destinations, lambda each: each.filter)
    waits = ByName(lambda: settings.all_destinations, lambda each: each.when == "media_stored")
    open_own = partial(open_storage, settings.storage_url.get_secret_value())
    known = KnownDestinations(database, waits)
    events = EventEndpoints(
        database, open_storage=open_own, destinations=known, internal_url=settings.internal_url
    )
    replays = make_replays(settings, database, wake=wake)
    rules = partial(file_rules, settings)
    sources = [source.name for source in settings.all_sources]
    control = DestinationControl(database, lambda: settings.every_destination, wake=wake)
    return [
        *JobEndpoints(submitter).table(),
        *events.table(),
        *FileEndpoints(database, open_storage=open_own).table(),
        *MediaEndpoints(database, open_storage=open_own).table(),
        *PromotionEndpoints(database, Promotions(database, replays, rules=rules, wake=wake)).table(),
        *RoutingEndpoints(database, filters).table(),
        *RemovedDeliveryEndpoints(RemovedDeliveries(database, waits)).table(),
        *DeadLetterEndpoints(database, known).table(),
        *DeliveryEndpoints(database, known, settings.internal_url).table(),
        *ReplayEndpoints(database, replays).table(),
        *RejectionEndpoints(database).table(),
        *AuditEndpoints(database).table(),
        *DestinationEndpoints(control).table(),
        *AlertEndpoints(database).table(),
        *FreezeEndpoints(database).table(),
        *UpkeepEndpoints(database, open_storage=open_own).table(),
        *RetentionEndpoints(database).table(),
        *SettingsEndpoints(lambda: report(settings, os.environ)).table(),
        *StatusEndpoints(database, partial(read_status, settings, database, submitter)).table(),
        *ResultFetchEndpoints(ResultFetch(database, submitter, sources=sources, wake=wake)).table(),
        *TailEndpoints(database, known).table(),
        *ExplainEndpoints(database, lambda: settings.all_destinations).table(),
    ]


def create_local_app(
    settings: Settings, database: Database, submitter: Submitter, *, caller: str
) -> Starlette:
    """Make the internal API for calls inside this process: they come from `caller` and need no token.

    A handler's error is raised to the caller as it is, in place of an answer.
    """
    table = endpoint_table(settings, database, submitter, wake=wake_no_lane)
    operator = Caller(name=caller, scopes=frozenset(SCOPES))
    return Starlette(routes=guarded(table, OneCaller(operator), database, expected=()))


def create_dashboard_app(settings: Settings, *, token: ApiToken) -> Starlette:
    """Make the dashboard alone, for one token; it needs no webhook secret, and nothing calls `/v1` in it."""
    from receiver.dashboard import dashboard_routes  # noqa: PLC0415 - as above

    database = Database(settings.database_url.get_secret_value())
    submitter = Submitter.configured(settings, database)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await submitter.close()
        await database.close()

    table = endpoint_table(settings, database, submitter, wake=wake_no_lane)
    routes = [
        *Documents(table).routes(),
        *dashboard_routes(LocalClients(table, database), Tokens([token])),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.reload = lambda: None
    return app


class _App(Starlette):
    """Starlette with the direct door of the callback.

    Extra slashes in the callback's path are ignored. On other paths they are not: a proxy in front may
    forbid a path, and another spelling of it must not get past the proxy's rule. The callback is public.
    """

    def __init__(self, door: DirectDoor | None, **options: Any) -> None:
        super().__init__(**options)
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "lifespan":
            send = _with_logged_failures(send)
            # Without a direct door in its state, the protocol sends webhooks through ASGI.
            scope.get("state", {})[DIRECT_DOOR] = self._door
        if scope["type"] == "http":
            path = "/" + "/".join(part for part in scope["path"].split("/") if part)
            if self._door is not None and f"{path}/".startswith(f"{CALLBACK_PATH}/"):
                scope["path"] = path
                request_ids.forget()
            else:
                send = request_ids.identify(scope, send)
        await super().__call__(scope, receive, send)


def _with_logged_failures(send: Send) -> Send:
    """Log a failure at startup or shutdown in one sentence, not with the traceback that Starlette sends."""

    async def send_or_log(message: Message) -> None:
        if message["type"] in {"lifespan.startup.failed", "lifespan.shutdown.failed"}:
            error = sys.exception()
            if error is not None:
                log.error("the service failed", error=error_text(error))
                log.debug("the failure's traceback", frames=traceback_lines(error))
            message = {"type": message["type"]}
        await send(message)

    return send_or_log


async def _crash(_request: Request, _exception: Exception) -> Response:
    # Starlette raises the exception again, so that the server logs it.
    body = error_body("api_error", "internal_error", "Internal error; the server's log has the traceback.")
    return Response(body, 500, None, "application/json")


async def _http_error(rejections: Rejections, request: Request, exception: Exception) -> Response:
    error = cast("HTTPException", exception)
    if error.status_code == HTTPStatus.NOT_FOUND and request.method == "POST":
        # Probably a webhook with a wrong URL. Clipia does not report these to its customers.
        rejections.note(NO_SOURCE, "unknown_path", raw_request(request.scope))
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    body = error_body("invalid_request_error", code, str(error.detail))
    return Response(body, error.status_code, error.headers, "application/json")
