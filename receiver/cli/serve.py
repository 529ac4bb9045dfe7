"""`receiver serve`: the web process."""

import asyncio
import os
import socket
import tempfile
from enum import StrEnum
from functools import partial
from typing import Annotated, Any

import structlog
import typer
import uvicorn
from starlette.applications import Starlette
from uvicorn.supervisors import Multiprocess

from receiver.api.protocol import DeadlineHttpToolsProtocol
from receiver.app import Only, Parts, collect_garbage_less, create_app, prepare
from receiver.cli.heartbeat import announce
from receiver.errors import SettingsError
from receiver.observability import configure_logging
from receiver.settings import Settings

GRACE = 10
"""Seconds that open requests have to end at shutdown, before the worker drains."""

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
    asyncio.run(prepare(settings))
    half: Only | None = only.value if only else None
    factory = partial(make_app, settings, only=half, worker=worker, multiprocess=workers > 1)
    config = server_config(factory, host=host, port=port, workers=workers)
    if workers == 1:
        Server(config).run()
        return
    with _metrics_folder() as folder:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        listener = config.bind_socket()
        _say_listening(listener)
        Multiprocess(config, sockets=[listener]).run()


def _metrics_folder() -> tempfile.TemporaryDirectory[str]:
    """Make the folder in which the processes add up their metrics."""
    try:
        return tempfile.TemporaryDirectory(prefix="receiver-metrics-")
    except OSError:
        raise SettingsError(
            "--workers needs a temporary folder that this user can write to, for the metrics: "
            "mount one at /tmp or set TMPDIR"
        ) from None


class Server(uvicorn.Server):
    """Says where it listens, for people and for whoever asked for port 0."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        await super().startup(sockets)
        for server in self.servers:
            for listener in server.sockets:
                _say_listening(listener)


def _say_listening(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    announce("serve", (host, port))
    log.info("listening", url=f"http://{f'[{host}]' if ':' in host else host}:{port}")


def make_app(settings: Settings, *, multiprocess: bool, **options: Any) -> Starlette:
    """Make the application inside the process that serves it."""
    if multiprocess:
        # A process that uvicorn has spawned inherits no logging.
        configure_logging(level=settings.log_level)
    app = create_app(settings, multiprocess=multiprocess, **options)
    collect_garbage_less()
    return app


def server_config(app: Any, *, host: str, port: int, workers: int = 1) -> uvicorn.Config:
    """Return the server's configuration: the one that ships is the one that is tested."""
    return uvicorn.Config(
        app,
        factory=True,
        host=host,
        port=port,
        workers=workers,
        loop="uvloop",
        http=DeadlineHttpToolsProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # Nobody's claim about the client's address is believed; none is needed either.
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE,
    )
