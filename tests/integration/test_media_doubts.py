"""Bodies that may not be the file, over several attempts."""

import asyncio
import hashlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from support.events import World, opened, with_files
from support.media import PNG, SAMPLES, response, site

from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import MediaRow
from receiver.db.tables import attempts, deliveries, media

# The databases do not differ in these tests.
pytestmark = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)

PAGE = response(b"<html><body>Please wait</body></html>", "Content-Type: image/png")
BLEMISHED = SAMPLES["image/gif"].data[:-1]


class Cdn:
    """Answers each request with the next answer, and then repeats the last one."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = deque(answers)
        self.requests = 0

    async def answer(self, request: bytes, writer: asyncio.StreamWriter) -> None:
        """Answer."""
        self.requests += 1
        writer.write(self.answers.popleft() if len(self.answers) > 1 else self.answers[0])


@asynccontextmanager
async def fetching(database: Database, folder: Path, cdn: Cdn) -> AsyncIterator[World]:
    """Store an event with one image on a CDN with these answers."""
    async with site(cdn.answer) as server, opened(database, folder, server.origin) as world:
        world.add_destination("main")
        await world.add(with_files(server.origin, "r-1", "/a.png"))
        await world.fan_out()
        yield world


async def run_tries(world: World, count: int) -> dict[str, Any]:
    """Make the next attempts now, and return the row of the file."""
    for _ in range(count):
        await world.change(media, next_attempt_at=db_time(0.0))
        for work in await world.media_lane().claim(1):
            await work.run()
    (row,) = await world.rows(media)
    return row


async def forwarded_file(world: World) -> dict[str, Any]:
    """Deliver the event, and return its only file from the message."""
    for work in await world.delivery_lane().claim(1):
        await work.run()
    data: Any = world.recorders["main"].published[-1].get_data()
    (file,) = data["media"]
    assert isinstance(file, dict)
    return file


async def test_a_page_is_requested_again_until_the_file_is_there(database: Database, tmp_path: Path) -> None:
    """D15: two pages and then the image: the image is stored, without a warning."""
    async with fetching(database, tmp_path, Cdn(PAGE, PAGE, response(PNG))) as world:
        row = await run_tries(world, 2)
        assert (row["state"], row["uri"], row["attempts"]) == ("pending", None, 2)
        assert "page" in row["error"]
        assert await world.states(deliveries) == {"pending": 1}
        row = await run_tries(world, 1)
        assert (row["state"], row["content_type"], row["error"], row["warning"]) == (
            "stored",
            "image/png",
            None,
            None,
        )
        assert (await forwarded_file(world))["state"] == "stored"


async def test_a_page_that_stays_is_kept_as_no_media(database: Database, tmp_path: Path) -> None:
    """D15: after an hour of pages the last one is kept, in a state that no consumer takes for a file."""
    cdn = Cdn(PAGE)
    async with fetching(database, tmp_path, cdn) as world:
        await run_tries(world, 3)
        await world.change(media, created_at=db_time(-3601.0))
        row = await run_tries(world, 1)
        assert (row["state"], row["content_type"]) == ("not_media", "application/octet-stream")
        assert Path(row["uri"].removeprefix("file://")).read_bytes().startswith(b"<html>")
        assert (await run_tries(world, 1))["attempts"] == 4
        file = await forwarded_file(world)
        assert (file["state"], file["uri"], file["sha256"]) == ("not_media", row["uri"], row["sha256"])
        assert file["error"] == "the host sends a page or a text in place of the image"
        assert [each["outcome"] for each in await world.rows(attempts)][:4] == ["retry"] * 3 + ["failed"]
    assert cdn.requests == 4


async def test_a_page_asks_clipia_where_the_file_is(database: Database, tmp_path: Path) -> None:
    """D15: Clipia is asked for a file's present URL if a page came in its place, like after a 404."""
    async with fetching(database, tmp_path, Cdn(PAGE, response(PNG))) as world:

        async def fresh_url(_event: object, row: MediaRow) -> str:
            return row.url.replace("/a.png", "/b.png")

        world.fresh_url = fresh_url
        row = await run_tries(world, 2)
        assert (row["state"], row["url"].endswith("/b.png")) == ("stored", True)


async def test_the_same_blemish_twice_is_stored_and_flagged(database: Database, tmp_path: Path) -> None:
    """D9: a GIF without its trailer takes two downloads, is stored, and has a warning in every view."""
    cdn = Cdn(response(BLEMISHED))
    async with fetching(database, tmp_path, cdn) as world:
        row = await run_tries(world, 1)
        assert (row["state"], row["sha256"], row["uri"]) == ("pending", None, None)
        row = await run_tries(world, 1)
        assert (row["state"], row["error"]) == ("stored", None)
        assert row["warning"] == f"The file ends early, after {len(BLEMISHED)} bytes"
        assert row["sha256"] == hashlib.sha256(BLEMISHED).hexdigest()
        file = await forwarded_file(world)
        assert (file["state"], file["warning"]) == ("stored", row["warning"])
    assert cdn.requests == 2


async def test_a_doubt_that_passes_leaves_no_mark(database: Database, tmp_path: Path) -> None:
    """D9: if a file was cut in a cache and then comes whole, it is stored without a warning."""
    whole = SAMPLES["image/gif"].data
    async with fetching(database, tmp_path, Cdn(response(whole[:300]), response(whole))) as world:
        row = await run_tries(world, 2)
        assert (row["state"], row["warning"], row["size"]) == ("stored", None, len(whole))


async def test_different_blemishes_are_no_agreement(database: Database, tmp_path: Path) -> None:
    """D9: two bodies that differ prove no file, and another failure in between does not matter."""
    cdn = Cdn(
        response(BLEMISHED[:300]), response(BLEMISHED), response(b"", status="503 Busy"), response(BLEMISHED)
    )
    async with fetching(database, tmp_path, cdn) as world:
        row = await run_tries(world, 3)
        assert row["state"] == "pending"
        row = await run_tries(world, 1)
        assert (row["state"], row["size"]) == ("stored", len(BLEMISHED))


@pytest.mark.parametrize("answer", [PAGE, response(BLEMISHED)], ids=["page", "blemish"])
async def test_an_odd_body_holds_an_event_no_longer_than_an_hour(
    answer: bytes, database: Database, tmp_path: Path
) -> None:
    """D9: the body of the first attempt after an hour is kept, and the event is delivered."""
    cdn = Cdn(answer)
    async with fetching(database, tmp_path, cdn) as world:
        await world.change(media, created_at=db_time(-3601.0))
        row = await run_tries(world, 1)
        assert row["state"] in {"not_media", "stored"}
        assert await forwarded_file(world)
    assert cdn.requests == 1
