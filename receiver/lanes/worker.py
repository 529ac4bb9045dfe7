"""The worker: claim loops over the lanes, lease renewal, and a drain that does not count attempts."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from receiver.background import running, wait_for
from receiver.core.lane_names import FAN_OUT_LANE, Wake, wake_no_lane
from receiver.errors import DatabaseUnavailable
from receiver.lanes.attempts import jitter, log_failure, logged_failures
from receiver.lanes.base import Lane, Work
from receiver.lanes.fan_out import FanOut

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long the loops of a worker wait."""

    poll_seconds: float = 0.5
    """Pause before the next claim if no signal arrives. No signal is sent when a row becomes due."""
    pace_seconds: float = 0.02
    """Shortest time between two rounds of the fan-out, unless the last one left events behind.

    If each event had a round of its own, its transaction would cost the worker and the database several
    milliseconds. Events that arrive within this time share one.
    """
    gather_seconds: float = 0.01
    """How long a busy lane waits for half of its places to become free. If it claimed for each free place
    at once, it would claim one row at a time."""
    outage_pause_seconds: float = 2.0
    """Pause after a claim that failed because of an unavailable database or a bug."""
    drain_seconds: float = 25.0
    """Time for the work under way to finish at shutdown. Claims that are left are given back.

    A lane that is removed has no such limit: its process goes on, and so do the attempts, which have limits
    of their own, and the records of results, which wait for the database.
    """


DEFAULT_TIMING: Final = Timing()


class Wakeups:
    """A signal for each lane, which ends its wait early. If a signal is lost, the lane polls later."""

    def __init__(self, elsewhere: Wake = wake_no_lane) -> None:
        """`elsewhere` is called for lanes that do not wait in this process."""
        self._events: dict[str, asyncio.Event] = {}
        self._elsewhere = elsewhere

    def wake(self, lane: str) -> None:
        """Signal that a lane may have work."""
        if event := self._events.get(lane):
            event.set()
        else:
            self._elsewhere(lane)

    async def wait(self, lane: str, *, seconds: float) -> None:
        """Return at the lane's next signal, or after `seconds`."""
        event = self._events.setdefault(lane, asyncio.Event())
        await wait_for(event, seconds)
        event.clear()


class Worker:
    """Runs the fan-out and the lanes until it is stopped."""

    def __init__(
        self, fan_out: FanOut, lanes: Sequence[Lane], wakeups: Wakeups, *, timing: Timing = DEFAULT_TIMING
    ) -> None:
        self._fan_out = fan_out
        self._wakeups = wakeups
        self._timing = timing
        self._stopping = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None
        self._runners = [_LaneRunner(lane, wakeups, timing) for lane in lanes]
        self.lanes: Final = [FAN_OUT_LANE, *(runner.name for runner in self._runners)]
        """The names of its lanes; the list follows `add` and `remove`."""

    def stop(self) -> None:
        """Stop claiming and finish the work under way; `run` returns when that is done."""
        self._stopping.set()
        self._wakeups.wake(FAN_OUT_LANE)
        for runner in self._runners:
            runner.stop()

    def add(self, lane: Lane) -> None:
        """Work on one more lane, unless the worker stops."""
        if self._stopping.is_set():
            return
        runner = _LaneRunner(lane, self._wakeups, self._timing)
        self._runners.append(runner)
        self.lanes.append(runner.name)
        if self._group is not None:
            self._group.create_task(runner.run(), name=runner.name)

    async def remove(self, name: str) -> None:
        """Stop claiming in a lane, and return when its work under way is done, or given back at shutdown."""
        runner = next((each for each in self._runners if each.name == name), None)
        if runner is None:
            return
        runner.retire()
        await runner.ended.wait()
        self._runners.remove(runner)
        self.lanes.remove(name)

    async def run(self) -> None:
        """Work until `stop` is called. An unexpected error is logged with its traceback, and work goes on."""
        log.info("worker started", lanes=[runner.name for runner in self._runners])
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._run_fan_out(), name=FAN_OUT_LANE)
            for runner in self._runners:
                group.create_task(runner.run(), name=runner.name)
        log.info("worker stopped")

    async def _run_fan_out(self) -> None:
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await self._fan_out.run()
            except Exception as error:  # noqa: BLE001 - if the loop ended, acknowledged events would stay behind
                await _sit_out(error, FAN_OUT_LANE, self._stopping, self._timing)
                continue
            if not self._fan_out.may_have_more:
                await self._wakeups.wait(FAN_OUT_LANE, seconds=_jittered(self._timing.poll_seconds))
                await asyncio.sleep(began + self._timing.pace_seconds - time.monotonic())


class _LaneRunner:
    """Claims and runs the work of one lane."""

    def __init__(self, lane: Lane, wakeups: Wakeups, timing: Timing) -> None:
        self.name = lane.name
        self._lane = lane
        self._wakeups = wakeups
        self._timing = timing
        self._held = dict[asyncio.Task[None], Work]()
        self._rows = 0
        self._half_free = asyncio.Event()
        self._stopping = asyncio.Event()
        self._limited = asyncio.Event()
        self.ended: Final = asyncio.Event()

    def stop(self) -> None:
        """Let `run` claim no more, and drain for a limited time."""
        self._limited.set()
        self.retire()

    def retire(self) -> None:
        """Let `run` claim no more, and finish the work under way."""
        self._stopping.set()
        self._wakeups.wake(self.name)

    async def run(self) -> None:
        """Claim and work until `stop` or `retire` is called, then drain."""
        try:
            async with running(self._renew(), name=f"{self.name} renewal"):
                while not self._stopping.is_set():
                    await self._run_round()
                await self._drain()
        finally:
            self.ended.set()

    async def _run_round(self) -> None:
        """Claim for the free places, and wait unless all of them were filled."""
        free = self._lane.concurrency - self._rows
        if free > 0:
            try:
                works = await self._lane.claim(free)
            except Exception as error:  # noqa: BLE001 - as above
                await _sit_out(error, self.name, self._stopping, self._timing)
                return
            for work in works:
                task = asyncio.create_task(self._perform(work))
                self._held[task] = work
                self._rows += len(work.claims)
                self._lane.bytes_under_way += work.size
                task.add_done_callback(self._finished)
            if works and not self._is_half_free():
                self._half_free.clear()
                await wait_for(self._half_free, self._timing.gather_seconds)
            if self._lane.claims_again or sum(len(work.claims) for work in works) == free:
                return
        await self._wakeups.wait(self.name, seconds=_jittered(self._timing.poll_seconds))

    def _is_half_free(self) -> bool:
        return 2 * self._rows <= self._lane.concurrency

    async def _perform(self, work: Work) -> None:
        try:
            await work.run()
        except Exception:
            # Lanes handle the errors that they expect. The lease expires, and then the row is tried again.
            log.exception("work failed unexpectedly", lane=self.name, work_id=str(work.claim.id))

    def _finished(self, task: asyncio.Task[None]) -> None:
        work = self._held.pop(task)
        self._rows -= len(work.claims)
        self._lane.bytes_under_way -= work.size
        if self._is_half_free():
            self._half_free.set()
        if self._lane.may_have_more:
            self._wakeups.wake(self.name)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lane.lease_seconds / 3)
            held = dict(self._held)
            if not held:
                continue
            with logged_failures("leases not renewed", lane=self.name):
                renewed = await self._lane.renew([claim for work in held.values() for claim in work.claims])
                for task, work in held.items():
                    # If only some leases are lost, the results of these rows are not recorded.
                    if renewed.isdisjoint(claim.id for claim in work.claims) and task in self._held:
                        log.warning("lease lost, work dropped", lane=self.name, work_id=str(work.claim.id))
                        task.cancel()

    async def _drain(self) -> None:
        if not self._held:
            return
        waits = [asyncio.create_task(each) for each in (asyncio.wait(set(self._held)), self._limited.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in waits:
                each.cancel()
        if not self._held:
            return
        _, late = await asyncio.wait(self._held, timeout=self._timing.drain_seconds)
        if not late:
            return
        claims = [claim for task in late for claim in self._held[task].claims]
        for task in late:
            task.cancel()
        await asyncio.wait(late)
        with logged_failures("claims not given back", lane=self.name):
            await self._lane.release(claims)
            log.info("claims given back", lane=self.name, count=len(claims))


async def _sit_out(error: Exception, lane: str, stopping: asyncio.Event, timing: Timing) -> None:
    log_failure("no work claimed", error, expected=DatabaseUnavailable, lane=lane)
    await wait_for(stopping, _jittered(timing.outage_pause_seconds))


def _jittered(seconds: float) -> float:
    return seconds * (0.8 + 0.4 * jitter())
