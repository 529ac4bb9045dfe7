"""A local folder as storage: its files are complete, and durable as soon as `put` returns."""

import asyncio
import contextlib
import errno
import io
import os
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar
from uuid import uuid4

from receiver.errors import StorageUnavailable
from receiver.media.storage.base import ANY_TYPE, blocks, probe, require_key, run_to_end
from receiver.media.storage.direct import DirectWriter
from receiver.private_files import make_folder, open_private, sync_folder, write_all

P = ParamSpec("P")
T = TypeVar("T")

_INCOMING = ".incoming"
_BLOCK_BYTES = 512 * 1024
_ABANDONED_SECONDS = 24 * 60 * 60
_THREADS: Final = ThreadPoolExecutor(thread_name_prefix="storage")
"""Not asyncio's: a network mount without its server would keep all of them, and name resolution needs one."""
_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MB: Final = 1_000_000
RESERVED_SHARE: Final = 0.02
"""The share of the disk that files leave free, so that SQLite, on the same disk, still takes webhooks.

It is less than `LEAST_FREE_SHARE` of `receiver.disks`: operators are told before downloads wait."""
MAX_RESERVED_BYTES: Final = 1024 * _MB


class LocalStorage:
    """Files below `root`. Unfinished ones are in `root/.incoming`, from which `sweep` removes old ones."""

    def __init__(self, root: Path) -> None:
        self.root: Final = root.resolve()

    async def require_space(self, size: int) -> None:
        await self._run(_require_space, self.root, size)

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, content_type: str = ANY_TYPE) -> None:
        require_key(key)
        part = _Part(self.root)
        try:
            last = b""
            async for block in blocks(chunks, _BLOCK_BYTES):
                if last:
                    await self._run(part.write, last)
                last = block
            # A small file is one block, and so takes one call of a thread.
            await self._run(lambda: part.publish(last, self._path(key)))
        except BaseException:
            # Raise the first error. If the file cannot be removed now, `sweep` will do so.
            with contextlib.suppress(StorageUnavailable):
                await self._run(part.discard)
            raise

    async def open(self, key: str, *, start: int = 0) -> AsyncGenerator[bytes]:
        with contextlib.ExitStack() as opened:
            # Noted in the thread: a call that is cancelled has no result, and the file would stay open.
            file = await self._run(lambda: _open(self._path(key), start, opened))
            if file is None:
                raise FileNotFoundError(key)
            while block := await self._run(file.read, _BLOCK_BYTES):
                yield block

    async def stat(self, key: str) -> int | None:
        return await self._run(lambda: _size(self._path(key)))

    async def delete(self, key: str) -> None:
        await self._run(lambda: self._path(key).unlink(missing_ok=True))

    def uri(self, key: str) -> str:
        return (self.root / require_key(key)).as_uri()

    async def link(self, key: str, *, seconds: int) -> str | None:
        """Return None: a local folder has no signed URLs."""
        return None

    async def check(self) -> str | None:
        return await probe(self)

    async def sweep(self) -> int:
        return await self._run(_remove_abandoned, self.root / _INCOMING)

    async def close(self) -> None:
        """There are no connections to close."""

    def _path(self, key: str) -> Path:
        """Return the path of a key. Only for threads: a network mount without its server hangs."""
        path = self.root / require_key(key)
        # A key has no `..`, but a symbolic link in the folder could lead out of it.
        if not path.resolve().is_relative_to(self.root):
            raise StorageUnavailable(f"{path} leads out of {self.root}: remove the link", reason="error")
        return path

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            call = partial(work, *args, **kwargs)
            return await run_to_end(asyncio.get_running_loop().run_in_executor(_THREADS, call))
        except OSError as error:
            is_full = error.errno in _FULL_ERRORS
            advice = "free some space" if is_full else "make it a folder that this user can write to"
            raise StorageUnavailable(
                f"Cannot use {self.root}: {error.strerror}; {advice}, or change RECEIVER_STORAGE_URL",
                reason="full" if is_full else "error",
            ) from error


class _Part:
    """An unfinished file: `publish` gives it its name, `discard` removes it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._path = root / _INCOMING / uuid4().hex
        self._descriptor: int | None = None
        self._writer: DirectWriter | None = None

    def write(self, block: bytes) -> None:
        """Append a block that is not the last one."""
        if self._writer is None:
            self._writer = DirectWriter(self._open())
        # Before each block: other processes fill the disk, too, and some servers name no length.
        _require_space(self._open(), len(block))
        self._writer.write(block)

    def publish(self, last: bytes, path: Path) -> None:
        """Append the last block, flush the file and move it to `path`."""
        descriptor = self._open()
        _require_space(descriptor, len(last))
        if self._writer is not None:
            self._writer.end()
        write_all(descriptor, last)
        os.fsync(descriptor)
        self._close()
        make_folder(path.parent, flush=False)
        self._path.rename(path)
        # Flush existing folders, too: the process that made one may not have done so yet.
        for folder in path.parents[: len(path.relative_to(self.root).parts)]:
            sync_folder(folder)

    def discard(self) -> None:
        self._close()
        self._path.unlink(missing_ok=True)

    def _open(self) -> int:
        if self._descriptor is None:
            make_folder(self._path.parent)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = open_private(str(self._path), flags)
        return self._descriptor

    def _close(self) -> None:
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)


def _require_space(place: Path | int, size: int) -> None:
    """Raise OSError unless a file of `size` bytes leaves the reserve; `place` is a folder or an open file."""
    if isinstance(place, Path):
        # The first file makes the folder.
        place = next(each for each in (place, *place.parents) if each.exists())
    disk = os.statvfs(place)
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    reserved = min(int(total * RESERVED_SHARE), MAX_RESERVED_BYTES)
    # Some file systems of buckets have a total of 0.
    if total and free - size < reserved:
        raise OSError(
            errno.ENOSPC,
            f"No space left for {size / _MB:.1f} MB: {free / _MB:.1f} MB are free, and "
            f"{reserved / _MB:.1f} MB of the disk stay reserved for webhooks",
        )


def _open(path: Path, start: int, opened: contextlib.ExitStack) -> io.FileIO | None:
    try:
        file = opened.enter_context(path.open("rb", buffering=0))
    except FileNotFoundError:
        return None
    file.seek(start)
    return file


def _size(path: Path) -> int | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def _remove_abandoned(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    limit = time.time() - _ABANDONED_SECONDS
    removed = 0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # its write has ended, or another sweep removed it
            if path.stat().st_mtime < limit:
                path.unlink()
                removed += 1
    return removed
