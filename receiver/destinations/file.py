"""`file:path.jsonl`: one event per line, appended and flushed to the disk.

Several processes may append to one file. Whoever writes holds its lock, so that a last line without an end
can only be what a crash left of an append that was never confirmed.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import structlog
from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import closed, encode
from receiver.errors import PublishFailed, SettingsError
from receiver.files import make_folder, open_private, sync_folder, write_all

LOCK_TIMEOUT: Final = 10.0
"""Seconds to wait for another process's lock: it may have been stopped while it held it."""
LOCK_POLL: Final = 0.002
BLOCK: Final = 4096

_HOPELESS: Final = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)

log = structlog.get_logger()


class FileDestination:
    """Appends events to a file of JSON lines.

    Events that come while a write is under way wait for the next one, which takes all of them: a flush to the
    disk costs the same for one as for many.
    """

    concurrency = 256

    def __init__(self, settings: DestinationSettings) -> None:
        self._path = _parse(settings)
        self._name = settings.name
        self._lines = _Lines(self._path, lock_timeout=settings.timeout)
        self._writing = asyncio.Lock()
        self._waiting: list[bytes] = []
        self._next_write: asyncio.Task[OSError | None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Open and repair the file. Raises SettingsError where it cannot be a file of ours."""
        try:
            await self.check()
        except PublishFailed as error:
            log.warning("destination is not ready", destination=self._name, error=str(error))

    async def check(self) -> None:
        """Open the file, which makes it and its folders, and see that it can be locked."""
        try:
            async with self._writing:
                await asyncio.to_thread(self._lines.check)
        except OSError as error:
            if isinstance(error, _UnusableError) or error.errno in _HOPELESS:
                raise SettingsError(f"destination {self._name!r}: {self._describe(error)}") from error
            raise self._failed(error) from error

    async def publish(self, event: CloudEvent) -> None:
        """Append the event and return when it is on the disk."""
        if self._closed:
            raise closed()
        self._waiting.append(encode(event) + b"\n")
        if self._next_write is None:
            self._next_write = asyncio.create_task(self._write_waiting())
        # Shielded: the write is the others', too.
        error = await asyncio.shield(self._next_write)
        if error is not None:
            raise self._failed(error) from error

    async def close(self) -> None:
        """Write what waits and close the file."""
        self._closed = True
        if self._next_write is not None:
            await asyncio.wait([self._next_write])
        async with self._writing:
            await asyncio.to_thread(self._lines.close)

    async def _write_waiting(self) -> OSError | None:
        """Return a failure instead of raising it: nobody may be left to take it."""
        async with self._writing:
            lines, self._waiting = self._waiting, []
            self._next_write = None
            try:
                await asyncio.to_thread(self._lines.append, b"".join(lines))
            except OSError as error:
                return error
        return None

    def _failed(self, error: OSError) -> PublishFailed:
        reason = errno.errorcode.get(error.errno or 0, "io").lower()
        return PublishFailed(self._describe(error), reason=reason)

    def _describe(self, error: OSError) -> str:
        return f"{self._path}: {error.strerror}"


class _UnusableError(OSError):
    """The path names something that must not be appended to."""


class _Lines:
    """An append-only file that several processes share; blocking, for one thread at a time.

    Every method raises OSError; the next one opens the file anew.
    """

    def __init__(self, path: Path, *, lock_timeout: float | None = None) -> None:
        self._path = path
        self._lock_timeout = lock_timeout
        self._descriptor: int | None = None

    def check(self) -> None:
        """Open, lock and repair."""
        with self._locked() as descriptor:
            _repair(descriptor)

    def append(self, lines: bytes) -> None:
        """Append whole lines and flush them to the disk, or append nothing."""
        with self._locked() as descriptor:
            end = _repair(descriptor)
            try:
                write_all(descriptor, lines)
                os.fsync(descriptor)
            except OSError:
                # Nothing of this is confirmed, so all of it will come again.
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, end)
                raise

    def close(self) -> None:
        """Close the file, which also unlocks it."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        try:
            descriptor = self._lock_current()
            yield descriptor
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except BaseException:
            self.close()
            raise

    def _lock_current(self) -> int:
        """Lock the file that has our name now: log rotation renames the one that we hold."""
        while True:
            descriptor = self._descriptor if self._descriptor is not None else self._open()
            _lock(descriptor, self._lock_timeout)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), self._path.stat()):
                    return descriptor
            self.close()

    def _open(self) -> int:
        make_folder(self._path.parent)
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
        self._descriptor = open_private(str(self._path), flags)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise _UnusableError(errno.EINVAL, "is not a regular file")
        # Also where the file was there: its maker may have died before it did this.
        sync_folder(self._path.parent)
        return self._descriptor


def _lock(descriptor: int, timeout: float | None) -> None:
    deadline = time.monotonic() + (timeout or LOCK_TIMEOUT)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock") from None
            time.sleep(LOCK_POLL)
        else:
            return


def _repair(descriptor: int) -> int:
    """Cut off a last line that has no end, and return the size of the file."""
    size = os.fstat(descriptor).st_size
    end = _end_of_lines(descriptor, size)
    if end < size:
        # A power cut may leave zeros. Anything else is no event of ours: the path is a mistake.
        if os.pread(descriptor, 1, end) not in {b"{", b"\0"}:
            raise _UnusableError(errno.EINVAL, "does not end with a whole line and is no file of events")
        os.ftruncate(descriptor, end)
        log.warning("removed a torn last line", bytes=size - end)
    return end


def _end_of_lines(descriptor: int, size: int) -> int:
    end = size
    while end > 0:
        start = max(0, end - BLOCK)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _parse(settings: DestinationSettings) -> Path:
    try:
        parts = urlsplit(settings.url.get_secret_value())
    except ValueError:
        parts = urlsplit("")
    path = unquote(parts.path)
    if parts.netloc or parts.query or parts.fragment or not path.strip("/") or "\0" in path:
        raise SettingsError(
            f"destination {settings.name!r}: write file:path.jsonl or file:///path.jsonl "
            "(%3F and %23 for ? and # in a name)"
        )
    return Path(path)
