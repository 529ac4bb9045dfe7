"""The file destination: durability, repair, sharing, rotation."""

import asyncio
import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs
from support.kinds_base import make_event, open_url, until

from receiver.destinations import Destination
from receiver.destinations import file as file_module
from receiver.errors import PublishFailed, SettingsError

APPENDER = """
import asyncio, os, signal, structlog, sys
structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
sys.path.insert(0, sys.argv[3])
from support.kinds_base import make_event, open_url, until

async def publish(destination, numbers):
    for number in numbers:
        event = make_event({"fill": "x" * (number * 7919 % 65536)})
        await destination.publish(event)
        os.write(1, f"{event.get_extension('deliveryid')}\\n".encode())

async def main():
    destination = open_url(sys.argv[1])
    await destination.start()
    numbers = iter(range(int(sys.argv[2]) if sys.argv[2] != "endless" else 100_000))
    await asyncio.gather(*(publish(destination, numbers) for _ in range(8)))
    await destination.close()

if len(sys.argv) > 4:
    def half_and_die(descriptor, data, write=os.write):
        if descriptor == 1:
            return write(descriptor, data)
        write(descriptor, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    os.write = half_and_die

asyncio.run(main())
"""
TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The path of the destination's file."""
    return tmp_path / "events.jsonl"


async def started(path: Path) -> Destination:
    """Open and start a destination."""
    destination = open_url(f"file:{path}")
    await destination.start()
    return destination


def read(path: Path) -> list[dict[str, Any]]:
    """Read all lines; each has an end and is one JSON object."""
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def ids(path: Path) -> list[str]:
    """Return the delivery ids in the file."""
    return [event["deliveryid"] for event in read(path)]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the file's lock as another process would."""
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        yield


class Disk:
    """Watches writes and flushes of events, and can hold the flushes back or fail them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        self.go = threading.Event()
        self.go.set()
        self.error: OSError | None = None
        self._fsync = os.fsync
        self._write = os.write
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "write", self.write)

    def write(self, descriptor: int, data: Any) -> int:
        """Write and record it."""
        written = self._write(descriptor, data)
        self._note("write", descriptor)
        return written

    def fsync(self, descriptor: int) -> None:
        """Flush or fail, as the test has set it, and record it."""
        assert self.go.wait(10)
        if self.error is not None:
            raise self.error
        self._fsync(descriptor)
        self._note("fsync", descriptor)

    def _note(self, call: str, descriptor: int) -> None:
        target = Path(f"/proc/self/fd/{descriptor}").readlink()
        # The event loop wakes itself up through a socket or a pipe.
        if target.is_absolute():
            self.calls.append((call, target.name))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Watch writes and flushes."""
    return Disk(monkeypatch)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("file:events.jsonl", "events.jsonl"),
        ("file:out/events.jsonl", "out/events.jsonl"),
        ("file:my%20events%3F%23%25.jsonl", "my events?#%.jsonl"),
        ("file:{here}/absolute.jsonl", "absolute.jsonl"),
        ("file://{here}/three.jsonl", "three.jsonl"),
    ],
)
async def test_url_names_the_file(tmp_path: Path, url: str, expected: str) -> None:
    """A path is relative to the working directory or absolute, percent-decoded; folders are made."""
    destination = open_url(url.format(here=tmp_path))
    await destination.start()
    await destination.publish(make_event())
    await destination.close()
    assert len(read(tmp_path / expected)) == 1


async def test_file_and_folders_are_flushed_before_the_first_event(tmp_path: Path, disk: Disk) -> None:
    """E1: the names of new folders and of a new file are on the disk before an event is confirmed."""
    destination = await started(tmp_path / "a" / "b" / "events.jsonl")
    assert disk.calls == [("fsync", tmp_path.name), ("fsync", "a"), ("fsync", "b")]
    await destination.publish(make_event())
    await destination.close()
    assert disk.calls[3:] == [("write", "events.jsonl"), ("fsync", "events.jsonl")]


async def test_event_is_confirmed_after_the_flush(path: Path, disk: Disk) -> None:
    """E1: publish does not return before the written line is flushed, and does not block the loop."""
    destination = await started(path)
    disk.calls.clear()
    disk.go.clear()
    publishing = asyncio.create_task(destination.publish(make_event()))
    await until(lambda: bool(disk.calls))
    await asyncio.sleep(0.05)
    assert disk.calls == [("write", "events.jsonl")]
    assert not publishing.done()
    disk.go.set()
    await publishing
    assert disk.calls == [("write", "events.jsonl"), ("fsync", "events.jsonl")]
    await destination.close()


async def test_events_that_wait_share_one_flush(path: Path, disk: Disk) -> None:
    """E1: all events that come while a flush is under way are written and flushed together."""
    destination = await started(path)
    disk.calls.clear()
    disk.go.clear()
    first = asyncio.create_task(destination.publish(make_event()))
    await until(lambda: bool(disk.calls))
    rest = [asyncio.create_task(destination.publish(make_event())) for _ in range(50)]
    await asyncio.sleep(0.01)
    disk.go.set()
    await asyncio.gather(first, *rest)
    await destination.close()
    assert disk.calls == [("write", "events.jsonl"), ("fsync", "events.jsonl")] * 2
    assert len(read(path)) == 51


async def test_failed_flush_is_no_confirmation(path: Path, disk: Disk) -> None:
    """C8: if the flush fails the event is removed again, and a later one uses a new descriptor."""
    destination = await started(path)
    await destination.publish(make_event())
    before = path.read_bytes()
    disk.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event())
    assert caught.value.reason == "eio"
    assert str(caught.value) == f"{path}: Input/output error"
    assert path.read_bytes() == before
    disk.error = None
    disk.calls.clear()
    await destination.publish(make_event())
    await destination.close()
    # After a failed flush a descriptor may report the next one as good without writing the data.
    assert ("fsync", path.parent.name) in disk.calls
    assert len(read(path)) == 2


async def test_short_write_is_taken_back(path: Path) -> None:
    """D16: if the file size limit cuts a write short no part stays; later events get through."""
    destination = await started(path)
    first, second, third = (
        make_event({"fill": "x" * 200_000}),
        make_event({"fill": "y" * 200_000}),
        make_event(),
    )
    await destination.publish(first)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100_000, hard))
    try:
        with pytest.raises(PublishFailed) as caught:
            await destination.publish(second)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.reason == "efbig"
    assert path.read_bytes() == before
    await destination.publish(third)
    await destination.close()
    assert ids(path) == [first.get_extension("deliveryid"), third.get_extension("deliveryid")]


WHOLE = b'{"deliveryid": "whole"}\n'


@pytest.mark.parametrize(
    "torn",
    [b"{", b'{"deliveryid": "torn"', b'{"fill": "' + b"x" * 20_000, b"\0" * 5000, b'{"deliveryid": "torn"}'],
    ids=["one byte", "half", "long", "zeros of a power cut", "all but the end"],
)
@pytest.mark.parametrize("before", [b"", WHOLE, WHOLE * 1000], ids=["alone", "after one", "after many"])
async def test_torn_line_is_cut_off_at_start(path: Path, before: bytes, torn: bytes) -> None:
    """E3: the start removes the torn line of a crash, and no whole line."""
    path.write_bytes(before + torn)
    with capture_logs() as logs:
        destination = await started(path)
    assert path.read_bytes() == before
    assert [entry["bytes"] for entry in logs] == [len(torn)]
    await destination.publish(make_event())
    await destination.close()
    assert len(read(path)) == before.count(b"\n") + 1


async def test_torn_line_of_another_process_is_cut_off_before_an_append(path: Path) -> None:
    """E3: if another process tears a line while this one runs, the next line is whole."""
    destination = await started(path)
    await destination.publish(make_event())
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"torn')
    event = make_event()
    await destination.publish(event)
    await destination.close()
    assert path.read_bytes().startswith(whole + b"{")
    assert ids(path)[1:] == [event.get_extension("deliveryid")]


async def test_whole_lines_are_left_alone(path: Path) -> None:
    """E3: the start does not change a file that ends with a whole line, whatever its content."""
    path.write_bytes(b"# not ours\n\n" + WHOLE)
    with capture_logs() as logs:
        destination = await started(path)
    await destination.close()
    assert path.read_bytes() == b"# not ours\n\n" + WHOLE
    assert logs == []


async def test_foreign_file_is_not_cut(path: Path) -> None:
    """A file of another kind, such as a database, is rejected and stays unchanged."""
    content = b"SQLite format 3\0\n" + b"\1" * 5000
    path.write_bytes(content)
    destination = open_url(f"file:{path}")
    with pytest.raises(SettingsError, match="is not a file of events"):
        await destination.start()
    with pytest.raises(PublishFailed):
        await destination.publish(make_event())
    await destination.close()
    assert path.read_bytes() == content


def make_folder(path: Path) -> None:
    """Put a folder at the path."""
    path.mkdir()


def make_pipe(path: Path) -> None:
    """Put a named pipe at the path."""
    os.mkfifo(path)


def make_link(path: Path) -> None:
    """Put a link to a device at the path."""
    path.symlink_to("/dev/null")


def make_loop(path: Path) -> None:
    """Put a link to itself at the path."""
    path.symlink_to(path)


@pytest.mark.parametrize("make", [make_folder, make_pipe, make_link, make_loop])
async def test_path_that_is_no_file_is_rejected(path: Path, make: Callable[[Path], None]) -> None:
    """A mistake that a restart cannot repair is a SettingsError at start that names the path."""
    make(path)
    destination = open_url(f"file:{path}")
    with pytest.raises(SettingsError) as caught:
        await destination.start()
    assert str(path) in str(caught.value)
    assert "'test'" in str(caught.value)
    await destination.close()


async def test_path_below_a_file_is_rejected(path: Path) -> None:
    """If a folder cannot be made, that is a SettingsError, too."""
    path.write_bytes(b"")
    destination = open_url(f"file:{path}/events.jsonl")
    with pytest.raises(SettingsError):
        await destination.start()
    await destination.close()


@pytest.mark.parametrize("compressed", [True, False])
async def test_rotation_is_noticed(path: Path, *, compressed: bool) -> None:
    """If log rotation has renamed or removed the file, a new one is made and written."""
    destination = await started(path)
    events = [make_event() for _ in range(4)]
    await destination.publish(events[0])
    rotated = path.with_suffix(".1")
    path.rename(rotated)
    if compressed:
        rotated.rename(path.with_suffix(".gz"))
        rotated = path.with_suffix(".gz")
    await destination.publish(events[1])
    await destination.publish(events[2])
    assert ids(rotated) == [events[0].get_extension("deliveryid")]
    assert ids(path) == [event.get_extension("deliveryid") for event in events[1:3]]
    path.unlink()
    await destination.publish(events[3])
    await destination.close()
    assert ids(path) == [events[3].get_extension("deliveryid")]


async def test_truncated_file_is_appended_to_from_its_start(path: Path) -> None:
    """If the file was truncated from outside, no zeros fill the gap."""
    destination = await started(path)
    await destination.publish(make_event())
    os.truncate(path, 0)
    await destination.publish(make_event())
    await destination.close()
    assert len(read(path)) == 1


def count_descriptors() -> int:
    """Return the number of open descriptors of this process."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_close_waits_for_the_last_write(path: Path) -> None:
    """E16: an event that was passed before the close is written before it, not after."""
    await (await started(path)).close()
    before = count_descriptors()
    destination = open_url(f"file:{path}")
    publishing = asyncio.create_task(destination.publish(make_event()))
    await asyncio.sleep(0)
    await destination.close()
    assert len(read(path)) == 1
    await publishing
    assert count_descriptors() == before


async def test_descriptors_are_not_lost(path: Path) -> None:
    """Rotations and failures leave no open descriptor."""
    before = count_descriptors()
    destination = await started(path)
    for _ in range(20):
        path.unlink()
        await destination.publish(make_event())
        path.unlink()
        path.mkdir()
        with pytest.raises(PublishFailed):
            await destination.publish(make_event())
        path.rmdir()
        path.touch()
    await destination.close()
    assert count_descriptors() == before


async def test_lock_of_another_process_is_waited_for(path: Path) -> None:
    """Several processes may append: while one holds the lock the others wait."""
    destination = await started(path)
    with locked(path):
        publishing = asyncio.create_task(destination.publish(make_event()))
        await asyncio.sleep(0.05)
        assert path.read_bytes() == b""
        assert not publishing.done()
    await publishing
    await destination.close()
    assert len(read(path)) == 1


async def test_lock_is_not_waited_for_for_ever(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E6: if a process is stopped while it holds the lock, the publish fails instead of hanging."""
    monkeypatch.setattr(file_module, "LOCK_TIMEOUT_SECONDS", 0.05)
    path.touch()
    with locked(path):
        with capture_logs() as logs:
            destination = await started(path)
        assert [entry["log_level"] for entry in logs] == ["warning"]
        with pytest.raises(PublishFailed) as caught:
            await destination.publish(make_event())
        assert caught.value.reason == "etimedout"
    await destination.publish(make_event())
    await destination.close()
    assert len(read(path)) == 1


async def test_unlocked_between_appends(path: Path) -> None:
    """A destination that is idle holds no lock, also after a failure."""
    destination = await started(path)
    await destination.publish(make_event())
    with path.open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_UN)
        os.write(other.fileno(), b"foreign")
        with pytest.raises(PublishFailed):
            await destination.publish(make_event())
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await destination.close()


def append(path: Path, count: str, *more: str) -> subprocess.Popen[bytes]:
    """Run a process that appends events and prints the ids of confirmed ones."""
    return subprocess.Popen(
        [sys.executable, "-c", APPENDER, f"file:{path}", count, TESTS, *more],
        stdout=subprocess.PIPE,
        bufsize=0,
        # Measuring coverage would only slow down a process that is killed before it reports.
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
    )


def confirmed_by(process: subprocess.Popen[bytes]) -> list[str]:
    """Return the ids that the process printed, once it has ended."""
    output, _ = process.communicate(timeout=30)
    return output.decode().split()


async def test_processes_share_a_file(path: Path) -> None:
    """E1: if three processes append at once every line is whole and there exactly once."""
    processes = [append(path, "60") for _ in range(3)]
    confirmed = [each for process in processes for each in confirmed_by(process)]
    assert len(confirmed) == 180
    assert sorted(ids(path)) == sorted(confirmed)


async def test_kill_in_the_middle_of_a_write(path: Path) -> None:
    """E3: a process killed in the middle of a write leaves a torn line, which the next start removes."""
    destination = await started(path)
    event = make_event()
    await destination.publish(event)
    await destination.close()
    process = append(path, "endless", "torn")
    assert confirmed_by(process) == []
    assert process.returncode == -signal.SIGKILL
    assert not path.read_bytes().endswith(b"\n")
    await (await started(path)).close()
    assert ids(path)[0] == event.get_extension("deliveryid")


async def test_kill_loses_no_confirmed_line(path: Path) -> None:
    """T2: 24 times kill -9 at a random moment; every confirmed line is there and every line is whole."""
    choose = random.Random()
    total = 0
    for _ in range(12):
        pair = [append(path, "endless") for _ in range(2)]
        confirmed = set()
        for process in pair:
            assert process.stdout is not None
            confirmed.add(process.stdout.readline().decode().strip())
        for process in pair:
            await asyncio.sleep(choose.uniform(0, 0.05))
            process.kill()
            output, _ = process.communicate(timeout=30)
            # The last id may be cut off in the pipe, too.
            confirmed |= {line.decode() for line in output.split(b"\n")[:-1]}
        await (await started(path)).close()
        assert confirmed - set(ids(path)) == set()
        total += len(confirmed)
        path.unlink()
    assert total > 100
