"""The web application under a real uvicorn, in the event loop of the test."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Literal

import uvicorn
from starlette.applications import Starlette

from receiver.api.protocol import DeadlineHttpToolsProtocol
from receiver.cli.serve import server_config

Door = Literal["direct", "asgi"]
"""The way of a webhook from our protocol to `Ingest`: directly, or through ASGI."""


class _AsgiOnly(DeadlineHttpToolsProtocol):
    """Sends all requests through ASGI."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as its base
        super().connection_made(transport)
        self._door = None


class Server(uvicorn.Server):
    """The shipped server inside a test."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the test."""
        yield


@asynccontextmanager
async def serving(
    app: Starlette,
    *,
    listener: socket.socket | None = None,
    door: Door = "direct",
    keep_alive: int = 5,
) -> AsyncIterator[str]:
    """Serve an application as `receiver serve` does; return its URL."""
    listener = listener or socket.create_server(("127.0.0.1", 0))
    config = server_config(lambda: app, keep_alive=keep_alive)
    config.timeout_graceful_shutdown = 1
    if door == "asgi":
        config.http = _AsgiOnly
    server = Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="receiver")
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.005)
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        await task
        listener.close()
