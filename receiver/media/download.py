"""Download of one file from an allow-listed host into the storage: all of it, or none."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import httpcore
import httpx
import structlog

from receiver import __version__
from receiver.core.output_files import Kind
from receiver.core.retry import longest_wait
from receiver.error_texts import cause
from receiver.errors import MediaBlocked, MediaMissing, MediaUnavailable, NotMedia, SettingsError
from receiver.media.digests import stated_digests
from receiver.media.file_types import MIN_BYTES, SNIFF_BYTES, is_page, sniff
from receiver.media.hosts import MediaHosts
from receiver.media.inspection import Inspection
from receiver.media.network import GuardedNetwork
from receiver.media.pools import open_pool, open_proxied_pool, open_tls
from receiver.media.resume import read_resuming
from receiver.media.storage import Storage

log = structlog.get_logger()

_MIB = 1024 * 1024
_OK = 200
_RETRY_LATER = {408, 425, 429}
_REDIRECTS = {301, 302, 303, 307, 308}
_MAX_REDIRECTS = 4
# Codings that change the bytes. Servers also send words that change none, such as `aws-chunked`, `UTF-8`.
_COMPRESSIONS = {
    *("gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress", "bzip2", "x-bzip2"),
    *("xz", "lzma", "lz4", "snappy", "exi", "pack200-gzip", "dcb", "dcz"),
}
# A reserved address, which never becomes public: `start` requests it, and a guarded pool must raise.
_NEVER_PUBLIC = "https://240.0.0.1/"


@dataclass(frozen=True, kw_only=True)
class DownloadLimits:
    """The largest sizes of files, and how long a download may take."""

    image_bytes: int = 64 * _MIB
    audio_bytes: int = 256 * _MIB
    video_bytes: int = 2048 * _MIB
    file_bytes: int = 2048 * _MIB
    connect_seconds: float = 10.0
    header_seconds: float = 30.0
    idle_seconds: float = 30.0
    total_seconds: float = 3600.0
    min_bytes_per_second: int = 16 * 1024
    # The rate is checked each time that the download has waited this long for the sender. Time spent in our
    # storage does not count.
    rate_window_seconds: float = 30.0

    def max_bytes(self, kind: Kind) -> int:
        """Return the size limit of a file of `kind`."""
        return {
            "image": self.image_bytes,
            "audio": self.audio_bytes,
            "video": self.video_bytes,
            "file": self.file_bytes,
        }[kind]


_DEFAULT_LIMITS = DownloadLimits()


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file that is complete and durable in the storage. `size` is in bytes, `sha256` in hex."""

    key: str
    uri: str
    size: int
    sha256: str
    content_type: str
    is_media: bool
    """False for a page or a text that the host sent in place of the file."""
    warning: str | None
    """The doubt about the file, if it was stored in spite of one."""


class Downloader:
    """Fetches files through httpcore, the layer below httpx.

    httpx would add a cookie jar, redirects that it follows by itself, netrc and proxies from the environment.
    httpcore has none of them, and takes the guarded network as an ordinary argument of its pool.
    """

    def __init__(
        self,
        *,
        hosts: MediaHosts,
        storage: Storage,
        limits: DownloadLimits = _DEFAULT_LIMITS,
        ca: str | None = None,
        proxy: str | None = None,
    ) -> None:
        """Trust the authorities in the file `ca`, too; with a `proxy` only development origins are direct.

        Raises SettingsError if the file has no certificates.
        """
        self._hosts = hosts
        self._storage = storage
        self._limits = limits
        tls = open_tls(ca)
        self._pool = open_pool(GuardedNetwork(hosts), tls)
        self._proxied = None if proxy is None else open_proxied_pool(proxy, tls)

    async def start(self) -> None:
        """Check that the pool rejects a forbidden address. Raises SettingsError if it does not."""
        if self._proxied is not None:
            return  # the proxy resolves the names and chooses the addresses
        try:
            async with self._get(httpx.URL(_NEVER_PUBLIC)):
                pass
        except MediaBlocked:
            return
        except MediaUnavailable:
            pass
        await self.close()
        raise SettingsError("The installed httpcore bypasses the media guard: install the pinned versions")

    async def save(
        self,
        *,
        url: str,
        kind: Kind,
        stem: str,
        field: str | None = None,
        seen_sha256: str | None = None,
        keep_doubtful: bool = False,
    ) -> StoredFile:
        """Download `url`, announced as a `kind` in a `field`, and store it.

        The key is `stem` plus the extension of the file's type. A file of another type than the kind allows
        was paid for, so it is stored too, as `application/octet-stream` with the extension `.bin`.

        A body in doubt is stored if its SHA-256 is `seen_sha256`, that of the attempt before, or with
        `keep_doubtful`, which also stores a page in place of the file. Raises MediaBlocked, MediaUnavailable
        or a subclass of it, or StorageUnavailable; then no file is stored.
        """
        max_bytes = self._limits.max_bytes(kind)
        deadline = asyncio.get_running_loop().time() + self._limits.total_seconds
        async with self._follow(self._hosts.vet(url)) as (final, response):
            headers = httpx.Headers(response.headers)
            _check_answer(response.status, headers, max_bytes)
            # Before the body: a file that does not fit would be fetched again and again to its middle.
            await self._storage.require_space(int(headers.get("content-length", 0)))
            body = read_resuming(
                response,
                pace=partial(_pace, limits=self._limits, deadline=deadline),
                # `final` is the URL behind the redirects: these may lead to another file by now.
                request=partial(self._get, final),
                deadline=deadline,
            )
            async with aclosing(body) as parts:
                head = await _read_head(parts)
                file_type = sniff(head[:SNIFF_BYTES], kind)
                is_media = file_type.is_known or not is_page(head[:SNIFF_BYTES], kind, url, field)
                if not is_media and not keep_doubtful:
                    raise NotMedia(f"The host sends a page or a text in place of the {kind}", reason="page")
                inspection = Inspection(
                    max_bytes=max_bytes,
                    min_bytes=1 if kind == "file" else MIN_BYTES,
                    stated=stated_digests(headers),
                    walk=file_type.walk,
                    is_framed="content-length" in headers or "transfer-encoding" in headers,
                    seen_sha256=seen_sha256,
                    keep_doubtful=keep_doubtful,
                )
                key = stem + file_type.extension
                if not file_type.is_known:
                    log.warning("media kept as plain bytes", key=key, kind=kind)
                async with aclosing(inspection.stream(head, parts)) as chunks:
                    await self._storage.put(key, chunks, content_type=file_type.content_type)
        return StoredFile(
            key=key,
            uri=self._storage.uri(key),
            size=inspection.size,
            sha256=inspection.sha256,
            content_type=file_type.content_type,
            is_media=is_media,
            warning=inspection.warning,
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()
        if self._proxied is not None:
            await self._proxied.aclose()

    @asynccontextmanager
    async def _follow(self, url: httpx.URL) -> AsyncIterator[tuple[httpx.URL, httpcore.Response]]:
        """Request `url` and follow its redirects; each URL is vetted and gets a connection of its own."""
        for _ in range(_MAX_REDIRECTS + 1):
            async with self._get(url) as response:
                location = httpx.Headers(response.headers).get("location")
                if response.status not in _REDIRECTS or not location:
                    yield url, response
                    return
            url = self._vet_redirect(url, location)
        raise MediaUnavailable(f"More than {_MAX_REDIRECTS} redirects in a row", reason="redirect")

    def _vet_redirect(self, url: httpx.URL, location: str) -> httpx.URL:
        try:
            return self._hosts.vet(str(url.join(location)))
        except httpx.InvalidURL as error:
            raise MediaBlocked("The redirect's URL cannot be parsed", reason="redirect") from error
        except MediaBlocked as error:
            raise MediaBlocked(f"The host redirects elsewhere: {error}", reason="redirect") from error

    @asynccontextmanager
    async def _get(
        self, url: httpx.URL, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> AsyncIterator[httpcore.Response]:
        request = httpcore.Request(
            "GET",
            httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=[
                (b"Host", url.netloc),
                (b"User-Agent", b"clipia-receiver/" + __version__.encode()),
                (b"Accept", b"*/*"),
                (b"Accept-Encoding", b"identity"),
                *headers,
            ],
            extensions={"timeout": {"connect": self._limits.connect_seconds}},
        )
        try:
            async with asyncio.timeout(self._limits.header_seconds):
                response = await self._pool_for(url).handle_async_request(request)
        except (TimeoutError, httpcore.TimeoutException) as error:
            raise MediaUnavailable(f"No answer from {url.host} in time", reason="timeout") from error
        except httpcore.ProxyError as error:
            raise MediaUnavailable(
                f"The proxy of RECEIVER_MEDIA_PROXY cannot connect to {url.host}", reason="connect"
            ) from error
        except (httpcore.NetworkError, httpcore.ProtocolError) as error:
            # The host or the proxy may be at fault: a proxy that does not speak HTTP breaks the same way.
            way = "" if self._pool_for(url) is self._pool else " through the proxy of RECEIVER_MEDIA_PROXY"
            raise MediaUnavailable(
                f"No answer from {url.host}{way}: {cause(error)}", reason="connect"
            ) from error
        try:
            yield response
        finally:
            await response.aclose()

    def _pool_for(self, url: httpx.URL) -> httpcore.AsyncConnectionPool:
        if self._proxied is None or self._hosts.needs_no_proxy(url):
            return self._pool
        return self._proxied


def _check_answer(status: int, headers: httpx.Headers, max_bytes: int) -> None:
    """Raise unless the response is a whole file without a content coding, and not too large."""
    if 400 <= status < 500 and status not in _RETRY_LATER:
        raise MediaMissing(f"The host answers {status}", reason="missing")
    if status != _OK:
        wait = longest_wait(headers.get_list("retry-after"), now=datetime.now(UTC))
        raise MediaUnavailable(f"The host answers {status}", reason="status", retry_after=wait)
    codings = {coding.strip().lower() for coding in headers.get_list("content-encoding", split_commas=True)}
    if codings & _COMPRESSIONS:
        raise MediaUnavailable(
            "The host sends the file compressed, although the request forbids it", reason="encoding"
        )
    length = headers.get("content-length")
    if length is not None and int(length) > max_bytes:
        raise MediaBlocked(f"The file has {length} bytes, more than {max_bytes}", reason="too_large")


async def _pace(
    stream: AsyncIterator[bytes], limits: DownloadLimits, deadline: float
) -> AsyncGenerator[bytes, None]:
    """Pass the parts on; raise MediaUnavailable if they stall, come too slowly or after the `deadline`."""
    now = asyncio.get_running_loop().time
    waited, received = 0.0, 0
    while True:
        started = now()
        try:
            async with asyncio.timeout_at(min(deadline, started + limits.idle_seconds)):
                part = await anext(stream, None)
        except TimeoutError as error:
            raise MediaUnavailable("The rest of the file did not come in time", reason="timeout") from error
        except (httpcore.NetworkError, httpcore.ProtocolError, OSError) as error:
            raise MediaUnavailable(
                f"The connection broke within the file: {cause(error)}", reason="truncated"
            ) from error
        if part is None:
            return
        waited += now() - started
        received += len(part)
        if waited >= limits.rate_window_seconds:
            if received < waited * limits.min_bytes_per_second:
                raise MediaUnavailable(f"Only {received} bytes came in {waited:.0f} s", reason="too_slow")
            waited, received = 0.0, 0
        yield part


async def _read_head(parts: AsyncIterator[bytes]) -> bytes:
    head = b""
    async for part in parts:
        head += part
        if len(head) >= SNIFF_BYTES:
            break
    return head
