"""The protocol of a storage, and the helpers that all storages share."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Final, Protocol, TypeVar
from uuid import uuid4

from receiver.errors import StorageUnavailable

T = TypeVar("T")

# Lower case only: a file system that ignores case would make one file of two keys. No leading dot: these
# names are for unfinished files.
_SEGMENT = r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?"
_KEY = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,7}}")
_MAX_KEY_LENGTH = 512

ANY_TYPE: Final = "application/octet-stream"
"""The content type of files that browsers must download and never show."""


class Storage(Protocol):
    """Keeps files under keys such as `0b8f/0-image.png`.

    The service makes the keys, in lower-case ASCII; any other key raises ValueError. Every method raises
    StorageUnavailable if the storage fails, with the reason `full` if it has no space left, else `error`.
    """

    async def require_space(self, size: int) -> None:
        """Raise StorageUnavailable if a file of `size` bytes would fill the disk; a bucket takes any."""

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, content_type: str = ANY_TYPE) -> None:
        """Store all `chunks` under `key`; a bucket sends the `content_type` to browsers.

        On return the file is durable, and has replaced an earlier file of this key. If `chunks` raises, the
        exception passes through and no file is stored.
        """

    def open(self, key: str, *, start: int = 0) -> AsyncGenerator[bytes]:
        """Iterate over a file's bytes from `start`. Raises FileNotFoundError if there is no such file."""

    async def stat(self, key: str) -> int | None:
        """Return the size in bytes; None if there is no such file."""

    async def delete(self, key: str) -> None:
        """Remove a file, if there is one."""

    def uri(self, key: str) -> str:
        """Return the URI under which other programs find the file: `file:///…`, `s3://…`."""

    async def link(self, key: str, *, seconds: int) -> str | None:
        """Return a signed URL that reads the file for `seconds`; None if the storage has no signed URLs.

        Raises ValueError if `seconds` is below 1 or above 7 days.
        """

    async def check(self) -> str | None:
        """Write, read back and delete a small file; return a warning if only the deletion fails.

        The message of StorageUnavailable says what to do.
        """

    async def sweep(self) -> int:
        """Remove unfinished files that are more than a day old; return their number."""

    async def close(self) -> None:
        """Close the connections."""


def require_key(key: str) -> str:
    """Return `key` if it is safe to use as a relative path, else raise ValueError."""
    if len(key) > _MAX_KEY_LENGTH or not _KEY.fullmatch(key):
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


async def ahead(items: AsyncIterator[T]) -> AsyncGenerator[T]:
    """Pass `items` on; while the caller uses one, the next one is fetched."""
    fetching = asyncio.ensure_future(_fetch(items))
    try:
        while item := await fetching:
            fetching = asyncio.ensure_future(_fetch(items))
            yield item[0]
    finally:
        fetching.cancel()
        await asyncio.wait({fetching})
        fetching.cancelled() or fetching.exception()  # retrieved, or asyncio would report it as lost


async def _fetch(items: AsyncIterator[T]) -> tuple[T] | tuple[()]:
    async for item in items:
        return (item,)
    return ()


async def run_to_end(work: Awaitable[T], on_cancel: Callable[[], None] = lambda: None) -> T:
    """Await `work` to its end, even if the caller is cancelled meanwhile; only then raise the cancellation.

    A thread cannot be cancelled, and an upload must not be: both would still use the file or the connection
    while the caller closes it.
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
        task.cancelled() or task.exception()  # retrieved, or asyncio would report the exception as lost
        raise cancelled
    return task.result()


async def probe(storage: Storage) -> str | None:
    """Write, read back and delete a small file; see `Storage.check`. Raises StorageUnavailable."""
    # In a folder, like the files of events: this also checks the permission to make one.
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
        # No error: the service needs no permission to delete files.
        warning = f"the probe {storage.uri(key)} stays, because it cannot be deleted: {error}"
    if found != content:
        raise StorageUnavailable("A file that was just written reads back with other bytes", reason="error")
    return warning
