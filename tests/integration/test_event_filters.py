"""`GET /v1/events` by job, delivery and ids, on each database."""

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from support.events import World, opened, plain
from support.payloads import SECRET

from receiver.app import create_app
from receiver.db import event_filter
from receiver.db.database import Database
from receiver.db.rows import event_id
from receiver.db.tables import deliveries, events
from receiver.settings import Settings

TOKEN = "operator-0123456789abcdef"


class Site:
    """A database with events, and the API on it."""

    def __init__(self, world: World, client: httpx.AsyncClient) -> None:
        self.world = world
        self._client = client

    async def get(self, **query: Any) -> httpx.Response:
        """List events."""
        return await self._client.get("/v1/events", params=query)

    async def found(self, **query: Any) -> list[str]:
        """Return the request_ids of the events that are listed."""
        response = await self.get(**query)
        assert response.status_code == 200, response.text
        return [row["request_id"] for row in response.json()["data"]]


@pytest.fixture
async def site(database: Database, database_url: str, tmp_path: Path) -> AsyncIterator[Site]:
    """Four delivered events with jobs of two callers, and one without a job."""
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
        world.add_destination("main")
        for number, caller in enumerate(("shop", "shop", "blog", "blog")):
            await world.add_job(
                f"order-{number}", caller=caller, request_id=f"r-{number}", metadata={"n.o": str(number % 2)}
            )
        await world.add_history(*(plain(f"r-{number}") for number in range(5)))
        yield Site(world, client)


@pytest.mark.parametrize("few", [event_filter.FEW_JOBS, 0], ids=["by ids", "in their order"])
async def test_events_are_found_by_their_jobs(site: Site, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caller, metadata and idempotency key of the job select events, however many jobs a caller has."""
    monkeypatch.setattr(event_filter, "FEW_JOBS", few)
    assert await site.found(caller="blog") == ["r-3", "r-2"]
    assert await site.found(caller="nobody") == []
    assert await site.found(caller="shop", limit=1) == ["r-1"]
    assert await site.found(idempotency_key="order-2") == ["r-2"]
    assert await site.found(idempotency_key="order-2", caller="shop") == []
    assert await site.found(idempotency_key="order") == []
    assert await site.found(**{"metadata.n.o": "1"}) == ["r-3", "r-1"]
    assert await site.found(**{"metadata.n.o": "1", "caller": "shop"}) == ["r-1"]
    assert await site.found(**{"metadata.absent": "1"}) == []


async def test_events_are_found_by_ids(site: Site) -> None:
    """An event is found by its id, its request_id, its job's id and the id of a delivery."""
    async with site.world.database.read() as connection:
        rows = await connection.execute(
            select(events.c.request_id, deliveries.c.id).join(
                deliveries, deliveries.c.event_seq == events.c.seq
            )
        )
        delivery_ids = {row.request_id: row.id for row in rows}
    job_id = await site.world.add_job("late", request_id="r-4")
    nobody = str(uuid.UUID(int=7))
    cases: list[tuple[dict[str, object], list[str]]] = [
        ({"event_id": event_id("clipia", "r-1")}, ["r-1"]),
        ({"request_id": "r-1"}, ["r-1"]),
        ({"request_id": str(event_id("clipia", "r-1"))}, []),
        ({"job_id": job_id}, ["r-4"]),
        ({"delivery_id": delivery_ids["r-2"]}, ["r-2"]),
        ({"delivery_id": delivery_ids["r-2"], "request_id": "r-1"}, []),
    ]
    for query, found in cases:
        assert await site.found(**{name: str(value) for name, value in query.items()}) == found
    for name in ("event_id", "request_id", "job_id", "delivery_id"):
        assert await site.found(**{name: nobody}) == []
    for name in ("event_id", "job_id", "delivery_id"):
        response = await site.get(**{name: "r-1"})
        assert (response.status_code, name in response.json()["error"]["message"]) == (400, True)


async def test_events_are_found_by_their_deliveries(site: Site) -> None:
    """A state and a destination select the events that have a delivery with both."""
    world = site.world
    for state, request_id in (("dead", "r-1"), ("pending", "r-2"), ("canceled", "r-3")):
        seq = select(events.c.seq).where(events.c.request_id == request_id).scalar_subquery()
        await world.change(deliveries, deliveries.c.event_seq == seq, state=state)
    assert await site.found(delivery_state="dead") == ["r-1"]
    assert await site.found(delivery_state="pending", destination="main") == ["r-2"]
    assert await site.found(delivery_state="canceled") == ["r-3"]
    assert await site.found(delivery_state="delivered") == ["r-4", "r-0"]
    assert await site.found(delivery_state="dead", destination="main") == ["r-1"]
    unknown = await site.get(delivery_state="dead", destination="other")
    assert "there is no destination 'other'; known: main" in unknown.json()["error"]["message"]
    assert await site.found(destination="main", limit=2) == ["r-4", "r-3"]
    response = await site.get(delivery_state="lost")
    assert "pending, delivered, dead, canceled" in response.json()["error"]["message"]


async def test_times_may_be_relative(site: Site) -> None:
    """`since=2h` is two hours ago; other units, signs and huge numbers are 400."""
    then = datetime.now(UTC) - timedelta(hours=3)
    await site.world.change(events, events.c.request_id == "r-0", received_at=then)
    assert await site.found(until="2h") == ["r-0"]
    assert await site.found(since="4h", until="90m") == ["r-0"]
    for since in ("9000s", "150m", "2h", "1d", "1w"):
        assert len(await site.found(since=since)) == (5 if since in ("1d", "1w") else 4), since
    for wrong in ("1y", "h", "-1h", "1.5h", "1 h", "9999999h", "999999w", "²h"):
        response = await site.get(since=wrong)
        assert response.status_code == 400, wrong
        assert "since" in response.json()["error"]["message"]
