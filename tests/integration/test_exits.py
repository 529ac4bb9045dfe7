"""No row waits forever: if work cannot go on, it is set aside, or a command ends it; on both databases."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.events import World, opened, plain, with_files

from receiver import unrecognized
from receiver.core.lane_names import wake_no_lane
from receiver.core.retry import GIVE_UP_SECONDS
from receiver.core.routing import RoutingFacts, mismatch
from receiver.db import outbox
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.selection import Selection
from receiver.db.tables import attempts, deliveries, events, media
from receiver.destination_settings import FilterSettings
from receiver.errors import StorageUnavailable
from receiver.lanes import targets
from receiver.lanes.fan_out import FanOut

CDN = "https://media.clipia.ai"


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server."""
    async with opened(database, tmp_path / "media") as made:
        yield made


@pytest.fixture
def bad_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the fan-out of events of the model `bad` fail like a bug."""

    def fail_for_bad(wanted: FilterSettings, facts: RoutingFacts) -> str | None:
        if facts.model == "bad":
            raise KeyError("a mistake")
        return mismatch(wanted, facts)

    monkeypatch.setattr(targets, "mismatch", fail_for_bad)


@pytest.mark.usefixtures("bad_model")
async def test_events_that_fail_hold_up_no_others(world: World) -> None:
    """E7: if failing events could fill a batch, they rest, and younger events are fanned out meanwhile."""
    world.add_destination("main")
    for number in range(6):
        await world.add(plain(f"bad-{number}", model="bad"))
    await world.add(plain("good"))
    fan_out = FanOut(world.database, world.targets, wake=wake_no_lane, rest_seconds=3600.0)
    for _ in range(2):
        with pytest.raises(KeyError):
            await fan_out.run(limit=3)
    assert await fan_out.run(limit=3) == 1
    assert await fan_out.run(limit=3) == 0, "resting events must not be tried again"
    assert await world.sent_to() == {("good", "main")}
    assert await world.states(events) == {"received": 6, "ready": 1}
    fan_out = FanOut(world.database, world.targets, wake=wake_no_lane, rest_seconds=-1.0)
    for _ in range(2):
        with pytest.raises(KeyError):
            await fan_out.run(limit=6)


async def test_an_event_that_always_fails_is_set_aside(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """E7: after three days, with an hour of failures, it is `unrecognized`; `events recover` undoes that."""
    world.add_destination("main")
    for name in ("old", "young"):
        await world.add(plain(name, model="bad"))
    long_ago = datetime.now(UTC) - timedelta(seconds=GIVE_UP_SECONDS + 1)
    await world.change(events, events.c.request_id == "old", received_at=long_ago)
    with monkeypatch.context() as patch:
        patch.setattr(targets, "mismatch", lambda *_: 1 / 0)
        fan_out = FanOut(world.database, world.targets, wake=wake_no_lane)
        with pytest.raises(ZeroDivisionError):
            await fan_out.run()
        assert await world.states(events) == {"received": 2}, "the first failure must not set an event aside"
        fan_out._min_failing_seconds = 0.0
        with pytest.raises(ZeroDivisionError):
            await fan_out.run()
    found = {row["request_id"]: (row["state"], row["reason"]) for row in await world.rows(events)}
    assert found == {"old": ("unrecognized", "fan_out"), "young": ("received", None)}
    recovered, _ = await unrecognized.recover_part(world.database, after=0, dry_run=False)
    assert [each.outcome for each in recovered] == ["accepted"]
    await world.fan_out()
    assert await world.sent_to() == {("old", "main"), ("young", "main")}
    assert {row["reason"] for row in await world.rows(events)} == {None}


async def test_downloads_can_be_given_up(world: World) -> None:
    """E8: files that cannot be stored end as `gone`, the message is sent, a late result is not recorded."""
    main = world.add_destination("main")
    await world.add(with_files(CDN, "r-1", "/a.png", "/b.png"))
    await world.add(with_files(CDN, "r-2", "/c.png"))
    await world.fan_out()
    (claimed,) = await world.media_lane().claim(1)
    async with world.database.write() as connection:
        (seq,) = (await Selection(ids=("r-1",)).find_seqs(connection))["r-1"]
        assert await outbox.count_pending_media(connection, seq) == 2
        assert await outbox.give_up_media(connection, seq, by="ops") == 2
        assert await outbox.give_up_media(connection, seq, by="ops") == 0
    world.downloader.save = full  # type: ignore[method-assign]  # replaced on purpose
    await claimed.run()
    mine = media.c.event_seq == seq
    assert {(row["state"], row["error"]) for row in await world.rows(media, mine)} == {
        ("gone", "given up by ops")
    }
    assert await world.states(media) == {"gone": 2, "pending": 1}
    assert [row["error"] for row in await world.rows(attempts)] == ["given up by ops"] * 2
    async with world.working():
        await world.until_states(deliveries, pending=1, delivered=1)
    (message,) = main.published
    data: Any = message.get_data()
    assert [file["state"] for file in data["media"]] == ["gone", "gone"]


async def full(**_: Any) -> Any:
    """Fail like a storage that is full."""
    raise StorageUnavailable("too large for this storage", reason="full")


async def test_a_file_that_cannot_be_stored_delays_no_other(world: World) -> None:
    """D16: if the storage refuses a file, downloads pause; the same refusal again does not pause them."""
    world.add_destination("main")
    await world.add(with_files(CDN, "r-1", "/a.png"))
    await world.fan_out()
    lane = world.media_lane()
    world.downloader.save = full  # type: ignore[method-assign]  # replaced on purpose
    (work,) = await lane.claim(1)
    await work.run()
    await world.change(media, next_attempt_at=db_time(0.0))
    assert await lane.claim(1) == []
    lane._paused_until = 0.0
    (work,) = await lane.claim(1)
    with capture_logs() as logs:
        await work.run()
    assert [entry["event"] for entry in logs] == ["media not stored"]
    await world.change(media, next_attempt_at=db_time(0.0))
    assert len(await lane.claim(1)) == 1
