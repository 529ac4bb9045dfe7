"""An S3-compatible bucket as storage, through obstore. Importing this needs the extra `s3`."""

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from receiver.errors import SettingsError, StorageUnavailable
from receiver.media.storage.base import blocks, probe, require_key, settled

if TYPE_CHECKING:
    from obstore.store import S3Config

# S3's smallest part, few at once and fed in small blocks, so that memory stays flat whatever the file's size.
_PART = 5 * 1024 * 1024
_PARTS_AT_ONCE = 2
_BLOCK = 256 * 1024
_READ = 1024 * 1024

_STATUS = re.compile(r"\bstatus(?: code)?: ([1-5][0-9]{2})\b")
_CODE = re.compile(r"<Code>([A-Za-z]{3,64})</Code>")
_OS_ERROR = re.compile(r"\bOs \{\s*code: ([0-9]{1,4}),|\(os error ([0-9]{1,4})\)")
_SIGNS = (
    (r"\bstatus(?: code)?: 40[13]\b", "access denied"),
    (r"\bstatus(?: code)?: 404\b", "there is no such bucket"),
    (r"\bstatus(?: code)?: 5[0-9]{2}\b", "the server reports an error"),
    (r"dns error|failed to lookup address", "the host name was not found"),
    (r"certificate|UnknownIssuer", "the TLS certificate is not trusted"),
    (r"timed out|TimedOut", "no answer in time"),
    (r"error sending request", "the connection failed"),
)


class S3Storage:
    """Objects below `prefix` of `bucket`. Credentials are where every S3 client looks for them: `AWS_…`."""

    def __init__(self, *, bucket: str, prefix: str, endpoint: str | None, region: str | None) -> None:
        self._base = f"s3://{bucket}/{prefix}/" if prefix else f"s3://{bucket}/"
        config: S3Config = {"checksum_algorithm": "SHA256"}
        if endpoint is not None:
            config["endpoint"] = endpoint
        if region is not None:
            config["region"] = region
        try:
            self._store = S3Store(
                bucket,
                prefix=prefix or None,
                config=config,
                client_options={
                    "connect_timeout": "5s",
                    "timeout": "60s",
                    "allow_http": endpoint is not None and endpoint.startswith("http://"),
                },
                # Short: a download that could not be stored is tried again later, as a whole.
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=30)},
            )
        except (BaseError, TypeError, ValueError) as error:
            raise SettingsError(
                f"RECEIVER_STORAGE_URL: no client for S3 can be made ({type(error).__name__}): see bucket, "
                "endpoint and the AWS_… variables; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go together"
            ) from None

    async def put(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        """See Storage. What fits into one part is a single request, more is a multipart upload."""
        path = require_key(key)
        source = _Source(blocks(chunks, _BLOCK))
        head = await source.peek(_PART)
        if len(head) < _PART:
            with self._translated():
                await settled(obstore.put_async(self._store, path, head, use_multipart=False))
            return
        del head  # or it would stay in memory for as long as the upload lasts
        try:
            with self._translated(source):
                upload = obstore.put_async(
                    self._store,
                    path,
                    source,
                    use_multipart=True,
                    chunk_size=_PART,
                    max_concurrency=_PARTS_AT_ONCE,
                )
                await settled(upload, on_cancel=source.stop)
        finally:
            await source.aclose()

    async def open(self, key: str) -> AsyncIterator[bytes]:
        """See Storage."""
        path = require_key(key)
        with self._translated():
            try:
                found = await obstore.get_async(self._store, path)
            except FileNotFoundError:
                found = None
        if found is None:
            raise FileNotFoundError(key)
        stream = aiter(found.stream(min_chunk_size=_READ))

        async def read() -> bytes | None:
            with self._translated():
                return await anext(stream, None)

        while (block := await read()) is not None:
            yield bytes(block)

    async def stat(self, key: str) -> int | None:
        """See Storage."""
        path = require_key(key)
        with self._translated():
            try:
                return (await obstore.head_async(self._store, path))["size"]
            except FileNotFoundError:
                return None

    async def delete(self, key: str) -> None:
        """See Storage."""
        path = require_key(key)
        with self._translated(), contextlib.suppress(FileNotFoundError):
            await obstore.delete_async(self._store, path)

    def uri(self, key: str) -> str:
        """See Storage."""
        return self._base + require_key(key)

    async def check(self) -> None:
        """See Storage."""
        await probe(self)

    async def sweep(self) -> int:
        """See Storage. Failed uploads are aborted; what a crash leaves open is for a lifecycle rule."""
        return 0

    async def close(self) -> None:
        """See Storage."""

    @contextlib.contextmanager
    def _translated(self, source: "_Source | None" = None) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            if source is not None and source.failure is not None:
                raise source.failure from None
            raise StorageUnavailable(
                f"Cannot use {self._base}: {_why(error)}; check RECEIVER_STORAGE_URL, the bucket, "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                reason="error",
            ) from error


def _why(error: Exception) -> str:
    """Return what has happened: by the exception's class, and by the numbers and codes in its text.

    The text itself may quote what was signed, and with it a session token.
    """
    text = str(error)
    facts = [type(error).__name__]
    facts += [f"HTTP {found[1]}" for found in [_STATUS.search(text)] if found]
    facts += [found[1] for found in [_CODE.search(text)] if found]
    words = next((words for sign, words in _SIGNS if re.search(sign, text)), "")
    if words == "the connection failed" and (found := _OS_ERROR.search(text)):
        words = os.strerror(int(found[1] or found[2]))
    return f"{words} ({', '.join(facts)})" if words else ", ".join(facts)


class _Source:
    """What an upload reads from. Only an error raised in here makes obstore abort the upload on the server.

    Cancelling the upload instead would leave its parts in the bucket, invisible and paid for.
    """

    def __init__(self, blocks: AsyncIterator[bytes]) -> None:
        self.failure: Exception | None = None
        self._blocks = blocks
        self._head: deque[bytes] = deque()
        self._reading: asyncio.Future[bytes | None] | None = None
        self._is_stopped = False

    async def peek(self, size: int) -> bytes:
        """Return the first blocks, `size` bytes or all that there are; they will still be read."""
        length = 0
        while length < size and (block := await anext(self._blocks, None)) is not None:
            self._head.append(block)
            length += len(block)
        return b"".join(self._head)

    def __aiter__(self) -> "_Source":
        return self

    async def __anext__(self) -> bytes:
        if self._is_stopped:
            raise _Stopped
        if self._head:
            return self._head.popleft()
        self._reading = asyncio.ensure_future(anext(self._blocks, None))
        try:
            block = await self._reading
        except asyncio.CancelledError:
            raise _Stopped from None
        except Exception as error:
            self.failure = error
            raise
        if block is None:
            raise StopAsyncIteration
        return block

    def stop(self) -> None:
        """Make the upload fail now."""
        self._is_stopped = True
        if self._reading is not None:
            self._reading.cancel()

    async def aclose(self) -> None:
        """Wait until nothing reads from the rest any more."""
        self.stop()
        if self._reading is not None:
            await asyncio.wait({self._reading})


class _Stopped(Exception):  # noqa: N818 - a signal
    """The caller was cancelled."""
