"""`file:path.jsonl`: one event per line, appended and flushed to the disk.

Several processes may append to one file. Each locks it while it writes, so a last line without an end
is an append that a crash interrupted and that was never confirmed.
"""

import asyncio
import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import structlog
from cloudevents.core.v1.event import CloudEvent

from receiver.batching import Batcher
from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import CheckedDestination, Failure, closed_failure, encode
from receiver.errors import PublishFailed, PublishRejected, SettingsError
from receiver.private_files import make_folder, open_private, sync_folder, write_all

LOCK_TIMEOUT_SECONDS: Final = 10.0
"""Seconds to wait for another process's lock: a process may be stopped while it holds it."""
LOCK_POLL_SECONDS: Final = 0.002
BLOCK_BYTES: Final = 4096

_PERMANENT: Final = {
    *(errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM, errno.EROFS),
}

log = structlog.get_logger()


class FileDestination(CheckedDestination):
    """Appends events to a file of JSON lines.

    Events that arrive while a write is under way share the next one: a flush to the disk costs the same for
    one event as for many.
    """

    concurrency = 1024

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._path = _parse(settings)
        self._lines = _Lines(self._path, lock_timeout=settings.timeout)
        self._in_use = asyncio.Lock()
        self._batcher: Batcher[bytes, OSError | None] = Batcher(self._append)
        self._closed = False

    async def check(self) -> None:
        """Open and repair the file, make it and its folders if necessary, and check that it can be locked.

        Raises SettingsError if it cannot be a file of events.
        """
        try:
            async with self._in_use:
                await asyncio.to_thread(self._lines.check)
        except OSError as error:
            if isinstance(error, _UnusableError) or error.errno in _PERMANENT:
                raise SettingsError(f"destination {self._name!r}: {self._error_text(error)}") from error
            raise self._failure_from(error) from error

    async def publish(self, event: CloudEvent) -> None:
        """Append the event and return when it is flushed to the disk."""
        if self._closed:
            raise closed_failure()
        error = await self._batcher.add(encode(event) + b"\n")
        if error is not None:
            raise self._failure_from(error) from error

    async def publish_first(self, events: Sequence[CloudEvent]) -> Sequence[Failure | None]:
        """Append all events with one flush; see `GroupDestination`."""
        if self._closed:
            return [closed_failure()] * len(events)
        lines, failures = list[bytes](), list[Failure | None]()
        for event in events:
            try:
                lines.append(encode(event) + b"\n")
            except PublishRejected as rejected:
                failures.append(rejected)
            else:
                failures.append(None)
        error = await self._batcher.add(b"".join(lines)) if lines else None
        if error is None:
            return failures
        failed = self._failure_from(error)
        return [each or failed for each in failures]

    async def close(self) -> None:
        """Write the events that wait, and close the file."""
        self._closed = True
        await self._batcher.drain()
        async with self._in_use:
            await asyncio.to_thread(self._lines.close)

    async def _append(self, lines: Sequence[bytes]) -> Sequence[OSError | None]:
        try:
            async with self._in_use:
                await asyncio.to_thread(self._lines.append, b"".join(lines))
        except OSError as error:
            return [error] * len(lines)
        return [None] * len(lines)

    def _failure_from(self, error: OSError) -> PublishFailed:
        reason = errno.errorcode.get(error.errno or 0, "io").lower()
        return PublishFailed(self._error_text(error), reason=reason)

    def _error_text(self, error: OSError) -> str:
        return f"{self._path}: {error.strerror}"


class _UnusableError(OSError):
    """The path names an object that must not be appended to."""


class _Lines:
    """An append-only file that several processes share; blocking, for one thread at a time.

    Every method raises OSError. If one has failed, the next call opens the file again.
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
        """Append whole lines and flush them to the disk; after a failure the file is as before."""
        with self._locked() as descriptor:
            end = _repair(descriptor)
            try:
                write_all(descriptor, lines)
                os.fsync(descriptor)
            except OSError:
                # None of these lines is confirmed, so each will be published again.
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
        """Lock the file that has our path now: log rotation may have renamed the one that is open."""
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
        # Even if the file exists: the process that made it may have crashed before this.
        sync_folder(self._path.parent)
        return self._descriptor


def _lock(descriptor: int, timeout: float | None) -> None:
    deadline = time.monotonic() + (timeout or LOCK_TIMEOUT_SECONDS)
    while True:
        try:
            # Poll: a lock that blocks the thread has no timeout.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process holds the lock") from None
            time.sleep(LOCK_POLL_SECONDS)
        else:
            return


def _repair(descriptor: int) -> int:
    """Cut off a last line that has no end, and return the size of the file."""
    size = os.fstat(descriptor).st_size
    end = _end_of_lines(descriptor, size)
    if end < size:
        # A power cut may leave zeros. Any other text is not an event, so the path must be wrong.
        if os.pread(descriptor, 1, end) not in {b"{", b"\0"}:
            raise _UnusableError(errno.EINVAL, "does not end with a whole line and is not a file of events")
        os.ftruncate(descriptor, end)
        log.warning("removed a torn last line", bytes=size - end)
    return end


def _end_of_lines(descriptor: int, size: int) -> int:
    end = size
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
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
