"""The state of destinations that all processes share, as this process sees it: pauses, and open circuits.

A lane asks for it before each claim. A query at each claim would slow down every delivery, so one task reads
the state of all destinations twice a second.
"""

import os
import socket
import time
import uuid
from collections.abc import Collection
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Protocol

from receiver.core.lane_names import DESTINATION_STATES, Wake, destination_lane, wake_no_lane
from receiver.db import destinations
from receiver.db.database import Database
from receiver.db.destinations import Circuit, PauseState
from receiver.errors import DatabaseUnavailable
from receiver.lanes.attempts import log_failure

if TYPE_CHECKING:
    from receiver.lanes.worker import Wakeups

READ_SECONDS: Final = 0.5
"""Pause between two reads, unless a signal comes."""
RENEW_SECONDS: Final = 10.0
"""Time after which an open circuit is reported again."""

Elsewhere = dict[tuple[uuid.UUID, datetime], str]
"""The destinations of the circuits that other processes have opened; a key stands for one opening."""


class Listener(Protocol):
    """Follows the circuits of other processes to one destination."""

    def opened_elsewhere(self) -> None:
        """Another process has opened its circuit."""

    def closed_elsewhere(self) -> None:
        """Another process has closed its circuit."""


class DestinationStates:
    """The shared state of all destinations; before the first `refresh` none is paused and no circuit open."""

    def __init__(self, database: Database, *, wake: Wake = wake_no_lane) -> None:
        self._database = database
        self._wake = wake
        self._process = uuid.uuid4()
        self._owner = f"{socket.gethostname()[:255]}:{os.getpid()}"
        self._pauses: dict[str, PauseState] = {}
        self._read_at = 0.0
        self._elsewhere: Elsewhere = {}
        self._opened: dict[str, Circuit] = {}
        """The open circuits of this process."""
        self._closed: set[str] = set()
        """Circuits that this process has closed since it last wrote."""
        self._write_at = 0.0
        self._listeners: dict[str, Listener] = {}

    def register(self, name: str, listener: Listener) -> None:
        """Tell the listener from now on; if a circuit is open elsewhere, tell it at once."""
        self._listeners[name] = listener
        if name in self._elsewhere.values():
            listener.opened_elsewhere()

    def forget(self, name: str) -> None:
        """Withdraw the circuit of a destination that this process serves no more."""
        self._listeners.pop(name, None)
        self.closed(name)

    def is_paused(self, name: str) -> bool:
        """Return whether deliveries to a destination wait."""
        state = self._pauses.get(name)
        return state is not None and state.pause is not None

    def age(self, name: str, age: float) -> float:
        """Return the age of a delivery that counts: it begins anew at the end of a pause."""
        state = self._pauses.get(name)
        if state is None or state.resumed is None:
            return age
        return min(age, state.resumed + time.monotonic() - self._read_at)

    def opened(self, name: str, error: str | None) -> None:
        """Record that this process has opened its circuit, or its last error."""
        before = self._opened.get(name)
        self._opened[name] = Circuit(
            destination=name,
            process=self._process,
            owner=self._owner,
            open_since=before.open_since if before else datetime.now(UTC),
            error=error,
        )
        self._closed.discard(name)
        if before is None:
            self._write_soon()

    def closed(self, name: str) -> None:
        """Record that this process has closed its circuit to a destination, or serves it no more."""
        if self._opened.pop(name, None) is not None:
            self._closed.add(name)
            self._write_soon()

    def _write_soon(self) -> None:
        self._write_at = 0.0
        self._wake(DESTINATION_STATES)

    async def refresh(self) -> None:
        """Read the state once and write this process's changes. Raises DatabaseUnavailable."""
        async with self._database.read() as connection:
            pauses = await destinations.read_pauses(connection)
            circuits = await destinations.read_circuits(connection)
        self._apply(pauses, circuits)
        if (self._opened or self._closed) and time.monotonic() >= self._write_at:
            closed, opened = frozenset(self._closed), list(self._opened.values())
            # Before the write: a change that comes meanwhile is written next.
            self._write_at = time.monotonic() + RENEW_SECONDS
            try:
                async with self._database.write() as connection:
                    await destinations.withdraw(connection, self._process, closed)
                    await destinations.report(connection, opened)
            except DatabaseUnavailable:
                self._write_at = 0.0
                raise
            self._closed -= closed

    def _apply(self, pauses: dict[str, PauseState], circuits: Collection[Circuit]) -> None:
        before, paused = self._elsewhere, {name for name in self._pauses if self.is_paused(name)}
        self._pauses, self._read_at = pauses, time.monotonic()
        self._elsewhere = {
            (each.process, each.open_since): each.destination
            for each in circuits
            if each.process != self._process
        }
        for name in paused:
            if not self.is_paused(name):
                self._wake(destination_lane(name))
        for name in _destinations_of(before, without=self._elsewhere) & self._listeners.keys():
            self._listeners[name].closed_elsewhere()
        for name in _destinations_of(self._elsewhere, without=before) & self._listeners.keys():
            self._listeners[name].opened_elsewhere()

    async def run(self, wakeups: "Wakeups") -> None:
        """Refresh until cancelled; a signal of an operator's change shortens the pause."""
        is_failing = False
        while True:
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - if the loop ended, no pause would take effect
                # Once for each outage: twice a second would fill the log.
                if not is_failing:
                    log_failure("state of destinations not read", error, expected=DatabaseUnavailable)
                is_failing = True
            else:
                is_failing = False
            await wakeups.wait(DESTINATION_STATES, seconds=READ_SECONDS)


def _destinations_of(some: Elsewhere, *, without: Elsewhere) -> set[str]:
    return {some[key] for key in some.keys() - without.keys()}
