"""A bucket of S3, Google Cloud Storage or Azure as storage.

obstore is an optional dependency: if it is missing, importing this module raises ImportError.
"""

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import obstore
from obstore.store import AzureStore, GCSStore, S3Store

from receiver.errors import SettingsError, StorageUnavailable
from receiver.media.storage.base import ANY_TYPE, blocks, probe, require_key, run_to_end

if TYPE_CHECKING:
    from obstore import BytesStream, GetResult
    from obstore.store import RetryConfig

T = TypeVar("T")
Store: TypeAlias = S3Store | GCSStore | AzureStore

# The smallest part that S3 takes, two at once, read in small blocks: the memory does not grow with the file.
_PART_BYTES = 5 * 1024 * 1024
_PARTS_AT_ONCE = 2
_BLOCK_BYTES = 256 * 1024
_MIB = 1024 * 1024

ANSWER_SECONDS: Final = 60.0
"""Seconds that the server may take for an answer without a body, or for the next block of a file."""
_PART_SECONDS: Final = 320
"""Seconds that an upload of one part may take: at 16 KiB/s, the slowest rate of a download.

The client counts the time from the start of a request, so this cannot be a shorter idle timeout.
"""
# Short: a download that cannot be stored is repeated later, from its start.
RETRIES: "Final[RetryConfig]" = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
_LONGEST_LINK_SECONDS: Final = 7 * 24 * 60 * 60

_STATUS = re.compile(r"\bstatus(?: code)?: ([1-5][0-9]{2})\b")
_CODE = re.compile(r"<Code>([A-Za-z]{3,64})</Code>")
_NO_BUCKET = re.compile(r"<Code>(?:NoSuchBucket|ContainerNotFound)</Code>")
_OS_ERROR = re.compile(r"\bOs \{\s*code: ([0-9]{1,4}),|\(os error ([0-9]{1,4})\)")
_CONNECTION_FAILED = "the connection failed"
_CAUSES = (
    (r"\bSASforSASNotSupported\b", "a SAS token signs no links; that takes the account's key"),
    (r"\bstatus(?: code)?: 40[13]\b", "access denied"),
    (r"\bstatus(?: code)?: 404\b", "there is no such bucket"),
    (r"\bstatus(?: code)?: 5[0-9]{2}\b", "the server reports an error"),
    (r"dns error|failed to lookup address", "the host name was not found"),
    (r"certificate|UnknownIssuer", "the TLS certificate is not trusted"),
    (r"timed out|TimedOut", "no answer in time"),
    (r"error sending request", _CONNECTION_FAILED),
)


def open_store(
    scheme: str,
    bucket: str,
    prefix: str,
    options: Mapping[str, str],
    *,
    credentials: str,
    retries: "RetryConfig" = RETRIES,
) -> Store:
    """Return the client of a bucket. Credentials come from the environment. Raises SettingsError."""
    store, names = _STORES[scheme]
    config: dict[str, object] = {names[name]: value for name, value in options.items() if name in names}
    if store is S3Store:
        # Some services do not know the request that deletes several objects.
        config["disable_bulk_delete"] = True
        if options.get("checksum") != "none":
            config["checksum_algorithm"] = "SHA256"
    client = {
        "connect_timeout": "5s",
        # This limit would be for a whole file, and cannot be switched off.
        "timeout": "365d",
        "read_timeout": f"{_PART_SECONDS}s",
        "allow_http": options.get("endpoint", "").startswith("http://"),
    }
    try:
        return store(
            bucket, prefix=prefix or None, config=config, client_options=client, retry_config=retries
        )
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise SettingsError(
            f"RECEIVER_STORAGE_URL: cannot make a client for {scheme}:// ({type(error).__name__}): check the "
            f"URL and its options, and the credentials in {credentials}"
        ) from None


_STORES: Final[Mapping[str, tuple[Callable[..., Store], Mapping[str, str]]]] = {
    "s3": (S3Store, {"endpoint": "endpoint", "region": "region"}),
    "gs": (GCSStore, {"endpoint": "base_url"}),
    "az": (AzureStore, {"endpoint": "endpoint", "account": "account_name"}),
}
"""For each scheme its client, and the client's names of the options of a URL."""


class ObjectStorage:
    """Objects of one bucket. Each URI is `base` and a key; errors name the variables with `credentials`."""

    def __init__(
        self, store: Store, *, base: str, credentials: str, answer_seconds: float = ANSWER_SECONDS
    ) -> None:
        self._store = store
        self._answer_seconds = answer_seconds
        self._base = base
        self._credentials = credentials

    async def require_space(self, size: int) -> None:
        """Return: a bucket has no limit that it tells."""

    async def put(self, key: str, chunks: AsyncIterator[bytes], *, content_type: str = ANY_TYPE) -> None:
        """Store a file of less than a part with a single request, and a larger one in a multipart upload."""
        path = require_key(key)
        source = _Source(blocks(chunks, _BLOCK_BYTES))
        head = await source.peek(_PART_BYTES)
        attributes: obstore.Attributes = {"Content-Type": content_type}
        if len(head) < _PART_BYTES:
            with self._translated():
                await run_to_end(
                    obstore.put_async(self._store, path, head, attributes=attributes, use_multipart=False)
                )
            return
        del head  # or it would stay in memory until the upload ends
        try:
            with self._translated(source):
                upload = obstore.put_async(
                    self._store,
                    path,
                    source,
                    attributes=attributes,
                    use_multipart=True,
                    chunk_size=_PART_BYTES,
                    max_concurrency=_PARTS_AT_ONCE,
                )
                await run_to_end(upload, on_cancel=source.stop)
        finally:
            await source.aclose()

    async def open(self, key: str, *, start: int = 0) -> AsyncGenerator[bytes]:
        """Iterate over a file. If a connection breaks after a MiB or more, continue with a new one."""
        path = require_key(key)
        position = start
        first = found = await self._get(path, position)
        while True:
            begin = position
            with self._translated():
                stream, end = found.stream(min_chunk_size=_BLOCK_BYTES), found.range[1]
            while (block := await self._read(stream, may_break=position - begin >= _MIB)) is not None:
                position += len(block)
                yield block
            if position >= end:
                return
            if position - begin < _MIB:
                raise StorageUnavailable(f"{self.uri(key)} ends early", reason="error")
            found = await self._get(path, position)
            with self._translated():
                # Only after a break: if the server sends a date that Python cannot read, `meta` raises.
                tags = {first.meta["e_tag"], found.meta["e_tag"]}
            if len(tags) > 1 or None in tags:
                raise StorageUnavailable(f"{self.uri(key)} was replaced while it was read", reason="error")

    async def stat(self, key: str) -> int | None:
        path = require_key(key)
        with self._translated():
            try:
                return (await self._in_time(obstore.head_async(self._store, path)))["size"]
            except FileNotFoundError:
                return None

    async def delete(self, key: str) -> None:
        path = require_key(key)
        with self._translated(), contextlib.suppress(FileNotFoundError):
            await self._in_time(obstore.delete_async(self._store, path))

    def uri(self, key: str) -> str:
        return self._base + require_key(key)

    async def link(self, key: str, *, seconds: int) -> str | None:
        path = require_key(key)
        if not 0 < seconds <= _LONGEST_LINK_SECONDS:
            raise ValueError(f"A link holds for 1 to {_LONGEST_LINK_SECONDS} seconds")
        with self._translated():
            return await self._in_time(
                obstore.sign_async(self._store, "GET", path, timedelta(seconds=seconds))
            )

    async def check(self) -> str | None:
        return await probe(self)

    async def sweep(self) -> int:
        """Return 0: `put` aborts failed uploads, and a lifecycle rule removes those that a crash left."""
        return 0

    async def close(self) -> None:
        """Keep the connections: the client has no method that closes them."""

    async def _get(self, path: str, position: int) -> "GetResult":
        with self._translated():
            try:
                options: obstore.GetOptions = {"range": {"offset": position}} if position else {}
                return await self._in_time(obstore.get_async(self._store, path, options=options))
            except FileNotFoundError as error:
                # A missing bucket raises it, too.
                if _NO_BUCKET.search(str(error)):
                    raise
        raise FileNotFoundError(path)

    async def _read(self, stream: "BytesStream", *, may_break: bool) -> bytes | None:
        """Return the next block; None at the end, and at a break if the stream `may_break`."""
        try:
            with self._translated():
                block = await self._in_time(anext(stream, None))
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
                f"Cannot use {self._base}: {self._error_text(error)}; check RECEIVER_STORAGE_URL, the bucket "
                f"and {self._credentials}",
                reason="error",
            ) from error

    async def _in_time(self, work: Awaitable[T]) -> T:
        async with asyncio.timeout(self._answer_seconds):
            return await work

    def _error_text(self, error: BaseException) -> str:
        """Return the cause of an error, from its class and the numbers and codes in its text.

        The text itself may quote the signed request, and with it a session token.
        """
        text = str(error)
        facts = [type(error).__name__]
        if isinstance(error, TimeoutError):
            return f"no answer in {self._answer_seconds:.0f} s ({facts[0]})"
        facts += [f"HTTP {status}" for status in _STATUS.findall(text)[:1]] + _CODE.findall(text)[:1]
        found = next((words for sign, words in _CAUSES if re.search(sign, text)), None)
        if found == _CONNECTION_FAILED and (number := _OS_ERROR.search(text)):
            found = os.strerror(int(number[1] or number[2]))
        return f"{found} ({', '.join(facts)})" if found else ", ".join(facts)


def _is_failure(error: BaseException) -> bool:
    """Return whether the client failed: a panic of its Rust code is a BaseException, but no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


class _Source:
    """The blocks that an upload reads.

    Cancelling an upload would be simpler, but would leave its parts in the bucket, invisible and paid for.
    obstore aborts the upload on the server only if this iterator raises, so `stop` makes it raise.
    """

    def __init__(self, blocks: AsyncIterator[bytes]) -> None:
        self.failure: Exception | None = None
        self._blocks = blocks
        self._head: deque[bytes] = deque()
        self._reading: asyncio.Future[bytes | None] | None = None
        self._is_stopped = False

    async def peek(self, size: int) -> bytes:
        """Return the first blocks, at least `size` bytes unless the file ends, and keep them to be read."""
        length = 0
        while length < size and (block := await anext(self._blocks, None)) is not None:
            self._head.append(block)
            length += len(block)
        return b"".join(self._head)

    def __aiter__(self) -> "_Source":
        return self

    async def __anext__(self) -> bytes:
        if self._is_stopped:
            raise _UploadCancelled
        if self._head:
            return self._head.popleft()
        self._reading = asyncio.ensure_future(anext(self._blocks, None))
        try:
            block = await self._reading
        except asyncio.CancelledError:
            raise _UploadCancelled from None
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
        """Stop, and wait until the read that is under way has ended."""
        self.stop()
        if self._reading is not None:
            await asyncio.wait({self._reading})


class _UploadCancelled(Exception):
    """The caller of `put` was cancelled: the upload must fail."""
