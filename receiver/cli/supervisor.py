"""Runs several web processes on one port: starts them, replaces one that dies, and stops them together.

uvicorn has a supervisor, too. It kills a process that takes more than five seconds to import, again and
again, and its processes keep running if it is killed.
"""

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
from uvicorn.config import STARTUP_FAILURE

from receiver.reload import accept_reloads, hold_reloads, is_hangup

POLL_SECONDS: Final = 0.2
"""Time between two checks for signals and for processes that died."""
RESTART_PAUSE_SECONDS: Final = 1.0
"""Time until a process that died is replaced: one that dies at its start must not use the whole CPU."""
ORPHAN_SECONDS: Final = 5.0
"""Time that a process has to stop after its parent has died."""

Target = Callable[..., None]

log = structlog.get_logger()


class Supervisor:
    """Runs `count` processes, each of which calls `target` with the listening sockets."""

    def __init__(
        self,
        target: Target,
        listeners: Sequence[socket.socket],
        *,
        count: int,
        own: Sequence[Sequence[socket.socket]] = (),
        reload: Callable[[], None] = lambda: None,
    ) -> None:
        """`target` has to be picklable, because the processes are spawned.

        `reload` is called at SIGHUP, before the processes get the signal: later ones get another target.

        `own` has the listeners of each process alone. They are its second argument, and those of a process
        that died go to its replacement.
        """
        self._target = target
        self._listeners = list(listeners)
        self._own = own
        self._reload = reload
        self._places = list(range(count))
        """The numbers that no process has."""
        self._signals: list[int] = []
        self._processes: dict[SpawnProcess, int] = {}
        self._due: list[float] = []
        """When to replace each process that died."""
        self._stopping = False

    def run(self) -> int:
        """Run until a signal and return the exit status. SIGTERM drains, SIGINT stops at once."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in numbers}
        accept_reloads()
        try:
            return self._run()
        except BaseException:
            # At exit multiprocessing waits for the processes, and `_note` would ignore a signal then.
            self._stop(signal.SIGTERM)
            for number, handler in before.items():
                signal.signal(number, handler)
            raise

    def _run(self) -> int:
        first = [self._start() for _ in self._places.copy()]
        failed = False
        while self._processes or not self._stopping:
            wait([process.sentinel for process in self._processes], POLL_SECONDS)
            self._pass_signals_on()
            for process in [process for process in self._processes if not process.is_alive()]:
                self._places.append(self._processes.pop(process))
                if not self._stopping:
                    failed = self._handle_death(process, is_first=process in first)
            self._replace_due()
        return STARTUP_FAILURE if failed else 0

    def _handle_death(self, process: SpawnProcess, *, is_first: bool) -> bool:
        """Schedule a replacement; if the application cannot start, stop and return True."""
        log.error("web process died", pid=process.pid, status=process.exitcode)
        if is_first and process.exitcode == STARTUP_FAILURE:
            # A replacement would fail, too; the process has logged the reason.
            self._stop(signal.SIGTERM)
            return True
        self._due.append(time.monotonic() + RESTART_PAUSE_SECONDS)
        return False

    def _replace_due(self) -> None:
        while self._due and not self._stopping and self._due[0] <= time.monotonic():
            del self._due[0]
            self._replace()

    def _replace(self) -> None:
        try:
            self._start()
        except OSError as error:
            # Out of memory, or over the limit on processes: this may pass, and the others still serve.
            log.error("web process not replaced", error=type(error).__name__)
            self._due.append(time.monotonic() + RESTART_PAUSE_SECONDS)

    def _note(self, number: int, _frame: object) -> None:
        is_end = number == signal.SIGHUP and is_hangup()
        self._signals.append(signal.SIGTERM if is_end else number)

    def _pass_signals_on(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGHUP:
                self._pass_reload_on()
                continue
            self._stop(number)
            if number == signal.SIGINT:
                # A process that is still importing ignores SIGINT: `_start` spawned it that way.
                self._stop(signal.SIGTERM)

    def _pass_reload_on(self) -> None:
        if not self._stopping:
            self._reload()
            self._kill_all(signal.SIGHUP)

    def _stop(self, number: int) -> None:
        self._stopping = True
        # An open listener would accept clients that no process serves any more.
        for listener in [*self._listeners, *(each for own in self._own for each in own)]:
            listener.close()
        self._kill_all(number)

    def _kill_all(self, number: int) -> None:
        for process in self._processes:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)

    def _start(self) -> SpawnProcess:
        place = self._places[0]
        own = self._own[place : place + 1]
        process = multiprocessing.get_context("spawn").Process(
            target=_run_child, args=(self._target, self._listeners, *own)
        )
        # Ctrl-C in a terminal goes to all processes. A new one ignores it; this process passes it on later.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        hold_reloads()
        try:
            process.start()
        finally:
            accept_reloads()
            signal.signal(signal.SIGINT, handler)
        self._processes[process] = self._places.pop(0)
        return process


def _run_child(target: Target, *listeners: Sequence[socket.socket]) -> None:
    os.setpgid(0, 0)
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    target(*listeners)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    parent.join()
    log.error("the parent process died: this web process stops")
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ORPHAN_SECONDS)
    # A restart of the service needs the port, and unfinished work survives a crash.
    os._exit(1)
