"""A disk that hangs, such as a network mount without its server, stops neither the event loop nor a round."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.media import chunked

from receiver import disks
from receiver.db.database import Database
from receiver.disks import DiskStatus, read_disks
from receiver.media.storage.local import LocalStorage
from receiver.settings import Settings
from receiver.status import _disk_problems


class Mount:
    """Resolves no path until its server is back, and notes the threads that wait for it."""

    def __init__(self) -> None:
        self.back = threading.Event()
        self.waiting: list[threading.Thread] = []

    def resolve(self, path: Path, strict: bool = False) -> Path:  # noqa: FBT001, FBT002 - as in pathlib
        """Wait for the server."""
        self.waiting.append(threading.current_thread())
        assert threading.current_thread() is not threading.main_thread()
        assert self.back.wait(60)
        return path


@pytest.fixture
def mount(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mount]:
    """All paths are on a mount that hangs."""
    found = Mount()
    monkeypatch.setattr(Path, "resolve", lambda path, strict=False: found.resolve(path, strict))
    yield found
    found.back.set()


async def test_a_disk_that_hangs_keeps_one_thread(
    mount: Mount, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop goes on, the disk is reported as silent, and later rounds start no other thread."""
    monkeypatch.setattr(disks, "ANSWER_SECONDS", 0.5)
    settings = Settings.load(storage_url=f"file:{tmp_path}")
    database = Database("postgresql://nowhere/none")
    silent = DiskStatus(holds="media", path=str(tmp_path), free_bytes=None, total_bytes=None)
    for _ in range(3):
        assert await read_disks(settings, database) == [silent]
    assert len(mount.waiting) == 1
    (problem,) = _disk_problems([silent])
    assert problem["text"] == f"the disk of {tmp_path} (media) does not answer"

    monkeypatch.setattr(disks, "ANSWER_SECONDS", 30.0)
    mount.back.set()
    await asyncio.to_thread(mount.waiting[0].join)
    (found,) = await read_disks(settings, database)
    assert found["free_bytes"]
    await database.close()


async def test_a_local_storage_resolves_paths_in_threads(tmp_path: Path, mount: Mount) -> None:
    """The event loop never waits for the folder, whichever method is called."""
    mount.back.set()
    storage = await asyncio.to_thread(LocalStorage, tmp_path)
    await storage.put("a/b", chunked(b"content"))
    assert storage.uri("a/b") == tmp_path.joinpath("a/b").as_uri()
    assert await storage.stat("a/b") == len(b"content")
    assert b"".join([block async for block in storage.open("a/b")]) == b"content"
    await storage.delete("a/b")
    assert len(mount.waiting) > 3
