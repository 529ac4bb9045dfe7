"""A local folder as storage: complete files only, durable once `put` returns."""

import asyncio
import contextlib
import errno
import io
import os
import stat
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import ParamSpec, TypeVar
from uuid import uuid4

from receiver.errors import StorageUnavailable
from receiver.files import make_folder, open_private, sync_folder, write_all
from receiver.media.storage.base import ANY_TYPE, blocks, probe, require_key, settled

P = ParamSpec("P")
T = TypeVar("T")

_INCOMING = ".incoming"
_BLOCK = 1024 * 1024
_ABANDONED_SECONDS = 24 * 60 * 60
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalStorage:
    """Files below `root`. Unfinished ones are in `root/.incoming`; `sweep` removes what crashes left."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    async def put(
        self,
        key: str,
        chunks: AsyncIterator[bytes],
        *,
        content_type: str = ANY_TYPE,
    ) -> None:
        """See Storage."""
        path = self._path(key)
        part = _Part(self._root)
        try:
            await self._run(part.open)
            async for block in blocks(chunks, _BLOCK):
                await self._run(part.write, block)
            await self._run(part.publish, path)
        except BaseException:
            # The first error counts; what cannot be removed now is for `sweep`.
            with contextlib.suppress(StorageUnavailable):
                await self._run(part.discard)
            raise

    async def open(self, key: str) -> AsyncIterator[bytes]:
        """See Storage."""
        file = await self._run(_open, self._path(key))
        if file is None:
            raise FileNotFoundError(key)
        with file:
            while block := await self._run(file.read, _BLOCK):
                yield block

    async def stat(self, key: str) -> int | None:
        """See Storage."""
        return await self._run(_size, self._path(key))

    async def delete(self, key: str) -> None:
        """See Storage."""
        await self._run(self._path(key).unlink, missing_ok=True)

    def uri(self, key: str) -> str:
        """See Storage."""
        return self._path(key).as_uri()

    async def link(self, key: str, *, seconds: int) -> str | None:
        """See Storage."""
        return None

    async def check(self) -> str | None:
        """See Storage."""
        return await probe(self)

    async def sweep(self) -> int:
        """See Storage."""
        return await self._run(_remove_abandoned, self._root / _INCOMING)

    async def close(self) -> None:
        """See Storage."""

    def _path(self, key: str) -> Path:
        path = self._root / require_key(key)
        # The key cannot climb out by itself; a link planted in the folder could take it there.
        if not path.resolve().is_relative_to(self._root):
            raise StorageUnavailable(f"{path} leads out of {self._root}: remove the link", reason="error")
        return path

    async def _run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await settled(asyncio.to_thread(work, *args, **kwargs))
        except OSError as error:
            is_full = error.errno in _FULL
            advice = "free some space" if is_full else "make it a folder that this user can write to"
            raise StorageUnavailable(
                f"Cannot use {self._root}: {error.strerror}; {advice}, or change RECEIVER_STORAGE_URL",
                reason="full" if is_full else "error",
            ) from error


class _Part:
    """A file in the making: nobody sees it before `publish`, and after `discard` it is gone."""

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
        # Up to the root, even where a folder was there already: whoever made it may not have synced it yet.
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
        with contextlib.suppress(FileNotFoundError):  # its own write, or another janitor, was faster
            if path.stat().st_mtime < limit:
                path.unlink()
                removed += 1
    return removed
