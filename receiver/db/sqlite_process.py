"""The process that writes webhooks to SQLite (`sqlite_writer`), as the web process sees it."""

import asyncio
import marshal
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from typing import Any, Final, NamedTuple

import structlog

from receiver.db import sqlite_writer
from receiver.db.sqlite_writer import HEAD_BYTES, Statement, frame
from receiver.error_texts import cause

START_ROWS: Final = 8
"""The size of a group that starts the process: a service with few webhooks needs none."""
RESTART_PAUSE_SECONDS: Final = 1.0
"""Time until a process that died is replaced: one that dies at its start must not use the whole CPU."""
ANSWER_SECONDS: Final = 10.0
"""The most time for a group: after that, no webhook waits for the answer any more."""
CLOSE_SECONDS: Final = 2.0
"""Time that the process has to end by itself."""

log = structlog.get_logger()


class WriterLost(Exception):
    """The process died, and may have committed the group."""


class _Running(NamedTuple):
    process: subprocess.Popen[bytes]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class WriterProcess:
    """Starts the process for the first large group, and again after its death; it takes a group at a time."""

    def __init__(self, path: str, options: Mapping[str, Any], executor: Executor) -> None:
        """`path` and `options` are the arguments of `sqlite3.connect`.

        `executor` is the thread that runs all other transactions. None of them begins there before a process
        that was killed has ended.
        """
        self._hello: Final = frame((path, dict(options)))
        self._executor = executor
        self._running: _Running | None = None
        self._due = 0.0

    def takes(self, rows: int) -> bool:
        """Return whether a group of this size goes to the process now."""
        return self._running is not None or (rows >= START_ROWS and time.monotonic() >= self._due)

    async def run(self, statements: Sequence[Statement]) -> list[str]:
        """Run statements as `ArrivalWriter.run` does. Raises its errors, WriterLost and TimeoutError."""
        request = frame(statements)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                known, error = await self._exchange(request)
        except BaseException as failure:
            # The state of the process is unknown: the next group would take this group's answer for its own.
            if isinstance(failure, TimeoutError) or not isinstance(failure, OSError | EOFError):
                self._kill(failure if isinstance(failure, TimeoutError) else None)
                raise
            self._kill(failure)
            raise WriterLost from failure
        if error is not None:
            raise pickle.loads(error)  # noqa: S301 - from our own process
        result: list[str] = known
        return result

    async def _exchange(self, request: bytes) -> Any:
        running = self._running or await self._start()
        running.writer.write(request)
        size = int.from_bytes(await running.reader.readexactly(HEAD_BYTES), "big")
        return marshal.loads(await running.reader.readexactly(size))  # noqa: S302 - from our own process

    async def _start(self) -> _Running:
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_unix_connection(sock=ours)
            try:
                process = _spawn(theirs)
            except OSError as error:
                writer.transport.abort()
                log.error("the process that writes webhooks did not start", error=cause(error))
                raise
        writer.write(self._hello)
        self._running = running = _Running(process, reader, writer)
        return running

    def _kill(self, failure: Exception | None = None) -> None:
        """Kill the process; `failure` is how it was lost."""
        self._due = time.monotonic() + RESTART_PAUSE_SECONDS
        running, self._running = self._running, None
        if running is not None:
            running.writer.transport.abort()
            running.process.kill()
            self._executor.submit(_wait, running.process, failure)

    async def close(self) -> None:
        """End the process after its group."""
        running, self._running = self._running, None
        if running is not None:
            running.writer.close()
            await asyncio.get_running_loop().run_in_executor(self._executor, _wait, running.process)


def _spawn(socket_: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own script
        # Without the packages of the environment it starts in half of the time.
        [sys.executable, "-I", "-S", sqlite_writer.__file__],
        stdin=socket_.fileno(),
        stdout=subprocess.DEVNULL,
        # Ctrl-C in a terminal goes to the whole group.
        process_group=0,
    )


def _wait(process: subprocess.Popen[bytes], failure: Exception | None = None) -> None:
    try:
        process.wait(CLOSE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if failure is not None:
        log.error("the process that writes webhooks died", pid=process.pid, status=process.returncode)
