"""The sandbox's CDN: the file of each name, and its real format."""

import hashlib
import struct
from collections.abc import AsyncIterator, Iterator

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from receiver.sandbox import SandboxOptions, create_app
from receiver.sandbox.cdn import SAMPLES
from receiver.sandbox.options import SMALLEST_VIDEO_BYTES

FILES = {
    "/works/0a1b-1.png": ("image.png", "image/png"),
    "/works/0a1b-1.webp": ("image.webp", "image/webp"),
    "/works/0a1b-1.mp4": ("video.mp4", "video/mp4"),
    "/works/0a1b-1.mp3": ("audio-1.mp3", "audio/mpeg"),
    "/works/0a1b-2.mp3": ("audio-2.mp3", "audio/mpeg"),
    "/works/0a1b-2.png": ("image.png", "image/png"),
    "/sandbox/sample-image.png": ("image.png", "image/png"),
    "/sandbox/sample-image.webp": ("image.webp", "image/webp"),
    "/sandbox/sample-video.mp4": ("video.mp4", "video/mp4"),
    "/sandbox/sample-audio.mp3": ("audio-1.mp3", "audio/mpeg"),
    "/sandbox/sample-audio-2.mp3": ("audio-2.mp3", "audio/mpeg"),
}


@pytest.fixture
async def cdn() -> AsyncIterator[httpx.AsyncClient]:
    """A client of the CDN."""
    transport = httpx.ASGITransport(create_app(SandboxOptions()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:9000") as client:
        yield client


def boxes(video: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield type and size of the top-level boxes of an MP4 file."""
    at = 0
    while at < len(video):
        size, kind = struct.unpack_from(">I4s", video, at)
        if size == 1:
            (size,) = struct.unpack_from(">Q", video, at + 8)
        assert size >= 8
        yield kind, size
        at += size
    assert at == len(video)


@pytest.mark.parametrize("path", FILES)
async def test_get_head_and_range(cdn: httpx.AsyncClient, path: str) -> None:
    """A file is served whole, as headers only, or in part, with its true type and length."""
    name, content_type = FILES[path]
    expected = (SAMPLES / name).read_bytes()
    whole, head = await cdn.get(path), await cdn.head(path)
    part = await cdn.get(path, headers={"Range": "bytes=1000-1999"})
    beyond = await cdn.get(path, headers={"Range": "bytes=10000000-"})
    assert (whole.status_code, whole.content) == (200, expected)
    assert (head.status_code, head.content) == (200, b"")
    for answer in (whole, head):
        assert answer.headers["Content-Type"] == content_type
        assert answer.headers["Content-Length"] == str(len(expected))
        assert answer.headers["Accept-Ranges"] == "bytes"
    assert (part.status_code, part.content) == (206, expected[1000:2000])
    assert part.headers["Content-Range"] == f"bytes 1000-1999/{len(expected)}"
    assert beyond.status_code == 416


@pytest.mark.parametrize(
    "path",
    [
        "/works/x.gif",
        "/works/x",
        "/works/.png/../../answers.py",
        "/works/image.png/x",
        "/works/README.md",
        "/sandbox/",
    ],
)
async def test_unknown_files(cdn: httpx.AsyncClient, path: str) -> None:
    """A name without a known ending is 404 in Clipia's shape."""
    answer = await cdn.get(path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_samples_have_their_formats_marks() -> None:
    """D9: every sample begins and ends as its format requires, and all together have a few hundred KB."""
    png, webp, mp4 = ((SAMPLES / name).read_bytes() for name in ("image.png", "image.webp", "video.mp4"))
    tracks = [(SAMPLES / f"audio-{number}.mp3").read_bytes() for number in (1, 2)]
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    assert webp.startswith(b"RIFF" + struct.pack("<I", len(webp) - 8) + b"WEBP")
    kinds = [kind for kind, _ in boxes(mp4)]
    assert kinds[:2] == [b"ftyp", b"moov"], "players may start before the file is whole"
    assert b"mdat" in kinds
    assert all(track.startswith(b"ID3") for track in tracks)
    assert tracks[0] != tracks[1]
    assert len(mp4) + 16 <= SMALLEST_VIDEO_BYTES
    assert 100_000 < sum(file.stat().st_size for file in SAMPLES.iterdir()) < 500_000


def test_samples_are_the_ones_that_were_tried() -> None:
    """Every sample is, byte for byte, the file with the checksum of its source page."""
    lines = [line.split("  ") for line in (SAMPLES / "README.md").read_text().splitlines()[-6:-1]]
    given = {name: checksum for checksum, name in lines}
    files = [file for file in SAMPLES.iterdir() if file.suffix != ".md"]
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files} == given


@pytest.mark.parametrize("size", [SMALLEST_VIDEO_BYTES, 262_144 + 46_421 + 16, 1_000_001])
async def test_video_of_any_size(cdn: httpx.AsyncClient, size: int) -> None:
    """A video of a given size has exactly that size: the sample with padding that players skip."""
    answer = await cdn.get(f"/works/blob/{size}.mp4")
    assert answer.headers["Content-Length"] == str(size) == str(len(answer.content))
    assert answer.headers["Content-Type"] == "video/mp4"
    sample = (SAMPLES / "video.mp4").read_bytes()
    assert answer.content.startswith(sample)
    assert [*boxes(answer.content)][-1] == (b"free", size - len(sample))


async def test_head_of_a_huge_video() -> None:
    """HEAD of a video larger than memory is answered with its length, without making the body."""
    sandbox = create_app()

    async def strict(scope: Scope, receive: Receive, send: Send) -> None:
        async def without_body(message: Message) -> None:
            assert not message.get("body")
            await send(message)

        await sandbox(scope, receive, without_body)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(strict), base_url="http://x") as cdn:
        head = await cdn.head(f"/works/blob/{2**40}.mp4")
    assert (head.status_code, head.headers["Content-Length"]) == (200, str(2**40))


@pytest.mark.parametrize("size", [SMALLEST_VIDEO_BYTES - 1, 2**40 + 1])
async def test_video_size_has_limits(cdn: httpx.AsyncClient, size: int) -> None:
    """A video that is too small for the sample, or too large, is 404 with the limits."""
    answer = await cdn.get(f"/works/blob/{size}.mp4")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "A video has from 65536 to 1099511627776 bytes."


async def test_missing_media_on_order(cdn: httpx.AsyncClient) -> None:
    """D15: `media_missing_rate` answers downloads with 404."""
    await cdn.patch("/_sandbox/options", json={"media_missing_rate": 1})
    for path in ("/works/x-1.png", "/sandbox/sample-video.mp4", "/works/blob/100000.mp4"):
        assert (await cdn.get(path)).status_code == 404
