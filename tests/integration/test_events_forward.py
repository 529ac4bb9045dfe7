"""`GET /v1/events?after=`: a consumer reads events forward and misses none, on each database."""

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import delete
from support.events import World, insert_event, opened, plain
from support.payloads import SECRET

from receiver.app import create_app
from receiver.db import forward
from receiver.db.database import Database
from receiver.db.tables import events
from receiver.ingest import make_event
from receiver.settings import Settings

TOKEN = "operator-0123456789abcdef"


class Reader:
    """A consumer that keeps its position."""

    def __init__(self, world: World, client: httpx.AsyncClient) -> None:
        self.world = world
        self._client = client
        self.position = "0"

    async def get(self, **query: Any) -> httpx.Response:
        """List events."""
        return await self._client.get("/v1/events", params=query)

    async def read(self, **query: Any) -> list[str]:
        """Return the request_ids of the next events."""
        response = await self.get(after=self.position, **query)
        assert response.status_code == 200, response.text
        page = response.json()
        self.position = page["next"]
        return [row["request_id"] for row in page["data"]]


@pytest.fixture
async def reader(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Reader]:
    """A consumer of a receiver without events."""
    settings = Settings.load(
        database_url=database_url, clipia_webhook_secret=SECRET, api_tokens=f"ops:{TOKEN}:operate"
    )
    app = create_app(settings, worker=False)
    client = httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url="http://receiver",
        headers={"authorization": f"Bearer {TOKEN}"},
    )
    async with app.router.lifespan_context(app), opened(database, tmp_path / "media") as world, client:
        yield Reader(world, client)


async def test_events_are_read_forward_once(reader: Reader) -> None:
    """From the beginning, in pages, oldest first; each event once, and at the end the position stays."""
    assert await reader.read() == []
    for number in range(5):
        await reader.world.add(plain(f"r-{number}"))
    pages = [await reader.read(limit=2) for _ in range(4)]
    assert pages == [["r-0", "r-1"], ["r-2", "r-3"], ["r-4"], []]
    position = reader.position
    assert await reader.read() == []
    assert reader.position == position
    await reader.world.add(plain("r-5"))
    assert await reader.read(limit=200) == ["r-5"]


async def test_filters_move_the_position_too(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events that do not match are passed, however many statements that takes, and not read again."""
    monkeypatch.setattr(forward, "SPAN", 2)
    for number in range(7):
        await reader.world.add(plain(f"r-{number}", model="rare" if number == 5 else "m"))
    assert await reader.read(model="rare", wait=30) == ["r-5"]
    assert await reader.read(wait=30) == ["r-6"]


async def test_a_call_waits_for_an_event(reader: Reader) -> None:
    """The answer comes when an event is stored, long before the time is over; without one it is empty."""
    began = time.monotonic()
    assert await reader.read(wait=0.05) == []
    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        waiting = tasks.create_task(reader.read(wait=300))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await reader.world.add(plain("r-1"))
        assert await waiting == ["r-1"]
    assert time.monotonic() - began < 60


# SQLite has one writer at a time, so events become visible in their order.
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_an_event_that_commits_late_is_not_missed(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a later event is visible before an earlier one, the reader waits for the earlier one."""
    world = reader.world
    # The first event of a source locks its name.
    await world.add(plain("first"))
    assert await reader.read() == ["first"]
    position = reader.position
    monkeypatch.setattr(forward, "SETTLE_SECONDS", 0.05)
    async with world.database.write() as connection:
        await insert_event(connection, make_event("clipia", plain("early"), received_at=time.time()))
        await world.add(plain("late"))
        assert await reader.read() == []
        assert reader.position == position
        monkeypatch.setattr(forward, "SETTLE_SECONDS", 60.0)
        waiting = asyncio.create_task(reader.read())
        await asyncio.sleep(0.05)
        assert not waiting.done()
    async with asyncio.timeout(60):
        assert await waiting == ["early", "late"]


# A sequence of PostgreSQL gives no number twice.
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_numbers_that_are_used_again_are_not_missed(reader: Reader) -> None:
    """SQLite gives the numbers of pruned events to new ones: a position beyond the end starts again."""
    for number in range(3):
        await reader.world.add(plain(f"r-{number}"))
    assert len(await reader.read()) == 3
    async with reader.world.database.write() as connection:
        await connection.execute(delete(events))
    await reader.world.add(plain("new"))
    assert await reader.read() == ["new"]


async def test_a_call_reads_one_way(reader: Reader) -> None:
    """`cursor` with `after`, and `wait` without it, are 400 and named."""
    for query, name in (
        ({"after": "0", "cursor": "1"}, "cursor"),
        ({"wait": "1"}, "wait"),
        ({"after": "x"}, "cursor"),
        ({"after": "0", "wait": "301"}, "wait"),
    ):
        response = await reader.get(**query)
        assert response.status_code == 400
        assert name in response.json()["error"]["message"]
