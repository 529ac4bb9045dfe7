"""The body of a download, read over several connections if they break and the host can resume it."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final, Self, TypeAlias, cast

import httpcore
import httpx

from receiver.errors import MediaUnavailable
from receiver.media.streams import MOST_BYTES

Headers: TypeAlias = list[tuple[bytes, bytes]]

_MAX_CONNECTIONS: Final = 9
_RESUMABLE: Final = frozenset({"truncated", "timeout"})
_STRONG_TAG: Final = re.compile(r'"[!-~]*"')
_PARTIAL_CONTENT: Final = 206
_STRONG_AFTER_SECONDS: Final = 60.0


async def read_resuming(
    response: httpcore.Response,
    *,
    pace: Callable[[AsyncIterator[bytes]], AsyncGenerator[bytes, None]],
    request: Callable[[Headers], AbstractAsyncContextManager[httpcore.Response]],
    deadline: float,
) -> AsyncGenerator[bytes, None]:
    """Yield a body as `pace` passes it on; if the connection breaks, `request` the rest.

    `deadline` is a time of the event loop's clock, after which no rest is requested. Raises MediaUnavailable
    if the host cannot resume, or if a connection brought no byte.
    """
    version = _Version.of(httpx.Headers(response.headers))
    position = 0
    async with AsyncExitStack() as connections:
        for connection in range(1, _MAX_CONNECTIONS + 1):
            start = position
            try:
                async with aclosing(pace(_read(response))) as parts:
                    async for part in parts:
                        position += len(part)
                        yield part
            except MediaUnavailable as error:
                if error.reason not in _RESUMABLE:
                    raise
                broken = error
            else:
                return
            is_late = asyncio.get_running_loop().time() >= deadline
            if version is None or is_late or position == start or connection == _MAX_CONNECTIONS:
                raise broken
            await connections.aclose()
            rest = request(version.request_from(position))
            response = await connections.enter_async_context(rest)
            version.require_rest(response, position, broken)


async def _read(response: httpcore.Response) -> AsyncGenerator[bytes, None]:
    """Yield a body. Raises httpcore's errors if the connection breaks.

    If its length is known, all but its first bytes come directly from the connection: h11 copies each byte
    four times, 64 KiB at a time.
    """
    headers = httpx.Headers(response.headers)
    is_counted = "content-length" in headers and "transfer-encoding" not in headers
    left = int(headers["content-length"]) if is_counted else 0
    # If the iterator ended early, it would close the connection.
    async with aclosing(cast("AsyncGenerator[bytes, None]", response.aiter_stream())) as parts:
        async for part in parts:
            left -= len(part)
            yield part
            if is_counted:
                break
        connection: httpcore.AsyncNetworkStream = response.extensions["network_stream"]
        while left > 0:
            part = await connection.read(min(left, MOST_BYTES))
            if not part:
                raise httpcore.RemoteProtocolError(f"The connection ended {left} bytes before the file")
            left -= len(part)
            yield part


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One version of a file that a server can send in parts. `size` is in bytes."""

    size: int
    field: str
    """The name of the header that tells versions apart; `validator` is its value."""
    validator: str
    coding: str

    @classmethod
    def of(cls, headers: httpx.Headers) -> Self | None:
        """Return the version that the headers of a whole file identify; None if they may fit others."""
        size = headers.get("content-length")
        field = "etag" if "etag" in headers else "last-modified"
        is_strong = _STRONG_TAG.fullmatch(headers.get("etag", "")) or (field != "etag" and _is_old(headers))
        if size is None or not is_strong or headers.get("accept-ranges") == "none":
            return None
        coding = headers.get("content-encoding", "")
        return cls(size=int(size), field=field, validator=headers[field], coding=coding)

    def request_from(self, position: int) -> Headers:
        """Return the headers that request the rest, or all of the file if it has changed meanwhile."""
        return [(b"Range", b"bytes=%d-" % position), (b"If-Range", self.validator.encode("ascii"))]

    def require_rest(self, response: httpcore.Response, position: int, broken: MediaUnavailable) -> None:
        """Raise `broken` unless an answer's body is the rest of this version from `position` on."""
        headers = httpx.Headers(response.headers)
        # A 206 may leave out Last-Modified, but not the tag (RFC 9110). If the tag is missing, the server has
        # ignored If-Range.
        unstated = None if self.field == "etag" else self.validator
        if not (
            response.status == _PARTIAL_CONTENT
            and headers.get("content-range") == f"bytes {position}-{self.size - 1}/{self.size}"
            and headers.get(self.field, unstated) == self.validator
            and headers.get("content-encoding", "") == self.coding
        ):
            raise broken


def _is_old(headers: httpx.Headers) -> bool:
    """Return whether Last-Modified is old enough that no other version shares it (RFC 9110)."""
    try:
        sent, changed = (parsedate_to_datetime(headers.get(name, "")) for name in ("date", "last-modified"))
        age = (sent - changed).total_seconds()
        return headers["last-modified"].isascii() and age >= _STRONG_AFTER_SECONDS
    except (ValueError, TypeError, OverflowError):
        # A date is missing, or has no time zone, or a year of twenty digits.
        return False
