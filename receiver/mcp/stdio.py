"""The tools on standard input and output, for the program that started this one."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Final, Self, cast

from mcp.server.stdio import stdio_server

from receiver.client import Client
from receiver.errors import RequestError
from receiver.mcp.server import make_server
from receiver.mcp.tool import Tool
from receiver.setting_fields import SCOPES, Scope

MAX_LINE_BYTES: Final = 4 * 1024 * 1024
"""A longer message is not read as one, so it is answered with an error."""
MAX_WAITING_LINES: Final = 16


async def serve(tools: Sequence[Tool], client: Client, *, internal_url: str | None) -> None:
    """Serve the tools until the end of standard input, SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    server = make_server(tools, client, internal_url=internal_url)
    serving = asyncio.create_task(_serve(server), name="agent")
    stopping = asyncio.create_task(stopped.wait(), name="signals")
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving


async def _serve(server: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        async with stdio_server(stdin=cast("Any", _Lines())) as (reading, writing):
            await server.run(reading, writing, server.create_initialization_options())


class _Lines:
    """The lines of standard input, read by a thread of its own.

    The SDK reads in a thread that the event loop waits for at its end, so that SIGTERM would end nothing
    before the next line.
    """

    def __init__(self) -> None:
        self._lines: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING_LINES)
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="standard input", daemon=True).start()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        line = await self._lines.get()
        if not line:
            raise StopAsyncIteration
        return line.decode(errors="replace")

    def _read(self) -> None:
        # Not sys.stdin: the interpreter waits for its lock at the end, which this thread holds.
        with contextlib.suppress(OSError, RuntimeError), os.fdopen(os.dup(0), "rb") as file:
            line = b"-"
            while line:
                line = file.readline(MAX_LINE_BYTES)
                asyncio.run_coroutine_threadsafe(self._lines.put(line), self._loop).result()


async def find_scopes(client: Client) -> set[Scope]:
    """Return the scopes of the token of a receiver elsewhere. Raises ReceiverError.

    The receiver has no call for that, so a cheap call of each scope is tried. The one for `submit` has an
    empty model, which is checked after the scope and before anything else: it makes no job.
    """
    calls: dict[Scope, Callable[[], Awaitable[object]]] = {
        "submit": partial(client.submit_job, "", {}),
        "read": client.show_freeze,
        "operate": partial(client.list_actions, limit=1),
    }
    found: set[Scope] = set()
    for scope in SCOPES:
        try:
            await calls[scope]()
        except RequestError as error:
            if error.code == "insufficient_scope":
                continue
            if error.code != "invalid_request":
                raise
        found.add(scope)
    return found
