"""Writes that are killed, rejected or run out of space: whole files or none."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.media import Bucket, chunked, s3_server, stored_files
from support.servers import missing

from receiver.errors import StorageUnavailable
from receiver.media.storage.local import LocalStorage

KEY = "ab/cd/00-video.mp4"
WHOLE = b"".join(bytes([number]) * 65_536 for number in range(40))

STORED, FULL, ERROR = 0, 3, 4  # the call that ends the writer

# One worker thread, so that the n-th system call is always the same one.
WRITER = f"""
import asyncio, os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from receiver.errors import StorageUnavailable
from receiver.media import open_storage
from receiver.media.storage import local

local._THREADS = ThreadPoolExecutor(1)

async def chunks():
    for number in range(40):
        yield bytes([number]) * 65_536

async def main(url, file_size):
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    try:
        await open_storage(url).put({KEY!r}, chunks())
    except StorageUnavailable as error:
        sys.exit({FULL} if error.reason == "full" else {ERROR})
    os.write(1, b"stored")

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""
CALLS = "/^(write|fsync|rename|renameat|renameat2|mkdir|mkdirat)$"


@pytest.fixture
def strace() -> str:
    """Find strace, which makes system calls fail and kills processes within them."""
    found = shutil.which("strace")
    if found is None:
        missing("strace", "apt-get install strace")
    return str(found)


def write(url: str, *wrapper: str, file_size: int = 0) -> subprocess.CompletedProcess[str]:
    """Store a file in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.run(
        [*wrapper, sys.executable, "-c", WRITER, url, str(file_size)],
        capture_output=True,
        text=True,
        check=False,
        env=environment | {"PYTHONDONTWRITEBYTECODE": "1"},
        timeout=60,
    )


def killed_at(strace: str, call: str, number: int, folder: Path) -> bool:
    """Store a file and kill the process within its n-th such system call; False if it came to its end."""
    inject = f"inject=/^{call}:signal=KILL:when={number}"
    result = write(f"file:{folder}", strace, "-f", "--seccomp-bpf", "-o", os.devnull, "-e", inject)
    was_killed = result.returncode != STORED  # strace ends like its program; the answer is a write, too
    final = folder / KEY
    if final.exists():
        assert final.read_bytes() == WHOLE
    assert was_killed or final.exists()
    return was_killed


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
async def test_a_killed_write_leaves_a_whole_file_or_none(call: str, strace: str, tmp_path: Path) -> None:
    """D10, D11, T3: kill -9 at every call that changes the disk; the next download ends with one file."""
    number = 1
    while killed_at(strace, call, number, tmp_path / str(number)):
        folder = tmp_path / str(number)
        await LocalStorage(folder).put(KEY, chunked(WHOLE))
        finished = {name for name in stored_files(folder) if not name.startswith(".incoming/")}
        assert finished == {KEY}
        number += 1
    at_least = {"write": 3, "fsync": 6, "rename": 1}
    assert number > at_least[call]


def test_the_file_is_durable_before_its_name_and_its_name_before_the_answer(
    strace: str, tmp_path: Path
) -> None:
    """D10: data is flushed, then renamed, then every folder up to the root is flushed, then `put` returns."""
    log = tmp_path / "strace.log"
    result = write(f"file:{tmp_path}/media", strace, "-f", "-y", "-o", str(log), "-e", f"trace={CALLS}")
    assert result.stdout == "stored"
    calls = re.findall(r"^\d+ +(\w+)\(.*?(?:<([^>]*)>|\"([^\"]*)\")", log.read_text(), re.MULTILINE)
    names = [f"{call} {one or other}".replace(f"{tmp_path}/", "") for call, one, other in calls]
    names = [re.sub(r"\.incoming/\w+", ".incoming/part", name) for name in names]
    in_order = [name for name in names if not name.startswith("mkdir")]
    assert in_order == [
        f"fsync {tmp_path}",
        "fsync media",
        "write media/.incoming/part",
        "write media/.incoming/part",
        "write media/.incoming/part",
        "fsync media/.incoming/part",
        "rename media/.incoming/part",
        "fsync media/ab/cd",
        "fsync media/ab",
        "fsync media",
        in_order[-1],
    ]
    assert in_order[-1].startswith("write pipe")


@pytest.mark.parametrize(
    ("inject", "status"),
    [
        ("/^write:error=ENOSPC:when=2", FULL),
        ("/^write:error=EDQUOT:when=1", FULL),
        ("/^fsync:error=EIO:when=3", ERROR),
        ("/^rename:error=EACCES", ERROR),
        ("/^mkdir:error=EROFS", ERROR),
    ],
)
def test_a_failing_disk_leaves_no_file(inject: str, status: int, strace: str, tmp_path: Path) -> None:
    """D16: another error than a full disk is reported as such, and the unfinished file is removed."""
    result = write(f"file:{tmp_path}/media", strace, "-f", "-o", os.devnull, "-e", f"inject={inject}")
    assert result.returncode == status, result.stderr
    assert stored_files(tmp_path) == {}


def test_a_limit_on_the_size_of_files_leaves_no_file(tmp_path: Path) -> None:
    """D16: if a limit first causes a short write, the storage counts as full, and no short file is stored."""
    result = write(f"file:{tmp_path}/media", file_size=1_500_000)
    assert result.returncode == FULL, result.stderr
    assert stored_files(tmp_path) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount 4 MiB of memory as a file system."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if (
        os.geteuid() != 0
        or subprocess.run(command, check=False, capture_output=True, timeout=60).returncode != 0
    ):
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=60)


async def test_a_full_disk_recovers_by_itself(small_disk: Path) -> None:
    """D16: if the disk is full, no part of the file remains, and the next one that fits is stored."""
    storage = LocalStorage(small_disk)
    with pytest.raises(StorageUnavailable) as caught:
        await storage.put("ab/00-video.mp4", chunked(bytes(5_000_000), 65_536))
    assert caught.value.reason == "full"
    assert stored_files(small_disk) == {}
    await storage.put("ab/01-video.mp4", chunked(bytes(3_000_000), 65_536))
    with pytest.raises(StorageUnavailable, match="free some space"):
        await storage.put("ab/02-video.mp4", chunked(bytes(2_000_000), 65_536))
    assert list(stored_files(small_disk)) == ["ab/01-video.mp4"]


async def test_files_leave_a_reserve_for_the_database(small_disk: Path) -> None:
    """D16: neither an announced file nor one without a length takes the last 2 % of the disk."""
    storage, filler = LocalStorage(small_disk / "media"), small_disk / "filler"
    filler.write_bytes(bytes(3_000_000))
    await storage.require_space(1_000_000)
    with pytest.raises(StorageUnavailable, match=r"No space left for 1\.1 MB: 1\.2 MB are free, and 0\.1 MB"):
        await storage.require_space(1_150_000)
    with pytest.raises(StorageUnavailable) as caught:
        await storage.put("ab/00-video.mp4", chunked(bytes(1_150_000), 65_536))
    assert (caught.value.reason, stored_files(small_disk / "media")) == ("full", {})
    filler.unlink()
    await storage.put("ab/00-video.mp4", chunked(bytes(1_150_000), 65_536))
    assert list(stored_files(small_disk / "media")) == ["ab/00-video.mp4"]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Run an S3 server for the tests of this module."""
    with s3_server(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


UPLOADER = """
import asyncio, os, signal, sys
from receiver.media import open_storage

async def chunks():
    for number in range(8):
        yield bytes(2_000_000)
        await asyncio.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(open_storage(sys.argv[1]).put("ab/00-video.mp4", chunks()))
"""


def test_a_killed_upload_leaves_no_object(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """D10: kill -9 in the middle of an upload; the parts are no object, so they cannot be read."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    result = subprocess.run([sys.executable, "-c", UPLOADER, bucket.url], check=False, timeout=60)
    assert result.returncode == -9
    assert bucket.open_uploads() == 1
    assert bucket.list_keys() == []
