"""When the worker looks for work, and when it lets the database be."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from typing import cast
from uuid import UUID

from support.events import running

from receiver.core.lane_names import FAN_OUT_LANE
from receiver.db.rows import Claim
from receiver.lanes.base import LEASE_SECONDS, Work
from receiver.lanes.fan_out import FanOut
from receiver.lanes.worker import DEFAULT_TIMING, Wakeups, Worker

MANY = 200
"""Events that are a reason to look again."""
SOON = 0.6 * DEFAULT_TIMING.poll_seconds
"""Seconds in which nobody looks for work who was not told of it."""


class Events:
    """A fan-out that finds what it is told to."""

    def __init__(self, find: Callable[[], int] = lambda: 0) -> None:
        self.find = find
        self.looks = 0
        self.may_have_more = False

    async def run(self) -> int:
        """Look once."""
        self.looks += 1
        found = self.find()
        self.may_have_more = found >= MANY
        return found


class Places:
    """A lane that has two pieces of work, and may have left some behind."""

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
        """Nobody else wants them."""


@asynccontextmanager
async def working(found: Events, *lanes: Places) -> AsyncIterator[Wakeups]:
    """Run a worker inside the block."""
    wakeups = Wakeups()
    async with running(Worker(cast("FanOut", found), lanes, wakeups)):
        yield wakeups


async def test_events_that_trickle_in_are_fanned_out_together() -> None:
    """One by one they would cost a transaction each; a busy worker looks fifty times a second at most."""
    found, began = Events(lambda: 1), time.monotonic()
    async with working(found) as wakeups:
        while time.monotonic() - began < SOON:
            wakeups.wake(FAN_OUT_LANE)
            await asyncio.sleep(0.001)
    assert 2 < found.looks <= (time.monotonic() - began) / DEFAULT_TIMING.pace_seconds + 2


async def test_the_first_event_does_not_wait() -> None:
    """Who has nothing to do looks as soon as it is told."""
    found = Events()
    async with working(found) as wakeups:
        await asyncio.sleep(5 * DEFAULT_TIMING.pace_seconds)
        assert found.looks == 1
        wakeups.wake(FAN_OUT_LANE)
        # Turns of the loop, and no time.
        for _ in range(20):
            await asyncio.sleep(0)
        assert found.looks == 2


async def test_a_backlog_is_fanned_out_without_a_break() -> None:
    """As long as a lot leaves events behind, the worker does not wait to be told of more."""
    left = [MANY] * 5
    found = Events(lambda: left.pop() if left else 0)
    async with working(found):
        await asyncio.sleep(SOON)
    assert not left


async def test_a_lane_that_has_left_nothing_is_not_claimed_from_again() -> None:
    """The end of the work itself is no news of more, but for a lane that could not take all."""
    took_all, left_some = Places(may_have_more=False), Places(may_have_more=True)
    left_some.name = "others"
    async with working(Events(), took_all, left_some):
        await asyncio.sleep(SOON)
        assert took_all.claims == 1
        assert left_some.claims > 1
