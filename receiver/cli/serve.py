"""`receiver serve`: the web process."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from functools import partial
from types import FrameType
from typing import Annotated, Any, cast

import structlog
import typer
import uvicorn
from starlette.applications import Starlette

from receiver.api.memory import MemoryBudget, set_up_allocator
from receiver.api.protocol import DeadlineHttpToolsProtocol
from receiver.api.protocol_check import check_protocol
from receiver.app import Only, create_app
from receiver.cli.heartbeat import announce
from receiver.cli.listeners import bind
from receiver.cli.supervisor import Supervisor
from receiver.errors import SettingsError
from receiver.logs import configure_logging
from receiver.process import Parts, collect_garbage_less, prepare
from receiver.settings import Settings

GRACE = 10
"""Seconds that open requests have to end after the drain period, before the worker drains."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""

log = structlog.get_logger()


class Half(StrEnum):
    """Which listener this is."""

    webhook = "webhook"
    internal = "internal"


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8000,
    worker: Annotated[
        bool,
        typer.Option("--worker/--no-worker", help="Embed a worker, or leave the work to `receiver worker`."),
    ] = True,
    only: Annotated[
        Half | None,
        typer.Option(help="Serve one half: the public callback, or everything else. Default: both."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Web processes (more than one needs PostgreSQL).", min=1)] = 1,
) -> None:
    """Receive webhooks, and (unless --no-worker) save their media and forward them.

    Settings come from the environment and receiver.toml; CLIPIA_WEBHOOK_SECRET is the one that must be set.
    On SIGTERM requests are still served for RECEIVER_DRAIN seconds, while /readyz says 503; Ctrl-C ends at
    once. The exit status is 0 after either.
    """
    settings = Settings.load()
    settings.require_sources()
    configure_logging(level=settings.log_level)
    if worker:
        Parts.make(settings)
    if workers > 1 and settings.database_url.get_secret_value().startswith("sqlite"):
        raise SettingsError(
            "--workers needs PostgreSQL: several processes that write to one SQLite file wait on each other"
        )
    check_protocol()
    # Before the database is asked: what is wrong with the address is told at once.
    listeners = bind(host, port)
    asyncio.run(prepare(settings))
    half: Only | None = only.value if only else None
    run = partial(_run_server, settings, only=half, worker=worker, multiprocess=workers > 1)
    if workers == 1:
        run(listeners, on_start=partial(_say_listening, listeners))
        return
    with _metrics_folder() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        for listener in listeners:
            # Clients wait, rather than be refused, until the processes have started.
            listener.listen(BACKLOG)
        _say_listening(listeners)
        status = Supervisor(run, listeners, count=workers).run()
    if status:
        sys.exit(status)


def _metrics_folder() -> tempfile.TemporaryDirectory[str]:
    """Make the folder in which the processes add up their metrics."""
    try:
        return tempfile.TemporaryDirectory(prefix="receiver-metrics-")
    except OSError:
        raise SettingsError(
            "--workers needs a temporary folder that this user can write to, for the metrics: "
            "mount one at /tmp or set TMPDIR"
        ) from None


def _run_server(
    settings: Settings,
    listeners: Sequence[socket.socket],
    *,
    multiprocess: bool,
    on_start: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    factory = partial(make_app, settings, multiprocess=multiprocess, **options)
    config = server_config(factory, keep_alive=settings.keep_alive)
    Server(config, drain=settings.drain, on_start=on_start).run(list(listeners))


class Server(uvicorn.Server):
    """Serves until a signal. SIGTERM starts the drain period; SIGINT ends it, or serves no more at once.

    In the drain period `/readyz` says 503, so that load balancers look elsewhere, and each answer closes its
    connection. SIGTERM again changes nothing: systemd sends it to each process, and the parent passes it on.
    """

    def __init__(
        self, config: uvicorn.Config, *, drain: float, on_start: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self._drain = drain
        self._drain_ends: float | None = None
        self._draining = False
        self._on_start = on_start

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take signals as the order to stop. uvicorn would raise them again, and so end with their status."""
        before = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note what to do at the next tick."""
        if sig == signal.SIGINT:
            self.force_exit = self.should_exit
            self.should_exit = True
        elif self._drain_ends is None:
            self._drain_ends = time.monotonic() + self._drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        self._on_start()

    async def on_tick(self, counter: int) -> bool:
        """Return whether to stop serving now."""
        if await super().on_tick(counter):
            return True
        if self._drain_ends is None:
            return False
        if not self._draining:
            self._draining = True
            self._start_drain()
        return time.monotonic() >= self._drain_ends

    def _start_drain(self) -> None:
        log.info("draining", seconds=self._drain)
        cast("Starlette", self.config.loaded_app).state.draining = True
        # uvicorn adds these headers to each answer, and heeds this one.
        close = [(b"connection", b"close")]
        self.config.encoded_headers = [*self.config.encoded_headers, *close]
        self.server_state.default_headers = [*self.server_state.default_headers, *close]
        for connection in self.server_state.connections:
            cast("DeadlineHttpToolsProtocol", connection).close_after_answer()


def _say_listening(listeners: Sequence[socket.socket]) -> None:
    for listener in listeners:
        host, port = listener.getsockname()[:2]
        announce("serve", (host, port))
        log.info("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")


def make_app(settings: Settings, *, multiprocess: bool, **options: Any) -> Starlette:
    """Make the application inside the process that serves it."""
    if multiprocess:
        # A process that was spawned inherits neither the secrets to mask nor logging.
        settings.register_secrets()
        configure_logging(level=settings.log_level)
    set_up_allocator()
    DeadlineHttpToolsProtocol.budget = MemoryBudget(settings.max_buffered_bytes)
    app = create_app(settings, multiprocess=multiprocess, **options)
    collect_garbage_less()
    return app


def server_config(app: Any, *, keep_alive: int) -> uvicorn.Config:
    """Return the server's configuration: the one that ships is the one that is tested."""
    return uvicorn.Config(
        app,
        factory=True,
        backlog=BACKLOG,
        loop="uvloop",
        http=DeadlineHttpToolsProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # Nobody's claim about the client's address is believed; none is needed either.
        proxy_headers=False,
        timeout_keep_alive=keep_alive,
        timeout_graceful_shutdown=GRACE,
    )
