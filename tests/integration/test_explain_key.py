"""An explanation is found by any id of its object, on both databases; and the command's exit status."""

import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlalchemy import update
from support.command_line import Commands
from support.events import World, opened, plain, with_files

from receiver.db import destinations, rejections, tables
from receiver.db.database import Database
from receiver.db.rejections import NewRejection
from receiver.destination_settings import DestinationSettings
from receiver.explain import Explanation, explain_key


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world with one destination."""
    async with opened(database, tmp_path / "media") as made:
        made.add_destination("main")
        yield made


MAIN = DestinationSettings.model_validate({"name": "main", "url": "file:/dev/null"})


async def explained(world: World, key: object, *configured: DestinationSettings) -> Explanation:
    """Explain an id in a receiver with one destination."""
    return await explain_key(world.database, str(key), lambda: configured or (MAIN,))


async def test_all_ids_lead_to_the_same_explanation(world: World) -> None:
    """Event, request, job, key, delivery, file and its URL are found; only the delivery stands alone."""
    job_id = await world.add_job("order-1", request_id="r-1")
    await world.add_job("order-1", caller="other")
    await world.add(with_files("https://media.clipia.ai", "r-1", "/a/b.png"))
    await world.fan_out()
    (event,) = await world.rows(tables.events)
    (delivery,) = await world.rows(tables.deliveries)
    (file,) = await world.rows(tables.media)
    link = f"https://receiver.internal/v1/media/{file['id']}"
    keys = [event["id"], "r-1", job_id, delivery["id"], file["id"], file["url"], link]
    for key in keys:
        found = await explained(world, key)
        assert (found["event_id"], found["job_id"], found["request_id"]) == (event["id"], job_id, "r-1"), key
        assert found["delivery_id"] == (delivery["id"] if key == delivery["id"] else None)
        assert found["state"] == "no_worker"
    other = await explained(world, "order-1")
    # The newest job with the key, and a note about the other one.
    assert (other["state"], "1 other callers" in other["verdict"]) == ("no_worker", True)
    for nothing in ("r-2", uuid.uuid4(), "https://media.clipia.ai/none", "a\0b", "\ud800", ""):
        assert (await explained(world, nothing))["state"] == "unknown"


async def test_shared_state_of_destinations_is_in_the_verdict(world: World) -> None:
    """Pause, removal and filter are those of the settings and of the database."""
    await world.add(plain("r-1"))
    await world.fan_out()
    async with world.database.write() as connection:
        await destinations.pause(connection, "main", by="ops", reason="their deploy")
    found = await explained(world, "r-1")
    assert found["state"] == "destination_paused"
    assert "by ops: their deploy" in found["verdict"]
    other = DestinationSettings.model_validate(
        {"name": "other", "url": "file:/dev/null", "filter": {"status": "ERROR"}}
    )
    removed = await explained(world, "r-1", other)
    assert removed["state"] == "destination_removed"
    assert any("other: its filter leaves the event out" in fact["text"] for fact in removed["facts"])


async def test_a_lost_webhook_is_found_among_the_rejected(world: World) -> None:
    """An id of no event leads to the rejected request that contains it."""
    rejection = NewRejection(
        received_at=datetime.now(UTC),
        source="clipia",
        reason="stale",
        cause="clock",
        diagnosis="the clock is off by +413 s",
        path="/clipia/webhook",
        peer=None,
        headers=[],
        body_size=20,
        size=100,
        body=b'{"request_id": "r-lost-1"}',
    )
    async with world.database.write() as connection:
        await rejections.insert(connection, [rejection])
    found = await explained(world, "r-lost-1")
    assert (found["state"], "off by +413 s" in found["verdict"]) == ("webhook_rejected", True)
    job_id = await world.add_job("order-1", request_id="r-lost-1")
    assert (await explained(world, job_id))["state"] == "webhook_rejected"
    assert (await explained(world, "r-lost"))["state"] == "webhook_rejected"
    # A short text would be in many requests by chance.
    assert (await explained(world, "r-l"))["state"] == "unknown"


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_the_command_prints_the_reason_and_ends_with_its_status(
    world: World,
    database_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    quiet: None,  # noqa: ARG001 - a fixture
) -> None:
    """`receiver why` has the exit status of the outcome; an id with a slash is no other path."""
    (tmp_path / "receiver.toml").write_text('[[destinations]]\nname = "main"\nurl = "file:main.jsonl"\n')
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database_url)
    commands = Commands(world, capsys, monkeypatch)
    await world.add_history(plain("r-1"), plain("r/2"))
    for key in ("r-1", "r/2"):
        assert "delivered: cost 1 credits; delivered to main at " in await commands.run("why", key)
    assert (await commands.try_("why", "https://x/absent")).status == 4
    async with world.database.write() as connection:
        await connection.execute(update(tables.deliveries).values(state="dead", error="PublishRejected: no"))
    said = await commands.try_("why", "r-1")
    (first, _) = await world.rows(tables.deliveries)
    assert (said.status, f"$ receiver deliveries retry {first['id']}" in said.out) == (11, True), said
