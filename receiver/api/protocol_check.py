"""The self-check of the HTTP protocol: its limits hold on the uvicorn and httptools that are installed.

The protocol extends private classes of uvicorn. If an upgrade renames a method, a limit is gone without an
error. So before `serve` listens, the check drives a protocol object over a transport in memory, with timers
that it runs itself. This takes about ten milliseconds.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, cast

import uvicorn
from uvicorn.server import ServerState

from receiver.api.protocol import DeadlineHttpToolsProtocol
from receiver.errors import SettingsError

_SILENT = logging.getLogger(f"{__name__}.silent")
_SILENT.disabled = True
_GET = b"GET / HTTP/1.1\r\nHost: receiver\r\n\r\n"


class _Timer:
    def __init__(self, delay: float, callback: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self.delay = delay
        self._callback, self._arguments = callback, arguments
        self.is_active = True

    def cancel(self) -> None:
        self.is_active = False

    def run(self) -> None:
        if self.is_active:
            self.is_active = False
            self._callback(*self._arguments)


class _Task:
    def add_done_callback(self, _callback: object) -> None:
        pass


class _Loop:
    """The part of an event loop that the protocol uses; no time passes, and no application runs."""

    def __init__(self) -> None:
        self.timers: list[_Timer] = []

    def time(self) -> float:
        return 0.0

    def call_later(self, delay: float, callback: Callable[..., None], *arguments: Any) -> _Timer:
        self.timers.append(_Timer(delay, callback, arguments))
        return self.timers[-1]

    def create_task(self, coroutine: Coroutine[Any, Any, None], **_: Any) -> _Task:
        coroutine.close()
        return _Task()

    def run_timers(self, *, within: float) -> None:
        """Run the timers that are active now and expire within `within` seconds."""
        for timer in [timer for timer in self.timers if timer.delay <= within]:
            timer.run()


class _Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.is_closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.is_closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def _application(_scope: object, _receive: object, _send: object) -> None:
    """Serve no request: the check ends before one would be answered."""


class _Connection:
    """A new connection to the protocol."""

    def __init__(self, protocol: type[DeadlineHttpToolsProtocol]) -> None:
        config = uvicorn.Config(_application, http=protocol, ws="none", lifespan="off", log_config=None)
        self.loop, self.transport = _Loop(), _Transport()
        self.protocol = protocol(config, ServerState(), {}, cast("asyncio.AbstractEventLoop", self.loop))
        self.protocol.logger = _SILENT
        self.protocol.connection_made(self.transport)


def _closes_slow_heads(connection: _Connection) -> bool:
    """Return whether the connection ends with the deadline if only a part of a head has arrived."""
    connection.protocol.data_received(_GET[:-2])
    connection.loop.run_timers(within=connection.protocol.HEADER_TIMEOUT)
    return connection.transport.is_closed


def _refuses_large_heads(connection: _Connection) -> bool:
    """Return whether a head that does not end gets 431 once it is larger than the limit."""
    connection.protocol.data_received(_GET[:-2])
    line = b"X-Line: %s\r\n" % (b"x" * 1000)
    for _ in range(connection.protocol.MAX_HEADER_BYTES // len(line) + 2):
        connection.protocol.data_received(line)
    return connection.transport.written.startswith(b"HTTP/1.1 431 ")


def _bounds_pipelines(connection: _Connection) -> bool:
    """Return whether requests beyond the limit are dropped while the first one is being answered."""
    most = connection.protocol.MAX_PIPELINED
    for _ in range(most + 5):
        connection.protocol.data_received(_GET)
    return len(connection.protocol.pipeline) == most and connection.protocol.deaf


_CHECKS: dict[str, Callable[[_Connection], bool]] = {
    "the deadline of a head": _closes_slow_heads,
    "the size of a head": _refuses_large_heads,
    "the number of pipelined requests": _bounds_pipelines,
}


def check_protocol(protocol: type[DeadlineHttpToolsProtocol] = DeadlineHttpToolsProtocol) -> None:
    """Raise SettingsError, which names the limit, if a limit of the protocol does not hold."""
    for limit, holds in _CHECKS.items():
        fault = _find_fault(protocol, holds)
        if fault is not None:
            raise SettingsError(
                f"{limit} {fault} on uvicorn {uvicorn.__version__}: install the versions of requirements.txt"
            )


def _find_fault(
    protocol: type[DeadlineHttpToolsProtocol], holds: Callable[[_Connection], bool]
) -> str | None:
    try:
        connection = _Connection(protocol)
        is_held = holds(connection)
        connection.protocol.connection_lost(None)
    except Exception as error:  # noqa: BLE001 - a renamed method may raise any error
        return f"cannot be checked ({type(error).__name__})"
    return None if is_held else "does not hold"
