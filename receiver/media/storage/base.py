"""What a storage is, and what every storage does alike."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol, TypeVar
from uuid import uuid4

from receiver.errors import StorageUnavailable

T = TypeVar("T")

# Lower case only: two keys must not become one file where case is folded. No leading dot: those names are
# ours.
_SEGMENT = r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,7}}")
_MAX_KEY = 512

ANY_TYPE: Final = "application/octet-stream"
"""Browsers download it and show nothing."""


class Storage(Protocol):
    """Keeps files under keys such as `0b8f/0-image.png`.

    Keys are ours, lower-case ASCII; another key is a ValueError. Every method raises StorageUnavailable when
    the storage cannot do its work: reason `full` when there is no room, `error` otherwise.
    """

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, content_type: str = ANY_TYPE) -> None:
        """Store all `chunks` under `key`, or nothing; a bucket tells browsers the `content_type`.

        On return the file is durable, and it has replaced what was there before. An exception from `chunks`
        passes through and leaves nothing behind.
        """

    def open(self, key: str) -> AsyncIterator[bytes]:
        """Iterate over a file's bytes. Raises FileNotFoundError when there is none."""

    async def stat(self, key: str) -> int | None:
        """Return the size in bytes; None when there is no such file."""

    async def delete(self, key: str) -> None:
        """Remove a file; one that is not there is fine."""

    def uri(self, key: str) -> str:
        """Return where others find the file: `file:///…`, `s3://…`."""

    async def link(self, key: str, *, seconds: int) -> str | None:
        """Return a URL with which anybody can read the file for so long; None if the storage makes none.

        Raises ValueError for less than a second and more than 7 days.
        """

    async def check(self) -> str | None:
        """Write, read back and delete a small file; return a warning if only the last of it is not possible.

        The StorageUnavailable that it raises says what to do.
        """

    async def sweep(self) -> int:
        """Remove what interrupted writes left behind more than a day ago; return how many files that were."""

    async def close(self) -> None:
        """Let go of connections."""


def require_key(key: str) -> str:
    """Return `key` if it is safe to use as a relative path, else raise ValueError."""
    if len(key) > _MAX_KEY or not _KEY.fullmatch(key):
        raise ValueError(f"Not a storage key: {key[:80]!r}")
    return key


async def blocks(chunks: AsyncIterator[bytes], size: int) -> AsyncIterator[bytes]:
    """Join `chunks` into blocks of at least `size` bytes; only the last one is smaller."""
    pending: list[bytes] = []
    length = 0
    async for chunk in chunks:
        pending.append(chunk)
        length += len(chunk)
        if length >= size:
            yield b"".join(pending)
            pending.clear()
            length = 0
    if length:
        yield b"".join(pending)


async def settled(work: Awaitable[T], on_cancel: Callable[[], None] = lambda: None) -> T:
    """Await `work` to its end even if the caller is cancelled meanwhile; only then honour the cancellation.

    A thread cannot be cancelled and an upload must not be: both would go on using what the caller cleans up.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
            on_cancel()
    if cancelled is not None:
        task.cancelled() or task.exception()  # looked at, so that asyncio does not report it as forgotten
        raise cancelled
    return task.result()


async def probe(storage: Storage) -> str | None:
    """Write, read back and delete a small file; see `Storage.check`. Raises StorageUnavailable."""
    # Below a folder, as the files of events are: that takes the right to make one.
    key, content = f"probe/{uuid4().hex}", uuid4().bytes

    async def chunks() -> AsyncIterator[bytes]:
        yield content

    await storage.put(key, chunks())
    try:
        found = b"".join([block async for block in storage.open(key)])
    except FileNotFoundError:
        found = b""
    warning = None
    try:
        await storage.delete(key)
    except StorageUnavailable as error:
        # Credentials without the right to delete are enough for all that the service does.
        warning = f"the probe {storage.uri(key)} stays, because it cannot be deleted: {error}"
    if found != content:
        raise StorageUnavailable("A file that was just written reads back differently", reason="error")
    return warning
