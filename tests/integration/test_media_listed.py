"""Files in any field of an output, fetched or skipped, and the reports about them."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cloudevents.core.v1.event import CloudEvent
from prometheus_client import REGISTRY
from support.events import World, opened
from support.media import PNG, response, site
from support.payloads import body

from receiver.core.output_files import FileRules
from receiver.db import reads
from receiver.db.database import Database
from receiver.db.tables import deliveries, events, media
from receiver.media import MediaHosts

# The databases do not differ in these tests.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)


@pytest.fixture
async def cdn() -> AsyncIterator[str]:
    """A CDN that has one image, at every path."""
    async with site(response(PNG)) as server:
        yield server.origin


@pytest.fixture
async def world(database: Database, tmp_path: Path, cdn: str) -> AsyncIterator[World]:
    """All parts but the web, with one destination and the rules of a running service."""
    async with opened(database, tmp_path / "media", cdn) as made:
        made.rules = FileRules(skip_reason=MediaHosts.parse([cdn]).skip_reason)
        made.add_destination("main")
        yield made


async def deliver(world: World, output: Any) -> list[dict[str, Any]]:
    """Take an event from its receipt to its message; return the message's files."""
    await world.add(body("r-1", payload={"model": "m", "output": output, "cost": 1}))
    async with world.working():
        await world.until_states(deliveries, delivered=1)
    message: CloudEvent = world.recorders["main"].published[0]
    data: Any = message.get_data()
    found: list[dict[str, Any]] = data["media"]
    return found


def skipped(reason: str) -> float:
    """Return the metric of skipped URLs."""
    return REGISTRY.get_sample_value("receiver_media_skipped_total", {"reason": reason}) or 0.0


async def test_files_in_undocumented_places_are_fetched(world: World, cdn: str) -> None:
    """B10: videos, models, previews and covers are stored, and the message names their fields."""
    output = {
        "videos": [{"url": f"{cdn}/1"}],
        "model_3d": f"{cdn}/m.glb",
        "presentation": {"previews": [[f"{cdn}/p.png"]]},
        "audio": {"cover": f"{cdn}/c"},
    }
    files = await deliver(world, output)
    assert [(file["field"], file["kind"], file["state"]) for file in files] == [
        ("/audio/cover", "image", "stored"),
        ("/model_3d", "file", "stored"),
        ("/presentation/previews/0/0", "image", "stored"),
        ("/videos/0/url", "video", "stored"),
    ]
    assert [file["content_type"] for file in files] == [
        "image/png",
        "image/png",
        "image/png",
        "application/octet-stream",
    ]


async def test_skipped_files_are_reported(world: World, cdn: str) -> None:
    """B10: a foreign host, a long URL and an invalid one appear in the API, the message and a metric."""
    before = {reason: skipped(reason) for reason in ("host", "length", "scheme")}
    long = f"{cdn}/" + "x" * 9000
    files = await deliver(
        world,
        {
            "images": [{"url": f"{cdn}/a.png"}, {"url": "https://example.com/b.png"}, "no URL"],
            "video": {"original_url": long, "url": f"{cdn}/v"},
        },
    )
    expected = [
        ("images[0].url", "original", "stored", None),
        ("images[1].url", "original", "skipped", "https://example.com:443 is not in RECEIVER_MEDIA_HOSTS"),
        ("images[2]", "original", "skipped", "it is not an http or https URL"),
        (
            "video.original_url",
            "original",
            "skipped",
            f"the URL has {len(long)} characters, more than 8192",
        ),
        ("video.url", "display", "stored", None),
    ]
    names = ("field", "variant", "state", "error")
    assert [tuple(file[name] for name in names) for file in files] == expected
    async with world.database.read() as connection:
        event = await reads.show_event(connection, "r-1")
        (listed,) = await reads.list_events(connection, limit=1)
    assert event is not None
    shown: list[Any] = [*event["media"]]
    assert [tuple(file[name] for name in names) for file in shown] == expected
    assert listed["media"] == {"stored": 2, "skipped": 3}
    assert {reason: skipped(reason) - count for reason, count in before.items()} == {
        "host": 1,
        "length": 1,
        "scheme": 1,
    }


async def test_an_event_with_skipped_files_only_is_delivered_without_waiting(world: World) -> None:
    """B10: if no file is to be fetched, the event is ready and its delivery is due."""
    await world.add(body("r-1", payload={"output": {"a": "https://example.com/b.png"}}))
    await world.fan_out()
    assert await world.states(events) == {"ready": 1}
    assert await world.states(media) == {"skipped": 1}
    (row,) = await world.rows(deliveries)
    assert row["next_attempt_at"] is not None


async def test_the_limits_of_the_settings_hold(world: World, cdn: str) -> None:
    """B10: as many files are fetched as the settings allow."""
    world.rules = FileRules(skip_reason=world.rules.skip_reason, max_files=1)
    files = await deliver(world, {"images": [f"{cdn}/1", f"{cdn}/2"]})
    assert [(file["state"], file["error"]) for file in files] == [
        ("stored", None),
        ("skipped", "the event has more than 1 files"),
    ]
