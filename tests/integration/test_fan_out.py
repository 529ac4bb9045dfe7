"""From the stored event to the confirmed message, on both databases, with files from a real CDN."""

import asyncio
import itertools
import statistics
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent
from prometheus_client import REGISTRY
from sqlalchemy import Table, update
from structlog.testing import capture_logs
from support import events as support_events
from support.events import plain, with_files
from support.payloads import body, failure

from receiver.core.lane_names import wake_no_lane
from receiver.db import inbox, leases, outbox, status
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import Claim, StoredEvent
from receiver.db.status import FailingFile
from receiver.db.tables import attempts, deliveries, events, media
from receiver.errors import DatabaseUnavailable, PublishFailed, PublishRejected, StorageUnavailable
from receiver.lanes.fan_out import FanOut
from receiver.lanes.worker import Timing
from receiver.media.storage import local
from receiver.media.storage.local import LocalStorage
from receiver.sandbox import SandboxOptions, create_app, running

SECONDS = 15.0
DELIVERED = {"destination": "main", "outcome": "delivered"}


class World(support_events.World):
    """A world with one destination."""

    def __init__(self, database: Database, folder: Path, media_host: str) -> None:
        super().__init__(database, folder, media_host)
        self.recorder = self.add_destination("main")

    async def until(self, table: Table, *states: str) -> list[dict[str, Any]]:
        """Wait until the rows of a table have exactly these states; return the rows."""
        await self.until_states(table, **Counter(states))
        return await self.rows(table)

    async def until_tried(self, table: Table) -> dict[str, Any]:
        """Wait until the only row of a table has a failed attempt on record; return the row."""

        async def find_tried() -> dict[str, Any] | None:
            rows = await self.rows(table)
            return rows[0] if rows and rows[0]["error"] else None

        return await support_events.until(find_tried)


@pytest.fixture
async def cdn() -> AsyncIterator[str]:
    """Run a CDN with real files."""
    async with running(create_app(SandboxOptions())) as url:
        yield url


@pytest.fixture
async def world(database: Database, tmp_path: Path, cdn: str) -> AsyncIterator[World]:
    """Return a world without a web server, with one destination."""
    made = World(database, tmp_path / "media", cdn)
    await made.downloader.start()
    yield made
    await made.downloader.close()
    await made.storage.close()


def with_image(cdn: str, request_id: str = "r-1", *, path: str = "/sandbox/sample-image.png") -> bytes:
    """Return the body of an event with one file of the CDN."""
    return with_files(cdn, request_id, path)


async def test_an_event_travels_the_whole_way(world: World, cdn: str) -> None:
    """The file is stored, then the message is confirmed, with all fields that a consumer needs."""
    await world.add(with_image(cdn))
    async with world.working():
        (delivery,) = await world.until(deliveries, "delivered")
    (file,) = await world.rows(media)
    (event,) = await world.rows(events)
    assert (event["state"], file["state"]) == ("ready", "stored")
    size = Path(file["uri"].removeprefix("file://")).stat().st_size
    assert size == file["size"]
    (message,) = world.recorder.published
    assert message.get_id() == str(event["id"])
    assert message.get_type() == "ai.clipia.generation.completed"
    assert message.get_subject() == "r-1"
    assert message.get_source() == "/clipia/webhook/clipia"
    assert message.get_time() == event["received_at"]
    assert message.get_extension("deliveryid") == str(delivery["id"])
    assert message.get_extension("attempt") == 1
    data: Any = message.get_data()
    assert {key: data[key] for key in ("request_id", "status", "model", "cost", "error")} == {
        "request_id": "r-1",
        "status": "OK",
        "model": "m",
        "cost": 3,
        "error": None,
    }
    assert data["output"]["images"][0]["width"] == 1
    assert data["media"] == [
        {
            "id": str(file["id"]),
            "url": f"{cdn}/sandbox/sample-image.png",
            "field": "images[0].url",
            "kind": "image",
            "variant": "original",
            "state": "stored",
            "uri": file["uri"],
            "sha256": file["sha256"],
            "size": file["size"],
            "content_type": "image/png",
            "error": None,
            "warning": None,
            "link": None,
        }
    ]
    assert {row["outcome"] for row in await world.rows(attempts)} == {"succeeded"}


async def test_a_failure_is_forwarded_as_failed(world: World) -> None:
    """An ERROR event has no files and is sent at once, with Clipia's error."""
    await world.add(failure("r-1"))
    async with world.working():
        await world.until(deliveries, "delivered")
    (message,) = world.recorder.published
    assert message.get_type() == "ai.clipia.generation.failed"
    data: Any = message.get_data()
    assert data["error"]["code"] == "GENERATION_FAILED"
    assert data["output"] is None


async def test_an_unrecognized_event_is_not_forwarded(world: World) -> None:
    """B11: an unrecognized event is sent to no destination, but stays in the database."""
    await world.add(b"strange")
    await world.add(plain("r-1"))
    async with world.working():
        await world.until(deliveries, "delivered")
    assert world.recorder.subjects == ["r-1"]
    assert sorted(row["state"] for row in await world.rows(events)) == ["ready", "unrecognized"]


async def test_a_destination_may_get_the_message_before_the_media(world: World, cdn: str) -> None:
    """A destination with `when = "received"` does not wait for the file; the default does."""
    early = world.add_destination("early", waits_for_media=False)
    downloading = asyncio.Event()
    save = world.downloader.save

    async def slow(**arguments: Any) -> Any:
        await downloading.wait()
        return await save(**arguments)

    world.downloader.save = slow  # type: ignore[method-assign]  # replaced on purpose
    await world.add(with_image(cdn))
    async with world.working():
        rows = await world.until(deliveries, "delivered", "pending")
        assert {row["destination"]: row["state"] for row in rows} == {"early": "delivered", "main": "pending"}
        downloading.set()
        await world.until(deliveries, "delivered", "delivered")
    first: Any = early.published[0].get_data()
    second: Any = world.recorder.published[0].get_data()
    assert (first["media"][0]["state"], first["media"][0]["uri"]) == ("pending", None)
    assert second["media"][0]["state"] == "stored"


async def test_a_dead_destination_delays_no_other(world: World) -> None:
    """E6: if one destination never answers, the others get all events nevertheless."""
    stuck = world.add_destination("stuck")
    stuck.behave = lambda _event: asyncio.sleep(3600)
    for number in range(60):
        await world.add(plain(f"r-{number}"))
    async with world.working(drain=0.1):
        await world.until(deliveries, *["delivered"] * 60, *["pending"] * 60)
    assert len(set(world.recorder.subjects)) == 60
    assert stuck.published == []


async def test_a_transient_failure_is_tried_again(world: World) -> None:
    """E4: each attempt is on record, and the message keeps its id while the attempt number grows."""
    seen: list[CloudEvent] = []

    def fail_twice(event: CloudEvent) -> None:
        seen.append(event)
        if len(seen) < 3:
            raise PublishFailed("503 from the destination", reason="status")

    world.recorder.behave = fail_twice
    await world.add(plain("r-1"))
    async with world.working():
        (delivery,) = await world.until(deliveries, "delivered")
    assert [event.get_extension("attempt") for event in seen] == [1, 2, 3]
    assert len({event.get_id() for event in seen}) == 1
    assert len({event.get_extension("deliveryid") for event in seen}) == 1
    recorded = [(row["number"], row["outcome"], row["error"]) for row in await world.rows(attempts)]
    said = "PublishFailed: 503 from the destination"
    assert recorded == [(1, "retry", said), (2, "retry", said), (3, "succeeded", None)]
    assert delivery["error"] is None


async def test_a_rejected_message_is_a_dead_letter(world: World) -> None:
    """E7: a rejected message becomes a dead letter with the reason, and the other messages go on."""

    def reject_one(event: CloudEvent) -> None:
        if event.get_subject() == "poison":
            raise PublishRejected("422 from the destination", reason="status")

    world.recorder.behave = reject_one
    for request_id in ("poison", "r-1", "r-2"):
        await world.add(plain(request_id))
    async with world.working():
        rows = await world.until(deliveries, "dead", "delivered", "delivered")
    (dead,) = [row for row in rows if row["state"] == "dead"]
    assert dead["error"] == "PublishRejected: 422 from the destination"
    assert dead["finished_at"] is not None
    assert sorted(world.recorder.subjects) == ["r-1", "r-2"]


async def test_the_schedule_ends_in_a_dead_letter(world: World) -> None:
    """E4: after three days of failures the delivery becomes a dead letter."""

    def fail(_event: CloudEvent) -> None:
        raise PublishFailed("still down", reason="connect")

    world.recorder.behave = fail
    await world.add(plain("r-1"))
    async with world.working():
        await world.until(deliveries, "pending")
        await world.change(deliveries, created_at=db_time(-4 * 86_400.0))
        await world.until(deliveries, "dead")


async def test_a_bug_in_a_destination_harms_only_its_message(world: World) -> None:
    """E7: an unexpected exception is recorded and retried, and the lane goes on."""
    publishes = 0

    def break_once(event: CloudEvent) -> None:
        nonlocal publishes
        if event.get_subject() == "odd":
            publishes += 1
            if publishes == 1:
                raise ZeroDivisionError("bug")

    world.recorder.behave = break_once
    for request_id in ("odd", "r-1"):
        await world.add(plain(request_id))
    async with world.working():
        await world.until(deliveries, "delivered", "delivered")
    assert publishes == 2
    assert "ZeroDivisionError, see the log" in {row["error"] for row in await world.rows(attempts)}


@pytest.mark.parametrize("table", [deliveries, media], ids=["delivery", "download"])
async def test_work_that_kills_its_workers_is_given_up(world: World, cdn: str, table: Table) -> None:
    """E8: a row that crashed five workers in a row is not tried a sixth time."""
    await world.add(with_image(cdn))
    async with world.working():
        await world.until(deliveries, "delivered")
    await world.change(
        table, state="pending", lost=5, attempts=5, next_attempt_at=db_time(0.0), finished_at=None
    )
    # A stored file stays, even if another attempt at it fails.
    await world.change(media, storage_key=None)
    world.recorder.published.clear()
    expected = "dead" if table is deliveries else "gone"
    async with world.working():
        (row,) = await world.until(table, expected)
    assert "gave up: 5 workers crashed while" in row["error"]
    assert world.recorder.published == []


async def test_a_missing_file_ends_as_gone_and_the_event_goes_on(world: World, cdn: str) -> None:
    """D15: a 404 is retried for an hour, then the file is given up, and the message says so."""
    await world.add(with_image(cdn, path="/absent.png"))
    async with world.working():
        file = await world.until_tried(media)
        assert (file["state"], file["attempts"]) == ("pending", 1)
        assert world.recorder.published == []
        await world.change(media, attempts=2, created_at=db_time(-3601.0), next_attempt_at=db_time(0.0))
        await world.until(media, "gone")
        await world.until(deliveries, "delivered")
    data: Any = world.recorder.published[0].get_data()
    assert (data["media"][0]["state"], data["media"][0]["uri"]) == ("gone", None)
    assert "404" in data["media"][0]["error"]


async def test_a_blocked_file_does_not_hold_the_event(world: World) -> None:
    """D1: if the guard blocks a URL, it is never fetched; the event is forwarded without its file."""
    await world.add(body("r-1"))  # this test does not allow media.clipia.ai
    async with world.working():
        (file,) = await world.until(media, "blocked")
        await world.until(deliveries, "delivered")
    assert file["attempts"] == 1


async def test_a_full_storage_pauses_downloads_and_gives_nothing_up(world: World, cdn: str) -> None:
    """D16: if the disk is full, downloads of any age pause, are not given up, and resume by themselves."""
    world.storage_pause_seconds = 0.3
    save = world.downloader.save
    calls: list[float] = []

    async def full_at_first(**arguments: Any) -> Any:
        calls.append(time.monotonic())
        if len(calls) == 1:
            raise StorageUnavailable("no space left", reason="full")
        return await save(**arguments)

    world.downloader.save = full_at_first  # type: ignore[method-assign]  # replaced on purpose
    await world.add(with_image(cdn))
    async with world.working():
        await world.until_tried(media)
        await world.change(media, created_at=db_time(-30 * 86_400.0), next_attempt_at=db_time(0.0))
        await world.until(media, "stored")
        await world.until(deliveries, "delivered")
    assert calls[1] - calls[0] >= 0.3


async def test_a_file_that_would_fill_the_disk_waits_without_being_fetched(
    world: World, cdn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D16: a reserve stays free for webhooks: the body is not read, and the download goes on by itself."""
    world.storage_pause_seconds = 0.3
    # All of the disk is reserved.
    monkeypatch.setattr(local, "RESERVED_SHARE", 1.0)
    monkeypatch.setattr(local, "MAX_RESERVED_BYTES", 2**62)
    begun = list[str]()
    put = LocalStorage.put

    async def noted(self: LocalStorage, key: str, *arguments: Any, **options: Any) -> None:
        begun.append(key)
        await put(self, key, *arguments, **options)

    monkeypatch.setattr(LocalStorage, "put", noted)
    await world.add(with_image(cdn))
    async with world.working():
        file = await world.until_tried(media)
        assert (file["state"], begun) == ("pending", [])
        assert "stay reserved for webhooks; free some space" in file["error"]
        async with world.database.read() as connection:
            failing = await status.find_failing_file(connection)
        assert failing == FailingFile(number=1, request_id="r-1", error=file["error"])
        monkeypatch.setattr(local, "RESERVED_SHARE", 0.0)
        await world.change(media, next_attempt_at=db_time(0.0))
        await world.until(media, "stored")
    async with world.database.read() as connection:
        assert await status.find_failing_file(connection) is None


async def test_shutdown_finishes_work_under_way(world: World) -> None:
    """E16: after a stop no row is claimed, and work under way is finished and recorded."""
    started = asyncio.Event()

    async def slow() -> None:
        started.set()
        await asyncio.sleep(0.3)

    world.recorder.behave = lambda _event: slow()
    await world.add(plain("r-1"))
    async with world.working():
        await started.wait()
    (delivery,) = await world.rows(deliveries)
    assert delivery["state"] == "delivered"


async def test_shutdown_releases_unfinished_work(world: World) -> None:
    """E16: work that outlasts the drain is released: due at once, with no attempt counted or recorded."""
    started = asyncio.Event()

    async def endless() -> None:
        started.set()
        await asyncio.sleep(3600)

    world.recorder.behave = lambda _event: endless()
    await world.add(plain("r-1"))
    async with world.working(drain=0.1):
        await started.wait()
    (delivery,) = await world.rows(deliveries)
    assert (delivery["state"], delivery["attempts"], delivery["lease"]) == ("pending", 0, None)
    assert await world.rows(attempts) == []
    world.recorder.behave = lambda _event: None
    async with world.working():
        await world.until(deliveries, "delivered")
    assert world.recorder.published[0].get_extension("attempt") == 1


async def test_long_work_keeps_its_lease(world: World) -> None:
    """E9: if work takes longer than a lease, the lease is renewed; two workers do it once."""
    world.lease_seconds = 0.6
    calls = 0

    async def slow() -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(2.0)

    world.recorder.behave = lambda _event: slow()
    await world.add(plain("r-1"))
    async with world.working(count=2):
        await world.until(deliveries, "delivered")
    assert calls == 1


async def test_a_lost_lease_drops_the_work(world: World) -> None:
    """E10: a worker that finds its lease taken stops that work and records no result."""
    world.lease_seconds = 0.6
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def until_cancelled() -> None:
        started.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    world.recorder.behave = lambda _event: until_cancelled()
    await world.add(plain("r-1"))
    async with world.working(drain=0.1):
        await started.wait()
        await world.change(deliveries, lease=uuid.uuid4(), next_attempt_at=db_time(3600.0))
        await asyncio.wait_for(cancelled.wait(), SECONDS)
    assert await world.rows(attempts) == []


async def test_a_result_is_recorded_when_the_database_is_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E3: if a confirmed message's result cannot be written at first, the message is not published again."""
    finish_all = leases.finish_all
    failures = 2

    async def away_at_first(
        connection: SqlConnection, table: Table, claims: Collection[Claim], **values: Any
    ) -> set[uuid.UUID]:
        nonlocal failures
        if failures:
            failures -= 1
            raise DatabaseUnavailable("gone for a moment", reason="database")
        return await finish_all(connection, table, claims, **values)

    monkeypatch.setattr(leases, "finish_all", away_at_first)
    await world.add(plain("r-1"))
    async with world.working():
        await world.until(deliveries, "delivered")
    assert len(world.recorder.published) == 1


async def test_fan_out_is_all_or_nothing(world: World, cdn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C12: a fan-out that fails half-way adds no row, and is repeated as a whole."""
    world.add_destination("second")
    insert = outbox.insert_deliveries
    calls = 0

    async def break_off(*arguments: Any, **options: Any) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise DatabaseUnavailable("gone", reason="database")
        return await insert(*arguments, **options)

    monkeypatch.setattr(outbox, "insert_deliveries", break_off)
    fan_out = FanOut(world.database, world.targets, wake=wake_no_lane)
    await world.add(with_image(cdn))
    with pytest.raises(DatabaseUnavailable):
        await fan_out.run()
    assert await world.rows(deliveries) == await world.rows(media) == []
    assert [row["state"] for row in await world.rows(events)] == ["received"]
    assert await fan_out.run() == 1
    assert len(await world.rows(deliveries)) == 2
    assert len(await world.rows(media)) == 1


async def test_a_bad_event_holds_up_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """E7: an event that cannot be fanned out stays as it is; the events before and after it go on."""
    add_work = FanOut._add_work

    async def break_on_bad(self: FanOut, connection: SqlConnection, found: Sequence[StoredEvent]) -> Any:
        added = await add_work(self, connection, found)
        if any(event.request_id == "bad" for event in found):
            raise RuntimeError("bug")
        return added

    monkeypatch.setattr(FanOut, "_add_work", break_on_bad)
    fan_out = FanOut(world.database, world.targets, wake=wake_no_lane)
    for name in ("r-1", "bad", "r-2"):
        await world.add(plain(name))
    assert await fan_out.run() == 3
    with pytest.raises(RuntimeError):
        await fan_out.run()
    assert {row["request_id"]: row["state"] for row in await world.rows(events)} == {
        "r-1": "ready",
        "bad": "received",
        "r-2": "ready",
    }
    assert len(await world.rows(deliveries)) == 2
    monkeypatch.setattr(FanOut, "_add_work", add_work)
    assert await fan_out.run() == 1
    assert len(await world.rows(deliveries)) == 3


async def test_a_busy_lane_claims_many_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """C13: if places become free one at a time, the lane does not make a claim for each of them."""
    claims: list[int] = []
    claim = leases.claim_deliveries

    async def counted(*arguments: Any, **options: Any) -> Any:
        found = await claim(*arguments, **options)
        claims.append(len(found))
        return found

    monkeypatch.setattr(leases, "claim_deliveries", counted)
    numbers = itertools.count()
    world.recorder.behave = lambda _event: asyncio.sleep(next(numbers) % 32 / 1000)
    for number in range(320):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until(deliveries, *["delivered"] * 320)
    found = [size for size in claims if size]
    assert sum(found) == 320
    assert statistics.mean(found) > 8


async def test_deliveries_are_logged_together(world: World) -> None:
    """One log line has all deliveries that were recorded together; each is counted."""
    before = REGISTRY.get_sample_value("receiver_deliveries_total", DELIVERED) or 0
    for number in range(20):
        await world.add(plain(f"r-{number}"))
    with capture_logs() as lines:
        async with world.working():
            await world.until(deliveries, *["delivered"] * 20)
    told = [line["request_ids"] for line in lines if line["event"] == "events delivered"]
    assert sorted(itertools.chain(*told)) == sorted(f"r-{number}" for number in range(20))
    assert len(told) < 20
    assert (REGISTRY.get_sample_value("receiver_deliveries_total", DELIVERED) or 0) - before == 20


async def test_several_workers_share_the_work(world: World) -> None:
    """C13: three workers forward 150 events, each once."""
    for number in range(150):
        await world.add(plain(f"r-{number}"))
    async with world.working(count=3):
        await world.until(deliveries, *["delivered"] * 150)
    assert sorted(world.recorder.subjects) == sorted(f"r-{number}" for number in range(150))


async def test_a_lane_outlives_an_unexpected_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug in a claim or in the fan-out is logged and retried; no acknowledged event stays behind."""
    world.timing = Timing(outage_pause_seconds=0.05)
    claim, lock = leases.claim_media, inbox.lock_received
    broken = {"claim", "lock"}

    async def claim_or_break(*arguments: Any, **options: Any) -> Any:
        if "claim" in broken:
            broken.remove("claim")
            raise RuntimeError("bug")
        return await claim(*arguments, **options)

    async def lock_or_break(*arguments: Any, **options: Any) -> Any:
        if "lock" in broken:
            broken.remove("lock")
            raise RuntimeError("bug")
        return await lock(*arguments, **options)

    monkeypatch.setattr(leases, "claim_media", claim_or_break)
    monkeypatch.setattr(inbox, "lock_received", lock_or_break)
    await world.add(plain("r-1"))
    async with world.working():
        await world.until(deliveries, "delivered")
    assert broken == set()


async def test_more_files_than_are_fetched(world: World, cdn: str) -> None:
    """B10: of 600 files 512 are downloaded; the others have a reason, and delay no delivery."""
    images = [{"url": f"{cdn}/sandbox/sample-image.png?{number}"} for number in range(600)]
    await world.add(body("r-1", payload={"model": "m", "output": {"images": images}, "cost": 1}))
    fan_out = FanOut(world.database, world.targets, wake=wake_no_lane)
    assert await fan_out.run() == 1
    rows = await world.rows(media)
    assert Counter(row["state"] for row in rows) == {"pending": 512, "skipped": 88}
    skipped = [row for row in rows if row["state"] == "skipped"]
    assert {row["error"] for row in skipped} == {"the event has more than 512 files"}
    assert {(row["next_attempt_at"], row["finished_at"] is None) for row in skipped} == {(None, False)}
    async with world.database.write() as connection:
        await connection.execute(update(media).where(media.c.position > 0).values(state="gone"))
        await connection.execute(update(media).where(media.c.position >= 512).values(state="skipped"))
    async with support_events.running(world.worker()):
        await support_events.until(lambda: _published(world))
    data = world.recorder.published[0].get_data()
    assert isinstance(data, dict)
    assert Counter(file["state"] for file in data["media"]) == {"stored": 1, "gone": 511, "skipped": 88}
    assert len(data["output"]["images"]) == 600


async def _published(world: World) -> bool:
    return bool(world.recorder.published)
