"""Replays that download files again that are no media, are intact or were skipped."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import ValidationError
from sqlalchemy import delete
from support.events import World, opened, with_files
from support.media import PNG, SAMPLES, response, site, stored_files
from support.payloads import body

from receiver.core.output_files import FileRules
from receiver.db import outbox
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.replays import add_media
from receiver.db.rows import NewMedia
from receiver.db.tables import events, media, replays
from receiver.media import MediaHosts
from receiver.media.verify import verify
from receiver.replays import ReplayRequest

# The databases do not differ here.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

PAGE = response(b"<html><body>Please wait</body></html>")
OTHER = SAMPLES["image/gif"].data


class Cdn:
    """Answers each request with the current `answer`."""

    def __init__(self, answer: bytes) -> None:
        self.answer = answer
        self.requests: list[bytes] = []

    async def respond(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        """Answer."""
        self.requests.append(request.split(b" ")[1])
        writer.write(self.answer)


@asynccontextmanager
async def fetched(database: Database, folder: Path, cdn: Cdn) -> AsyncIterator[World]:
    """Add an event with one image, and download the image."""
    async with site(cdn.respond) as server, opened(database, folder, server.origin) as world:
        world.add_destination("main")
        await world.add(with_files(server.origin, "r-1", "/a.png"))
        await world.fan_out()
        await run_downloads(world)
        yield world


async def run_downloads(world: World) -> dict[str, Any]:
    """Try each file that is due, and return the row of the first one."""
    await world.change(media, media.c.state == "pending", next_attempt_at=db_time(0.0))
    for work in await world.media_lane().claim(10):
        await work.run()
    return (await world.rows(media))[0]


async def replay(world: World, **values: Any) -> int:
    """Order a replay with `media` and make its first step; return how many files it downloads again."""
    order = await world.order(media=True, **values)
    for work in await world.replay_lane().claim(10):
        await work.run()
    (row,) = await world.rows(replays, replays.c.id == order["id"])
    return int(row["downloads"])


async def finding(world: World, row: dict[str, Any]) -> str:
    """Return the result of `media verify`."""
    expected = {name: row[name] for name in ("kind", "url", "field", "size", "sha256")}
    return await verify(world.storage, row["storage_key"], **expected)


@pytest.mark.parametrize(
    ("state", "kind", "name", "field"),
    [
        ("not_media", "image", "/a.png", "images[0].url"),
        ("stored", "image", "/a.png", None),
        ("stored", "file", "/a.glb", None),
        ("stored", "file", "/a", "/presentation/pptx_url"),
    ],
)
async def test_pages_are_downloaded_again(
    state: str, kind: str, name: str, field: str | None, database: Database, tmp_path: Path
) -> None:
    """D15: a page that was stored, by this release as such or by an earlier one as a file, is replaced."""
    cdn = Cdn(PAGE)
    async with fetched(database, tmp_path, cdn) as world:
        (row,) = await world.rows(media)
        url = row["url"].replace("/a.png", name)
        await world.change(media, kind=kind, url=url, field=field, created_at=db_time(-3601.0))
        row = await run_downloads(world)
        assert row["state"] == "not_media"
        await world.change(media, state=state, error=None)
        assert await finding(world, row) == "not_media"
        cdn.answer = response(PNG)
        assert await replay(world) == 1
        row = await run_downloads(world)
        assert (row["state"], row["content_type"], row["error"]) == ("stored", "image/png", None)
        assert await finding(world, row) == "intact"


async def test_intact_files_are_downloaded_again_with_force_only(database: Database, tmp_path: Path) -> None:
    """D11: an intact file is downloaded again only with `force`, and is replaced then."""
    cdn = Cdn(response(PNG))
    async with fetched(database, tmp_path, cdn) as world:
        before = (await world.rows(media))[0]
        cdn.answer = response(OTHER)
        assert await replay(world) == 0
        assert await world.rows(media) == [before]
        assert await replay(world, force=True) == 1
        assert await world.states(events) == {"fetching": 1}
        row = await run_downloads(world)
        assert (row["state"], row["sha256"], row["warning"]) == (
            "stored",
            hashlib.sha256(OTHER).hexdigest(),
            None,
        )
        assert await world.states(events) == {"ready": 1}


@pytest.mark.parametrize(
    "answer", [response(b"", status="404 Not Found"), PAGE, response(OTHER[:-1])], ids=["gone", "page", "cut"]
)
async def test_an_intact_file_outlives_a_download_that_fails(
    answer: bytes, database: Database, tmp_path: Path
) -> None:
    """D11: if the CDN has deleted an intact file, or sends a page or a doubtful body, the file stays."""
    cdn = Cdn(response(PNG))
    async with fetched(database, tmp_path / "media", cdn) as world:
        before = (await world.rows(media))[0]
        cdn.answer = answer
        await replay(world, force=True)
        row = await run_downloads(world)
        assert (row["state"], row["uri"]) == ("pending", before["uri"])
        await world.change(media, attempts=5, restarted_at=db_time(-4000.0), seen_sha256=None)
        row = await run_downloads(world)
        assert (row["state"], row["error"]) == ("stored", None)
        assert row["warning"].startswith("not downloaded again: ")
        assert {row[name] == before[name] for name in ("uri", "sha256", "size", "content_type")} == {True}
        assert await finding(world, row) == "intact"
        assert await world.states(events) == {"ready": 1}
    assert list(stored_files(tmp_path / "media").values()) == [PNG]


async def test_giving_up_a_download_leaves_an_intact_file(database: Database, tmp_path: Path) -> None:
    """D11: `receiver media give-up` ends the new download of an intact file, but keeps the file."""
    cdn = Cdn(response(PNG))
    async with fetched(database, tmp_path, cdn) as world:
        (before,) = await world.rows(media)
        await replay(world, force=True)
        async with world.database.write() as connection:
            assert await outbox.give_up_media(connection, 1, by="ops") == 1
        (row,) = await world.rows(media)
        assert (row["state"], row["error"], row["uri"]) == ("stored", None, before["uri"])
        assert await world.states(events) == {"ready": 1}


async def test_a_flagged_file_that_comes_again_needs_one_download(database: Database, tmp_path: Path) -> None:
    """D9: a flagged file with the same warning again is stored at the first attempt."""
    cdn = Cdn(response(OTHER[:-1]))
    async with fetched(database, tmp_path, cdn) as world:
        row = await run_downloads(world)
        assert (row["state"], bool(row["warning"])) == ("stored", True)
        assert await replay(world) == 0
        await replay(world, force=True)
        assert (await run_downloads(world))["state"] == "stored"
        assert len(cdn.requests) == 3
        cdn.answer = response(OTHER)
        await replay(world, force=True)
        row = await run_downloads(world)
        assert (row["state"], row["warning"], row["size"]) == ("stored", None, len(OTHER))


async def test_skipped_files_are_downloaded_once_the_settings_allow_it(
    database: Database, tmp_path: Path
) -> None:
    """B10: a replay with `media` downloads skipped files only if the settings no longer skip them."""
    cdn = Cdn(response(PNG))
    long = "/" + "x" * 300
    async with site(cdn.respond) as server, opened(database, tmp_path, server.origin) as world:
        world.add_destination("main")
        foreign = FileRules(skip_reason=MediaHosts.parse(["media.clipia.ai"]).skip_reason, max_url_length=256)
        world.rules = foreign
        await world.add(with_files(server.origin, "r-1", "/a.png", long))
        await world.fan_out()
        assert await world.states(media) == {"skipped": 2}
        # Releases before 0010 did not record the field.
        await world.change(media, media.c.position == 0, field=None)
        assert await replay(world, force=True) == 0
        assert await world.states(media) == {"skipped": 2}
        world.rules = FileRules(skip_reason=MediaHosts.parse([server.origin]).skip_reason)
        assert await replay(world) == 2
        await run_downloads(world)
        assert await world.states(media) == {"stored": 2}
        assert sorted(cdn.requests) == [b"/a.png", long.encode()]


async def test_files_that_releases_before_left_out_are_added(database: Database, tmp_path: Path) -> None:
    """B10: a replay with `media` adds unlisted files of an old event once, and keeps the listed ones."""
    cdn = Cdn(response(PNG))
    async with site(cdn.respond) as server, opened(database, tmp_path, server.origin) as world:
        world.add_destination("main")
        world.rules = FileRules(skip_reason=MediaHosts.parse([server.origin]).skip_reason)
        output = {
            "images": [{"url": f"{server.origin}/{name}"} for name in ("moved.png", "same.png")],
            "cover": {"original_url": f"{server.origin}/c1.png", "url": f"{server.origin}/c2.png"},
            "text": "https://example.com/x.png",
        }
        await world.add(body("r-1", payload={"output": output}))
        await world.add(body("r-2", payload={"output": {"model_3d": f"{server.origin}/m.glb"}}))
        await world.add(body("r-3", payload={"output": {"text": "no file"}}))
        await world.fan_out()
        await run_downloads(world)
        # As in a release before 0010, after Clipia had given the first file another URL.
        async with world.database.write() as connection:
            await connection.execute(delete(media).where(media.c.field.startswith("/")))
        await world.change(media, field=None)
        await world.change(media, media.c.position == 0, url=f"{server.origin}/now-here.png")
        before = await world.rows(media)
        assert [row["position"] for row in before] == [0, 1]
        await world.change(events, events.c.seq > 0, state="ready")
        cdn.requests.clear()
        assert await replay(world) == 3
        assert await world.states(events) == {"fetching": 2, "ready": 1}
        await run_downloads(world)
        assert await world.states(events) == {"ready": 3}
        assert sorted(cdn.requests) == [b"/c1.png", b"/c2.png", b"/m.glb"]
        after = [row for row in await world.rows(media) if row["id"] not in {each["id"] for each in before}]
        found = {(row["position"], row["variant"], row["field"], row["state"]) for row in after}
        assert found == {
            (2, "original", "/cover/original_url", "stored"),
            (2, "display", "/cover/url", "stored"),
            (3, "original", "/text", "skipped"),
            (0, "original", "/model_3d", "stored"),
        }
        assert await replay(world) == 0
        assert len(await world.rows(media)) == 6


async def test_an_erased_event_gets_no_files(database: Database, tmp_path: Path) -> None:
    """C16: if an event is erased after its output was read, no files are added to it."""
    async with opened(database, tmp_path, "https://media.clipia.ai") as world:
        await world.add(with_files("https://media.clipia.ai", "r-1"))
        await world.change(events, state="erased")
        file = NewMedia(position=0, variant="original", kind="image", url="https://media.clipia.ai/a")
        async with world.database.write() as connection:
            assert await add_media(connection, [(1, file)]) == []
        assert await world.rows(media) == []


def test_force_needs_media(database_url: str) -> None:  # noqa: ARG001 - the module's parameter
    """E12: `force` without `media` would have no effect, and is rejected."""
    with pytest.raises(ValidationError, match="force needs media"):
        ReplayRequest(all=True, force=True)


async def test_an_orders_fingerprint_is_that_of_the_release_before(
    database: Database, tmp_path: Path
) -> None:
    """E12: if an order was made by the previous release, its key has the same fingerprint now."""
    async with opened(database, tmp_path) as world:
        world.add_destination("main")
        await world.order(key="k")
        await world.order(key="k", force=False)
        (row,) = await world.rows(replays)
    content = ReplayRequest(all=True).model_dump(mode="json", exclude={"force"})
    assert row["force"] is False
    assert (
        row["fingerprint"] == hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
    )
