"""The tail: a stream of events, attempts and rejected requests with a cursor, on both databases."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert
from starlette.applications import Starlette
from support.command_line import Commands
from support.events import World, opened, plain
from support.payloads import SECRET
from support.serving import serving

from receiver.api import tail as tail_api
from receiver.app import create_app
from receiver.client import Client
from receiver.core.retry import RetryPolicy
from receiver.db import rejections, tables
from receiver.db import tail as tail_rows
from receiver.db.database import Database
from receiver.db.rejections import NewRejection
from receiver.db.tail import Position, Wanted
from receiver.errors import PublishFailed, RequestError
from receiver.settings import Settings

TOKEN = "operator-0123456789abcdef"
REJECTION = NewRejection(
    received_at=datetime.now(UTC),
    source="clipia",
    reason="mismatch",
    cause="unknown_secret",
    diagnosis="no known secret",
    path="/clipia/webhook",
    peer=None,
    headers=[],
    body_size=None,
    size=100,
    body=None,
)
Items = list[tuple[str, dict[str, Any]]]


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world with a destination that is tried once."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main", retry=RetryPolicy(initial=600, cap=600))
        yield made


def make(url: str) -> Starlette:
    """Make a receiver without a worker."""
    return create_app(
        Settings.load(database_url=url, clipia_webhook_secret=SECRET, api_tokens=f"ops:{TOKEN}:operate"),
        worker=False,
    )


@asynccontextmanager
async def inside(url: str) -> AsyncIterator[Client]:
    """Open a client of a receiver in this process."""
    app = make(url)
    async with (
        app.router.lifespan_context(app),
        Client("http://receiver", TOKEN, transport=httpx.ASGITransport(app)) as client,
    ):
        yield client


async def read(client: Client, **query: Any) -> tuple[Items, str]:
    """Return the items of a stream that ends at once, and its last cursor."""
    items, cursor = Items(), ""
    async for cursor, item in client.stream_tail(wait=0, **query):
        if item is not None:
            items.append((cursor, dict(item)))
    return items, cursor


async def deliver(world: World, request_id: str, error: Exception | None = None) -> None:
    """Store an event and attempt its delivery."""

    def behave(_event: object) -> None:
        if error is not None:
            raise error

    world.recorders["main"].behave = behave
    await world.add(plain(request_id))
    await world.fan_out()
    for work in await world.delivery_lane().claim(10):
        await work.run()


async def test_a_reader_misses_nothing_and_gets_nothing_twice(world: World, database_url: str) -> None:
    """From any cursor the rest follows once, in order, with files' and jobs' attempts left out."""
    async with inside(database_url) as client:
        await deliver(world, "before")
        _, start = await read(client)
        await deliver(world, "r-1")
        await deliver(world, "r-2", PublishFailed("queue full", reason="full"))
        async with world.database.write() as connection:
            await rejections.insert(connection, [REJECTION])
            now = datetime.now(UTC)
            other = {"work_id": (await world.rows(tables.events))[0]["id"], "number": 1, "started_at": now}
            await connection.execute(insert(tables.attempts).values(**other, duration_ms=1, outcome="retry"))
        items, end = await read(client, after=start)
        kinds = [(item["kind"], item.get("request_id")) for _, item in items]
        assert sorted(kinds, key=str) == sorted(
            [("event", "r-1"), ("delivered", "r-1"), ("event", "r-2"), ("failed", "r-2"), ("rejected", None)],
            key=str,
        )
        for index, (cursor, _) in enumerate(items):
            assert (await read(client, after=cursor))[0] == items[index + 1 :]
        assert (await read(client, after=end))[0] == []
        failed = [item for _, item in (await read(client, after=start, failures=True))[0]]
        assert [(each["kind"], each.get("text")) for each in failed if each["kind"] == "failed"] == [
            ("failed", "PublishFailed: queue full")
        ]
        assert {each["kind"] for each in failed} == {"failed", "rejected"}
        with pytest.raises(RequestError, match="there is no destination 'other'; known: main"):
            await read(client, after=start, destination="other")
        with pytest.raises(RequestError, match="after: pass the id"):
            await read(client, after="1-2")


async def test_a_small_page_is_followed_by_the_next(world: World) -> None:
    """Pages bound the memory of a stream, and its cursor goes on in each table where the page ended."""
    assert tail_rows.MAX_ROWS >= 100
    for number in range(5):
        await deliver(world, f"r-{number}")
    position, found = Position(0, 0, 0), []
    for _ in range(10):
        page = await tail_rows.read(world.database, position, Wanted(), limit=2)
        assert len(page.items) <= 4
        found += [(item["kind"], item["request_id"]) for item, _ in page.items]
        position = page.position
    assert sorted(found) == sorted((kind, f"r-{n}") for kind in ("event", "delivered") for n in range(5))


# SQLite has one writer at a time, so rows become visible in their order.
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_late_commit_is_not_missed(world: World) -> None:
    """If an attempt with a larger number is visible first, the reader waits for the earlier one."""
    await world.add(plain("r-1"))
    await world.fan_out()
    (row,) = await world.rows(tables.deliveries)
    start = await tail_rows.find_end(world.database)
    values = {"work_id": row["id"], "started_at": datetime.now(UTC), "duration_ms": 1, "outcome": "retry"}
    async with world.database.write() as connection:
        await connection.execute(insert(tables.attempts).values(number=1, **values))
        async with world.database.write() as other:
            await other.execute(insert(tables.attempts).values(number=2, **values))
        reading = asyncio.create_task(tail_rows.read(world.database, start, Wanted()))
        await asyncio.sleep(0.05)
        assert not reading.done()
    async with asyncio.timeout(60):
        page = await reading
    assert [item["attempt"] for item, _ in page.items] == [1, 2]


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_streams_are_limited_and_end_when_the_process_drains(
    world: World, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items arrive while the stream is open; one too many is 429; a draining process ends its streams."""
    monkeypatch.setattr(tail_api, "MAX_STREAMS", 1)
    monkeypatch.setattr(tail_api, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(tail_api, "HEARTBEAT_SECONDS", 0.05)
    app = make(database_url)
    headers = {"authorization": f"Bearer {TOKEN}"}
    async with serving(app) as url, httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as client:
        async with client.stream("GET", "/v1/tail", params={"wait": 300}) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert (stream.headers["x-accel-buffering"], stream.headers["cache-control"]) == (
                "no",
                "no-store",
            )
            lines = stream.aiter_lines()
            assert [await anext(lines) for _ in range(3)] == ["retry: 1000", "id: 0-0-0", ""]
            refused = await client.get("/v1/tail")
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_streams")
            await world.add(plain("r-1"))
            seen = [line async for line in until_data(lines)]
            assert json.loads(seen[-1].removeprefix("data: "))["request_id"] == "r-1"
            assert [await anext(lines) for _ in range(4)] == ["", "id: 1-0-0", "", ": still there"]
            app.state.draining = True
            async with asyncio.timeout(60):
                rest = [line async for line in lines]
            assert all(line in ("", ": still there") for line in rest)
        app.state.draining = False
        again = await client.get("/v1/tail", headers={"last-event-id": "0-0-0"})
        assert again.text.count("event: event") == 1


async def until_data(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """Return lines up to the first one with data."""
    async for line in lines:
        yield line
        if line.startswith("data: "):
            return


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_command_prints_a_line_for_each_item(
    world: World,
    database_url: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quiet: None,  # noqa: ARG001 - a fixture
) -> None:
    """`receiver tail` on this machine's database prints the rest after a cursor, as text and as JSON."""
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database_url)
    commands = Commands(world, capsys, monkeypatch)
    await deliver(world, "r-1", PublishFailed("queue full", reason="full"))
    options = ("tail", "--after", "0-0-0", "--timeout", "0")
    text = await commands.run(*options)
    assert [line.split()[2:5] for line in text.splitlines()] == [
        ["event", "clipia", "r-1"],
        ["failed", "main", "r-1"],
    ]
    printed = [json.loads(line) for line in (await commands.run(*options, "--json")).splitlines()]
    assert [(each["kind"], each["cursor"]) for each in printed] == [("event", "1-0-0"), ("failed", "1-1-0")]
