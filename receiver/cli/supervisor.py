"""Several web processes on one port: started, replaced if they die, and ended together.

uvicorn's own supervisor kills a process that takes more than five seconds to import, again and again, and its
processes go on without it.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Final

import structlog
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.config import STARTUP_FAILURE

LOOK: Final = 0.2
"""Seconds between looks for signals and for processes that died."""
RESTART_PAUSE: Final = 1.0
"""Seconds before a process that died is replaced: one that dies at once must not take all of the CPU."""
ORPHAN_WAIT: Final = 5.0
"""Seconds that a process has to end by itself once its parent is gone."""

Target = Callable[[Sequence[socket.socket]], None]

log = structlog.get_logger()


class Supervisor:
    """Runs `count` processes that each call `target` with the listening sockets."""

    def __init__(self, target: Target, listeners: Sequence[socket.socket], *, count: int) -> None:
        """`target` must be picklable: the processes are spawned."""
        self._target = target
        self._listeners = list(listeners)
        self._count = count
        self._signals: list[int] = []
        self._processes: list[SpawnProcess] = []
        self._due: list[float] = []
        """When each process that died is to be replaced."""
        self._stopping = False

    def run(self) -> int:
        """Run until a signal; return the exit status. SIGTERM drains, SIGINT ends at once."""
        before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return self._run()
        except BaseException:
            # multiprocessing waits for the processes at exit, and a signal that is noted does not end that.
            self._stop(signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
            raise

    def _run(self) -> int:
        first = [self._start() for _ in range(self._count)]
        status = 0
        while self._processes or not self._stopping:
            wait([process.sentinel for process in self._processes], LOOK)
            self._pass_signals_on()
            for process in [process for process in self._processes if not process.is_alive()]:
                self._processes.remove(process)
                _end_metrics(process)
                if self._stopping:
                    continue
                log.error("web process died", pid=process.pid, status=process.exitcode)
                if process in first and process.exitcode == STARTUP_FAILURE:
                    # Another one would not start either; the log says why.
                    status = STARTUP_FAILURE
                    self._stop(signal.SIGTERM)
                else:
                    self._due.append(time.monotonic() + RESTART_PAUSE)
            while self._due and not self._stopping and self._due[0] <= time.monotonic():
                del self._due[0]
                self._replace()
        return status

    def _replace(self) -> None:
        try:
            self._start()
        except OSError as error:
            # No memory, or no process more is allowed: that may pass, and the others still serve.
            log.error("web process not replaced", error=type(error).__name__)
            self._due.append(time.monotonic() + RESTART_PAUSE)

    def _note(self, number: int, _frame: object) -> None:
        self._signals.append(number)

    def _pass_signals_on(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            self._stop(number)
            if number == signal.SIGINT:
                # A process that still imports ignores the other one, as it was told to below.
                self._stop(signal.SIGTERM)

    def _stop(self, number: int) -> None:
        self._stopping = True
        # Else clients would wait here that no process serves any more.
        for listener in self._listeners:
            listener.close()
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def _start(self) -> SpawnProcess:
        process = multiprocessing.get_context("spawn").Process(
            target=_run_child, args=(self._target, self._listeners)
        )
        # The terminal sends Ctrl-C to all processes; this one passes it on when the others can take it.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            process.start()
        finally:
            signal.signal(signal.SIGINT, handler)
        self._processes.append(process)
        return process


def _end_metrics(process: SpawnProcess) -> None:
    """Drop the gauges of a process that has ended: an open circuit of its own would be shown for ever."""
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        with contextlib.suppress(OSError):
            mark_process_dead(process.pid)


def _run_child(target: Target, listeners: Sequence[socket.socket]) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    target(listeners)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    log.error("the parent process is gone")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ORPHAN_WAIT)
    # A restart needs the port, and everything that is unfinished survives a crash.
    os._exit(1)
