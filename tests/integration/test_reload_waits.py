"""Reloads while an old destination still has work under way."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent
from support.events import insert_event, plain, until
from support.payloads import SECRET

from receiver.db.database import Database
from receiver.destinations.file import FileDestination
from receiver.ingest import make_event
from receiver.lanes import live_destinations
from receiver.lanes.worker import Wakeups
from receiver.process import running_worker
from receiver.settings import Settings
from receiver.submitter import Submitter


async def test_an_attempt_that_lasts_keeps_no_reload_waiting(
    tmp_path: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: while an old destination finishes its work it is changed, removed and added; each event comes once.

    Only the newest of its successors gets a lane, after the old one has ended.
    """
    monkeypatch.setattr(live_destinations, "RELOAD_SECONDS", 0.05)
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    database = Database(f"sqlite:///{path}")

    def settings(*files: str) -> Settings:
        tables: list[dict[str, Any]] = [
            {"name": "orders", "url": f"file:{tmp_path / name}", "when": "received"} for name in files
        ]
        return Settings.load(
            database_url=database.url,
            clipia_webhook_secret=SECRET,
            destinations=tables or [{"name": "other", "url": "memory:"}],
        )

    async def add(name: str) -> None:
        async with database.write() as connection:
            await insert_event(connection, make_event("clipia", plain(name), received_at=0.0))

    def count(name: str) -> list[int]:
        text = (tmp_path / name).read_text() if (tmp_path / name).exists() else ""
        return [text.count(f'"subject":"{each}"') for each in ("r-1", "r-2")]

    async def is_delivered() -> bool:
        return count("first") == [1, 0] and count("last") == [0, 1]

    submitter = Submitter.configured(settings("first"), database)
    begun, gate = asyncio.Event(), asyncio.Event()
    publish_first = FileDestination.publish_first

    async def publish_late(self: FileDestination, events: Sequence[CloudEvent]) -> Any:
        begun.set()
        await gate.wait()
        return await publish_first(self, events)

    monkeypatch.setattr(FileDestination, "publish_first", publish_late)
    async with running_worker(settings("first"), database, Wakeups(), submitter) as worker:
        await add("r-1")
        await begun.wait()
        for files in (("between",), (), ("last",)):
            await asyncio.wait_for(worker.replace(settings(*files)), 20)
        await add("r-2")
        await asyncio.sleep(0.2)
        assert (count("last"), worker.lanes.count("destination:orders")) == ([0, 0], 1)
        gate.set()
        await until(is_delivered)
        assert worker.lanes.count("destination:orders") == 1
    assert count("between") == [0, 0]
    await submitter.close()
    await database.close()
