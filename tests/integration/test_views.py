"""The typed rows of `db.views` against the queries that return them."""

import time
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import get_type_hints

import pytest
from support.events import World, opened
from support.payloads import body

from receiver.db import inbox, reads, views
from receiver.db.database import Database
from receiver.db.leases import record_attempt
from receiver.db.rows import Attempt
from receiver.db.tables import deliveries, media
from receiver.ingest import make_event


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Everything but the web, without destinations."""
    async with opened(database, tmp_path / "media") as made:
        yield made


def check(row: object, view: type) -> None:
    """Compare the keys of a row with those that a view declares."""
    assert isinstance(row, Mapping)
    assert (view.__name__, {str(key) for key in row}) == (
        view.__name__,
        get_type_hints(view).keys() - {"recoverable"},
    )


async def test_rows_of_events_have_the_keys_of_their_views(world: World) -> None:
    """An event, its summary and all rows that refer to it have exactly the declared keys."""
    world.add_destination("main")
    await world.add_history(body("r-1"))
    event = make_event("clipia", body("r-1"), received_at=time.time(), secret_id="0", signed_at=time.time())
    attempt = Attempt(number=1, started_at=datetime.now(UTC), duration_ms=1, outcome="retry")
    works = [*await world.rows(media), *await world.rows(deliveries)]
    async with world.database.write() as connection:
        await inbox.record_receipts(connection, [(1, event, "duplicate")])
        for work in works:
            await record_attempt(connection, work["id"], attempt)
    async with world.database.read() as connection:
        (summary,) = await reads.list_events(connection, limit=10)
        found = await reads.find_event(connection, "r-1")
        shown = await reads.show_event(connection, "r-1")
        (listed,) = await reads.list_deliveries(connection, limit=10)
    check(summary, views.EventSummary)
    check(found, views.EventWithBody)
    check(shown, views.EventDetails)
    check(listed, views.ListedDelivery)
    assert shown is not None
    check(shown["receipts"][0], views.Receipt)
    check(shown["media"][0], views.FileWithLog)
    check(shown["deliveries"][0], views.DeliveryWithLog)
    check(shown["media"][0]["attempt_log"][0], views.LoggedAttempt)


async def test_rows_of_stored_files_have_the_keys_of_their_view(world: World) -> None:
    """A file to be checked has exactly the declared keys."""
    await world.add_history(body("r-1"))
    await world.change(media, state="stored")
    async with world.database.read() as connection:
        (stored,) = await reads.list_stored(connection, limit=10, after=None, since=None)
    check(stored, views.FileToVerify)


async def test_rows_of_jobs_and_replays_have_the_keys_of_their_views(world: World) -> None:
    """A job, its event, the sums of jobs and a replay have exactly the declared keys."""
    world.add_destination("main")
    job_id = await world.add_job("j-1", request_id="r-1")
    await world.add_history(body("r-1"))
    order = await world.order(selection={}, all=True)
    async with world.database.read() as connection:
        job = await reads.show_job(connection, job_id)
        (listed,) = await reads.list_jobs(
            connection,
            limit=10,
            metadata={},
            **dict.fromkeys(("before", "caller", "state", "model", "since", "until")),
        )
        (costs,) = await reads.job_costs(connection, by="day")
        (replay,) = await world.replays.list_orders(limit=10)
    check(job, views.JobDetails)
    check(listed, views.JobDetails)
    assert job is not None
    for found in (job, listed):
        check(found["event"], views.JobEvent)
    assert job["event"] is not None
    check(job["event"]["media"][0], views.File)
    check(job["event"]["deliveries"][0], views.Delivery)
    assert set(costs) | {"caller", "model"} == get_type_hints(views.JobCosts).keys()
    check(replay, views.ReplayHead)
    check(order, views.ReplayDetails)
