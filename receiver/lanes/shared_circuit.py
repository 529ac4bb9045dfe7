"""The circuit breaker of a lane, with its log and its metric, and the other processes' view of it."""

import time
from typing import Final

import structlog

from receiver.core.circuit_breaker import CircuitBreaker
from receiver.core.lane_names import Wake, destination_lane
from receiver.errors import PublishFailed, PublishRejected
from receiver.lanes.attempts import stored_text
from receiver.lanes.destination_states import DestinationStates
from receiver.lanes.targets import Target
from receiver.metrics import CIRCUIT_OPEN

NOT_OPENED: Final = "it could not be opened when the process started"

log = structlog.get_logger()


class SharedCircuit:
    """Counts the results of one destination in this process, and reports an open circuit to the others."""

    def __init__(self, target: Target, concurrency: int, states: DestinationStates, *, wake: Wake) -> None:
        self._name = target.name
        self._breaker = CircuitBreaker(concurrency)
        self._states = states
        self._wake = wake
        if target.is_down:
            self._breaker.open(time.monotonic())
            states.opened(self._name, NOT_OPENED)
        states.register(self._name, self)
        CIRCUIT_OPEN.labels(self._name).set(self.is_open)

    @property
    def is_open(self) -> bool:
        """Whether only probes may be sent."""
        return self._breaker.is_open

    @property
    def may_go_on(self) -> bool:
        """Whether a group under way may go on: the circuit is not open, and the destination is not paused."""
        return not self.is_open and not self._states.is_paused(self._name)

    def available(self, *, under_way: int) -> int:
        """Return how many more deliveries may start while `under_way` are in flight."""
        if self._states.is_paused(self._name):
            return 0
        return self._breaker.available(time.monotonic(), under_way=under_way)

    def note(self, error: Exception | None, started: float) -> None:
        """Count the result of an attempt. A destination that rejects one message is healthy."""
        was_open = self.is_open
        after = (error.retry_after if isinstance(error, PublishFailed) else None) or 0.0
        if error is None or isinstance(error, PublishRejected):
            self._breaker.succeeded()
            if was_open:
                log.info("circuit breaker closed", destination=self._name)
                self._states.closed(self._name)
        elif self._breaker.failed(time.monotonic(), started=started, retry_after=after):
            log.error("circuit breaker opened", destination=self._name, error=stored_text(error))
        if self.is_open and error is not None:
            self._states.opened(self._name, stored_text(error))
        if self.is_open != was_open:
            CIRCUIT_OPEN.labels(self._name).set(not was_open)

    def opened_elsewhere(self) -> None:
        """Be careful: another process has seen failures that this one has not."""
        self._breaker.suspect()

    def closed_elsewhere(self) -> None:
        """Try again soon: another process has reached the destination."""
        self._breaker.probe_at_once(time.monotonic())
        self._wake(destination_lane(self._name))
