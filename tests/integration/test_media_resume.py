"""Downloads whose connection breaks: they continue at the break if it is certainly the same file."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from support.media import SAMPLES, Answer, Site, local_storage, response, site, stored_files

from receiver.errors import MediaUnavailable
from receiver.media import Downloader, DownloadLimits, MediaHosts

MOVIE = SAMPLES["video/mp4"].data
MOVIE += bytes(4) + b"free" + bytes(60_000)  # a last box, which extends to the end of the file
TAG = '"v1"'
LIMITS = DownloadLimits(header_seconds=2, idle_seconds=0.3, total_seconds=30)


def cut(
    *steps: int | None,
    tag: Callable[[int], str | None] = lambda _number: TAG,
    place: str = "bytes {start}-{last}/{size}",
    ranges: bool = True,
    partial: str = "206 Partial Content",
    more: tuple[str, ...] = (),
    stall: bool = False,
) -> Answer:
    """Serve the movie: each connection sends so many bytes of it and breaks; None means the rest."""
    number = 0

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal number
        found = re.search(rb"\r\nRange: bytes=([0-9]+)-\r\n", request)
        start = int(found[1]) if found and ranges else 0
        step = steps[min(number, len(steps) - 1)]
        rest = MOVIE[start:]
        headers = list(more)
        if (now := tag(number)) is not None:
            headers.append(f"ETag: {now}")
        if start:
            headers.append(
                "Content-Range: " + place.format(start=start, last=len(MOVIE) - 1, size=len(MOVIE))
            )
        number += 1
        status = partial if start else "200 OK"
        writer.write(response(rest[:step], *headers, status=status, length=len(rest)))
        await writer.drain()
        if stall and step is not None:
            await asyncio.sleep(30)

    return answer


@asynccontextmanager
async def downloads(
    answer: Answer, folder: Path, limits: DownloadLimits = LIMITS
) -> AsyncIterator[tuple[Site, Downloader]]:
    """Run a server and a downloader that may fetch from it."""
    async with site(answer) as server, asyncio.timeout(60):
        opened = Downloader(
            hosts=MediaHosts.parse([server.origin]), storage=local_storage(folder), limits=limits
        )
        yield server, opened
        assert opened._pool.connections == []
        await opened.close()


async def save(server: Site, opened: Downloader) -> None:
    """Download the movie."""
    await opened.save(url=f"{server.origin}/a.mp4", kind="video", stem="ab/00-video")


@pytest.mark.parametrize("pause", ["cut", "stalled"])
@pytest.mark.parametrize("steps", [(10, None), (1000, 1, 5000, None), (len(MOVIE) - 1, None)])
async def test_a_download_resumes_at_the_break(
    steps: tuple[int | None, ...], pause: str, tmp_path: Path
) -> None:
    """D9: the parts of several connections are one file, and each requests only the missing bytes."""
    async with downloads(cut(*steps, stall=pause == "stalled"), tmp_path) as (server, opened):
        await save(server, opened)
        assert len(server.requests) == len(steps)
        position = 0
        for step, request in zip(steps, server.requests, strict=True):
            asked = f"\r\nRange: bytes={position}-\r\nIf-Range: {TAG}\r\n".encode()
            assert (asked in request) == (position > 0)
            position += step or 0
    assert stored_files(tmp_path) == {"media/ab/00-video.mp4": MOVIE}


@pytest.mark.parametrize(
    "answer",
    [
        cut(1000, None, tag=lambda number: f'"v{number}"'),
        cut(1000, None, tag=lambda number: None if number else TAG),
        cut(1000, None, tag=lambda number: f"W/{TAG}" if number else TAG),
        cut(1000, None, ranges=False),
        cut(1000, None, partial="200 OK"),
        cut(1000, None, place="bytes {start}-{last}/9"),
        cut(1000, None, place="bytes 0-{last}/{size}"),
        cut(1000, None, place="bytes {start}-{last}/*"),
        cut(1000, 0, 1000, None),
        cut(1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, None),
    ],
    ids=[
        "other tag",
        "no tag any more",
        "weak tag by now",
        "whole again",
        "whole by its status",
        "other size",
        "other place",
        "unknown size",
        "nothing",
        "too often",
    ],
)
async def test_another_answer_than_the_rest_is_not_appended(answer: Answer, tmp_path: Path) -> None:
    """D9: if an answer may be another file, or another part, the download ends like after a break."""
    async with downloads(answer, tmp_path) as (server, opened):
        with pytest.raises(MediaUnavailable) as caught:
            await save(server, opened)
        assert caught.value.reason == "truncated"
        assert 1 < len(server.requests) <= 9
    assert stored_files(tmp_path) == {}


@pytest.mark.parametrize(
    "answer",
    [
        cut(1000, None, tag=lambda _number: None),
        cut(1000, None, tag=lambda _number: 'W/"v1"'),
        cut(1000, None, more=("Accept-Ranges: none",)),
        cut(0, None),
    ],
    ids=["no tag", "weak tag", "no ranges", "nothing came"],
)
async def test_a_file_without_a_name_for_its_version_is_not_resumed(answer: Answer, tmp_path: Path) -> None:
    """D9: if parts of two files could be mixed up, or no byte came yet, no part is requested."""
    async with downloads(answer, tmp_path) as (server, opened):
        with pytest.raises(MediaUnavailable) as caught:
            await save(server, opened)
        assert caught.value.reason == "truncated"
        assert len(server.requests) == 1
    assert stored_files(tmp_path) == {}


def dated(*, changed: str, sent: str = "Sat, 21 Nov 2026 00:02:00 GMT") -> tuple[str, ...]:
    """Return the headers of a file without a tag."""
    return (f"Last-Modified: {changed}", f"Date: {sent}")


ABSURD_DATES = ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Mon, 01 Jan 2020 00:00:00 +99999999999999"]


@pytest.mark.parametrize("date", ABSURD_DATES)
async def test_a_file_with_an_absurd_date_is_stored(date: str, tmp_path: Path) -> None:
    """D9: if a date has an absurd year, the file cannot be resumed, but is stored."""
    answer = cut(None, tag=lambda _number: None, more=dated(changed=date))
    async with downloads(answer, tmp_path) as (server, opened):
        await save(server, opened)
    assert stored_files(tmp_path) == {"media/ab/00-video.mp4": MOVIE}


async def test_an_old_date_tells_versions_apart(tmp_path: Path) -> None:
    """D9: if there is no tag, Last-Modified is enough if it is a minute old."""
    changed = "Sat, 21 Nov 2026 00:01:00 GMT"
    answer = cut(1000, None, tag=lambda _number: None, more=dated(changed=changed))
    async with downloads(answer, tmp_path) as (server, opened):
        await save(server, opened)
        assert f"\r\nRange: bytes=1000-\r\nIf-Range: {changed}\r\n".encode() in server.requests[1]
    assert stored_files(tmp_path) == {"media/ab/00-video.mp4": MOVIE}


async def test_a_part_may_leave_out_the_date(tmp_path: Path) -> None:
    """D9: a 206 may leave out the Last-Modified that If-Range has named."""
    date = "Last-Modified: Sat, 21 Nov 2026 00:01:00 GMT", "Date: Sat, 21 Nov 2026 00:02:00 GMT"
    whole = cut(1000, None, tag=lambda _number: None, more=date)
    part = cut(None, tag=lambda _number: None)

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        await (part if b"\r\nRange:" in request else whole)(request, writer)

    async with downloads(answer, tmp_path) as (server, opened):
        await save(server, opened)
        assert len(server.requests) == 2
    assert stored_files(tmp_path) == {"media/ab/00-video.mp4": MOVIE}


def redirected(*targets: str) -> Answer:
    """Redirect /a.mp4 to each of these paths in order; each has a movie, and the first one breaks."""
    left = list(targets)
    movies = {path: cut(1000, None) for path in targets}

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        path = request.split()[1].decode()
        if path == "/a.mp4":
            writer.write(response(b"", f"Location: {left.pop(0)}", status="302 Found"))
            return
        await movies[path](request, writer)

    return answer


async def test_a_download_resumes_behind_its_redirects(tmp_path: Path) -> None:
    """D9: the rest is requested from the URL that sent the beginning: the redirect may have changed."""
    async with downloads(redirected("/1.mp4", "/2.mp4"), tmp_path) as (server, opened):
        await save(server, opened)
        assert [request.split()[1] for request in server.requests] == [b"/a.mp4", b"/1.mp4", b"/1.mp4"]
    assert stored_files(tmp_path) == {"media/ab/00-video.mp4": MOVIE}


async def test_a_redirect_of_the_rest_is_not_followed(tmp_path: Path) -> None:
    """D9: if the URL that sent the beginning now redirects, the download starts over later."""
    movie = cut(1000, None)

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"\r\nRange:" in request and request.startswith(b"GET /a.mp4"):
            writer.write(response(b"", "Location: /b.mp4", status="302 Found"))
            return
        await movie(request, writer)

    async with downloads(answer, tmp_path) as (server, opened):
        with pytest.raises(MediaUnavailable) as caught:
            await save(server, opened)
        assert caught.value.reason == "truncated"
        assert len(server.requests) == 2
    assert stored_files(tmp_path) == {}


@pytest.mark.parametrize(
    ("tag", "more"),
    [
        (None, dated(changed="Sat, 21 Nov 2026 00:01:01 GMT")),
        (None, dated(changed="nonsense")),
        *((None, dated(changed=date)) for date in ABSURD_DATES),
        (None, dated(changed="Sat, 21 Nov 2020 00:00:00 GMT \u00e9")),
        (None, dated(changed="Sat, 21 Nov 2026 00:00:00 -0000")),
        (None, ("Last-Modified: Sat, 21 Nov 2020 00:00:00 GMT",)),
        ('W/"v1"', dated(changed="Sat, 21 Nov 2020 00:00:00 GMT")),
    ],
    ids=["young", "nonsense", "absurd year", "absurd zone", "not ASCII", "no zone", "no clock", "weak tag"],
)
async def test_a_date_that_two_versions_may_share_is_not_enough(
    tag: str | None, more: tuple[str, ...], tmp_path: Path
) -> None:
    """D9: if a file has just changed, it may change again within the same second."""
    answer = cut(1000, None, tag=lambda _number: tag, more=more)
    async with downloads(answer, tmp_path) as (server, opened):
        with pytest.raises(MediaUnavailable):
            await save(server, opened)
        assert len(server.requests) == 1


async def test_the_whole_download_has_one_deadline(tmp_path: Path) -> None:
    """D7: after a break a slow host gets no more time, and the size limit stays the same."""
    limits = replace(LIMITS, total_seconds=0.8)
    async with downloads(cut(1000, stall=True), tmp_path, limits) as (server, opened):
        with pytest.raises(MediaUnavailable) as caught:
            await save(server, opened)
        assert caught.value.reason == "timeout"
        assert len(server.requests) < 6
    assert stored_files(tmp_path) == {}
