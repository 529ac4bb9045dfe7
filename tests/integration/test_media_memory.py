"""The memory of a large download, measured in a process of its own."""

import asyncio
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.media import NOISE, Answer, Bucket, box, response, s3_server, site

from receiver.media import Storage, open_storage

MIB = 1024 * 1024
ALLOWED = 32 * MIB

# The peak is reset after a first, small download, so that the imports of that one do not count.
DOWNLOADER = """
import asyncio, sys
from pathlib import Path
from receiver.media import Downloader, MediaHosts, open_storage

class Sink:
    '''Throws everything away: what is measured is the download alone.'''
    async def put(self, key, chunks, *, content_type):
        async for chunk in chunks:
            pass
    async def require_space(self, size):
        pass
    def uri(self, key):
        return key

def memory(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024

async def main(origin, storage):
    storage = Sink() if storage == "sink" else open_storage(storage)
    downloader = Downloader(hosts=MediaHosts.parse([origin]), storage=storage)
    await downloader.start()
    await downloader.save(url=origin + "/small", kind="video", stem="ab/00-video")
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    stored = await downloader.save(url=origin + "/large", kind="video", stem="ab/01-video")
    print(stored.size, memory("VmHWM") - before, stored.key)

asyncio.run(main(*sys.argv[1:]))
"""


def movie(size: int) -> Answer:
    """Serve a movie of exactly `size` bytes at `/large`, a small one elsewhere."""

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        total = size if b"/large" in request else 8 * MIB
        start = box(b"ftyp", b"isom" + bytes(4)) + box(b"moov", NOISE)
        start += struct.pack(">I", 1) + b"mdat" + struct.pack(">Q", total - len(start))
        writer.write(response(start, length=total))
        block, rest = bytes(MIB), total - len(start)
        while rest:
            writer.write(block[:rest])
            rest -= min(rest, MIB)
            await writer.drain()

    return answer


async def growth(storage: str, size: int) -> int:
    """Download `size` bytes and return the growth of the process's peak memory."""
    async with site(movie(size)) as server:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", DOWNLOADER, server.origin, storage, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 120)
    stored, grown, key = output.split()
    assert (int(stored), key) == (size, b"ab/01-video.mp4")
    return int(grown)


@pytest.fixture(autouse=True)
def linux() -> None:
    """Skip if the peak of a process's memory cannot be reset."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's /proc/self/clear_refs")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Run an S3 server for the tests of this module."""
    with s3_server(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


async def stored_size(storage: Storage) -> int | None:
    """Return the size of the large file."""
    try:
        return await storage.stat("ab/01-video.mp4")
    finally:
        await storage.close()


async def test_a_video_of_2_gib_takes_little_memory() -> None:
    """D7: the largest allowed video passes through in less than 32 MiB."""
    assert await growth("sink", 2048 * MIB) < ALLOWED


async def test_writing_to_a_folder_takes_little_memory(tmp_path: Path) -> None:
    """D7: the local folder needs no memory that grows with the file."""
    url = f"file:{tmp_path}/media"
    assert await growth(url, 128 * MIB) < ALLOWED
    assert await stored_size(open_storage(url)) == 128 * MIB


async def test_uploading_takes_little_memory(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """D7: the upload to a bucket needs no memory that grows with the file."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    assert await growth(bucket.url, 96 * MIB) < ALLOWED
    assert await stored_size(open_storage(bucket.url)) == 96 * MIB
