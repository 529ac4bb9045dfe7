"""`receiver serve`: the web process."""

import asyncio
import contextlib
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Annotated, Any, Final, cast

import structlog
import typer
import uvicorn
from starlette.applications import Starlette

from receiver.api.memory_budget import MemoryBudget, set_up_allocator
from receiver.api.protocol import DeadlineHttpToolsProtocol
from receiver.api.protocol_check import check_protocol
from receiver.app import Only, create_app
from receiver.cli.heartbeat import announce
from receiver.cli.listeners import MetricsHost, MetricsPort, bind, bind_metrics, url_of
from receiver.cli.options import MAX_PORT
from receiver.cli.remote import local_only
from receiver.cli.supervisor import Supervisor
from receiver.errors import SettingsError
from receiver.logs import configure_logging
from receiver.process import check_parts, collect_garbage_less, prepare
from receiver.reload import accept_reloads, hold_reloads, is_hangup, load_again, log_failed_reload
from receiver.settings import Settings
from receiver.tracing import require_tracing

GRACE_SECONDS: Final = 10
"""Time that open requests have to end after the drain period, before the worker drains."""
MAX_BACKLOG: Final = 2048
"""Connections that may wait to be accepted."""

log = structlog.get_logger()


@local_only("it runs a web process on this machine")
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=MAX_PORT)] = 8000,
    worker: Annotated[
        bool,
        typer.Option(
            "--worker/--no-worker", help="Run a worker, too, or leave its work to `receiver worker`."
        ),
    ] = True,
    only: Annotated[
        Only | None,
        typer.Option(help="Serve only the public callback, or only the internal API. Default: both."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Web processes; more than one needs PostgreSQL.", min=1)] = 1,
    mcp_allow_write: Annotated[
        bool,
        typer.Option(
            "--mcp-allow-write", help="Offer agents at /mcp the tools that act, if their token may operate."
        ),
    ] = False,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = "127.0.0.1",
) -> None:
    """Receive webhooks and serve the internal API; with a worker, save the media and forward the events.

    Settings come from the environment and from receiver.toml; CLIPIA_WEBHOOK_SECRET is required. On SIGTERM
    the server keeps answering requests for RECEIVER_DRAIN seconds, while /readyz says 503. Ctrl-C stops it
    at once. The exit status is 0 after either. On SIGHUP it reads the destinations of receiver.toml again.
    """
    hold_reloads()
    settings = Settings.load()
    settings.require_sources()
    configure_logging(level=settings.log_level)
    require_tracing()
    if worker:
        asyncio.run(check_parts(settings))
    if workers > 1 and settings.database_url.get_secret_value().startswith("sqlite"):
        raise SettingsError(
            "--workers needs PostgreSQL: several processes that write to one SQLite file wait for each other"
        )
    check_protocol()
    # Before the database is checked, so that a wrong address is reported at once.
    listeners = bind(host, port)
    metrics = bind_metrics(metrics_host, metrics_port, count=workers)
    asyncio.run(prepare(settings))
    run = partial(
        _run_server,
        settings,
        only=only,
        worker=worker,
        multiprocess=workers > 1,
        mcp_allow_write=mcp_allow_write,
    )
    if workers == 1:
        run(listeners, *metrics, on_start=partial(_log_listening, listeners))
        return
    for listener in listeners:
        # From here on clients wait for the processes to start; until now they were refused.
        listener.listen(MAX_BACKLOG)
    _log_listening(listeners)
    reload = partial(_reload, settings, worker=worker)
    status = Supervisor(run, listeners, count=workers, own=metrics, reload=reload).run()
    if status:
        sys.exit(status)


def _reload(settings: Settings, *, worker: bool) -> None:
    """Read the destinations again for web processes that start later."""
    try:
        loaded = load_again(settings)
        if worker:
            asyncio.run(check_parts(loaded))
    except Exception as error:  # noqa: BLE001 - any error would end the web processes
        log_failed_reload(error)
    else:
        settings.take_destinations(loaded)


def _run_server(
    settings: Settings,
    listeners: Sequence[socket.socket],
    metrics_listeners: Sequence[socket.socket] = (),
    *,
    multiprocess: bool,
    on_start: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    options |= {"multiprocess": multiprocess, "metrics_listeners": metrics_listeners}
    factory = partial(make_app, settings, **options)
    config = server_config(factory, keep_alive=settings.keep_alive)
    Server(config, drain=settings.drain, on_start=on_start).run(list(listeners))


class Server(uvicorn.Server):
    """Serves until a signal. SIGTERM starts the drain period; SIGINT ends it, or stops the server at once.

    In the drain period `/readyz` answers 503, so that load balancers use other servers, and each answer
    closes its connection. A second SIGTERM is ignored: systemd sends one to each process, and the parent
    passes its own on.
    """

    def __init__(
        self, config: uvicorn.Config, *, drain: float, on_start: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_ends: float | None = None
        self._draining = False
        self._must_reload = False
        self._on_start = on_start

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals. uvicorn would raise them again, and the exit status would not be 0."""
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)
        }
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._note_reload)
        accept_reloads()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Record the signal for the next tick."""
        if sig == signal.SIGINT:
            self.force_exit = self.should_exit
            self.should_exit = True
        elif self._drain_ends is None:
            self._drain_ends = time.monotonic() + self._drain

    def _note_reload(self, _sig: int, frame: FrameType | None) -> None:
        if is_hangup():
            self.handle_exit(signal.SIGTERM, frame)
        else:
            self._must_reload = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the server, then report that it listens."""
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop now."""
        if await super().on_tick(counter):
            return True
        if self._must_reload:
            self._must_reload = False
            cast("Starlette", self.config.loaded_app).state.reload()
        if self._drain_ends is None:
            return False
        if not self._draining:
            self._draining = True
            self._start_drain()
        return time.monotonic() >= self._drain_ends

    def _start_drain(self) -> None:
        log.info("draining", seconds=self._drain)
        cast("Starlette", self.config.loaded_app).state.draining = True
        # uvicorn adds these headers to each answer, and closes the connection because of this one.
        close = [(b"connection", b"close")]
        self.config.encoded_headers = [*self.config.encoded_headers, *close]
        self.server_state.default_headers = [*self.server_state.default_headers, *close]
        for connection in self.server_state.connections:
            cast("DeadlineHttpToolsProtocol", connection).close_after_answer()


def _log_listening(listeners: Sequence[socket.socket]) -> None:
    for listener in listeners:
        announce("serve", listener.getsockname()[:2])
        log.info("listening", url=url_of(listener))


def make_app(settings: Settings, *, multiprocess: bool, **options: Any) -> Starlette:
    """Make the application in the process that serves it."""
    if multiprocess:
        # A spawned process inherits neither the secrets to mask nor the logging configuration.
        settings.register_secrets()
        configure_logging(level=settings.log_level)
    set_up_allocator()
    DeadlineHttpToolsProtocol.budget = MemoryBudget(settings.max_buffered_bytes)
    app = create_app(settings, multiprocess=multiprocess, **options)
    collect_garbage_less()
    return app


def server_config(app: Any, *, keep_alive: int) -> uvicorn.Config:
    """Return the configuration of uvicorn; tests use it, too."""
    return uvicorn.Config(
        app,
        factory=True,
        backlog=MAX_BACKLOG,
        loop="uvloop",
        http=DeadlineHttpToolsProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # The client's address is not used, so a forged X-Forwarded-For has no effect.
        proxy_headers=False,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )
