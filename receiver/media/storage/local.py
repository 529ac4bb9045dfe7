"""A local folder as storage: its files are complete, and durable as soon as `put` returns."""

import asyncio
import contextlib
import errno
import io
import os
import stat
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import ParamSpec, TypeVar
from uuid import uuid4

from receiver.errors import StorageUnavailable
from receiver.media.storage.base import ANY_TYPE, blocks, probe, require_key, run_to_end
from receiver.private_files import make_folder, open_private, sync_folder, write_all

P = ParamSpec("P")
T = TypeVar("T")

_INCOMING = ".incoming"
_BLOCK_BYTES = 1024 * 1024
_ABANDONED_SECONDS = 24 * 60 * 60
_FULL_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalStorage:
    """Files below `root`. Unfinished ones are in `root/.incoming`, from which `sweep` removes old ones."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, content_type: str = ANY_TYPE) -> None:
        path = self._path(key)
        part = _Part(self._root)
        try:
            await self._run(part.open)
            async for block in blocks(chunks, _BLOCK_BYTES):
                await self._run(part.write, block)
            await self._run(part.publish, path)
        except BaseException:
            # Raise the first error. If the file cannot be removed now, `sweep` will do so.
            with contextlib.suppress(StorageUnavailable):
                await self._run(part.discard)
            raise

    async def open(self, key: str) -> AsyncGenerator[bytes]:
        file = await self._run(_open, self._path(key))
        if file is None:
            raise FileNotFoundError(key)
        with file:
            while block := await self._run(file.read, _BLOCK_BYTES):
                yield block

    async def stat(self, key: str) -> int | None:
        return await self._run(_size, self._path(key))

    async def delete(self, key: str) -> None:
        await self._run(self._path(key).unlink, missing_ok=True)

    def uri(self, key: str) -> str:
        return self._path(key).as_uri()

    async def link(self, key: str, *, seconds: int) -> str | None:
        """Return None: a local folder has no signed URLs."""
        return None

    async def check(self) -> str | None:
        return await probe(self)

    async def sweep(self) -> int:
        return await self._run(_remove_abandoned, self._root / _INCOMING)

    async def close(self) -> None:
        """There are no connections to close."""

    def _path(self, key: str) -> Path:
        path = self._root / require_key(key)
        # A key has no `..`, but a symbolic link in the folder could lead out of it.
        if not path.resolve().is_relative_to(self._root):
            raise StorageUnavailable(f"{path} leads out of {self._root}: remove the link", reason="error")
        return path

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await run_to_end(asyncio.to_thread(work, *args, **kwargs))
        except OSError as error:
            is_full = error.errno in _FULL_ERRORS
            advice = "free some space" if is_full else "make it a folder that this user can write to"
            raise StorageUnavailable(
                f"Cannot use {self._root}: {error.strerror}; {advice}, or change RECEIVER_STORAGE_URL",
                reason="full" if is_full else "error",
            ) from error


class _Part:
    """An unfinished file: `publish` gives it its name, `discard` removes it."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._path = root / _INCOMING / uuid4().hex
        self._closing = contextlib.ExitStack()
        self._file: io.FileIO

    def open(self) -> None:
        make_folder(self._path.parent)
        self._file = self._closing.enter_context(io.FileIO(self._path, "xb", opener=open_private))

    def write(self, block: bytes) -> None:
        write_all(self._file.fileno(), block)

    def publish(self, path: Path) -> None:
        os.fsync(self._file.fileno())
        self._closing.close()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path.rename(path)
        # Flush existing folders, too: the process that made one may not have done so yet.
        for folder in path.parents[: len(path.relative_to(self._root).parts)]:
            sync_folder(folder)

    def discard(self) -> None:
        self._closing.close()
        self._path.unlink(missing_ok=True)


def _open(path: Path) -> io.FileIO | None:
    try:
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        return None


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
