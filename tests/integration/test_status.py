"""The status on one screen: each figure from rows, on both databases."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from cloudevents.core.v1.event import CloudEvent
from support.events import World, opened, plain
from support.payloads import SECRET, body

from receiver.app import create_app
from receiver.core.lane_names import destination_lane
from receiver.core.retry import RetryPolicy
from receiver.db import rejections, status, workers
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rejections import NewRejection
from receiver.db.rows import new_id
from receiver.db.tables import deliveries, events, jobs, media
from receiver.db.workers import WorkerRun
from receiver.errors import PublishFailed, PublishRejected
from receiver.settings import Settings
from receiver.status import Status, read_status
from receiver.submitter import Submitter

TOKENS = "watcher:tok-watcher-0123456789:read,job:tok-submit-0123456789:submit"


class Site:
    """A receiver with the destinations `main` and `spare`, and a world that fills its database."""

    def __init__(self, world: World, settings: Settings) -> None:
        self.world = world
        self.settings = settings

    async def read(self) -> Status:
        """Read the status."""
        database = self.world.database
        submitter = Submitter.configured(self.settings, database)
        try:
            return await read_status(self.settings, database, submitter)
        finally:
            await submitter.close()


@pytest.fixture
async def site(database: Database, tmp_path: Path) -> AsyncIterator[Site]:
    """A receiver without events."""
    tmp_path.joinpath("receiver.toml").write_text(
        '[[destinations]]\nname = "main"\nurl = "file:main.jsonl"\n'
        '[[destinations]]\nname = "spare"\nurl = "file:spare.jsonl"\n'
    )
    settings = Settings.load(database_url=database.url, clipia_webhook_secret=SECRET, api_tokens=TOKENS)
    async with opened(database, tmp_path / "media") as world:
        yield Site(world, settings)


def of(found: Status, name: str) -> dict[str, Any]:
    """Return the figures of a destination, without those that depend on the time."""
    (row,) = [each for each in found["destinations"] if each["name"] == name]
    timed = {"name", "oldest_seconds", "delivered_per_minute", "failed_per_minute"}
    return {key: value for key, value in row.items() if key not in timed}


def texts(found: Status) -> list[str]:
    """Return the problems."""
    return [each["text"] for each in found["problems"]]


@asynccontextmanager
async def a_running_worker(database: Database, *destinations: str) -> AsyncIterator[None]:
    """Record a worker that serves the lanes of destinations."""
    lanes = [destination_lane(name) for name in destinations]
    run = WorkerRun(id=new_id(), host="web-1", pid=7, lanes=lanes, account=None)
    async with database.write() as connection:
        await workers.renew(connection, run)
    yield
    async with database.write() as connection:
        await workers.remove(connection, run.id)


async def test_an_empty_receiver_has_one_problem_without_a_worker(site: Site) -> None:
    """Nothing is forwarded as long as no worker runs; with one, there is no problem."""
    found = await site.read()
    assert texts(found) == ["no worker is running: nothing is forwarded"]
    assert found["last_webhook_at"] is None
    assert [each["name"] for each in found["destinations"]] == ["main", "spare"]
    async with a_running_worker(site.world.database, "main", "spare"):
        found = await site.read()
    assert found["problems"] == []
    assert [(each["host"], each["running"]) for each in found["workers"]] == [("web-1", True)]


async def test_failing_deliveries_are_shown_with_their_error(site: Site) -> None:
    """Each destination has its own backlog, failures, dead letters and last error."""
    world = site.world
    main = world.add_destination("main", retry=RetryPolicy(initial=60, cap=60, give_up_after=600))
    spare = world.add_destination("spare")

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("the broker says no", reason="connect")

    def reject(_event: CloudEvent) -> None:
        raise PublishRejected("422 from the destination", reason="status")

    main.behave, spare.behave = fail, reject
    await world.add(plain("r-1"))
    async with world.working():
        await world.until_states(deliveries, deliveries.c.error.is_not(None), pending=1, dead=1)
    async with a_running_worker(world.database, "main", "spare"):
        found = await site.read()
    assert of(found, "main") == {
        "configured": True,
        "pending": 1,
        "failing": 1,
        "dead": 0,
        "last_error": "PublishFailed: the broker says no",
        "pause": None,
        "circuit": None,
    }
    assert of(found, "spare") == {
        "configured": True,
        "pending": 0,
        "failing": 0,
        "dead": 1,
        "last_error": "PublishRejected: 422 from the destination",
        "pause": None,
        "circuit": None,
    }
    assert [each["failed_per_minute"] for each in found["destinations"]] == [1.0, 1.0]
    assert [each["command"] for each in found["problems"]] == [
        "receiver deliveries list --destination main --state pending",
        "receiver deliveries list --destination spare --state dead",
    ]


async def test_delivered_events_make_a_rate(site: Site) -> None:
    """The rate is of the last minutes; a webhook's time is that of the newest event."""
    world = site.world
    world.add_destination("main")
    for number in range(3):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until_states(deliveries, delivered=3)
    found = await site.read()
    assert [each["delivered_per_minute"] for each in found["destinations"]] == [3.0, 0.0]
    assert found["last_webhook_at"] is not None
    assert abs(found["last_webhook_at"] - datetime.now(UTC)) < timedelta(minutes=5)
    assert texts(found) == ["no worker is running: nothing is forwarded"]


async def test_the_last_hour_is_counted_by_minute(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events, deliveries and failed attempts have a count for each minute; a large hour has fewer minutes."""
    world = site.world
    main = world.add_destination("main", retry=RetryPolicy(initial=60, cap=60, give_up_after=600))
    for number in range(3):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until_states(deliveries, delivered=3)

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("the broker says no", reason="connect")

    main.behave = fail
    await world.add(plain("r-3"))
    async with world.working():
        await world.until_states(deliveries, deliveries.c.error.is_not(None), pending=1)
    await world.change(events, events.c.request_id == "r-0", received_at=db_time(-30 * 60.0))
    await world.change(events, events.c.request_id == "r-1", received_at=db_time(-61 * 60.0))
    found = await site.read()
    counted = [found["events_last_hour"], found["delivered_last_hour"], found["failed_last_hour"]]
    assert [len(each) for each in counted] == [60] * 3
    # A test may run from one minute to the next.
    assert sum(found["events_last_hour"][-2:]) == 2
    assert sum(found["events_last_hour"][28:31]) == 1
    assert [sum(each) for each in counted] == [3, 3, 1]
    monkeypatch.setattr(status, "MAX_COUNTED_EVENTS", 2)
    monkeypatch.setattr(status, "MAX_COUNTED_ATTEMPTS", 1)
    found = await site.read()
    assert len(found["events_last_hour"]) < 30
    assert (found["failed_last_hour"], found["delivered_last_hour"]) == ([1], [0])


async def test_rows_that_wait_too_long_are_problems(site: Site) -> None:
    """A lane that stands still, a destination without a worker and a removed one are each named."""
    world = site.world
    world.add_destination("main")
    world.add_destination("gone")
    await world.add(plain("r-1"))
    await world.fan_out()
    await world.add(plain("r-2"))
    await world.change(events, received_at=db_time(-3600.0))
    async with a_running_worker(world.database, "spare"):
        found = await site.read()
    assert texts(found) == [
        "gone is not configured any more: 1 pending or dead",
        "main: 1 pending, and no running worker serves it",
        "lane fanout: 1 waiting, the oldest for 60 min",
    ]
    await world.change(deliveries, created_at=db_time(-7 * 3600.0))
    async with a_running_worker(world.database, "main"):
        found = await site.read()
    assert "main: 1 pending, the oldest for 7 h" in texts(found)


async def test_rejected_requests_and_unsure_jobs_are_problems(site: Site) -> None:
    """Both are counted for their own time: an hour and a day."""
    world = site.world
    for key, state in (("k-1", "unsure"), ("k-2", "completed")):
        job_id = await world.add_job(key)
        await world.change(jobs, jobs.c.id == job_id, state=state)
    async with world.database.write() as connection:
        for hours in (0.1, 2.0):
            row = NewRejection(
                received_at=datetime.now(UTC) - timedelta(hours=hours),
                source="clipia",
                reason="mismatch",
                cause="unknown_secret",
                diagnosis="forged",
                path="/clipia/webhook",
                peer=None,
                headers=[],
                body=None,
                body_size=None,
                size=100,
            )
            await rejections.insert(connection, [row])
    async with a_running_worker(world.database, "main"):
        found = await site.read()
    assert found["jobs_last_day"] == {"unsure": 1, "completed": 1}
    assert found["rejections_last_hour"] == {"unknown_secret": 1}
    assert texts(found) == [
        "jobs that may or may not have reached Clipia: 1",
        "rejected requests in the last hour: 1",
    ]


async def test_a_full_disk_is_a_problem(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk of the stored files, and on SQLite that of the database."""
    monkeypatch.setattr("receiver.status.LEAST_FREE_SHARE", 1.1)
    found = await site.read()
    holds = ["media", "database"] if site.world.database.is_sqlite else ["media"]
    assert [each["holds"] for each in found["disks"]] == holds
    assert len([each for each in texts(found) if each.endswith("% left")]) == len(holds)


async def test_a_download_that_fails_is_a_problem(site: Site) -> None:
    """With the error of the last attempt, such as that the disk has no space, and the way to its event."""
    await site.world.add(body("r-1"))
    await site.world.fan_out()
    await site.world.change(media, state="pending", error="StorageUnavailable: no space left")
    found = await site.read()
    assert "downloads that fail: 1, the last one: StorageUnavailable: no space left" in texts(found)
    assert "receiver events show r-1" in [each["command"] for each in found["problems"]]


async def test_the_api_shows_the_status(site: Site) -> None:
    """G1: it needs the scope `read`."""
    app = create_app(site.settings, worker=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://receiver") as client,
    ):
        answers = [
            await client.get("/v1/status", headers={"authorization": f"Bearer {token}"})
            for token in ("tok-watcher-0123456789", "tok-submit-0123456789", "wrong-0123456789")
        ]
    assert [each.status_code for each in answers] == [200, 403, 401]
    assert answers[0].json()["problems"][0]["command"] == "receiver worker"
