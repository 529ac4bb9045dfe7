"""The worker: claim loops over lanes, lease renewal, and a drain that counts no attempt."""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol
from uuid import UUID

import structlog

from receiver.db.rows import Claim
from receiver.errors import DatabaseUnavailable
from receiver.lanes.base import FAN_OUT_LANE, LEASE, Work, describe
from receiver.lanes.fan_out import FanOut

POLL: Final = 0.5
"""Seconds between looks for work that no signal announced: other processes' and what becomes due."""
PACE: Final = 0.02
"""Seconds between two looks for events to fan out at least, unless there was as much as is done at once.

Those of a moment go together: one by one each costs its worker and its database several milliseconds.
"""
GATHER: Final = 0.01
"""Seconds that a busy lane waits for half of its places to come free: one that claimed for every place would
claim one row at a time."""
OUTAGE_PAUSE: Final = 2.0
"""Seconds between tries while the database is away."""
DRAIN: Final = 25.0
"""Seconds that work under way has to finish at shutdown; what has not is given back."""

log = structlog.get_logger()


class Lane(Protocol):
    """A kind of work, claimed by lease."""

    name: str
    concurrency: int
    left_behind: bool
    """Whether there may be more that is due than the last claim took."""

    async def claim(self, limit: int) -> Sequence[Work]:
        """Claim up to `limit` rows that are due."""
        ...

    async def renew(self, claims: Collection[Claim]) -> set[UUID]:
        """Extend leases; return the ids that are still ours."""
        ...

    async def release(self, claims: Collection[Claim]) -> None:
        """Give claims back untried."""
        ...


class Wakeups:
    """A signal per lane that shortens its wait; losing one costs no more than that wait."""

    def __init__(self, elsewhere: Callable[[str], None] = lambda _lane: None) -> None:
        """`elsewhere` is told of lanes that nobody waits for here: their worker is another process."""
        self._events: dict[str, asyncio.Event] = {}
        self._elsewhere = elsewhere

    def wake(self, lane: str) -> None:
        """Tell a lane that there is work."""
        if event := self._events.get(lane):
            event.set()
        else:
            self._elsewhere(lane)

    async def wait(self, lane: str, *, timeout: float) -> None:  # noqa: ASYNC109 - returns, never raises
        """Wait for a wake-up of the lane, or until the time is over."""
        event = self._events.setdefault(lane, asyncio.Event())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await event.wait()
        event.clear()


class Worker:
    """Runs the fan-out and every lane until it is told to stop."""

    def __init__(
        self, fan_out: FanOut, lanes: Sequence[Lane], wakeups: Wakeups, *, drain: float = DRAIN
    ) -> None:
        self._fan_out = fan_out
        self._lanes = [_LaneRunner(lane, wakeups, drain=drain) for lane in lanes]
        self._wakeups = wakeups
        self._stopping = asyncio.Event()

    @property
    def lanes(self) -> list[str]:
        """The names of its lanes."""
        return [FAN_OUT_LANE, *(runner.name for runner in self._lanes)]

    def stop(self) -> None:
        """Stop claiming and finish what is held; `run` returns when that is done."""
        self._stopping.set()
        for name in self.lanes:
            self._wakeups.wake(name)

    async def run(self) -> None:
        """Work until `stop` is called. What fails unexpectedly is logged with its traceback and goes on."""
        log.info("worker started", lanes=[runner.name for runner in self._lanes])
        async with asyncio.TaskGroup() as group:
            group.create_task(self._run_fan_out(), name=FAN_OUT_LANE)
            for runner in self._lanes:
                group.create_task(runner.run(self._stopping), name=runner.name)
        log.info("worker stopped")

    async def _run_fan_out(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await self._fan_out.run()
            except Exception as error:  # noqa: BLE001 - a loop that ended would leave acked events behind
                await _sit_out(error, FAN_OUT_LANE, self._stopping)
                continue
            if not self._fan_out.left_behind:
                await self._wakeups.wait(FAN_OUT_LANE, timeout=_jittered(POLL))
                await asyncio.sleep(began + PACE - time.monotonic())


class _LaneRunner:
    """Claims and runs the work of one lane."""

    def __init__(self, lane: Lane, wakeups: Wakeups, *, drain: float) -> None:
        self.name = lane.name
        self._lane = lane
        self._wakeups = wakeups
        self._drain = drain
        self._held: dict[asyncio.Task[None], Claim] = {}
        self._half_free = asyncio.Event()

    async def run(self, stopping: asyncio.Event) -> None:
        """Claim and work until told to stop, then drain."""
        renewal = asyncio.create_task(self._renew(), name=f"{self.name} renewal")
        try:
            while not stopping.is_set():
                await self._turn(stopping)
            await self._drain_held()
        finally:
            renewal.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await renewal

    async def _turn(self, stopping: asyncio.Event) -> None:
        room = self._lane.concurrency - len(self._held)
        if room > 0:
            try:
                works = await self._lane.claim(room)
            except Exception as error:  # noqa: BLE001 - as above
                await _sit_out(error, self.name, stopping)
                return
            for work in works:
                task = asyncio.create_task(self._perform(work), name=f"{self.name} {work.claim.id}")
                self._held[task] = work.claim
                task.add_done_callback(self._finished)
            if works:
                await self._gather()
            if len(works) == room:
                return
        await self._wakeups.wait(self.name, timeout=_jittered(POLL))

    async def _gather(self) -> None:
        if self._is_half_free():
            return
        self._half_free.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GATHER):
                await self._half_free.wait()

    def _is_half_free(self) -> bool:
        return 2 * len(self._held) <= self._lane.concurrency

    async def _perform(self, work: Work) -> None:
        try:
            await work.run()
        except Exception:
            # Lanes handle what they expect. The lease ends by itself and the row is tried again.
            log.exception("work failed unexpectedly", lane=self.name, work_id=str(work.claim.id))

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._held[task]
        if self._is_half_free():
            self._half_free.set()
        if self._lane.left_behind:
            self._wakeups.wake(self.name)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(LEASE / 3)
            held = dict(self._held)
            if not held:
                continue
            try:
                ours = await self._lane.renew(held.values())
            except Exception as error:  # noqa: BLE001 - as above
                _log_failure("leases not renewed", error, self.name)
                continue
            for task, claim in held.items():
                if claim.id not in ours and task in self._held:
                    log.warning("lease lost, work dropped", lane=self.name, work_id=str(claim.id))
                    task.cancel()

    async def _drain_held(self) -> None:
        if not self._held:
            return
        _, late = await asyncio.wait(self._held, timeout=self._drain)
        claims = [self._held[task] for task in late]
        for task in late:
            task.cancel()
        if not late:
            return
        await asyncio.wait(late)
        try:
            await self._lane.release(claims)
        except Exception as error:  # noqa: BLE001 - shutting down; the leases end by themselves
            _log_failure("claims not given back", error, self.name)
        else:
            log.info("claims given back", lane=self.name, count=len(claims))


def _log_failure(message: str, error: Exception, lane: str) -> None:
    expected = isinstance(error, DatabaseUnavailable)
    log.warning(message, lane=lane, error=describe(error), exc_info=None if expected else error)


async def _sit_out(error: Exception, lane: str, stopping: asyncio.Event) -> None:
    _log_failure("no work claimed", error, lane)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_jittered(OUTAGE_PAUSE)):
            await stopping.wait()


def _jittered(seconds: float) -> float:
    return seconds * random.uniform(0.8, 1.2)  # noqa: S311 - spreads load
