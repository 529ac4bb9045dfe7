"""When the worker claims, and when it leaves the database alone."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import cast
from uuid import UUID

from support.events import running

from receiver.core.lane_names import FAN_OUT_LANE
from receiver.db.rows import Claim
from receiver.lanes.base import LEASE_SECONDS, Lane, Work
from receiver.lanes.fan_out import FanOut
from receiver.lanes.worker import DEFAULT_TIMING, Timing, Wakeups, Worker

MANY = 200
"""Events that fill a batch."""
SOON = 0.6 * DEFAULT_TIMING.poll_seconds
"""Seconds in which a lane does not claim unless it is woken."""


class Events:
    """A fan-out that finds as many events as `find` says."""

    def __init__(self, find: Callable[[], int] = lambda: 0) -> None:
        self.find = find
        self.runs = 0
        self.may_have_more = False

    async def run(self) -> int:
        """Count the run."""
        self.runs += 1
        found = self.find()
        self.may_have_more = found >= MANY
        return found


class Places(Lane):
    """A lane with two pieces of work, which may have left more behind."""

    name = "places"
    concurrency = 8
    lease_seconds = LEASE_SECONDS

    def __init__(self, *, may_have_more: bool) -> None:
        self.may_have_more = may_have_more
        self.claims = 0

    async def claim(self, limit: int) -> Sequence[Work]:
        """Claim both the first time."""
        self.claims += 1
        if self.claims > 1 or limit < 2:
            return []
        claims = [Claim(id=uuid.uuid4(), lease=uuid.uuid4(), attempt=1, lost=0, age=0.0) for _ in range(2)]
        return [Work(claim=claim, run=lambda: asyncio.sleep(0.02)) for claim in claims]

    async def renew(self, claims: Collection[Claim]) -> set[UUID]:
        """Keep them."""
        return {claim.id for claim in claims}

    async def release(self, claims: Collection[Claim]) -> None:
        """Do no work: no other worker claims them."""


@asynccontextmanager
async def working(found: Events, *lanes: Places) -> AsyncIterator[Wakeups]:
    """Run a worker inside the block."""
    wakeups = Wakeups()
    async with running(Worker(cast("FanOut", found), lanes, wakeups)):
        yield wakeups


async def test_events_that_trickle_in_are_fanned_out_together() -> None:
    """Events that arrive one by one share batches: the fan-out runs 50 times a second at most."""
    found, began = Events(lambda: 1), time.monotonic()
    async with working(found) as wakeups:
        while time.monotonic() - began < SOON:
            wakeups.wake(FAN_OUT_LANE)
            await asyncio.sleep(0.001)
    assert 2 < found.runs <= (time.monotonic() - began) / DEFAULT_TIMING.pace_seconds + 2


async def test_the_first_event_does_not_wait() -> None:
    """An idle worker runs the fan-out as soon as it is woken."""
    found = Events()
    async with working(found) as wakeups:
        await asyncio.sleep(5 * DEFAULT_TIMING.pace_seconds)
        assert found.runs == 1
        wakeups.wake(FAN_OUT_LANE)
        # Rounds of the event loop, but no time.
        for _ in range(20):
            await asyncio.sleep(0)
        assert found.runs == 2


async def test_a_backlog_is_fanned_out_without_a_break() -> None:
    """If a batch leaves events behind, the worker runs the next one at once."""
    left = [MANY] * 5
    found = Events(lambda: left.pop() if left else 0)
    async with working(found):
        await asyncio.sleep(SOON)
    assert not left


async def test_a_lane_that_has_left_nothing_is_not_claimed_from_again() -> None:
    """The end of work is a reason to claim again only if the lane could not take all due rows."""
    took_all, left_some = Places(may_have_more=False), Places(may_have_more=True)
    left_some.name = "others"
    async with working(Events(), took_all, left_some):
        await asyncio.sleep(SOON)
        assert took_all.claims == 1
        assert left_some.claims > 1


class Gated(Places):
    """A lane with work that lasts until the gate opens."""

    def __init__(self) -> None:
        super().__init__(may_have_more=False)
        self.gate = asyncio.Event()
        self.begun = asyncio.Event()
        self.done = 0
        self.released: list[Claim] = []

    async def claim(self, limit: int) -> Sequence[Work]:
        """Claim two rows the first time."""
        return [replace(work, run=self._perform) for work in await super().claim(limit)]

    async def _perform(self) -> None:
        self.begun.set()
        await self.gate.wait()
        self.done += 1

    async def release(self, claims: Collection[Claim]) -> None:
        """Note the claims."""
        self.released += claims


async def test_a_lane_that_is_removed_finishes_its_work() -> None:
    """The limit of a shutdown does not apply to a removal: results and long attempts are waited for."""
    lane = Gated()
    worker = Worker(cast("FanOut", Events()), [lane], Wakeups(), timing=Timing(drain_seconds=0.0))
    async with running(worker):
        await lane.begun.wait()
        removal = asyncio.create_task(worker.remove(lane.name))
        await asyncio.sleep(0.1)
        assert (removal.done(), lane.released) == (False, [])
        lane.gate.set()
        await removal
        assert (lane.done, lane.released, worker.lanes) == (2, [], [FAN_OUT_LANE])


async def test_a_removal_does_not_hold_a_shutdown() -> None:
    """If the process stops while a removal waits, the work that is left is given back after the limit."""
    lane = Gated()
    worker = Worker(cast("FanOut", Events()), [lane], Wakeups(), timing=Timing(drain_seconds=0.05))
    async with asyncio.timeout(30), running(worker):
        await lane.begun.wait()
        removal = asyncio.create_task(worker.remove(lane.name))
        await asyncio.sleep(0.05)
    await removal
    assert (lane.done, len(lane.released)) == (0, 2)
