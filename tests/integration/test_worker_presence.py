"""Presence of workers, on both databases."""

import asyncio
import os
import socket
import time
import uuid

import pytest
from sqlalchemy import update
from support.events import until

from receiver.db import workers
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.tables import workers as table
from receiver.errors import DatabaseUnavailable
from receiver.lanes.worker_presence import present

SECONDS = 30.0


async def seen(database: Database) -> list[workers.SeenWorker]:
    """Return the workers that the database has."""
    async with database.read() as connection:
        return list(await workers.find_runs(connection))


async def age(database: Database, *, seconds: float) -> None:
    """Make each row `seconds` old."""
    async with database.write() as connection:
        await connection.execute(update(table).values(seen_at=db_time(-seconds)))


async def until_seen(database: Database, count: int) -> list[workers.SeenWorker]:
    """Wait until `count` processes are running."""
    deadline = time.monotonic() + SECONDS
    while True:
        running = [run for run in await seen(database) if run.is_running]
        if len(running) == count:
            return running
        assert time.monotonic() < deadline, running
        await asyncio.sleep(0.02)


async def test_a_worker_is_seen_while_it_works(database: Database) -> None:
    """Each process has one row while it works, with its lanes and its account, and none afterwards."""
    lanes = ["fanout", "media", "destination:orders"]
    async with present(database, lanes, account="live-0123456789abcdef"):
        (run,) = await until_seen(database, 1)
        assert (run.host, run.pid, run.lanes) == (socket.gethostname()[:255], os.getpid(), lanes)
        assert run.account == "live-0123456789abcdef"
        async with present(database, ["fanout"], account=None):
            assert len(await until_seen(database, 2)) == 2
        await until_seen(database, 1)
    assert await seen(database) == []


async def test_lanes_that_come_and_go_are_seen(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: after a reload the row has the new lanes, so that other processes know who serves a destination."""
    monkeypatch.setattr(workers, "RENEW_SECONDS", 0.05)
    lanes = ["fanout", "destination:old"]
    async with present(database, lanes, account=None):
        await until_seen(database, 1)
        lanes[1] = "destination:new"

        async def are_seen() -> bool:
            return (await seen(database))[0].lanes == lanes

        await until(are_seen)


async def test_a_row_is_renewed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a worker's row is old, or was deleted by others, the next renewal restores it."""
    monkeypatch.setattr(workers, "RENEW_SECONDS", 0.05)
    async with present(database, ["fanout"], account=None):
        (first,) = await until_seen(database, 1)
        for old in (workers.FRESH_SECONDS + 1, workers.KEPT_SECONDS + 1):
            await age(database, seconds=old)
            (again,) = await until_seen(database, 1)
            assert again.id == first.id


async def test_a_crashed_worker_is_forgotten(database: Database) -> None:
    """A row that is not renewed counts as stopped after half a minute, and is deleted after an hour."""
    crashed = workers.WorkerRun(id=uuid.uuid4(), host="gone", pid=1, lanes=["poll"], account=None)
    async with database.write() as connection:
        await workers.renew(connection, crashed)
    assert [run.is_running for run in await seen(database)] == [True]
    await age(database, seconds=workers.FRESH_SECONDS + 1)
    assert [run.is_running for run in await seen(database)] == [False]
    await age(database, seconds=workers.KEPT_SECONDS + 1)
    async with present(database, ["fanout"], account=None):
        (alive,) = await until_seen(database, 1)
        assert alive.host != "gone"
        assert len(await seen(database)) == 1


async def test_a_database_that_is_away_stops_no_worker() -> None:
    """If a row cannot be written, that is logged and tried again; the work inside the block goes on."""
    database = Database("postgresql://nobody@127.0.0.1:1/x")
    done = False
    async with present(database, ["fanout"], account=None):
        await asyncio.sleep(0.1)
        done = True
    assert done
    with pytest.raises(DatabaseUnavailable):
        await seen(database)
    await database.close()
