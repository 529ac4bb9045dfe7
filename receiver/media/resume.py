"""Reads the body of a download, over several connections if they break and the host lets it be resumed."""

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, aclosing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Final, Self, TypeAlias

import httpcore
import httpx

from receiver.errors import MediaUnavailable

Headers: TypeAlias = list[tuple[bytes, bytes]]

_MAX_CONNECTIONS: Final = 9
_BREAKS: Final = frozenset({"truncated", "timeout"})
_STRONG_TAG: Final = re.compile(r'"[!-~]*"')
_PARTIAL_CONTENT: Final = 206
_MINUTE: Final = 60.0


async def read_on(
    response: httpcore.Response,
    *,
    timely: Callable[[AsyncIterator[bytes]], AsyncGenerator[bytes, None]],
    request: Callable[[Headers], AbstractAsyncContextManager[httpcore.Response]],
    deadline: float,
) -> AsyncGenerator[bytes, None]:
    """Yield a body as `timely` lets it pass; after a break before the loop's `deadline` `request` the rest.

    Raises MediaUnavailable if the host cannot resume, or after a connection that brought nothing.
    """
    version = _Version.of(httpx.Headers(response.headers))
    position = 0
    async with AsyncExitStack() as connections:
        for connection in range(1, _MAX_CONNECTIONS + 1):
            start = position
            broken: MediaUnavailable | None = None
            try:
                async with aclosing(timely(response.aiter_stream())) as parts:
                    async for part in parts:
                        position += len(part)
                        yield part
            except MediaUnavailable as error:
                broken = error
            if broken is None:
                return
            is_late = asyncio.get_running_loop().time() >= deadline
            is_last = connection == _MAX_CONNECTIONS or position == start or is_late
            if version is None or is_last or broken.reason not in _BREAKS:
                raise broken
            await connections.aclose()
            response = await connections.enter_async_context(request(version.request_from(position)))
            if not version.is_continued(response.status, httpx.Headers(response.headers), position=position):
                raise broken


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One version of a file, of which parts can be requested. `size` is in bytes."""

    size: int
    field: str
    """The field of the response that tells versions apart, and below what it says."""
    validator: str
    coding: str

    @classmethod
    def of(cls, headers: httpx.Headers) -> Self | None:
        """Return what the headers of a whole file identify; None if parts of two files could be mixed up."""
        size = headers.get("content-length")
        field = "etag" if "etag" in headers else "last-modified"
        is_strong = _STRONG_TAG.fullmatch(headers.get("etag", "")) or (field != "etag" and _is_old(headers))
        if size is None or not is_strong or headers.get("accept-ranges") == "none":
            return None
        coding = headers.get("content-encoding", "")
        return cls(size=int(size), field=field, validator=headers[field], coding=coding)

    def request_from(self, position: int) -> Headers:
        """Return the headers that ask for the rest, or for the whole if that is another file by now."""
        return [(b"Range", b"bytes=%d-" % position), (b"If-Range", self.validator.encode("ascii"))]

    @property
    def _unstated(self) -> str | None:
        # A 206 may leave out Last-Modified, but not the tag (RFC 9110). One without it comes from a server
        # that did not look at If-Range.
        return None if self.field == "etag" else self.validator

    def is_continued(self, status: int, headers: httpx.Headers, *, position: int) -> bool:
        """Return whether an answer's body is the rest from `position` on."""
        return (
            status == _PARTIAL_CONTENT
            and headers.get("content-range") == f"bytes {position}-{self.size - 1}/{self.size}"
            and headers.get(self.field, self._unstated) == self.validator
            and headers.get("content-encoding", "") == self.coding
        )


def _is_old(headers: httpx.Headers) -> bool:
    """Return whether Last-Modified was a minute ago, so that no other version has the same (RFC 9110)."""
    try:
        sent, changed = (parsedate_to_datetime(headers.get(name, "")) for name in ("date", "last-modified"))
        is_plain = headers["last-modified"].isascii()
        return is_plain and (sent - changed).total_seconds() >= _MINUTE
    except (ValueError, TypeError, OverflowError):
        # There is none, one of them has no time zone, or it is beyond all bounds.
        return False
