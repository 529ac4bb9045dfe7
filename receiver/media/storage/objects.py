"""A bucket of S3, Google Cloud Storage or Azure as storage.

obstore is an optional dependency; whoever imports this module must expect an ImportError.
"""

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from receiver.errors import SettingsError, StorageUnavailable
from receiver.media.storage.base import ANY_TYPE, blocks, probe, require_key, settled

if TYPE_CHECKING:
    from obstore import BytesStream, GetResult
    from obstore.store import AzureConfig, ClientConfig, GCSConfig, RetryConfig, S3Config

T = TypeVar("T")
Store: TypeAlias = S3Store | GCSStore | AzureStore

# S3's smallest part, few at once and fed in small blocks, so that memory stays flat whatever the file's size.
_PART = 5 * 1024 * 1024
_PARTS_AT_ONCE = 2
_BLOCK = 256 * 1024
_MIB = 1024 * 1024

_STALL: Final = 60.0
"""Seconds that the server may take for an answer without a body, or for the next block of a file."""
_PART_SECONDS: Final = 320
"""Seconds that an upload of one part may take: the slowest rate of a download, 16 KiB/s.

The client counts the time from the start of a request, so this is no stall timeout for what is sent.
"""
# Short: a download that could not be stored is tried again later, as a whole.
_RETRIES: "Final[RetryConfig]" = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
_LONGEST_LINK: Final = 7 * 24 * 60 * 60

_STATUS = re.compile(r"\bstatus(?: code)?: ([1-5][0-9]{2})\b")
_CODE = re.compile(r"<Code>([A-Za-z]{3,64})</Code>")
_NO_BUCKET = re.compile(r"<Code>(?:NoSuchBucket|ContainerNotFound)</Code>")
_OS_ERROR = re.compile(r"\bOs \{\s*code: ([0-9]{1,4}),|\(os error ([0-9]{1,4})\)")
_SIGNS = (
    (r"\bSASforSASNotSupported\b", "a SAS token signs no links; that takes the account's key"),
    (r"\bstatus(?: code)?: 40[13]\b", "access denied"),
    (r"\bstatus(?: code)?: 404\b", "there is no such bucket"),
    (r"\bstatus(?: code)?: 5[0-9]{2}\b", "the server reports an error"),
    (r"dns error|failed to lookup address", "the host name was not found"),
    (r"certificate|UnknownIssuer", "the TLS certificate is not trusted"),
    (r"timed out|TimedOut", "no answer in time"),
    (r"error sending request", "the connection failed"),
)


def open_store(
    scheme: str, bucket: str, prefix: str, options: Mapping[str, str], *, credentials: str
) -> Store:
    """Return the client of a bucket. Credentials come from the environment. Raises SettingsError."""
    endpoint = options.get("endpoint")
    client: ClientConfig = {
        "connect_timeout": "5s",
        # It would cover a whole file. There is no way to switch it off.
        "timeout": "365d",
        "read_timeout": f"{_PART_SECONDS}s",
        "allow_http": endpoint is not None and endpoint.startswith("http://"),
    }
    try:
        if scheme == "gs":
            google: GCSConfig = {} if endpoint is None else {"base_url": endpoint}
            return GCSStore(
                bucket, prefix=prefix or None, config=google, client_options=client, retry_config=_RETRIES
            )
        if scheme == "az":
            azure: AzureConfig = {} if endpoint is None else {"endpoint": endpoint}
            if account := options.get("account"):
                azure["account_name"] = account
            return AzureStore(
                bucket, prefix=prefix or None, config=azure, client_options=client, retry_config=_RETRIES
            )
        # Not all services know the request that deletes several objects at once.
        s3: S3Config = {"disable_bulk_delete": True}
        if endpoint is not None:
            s3["endpoint"] = endpoint
        if region := options.get("region"):
            s3["region"] = region
        if options.get("checksum") != "none":
            s3["checksum_algorithm"] = "SHA256"
        return S3Store(bucket, prefix=prefix or None, config=s3, client_options=client, retry_config=_RETRIES)
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise SettingsError(
            f"RECEIVER_STORAGE_URL: no client for {scheme}:// can be made ({type(error).__name__}): see the "
            f"URL and its options, and the credentials in {credentials}"
        ) from None


class ObjectStorage:
    """Objects of one bucket. `base` is how its URIs start."""

    def __init__(self, store: Store, *, base: str, credentials: str) -> None:
        self._store = store
        self._base = base
        self._credentials = credentials

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, content_type: str = ANY_TYPE) -> None:
        """See Storage. What fits into one part is a single request, more is a multipart upload."""
        path = require_key(key)
        source = _Source(blocks(chunks, _BLOCK))
        head = await source.peek(_PART)
        attributes: obstore.Attributes = {"Content-Type": content_type}
        if len(head) < _PART:
            with self._translated():
                await settled(
                    obstore.put_async(self._store, path, head, attributes=attributes, use_multipart=False)
                )
            return
        del head  # or it would stay in memory for as long as the upload lasts
        try:
            with self._translated(source):
                upload = obstore.put_async(
                    self._store,
                    path,
                    source,
                    attributes=attributes,
                    use_multipart=True,
                    chunk_size=_PART,
                    max_concurrency=_PARTS_AT_ONCE,
                )
                await settled(upload, on_cancel=source.stop)
        finally:
            await source.aclose()

    async def open(self, key: str) -> AsyncIterator[bytes]:
        """See Storage. A connection that breaks within the file is replaced while each brings some of it."""
        path = require_key(key)
        position = 0
        first = found = await self._get(path, position)
        while True:
            start = position
            with self._translated():
                stream, end = found.stream(min_chunk_size=_BLOCK), found.range[1]
            while (block := await self._read(stream, may_break=position - start >= _MIB)) is not None:
                position += len(block)
                yield block
            if position >= end:
                return
            if position - start < _MIB:
                raise StorageUnavailable(f"{self.uri(key)} ends early", reason="error")
            found = await self._get(path, position)
            with self._translated():
                # Only now: a date that Python does not know makes all of an object's facts unreadable.
                tags = {first.meta["e_tag"], found.meta["e_tag"]}
            if len(tags) > 1 or None in tags:
                raise StorageUnavailable(f"{self.uri(key)} was replaced while it was read", reason="error")

    async def stat(self, key: str) -> int | None:
        """See Storage."""
        path = require_key(key)
        with self._translated():
            try:
                return (await _soon(obstore.head_async(self._store, path)))["size"]
            except FileNotFoundError:
                return None

    async def delete(self, key: str) -> None:
        """See Storage."""
        path = require_key(key)
        with self._translated(), contextlib.suppress(FileNotFoundError):
            await _soon(obstore.delete_async(self._store, path))

    def uri(self, key: str) -> str:
        """See Storage."""
        return self._base + require_key(key)

    async def link(self, key: str, *, seconds: int) -> str | None:
        """See Storage."""
        path = require_key(key)
        if not 0 < seconds <= _LONGEST_LINK:
            raise ValueError(f"A link holds for 1 to {_LONGEST_LINK} seconds")
        with self._translated():
            return await _soon(obstore.sign_async(self._store, "GET", path, timedelta(seconds=seconds)))

    async def check(self) -> str | None:
        """See Storage."""
        return await probe(self)

    async def sweep(self) -> int:
        """See Storage. Failed uploads are aborted; what a crash leaves open is for a lifecycle rule."""
        return 0

    async def close(self) -> None:
        """See Storage."""

    async def _get(self, path: str, position: int) -> "GetResult":
        with self._translated():
            try:
                options: obstore.GetOptions = {"range": {"offset": position}} if position else {}
                return await _soon(obstore.get_async(self._store, path, options=options))
            except FileNotFoundError as error:
                # Raised for a bucket that is not there, too.
                if _NO_BUCKET.search(str(error)):
                    raise
        raise FileNotFoundError(path)

    async def _read(self, stream: "BytesStream", *, may_break: bool) -> bytes | None:
        """Return the next block, or None at the end; also at a break, if it may."""
        try:
            with self._translated():
                block = await _soon(anext(stream, None))
                return None if block is None else bytes(block)
        except StorageUnavailable:
            if not may_break:
                raise
            return None

    @contextlib.contextmanager
    def _translated(self, source: "_Source | None" = None) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if not _is_failure(error):
                raise
            if source is not None and source.failure is not None:
                raise source.failure from None
            raise StorageUnavailable(
                f"Cannot use {self._base}: {_why(error)}; check RECEIVER_STORAGE_URL, the bucket, "
                f"{self._credentials}",
                reason="error",
            ) from error


async def _soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(_STALL):
        return await work


def _is_failure(error: BaseException) -> bool:
    """Whether an exception is a failure of the client; a panic of its Rust code is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _why(error: BaseException) -> str:
    """Return what has happened: by the exception's class, and by the numbers and codes in its text.

    The text itself may quote what was signed, and with it a session token.
    """
    text = str(error)
    facts = [type(error).__name__]
    facts += [f"HTTP {found[1]}" for found in [_STATUS.search(text)] if found]
    facts += [found[1] for found in [_CODE.search(text)] if found]
    if isinstance(error, TimeoutError):
        return f"no answer in {_STALL:.0f} s ({facts[0]})"
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


class _Stopped(Exception):
    """The caller was cancelled."""
