"""Retention each night: one run a day, in parts that any worker goes on with, each on record."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.events import World, opened, plain
from support.history import DAY
from support.payloads import SECRET

from receiver.api.metrics import RowGauges
from receiver.app import create_app
from receiver.core.lane_names import wake_no_lane
from receiver.db import retention_runs as sql
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.operation_tables import retention_runs
from receiver.db.retention_runs import Plan
from receiver.db.tables import events
from receiver.errors import StorageUnavailable
from receiver.lanes.retention import RetentionLane
from receiver.media.storage.local import LocalStorage
from receiver.metrics import RETENTION_AGE
from receiver.retention import Limits
from receiver.settings import Settings
from receiver.status import Status, read_status
from receiver.submitter import Submitter

TOKEN = "tok-retention-0123456789"
PLAN = Plan(older_than_days=90)


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Five events of 100 days ago, which were delivered, and a new one."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        await made.add_history(*(plain(f"r-{number}") for number in range(5)))
        await made.change(events, received_at=db_time(-100 * DAY))
        await made.add_history(plain("new"))
        yield made


def lane(world: World, plan: Plan = PLAN, **options: Any) -> RetentionLane:
    """Return the lane of a worker; it prunes two events at a time."""
    options = dict[str, Any](check_seconds=0.0, failure_pause_seconds=0.0, limits=Limits(events=2)) | options
    return RetentionLane(world.database, plan, LocalStorage(Path("media")), wake=wake_no_lane, **options)


async def step(worker: RetentionLane) -> bool:
    """Let a worker claim and take one part; return whether there was one."""
    works = await worker.claim(1)
    for work in works:
        await work.run()
    return bool(works)


async def finish(*workers: RetentionLane) -> int:
    """Let workers take parts in turns until none is due; return the number of parts."""
    parts = 0
    while any([await step(worker) for worker in workers]):
        parts += 1
        assert parts < 50
    return parts


async def only_run(world: World) -> dict[str, Any]:
    """Return the only run."""
    (row,) = await world.rows(retention_runs)
    return row


async def status_of(world: World, **settings: Any) -> Status:
    """Return the status."""
    loaded = Settings.load(database_url=world.database.url, clipia_webhook_secret=SECRET, **settings)
    submitter = Submitter.configured(loaded, world.database)
    try:
        return await read_status(loaded, world.database, submitter)
    finally:
        await submitter.close()


async def test_two_workers_run_once_a_day(world: World) -> None:
    """C16: they share the parts of one run, and the next run begins on the next day."""
    workers = lane(world), lane(world)
    await asyncio.gather(*(worker.claim(1) for worker in workers))
    await world.change(retention_runs, next_attempt_at=db_time(0.0), lost=0)
    assert await finish(*workers) >= 3
    run = await only_run(world)
    assert (run["state"], run["events"], run["kept"], run["by"]) == ("completed", 5, 0, "schedule")
    assert {row["request_id"] for row in await world.rows(events)} == {"new"}
    assert await finish(*workers) == 0
    await world.change(retention_runs, day="2026-01-01")
    await finish(*workers)
    assert [row["state"] for row in await world.rows(retention_runs)] == ["completed"] * 2


async def test_a_run_goes_on_where_a_killed_worker_stopped(world: World) -> None:
    """C13: the lease of the dead worker ends, and another one takes the part that was not recorded."""
    first, second = lane(world), lane(world)
    assert await step(first)
    position = (await only_run(world))["position"]
    await first.claim(1)  # and it dies
    assert await finish(second) == 0
    await world.change(retention_runs, next_attempt_at=db_time(0.0))
    await finish(second)
    run = await only_run(world)
    assert position == "events-2"
    assert (run["state"], run["events"]) == ("completed", 5)


async def test_a_run_that_kills_its_workers_is_given_up(world: World) -> None:
    """E5: five workers died; the run has failed, and the status and the alert say so."""
    worker = lane(world)
    await worker.claim(1)
    await world.change(retention_runs, next_attempt_at=db_time(0.0), lost=5)
    assert await step(worker)
    run = await only_run(world)
    assert (run["state"], run["error"]) == ("failed", "gave up: 6 workers crashed while pruning")
    found = await status_of(world)
    assert found["retention_fails"]
    assert "receiver retention list" in [each["command"] for each in found["problems"]]


@pytest.mark.parametrize("clock", [[0, -1, 0, 0], [0, 0, -2, 0]])
async def test_a_clock_that_is_set_back_makes_no_second_run(
    world: World, clock: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C16: a day that has had its run has no other one, and a run of a wrong day is one run more at most."""
    days = iter(clock)
    real = sql._today

    async def today(connection: Any) -> date:
        return await real(connection) + timedelta(days=next(days, 0))

    monkeypatch.setattr(sql, "_today", today)
    worker = lane(world)
    for _ in clock:
        await worker.claim(1)
        await world.change(retention_runs, state="completed", lease=None)
    found = [row["day"] for row in await world.rows(retention_runs)]
    assert len(found) == len(set(found)) == 2


async def test_the_days_are_utc_whatever_the_machine_says(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C16: daylight saving time neither skips nor repeats a run: it is due at 3:00 UTC each day."""
    monkeypatch.setenv("TZ", "Pacific/Auckland")
    async with world.database.read() as connection:
        before = await sql.next_due(connection)
    await lane(world).claim(1)
    async with world.database.read() as connection:
        after = await sql.next_due(connection)
    assert (before.utcoffset(), before.hour, after - before) == (timedelta(0), 3, timedelta(days=1))
    assert before <= datetime.now(UTC) < after


async def test_a_failing_storage_is_on_record_and_the_run_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D16: the error is in the run, the status and the alert; when the storage is back, the run ends well."""

    async def away(*_: Any, **__: Any) -> None:
        raise StorageUnavailable("the bucket is away", reason="error")

    worker = lane(world, Plan(older_than_days=90, media=True))
    with monkeypatch.context() as patch:
        patch.setattr("receiver.retention._delete", away)
        patch.setattr("receiver.db.pruning.list_files", _one_file)
        assert await step(worker)
    run = await only_run(world)
    assert (run["state"], run["error"]) == ("pending", "StorageUnavailable: the bucket is away")
    async with world.database.read() as connection:
        failed = await sql.find_failed(connection)
    assert failed is not None
    assert failed["id"] == run["id"]
    found = await status_of(world, retention_days=90)
    texts = [each["text"] for each in found["problems"]]
    assert "the last run of retention fails: StorageUnavailable: the bucket is away" in texts
    await finish(worker)
    run = await only_run(world)
    assert (run["state"], run["error"]) == ("completed", None)
    assert not (await status_of(world))["retention_fails"]


async def _one_file(_connection: Any, _seqs: Any) -> list[Any]:
    from receiver.db.pruning import StoredFile  # noqa: PLC0415 - for this double alone

    return [StoredFile("ab/00-image.png", LocalStorage(Path("media")).uri("ab/00-image.png"))]


async def test_a_run_without_progress_is_a_problem(world: World) -> None:
    """Its process was killed, and no worker goes on with it; so is a run that no worker begins."""
    found = await status_of(world, retention_days=90)
    assert found["retention"] is not None
    assert found["retention"]["next_at"] <= found["at"]
    await lane(world).claim(1)
    assert not (await status_of(world))["retention_fails"]
    await world.change(retention_runs, seen_at=db_time(-DAY - 60))
    assert (await status_of(world))["retention_fails"]


async def test_runs_of_operators_are_on_record_too(world: World) -> None:
    """C16: `POST /v1/prune` in parts is one run with the caller's name; a dry run leaves no record."""
    settings = Settings.load(
        database_url=world.database.url, clipia_webhook_secret=SECRET, api_tokens=f"ops:{TOKEN}"
    )
    app = create_app(settings, worker=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app),
            base_url="http://receiver",
            headers={"authorization": f"Bearer {TOKEN}"},
        ) as client,
    ):
        answer = (await client.post("/v1/prune", json={"older_than_days": 90, "dry_run": True})).json()
        assert answer["run"] is None
        assert (await client.get("/v1/retention")).json()["data"] == []
        parts = 0
        body: dict[str, Any] = {"older_than_days": 90}
        while body:
            answer = (await client.post("/v1/prune", json=body)).json()
            parts += 1
            states = [each["state"] for each in (await client.get("/v1/retention")).json()["data"]]
            assert states == ["pending" if answer["next"] else "completed"]
            more = answer["next"] is not None
            body = {name: answer[name] for name in ("before", "next", "run")} if more else {}
        (run,) = (await client.get("/v1/retention")).json()["data"]
    assert parts > 1
    assert (run["by"], run["events"], run["older_than_days"], run["error"]) == ("ops", 5, 90, None)
    # No lane goes on with it.
    await world.change(retention_runs, state="pending")
    await world.change(retention_runs, day=None)
    worker = lane(world)
    await finish(worker)
    assert [row["by"] for row in await world.rows(retention_runs) if row["state"] == "completed"] == [
        "schedule"
    ]


async def test_the_metric_is_the_age_of_the_last_success(world: World) -> None:
    """It grows until a run succeeds, and is 0 without retention."""
    await lane(world).claim(1)
    await world.change(retention_runs, created_at=db_time(-2 * DAY))
    for days, least in ((None, 0.0), (90, 2 * DAY)):
        settings = Settings.load(
            database_url=world.database.url, clipia_webhook_secret=SECRET, retention_days=days
        )
        submitter = Submitter.configured(settings, world.database)
        await RowGauges(settings, world.database, submitter)()
        await submitter.close()
        assert least <= RETENTION_AGE._value.get() < least + 60
    await world.change(retention_runs, state="completed", finished_at=db_time(-30.0))
    async with world.database.read() as connection:
        assert 30 <= await sql.success_age(connection) < 90
