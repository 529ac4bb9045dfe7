"""A destination's own concurrency and rate limit in its lane."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from cloudevents.core.v1.event import CloudEvent
from support.events import World, opened, plain, until

from receiver.db.database import Database
from receiver.db.tables import deliveries


@pytest.fixture
async def world(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server, on SQLite: the statements do not differ."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    database = Database(f"sqlite:///{path}")
    async with opened(database, tmp_path / "media") as made:
        yield made
    await database.close()


async def test_concurrency(world: World) -> None:
    """E5: no more deliveries are under way at once than the destination's own `concurrency`."""
    narrow = world.add_destination("narrow")
    world.targets[0] = replace(world.targets[0], concurrency=3)
    seen: list[int] = []
    gate = asyncio.Event()

    async def wait(_event: CloudEvent) -> None:
        seen.append(narrow.under_way)
        await gate.wait()

    narrow.behave = wait
    for number in range(12):
        await world.add(plain(f"r-{number}"))
    async with world.working():

        async def is_full() -> bool:
            return len(seen) == 3

        await until(is_full)
        gate.set()
        await world.until_states(deliveries, delivered=12)
    assert max(seen) == 3


async def test_rate(world: World) -> None:
    """E5: a destination with a rate limit gets all its events, and never more than the rate allows."""
    slow = world.add_destination("slow")
    world.targets[0] = replace(world.targets[0], rate=20.0)
    begun: list[float] = []

    async def note(_event: CloudEvent) -> None:
        begun.append(time.monotonic())

    slow.behave = note
    for number in range(12):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until_states(deliveries, delivered=12)
    # There are 11 pauses of 50 ms; if the machine is busy at the first one, it is a little shorter.
    assert begun[-1] - begun[0] > 0.4
