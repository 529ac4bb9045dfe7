"""HTTP answers byte by byte: the status line counts, however odd the rest of the answer is.

h11 reads the head of an answer as a whole. One header that it does not like, and it tells no status; a length
that is not kept, and the exchange fails. So the bytes are noted on their way to it.
"""

import re
import ssl
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Final

import httpcore

MAX_HEAD: Final = 128 * 1024
"""Bytes of an answer that are noted; h11 takes no longer head."""

_STATUS_LINE: Final = re.compile(rb"HTTP/1\.[01] ([1-9][0-9]{2})(?: [^\r\n]*)?\r?\n")
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_SWITCHING_PROTOCOLS: Final = 101


class RawAnswer:
    """The bytes that have come back for one request."""

    def __init__(self) -> None:
        self._is_asked = False
        self._noted = bytearray()
        self._size = 0

    def on_write(self, data: bytes) -> None:
        """Take note that something of the request is sent: only what comes after that answers it."""
        # A proxy's answer to CONNECT is none to the request. Nothing at all is written at the end of each.
        self._is_asked = self._is_asked or (data != b"" and not data.startswith(b"CONNECT "))

    def on_read(self, data: bytes) -> None:
        """Note bytes that have come."""
        if self._is_asked:
            self._size += len(data)
            self._noted += data[: max(0, MAX_HEAD - len(self._noted))]

    @property
    def status(self) -> int | None:
        """The status; None until its line is complete, and if it is no answer of HTTP/1."""
        found = self._find_status_line()
        return found and int(found[1])

    def is_longer(self, body: int) -> bool:
        """Return whether there is more than the head and so many bytes of a body."""
        line = self._find_status_line()
        end = line and _END_OF_HEAD.search(self._noted, line.end() - 1)
        return end is not None and self._size > end.end() + body

    def _find_status_line(self) -> re.Match[bytes] | None:
        """Find the line of the answer itself, after those that only say that it is to come (1xx)."""
        # A server may end a body with a line end beyond its length: it comes before the next answer.
        position = len(self._noted) - len(self._noted.lstrip(b"\r\n"))
        while found := _STATUS_LINE.match(self._noted, position):
            if int(found[1]) >= 200 or int(found[1]) == _SWITCHING_PROTOCOLS:  # noqa: PLR2004 - 1xx end there
                return found
            end = _END_OF_HEAD.search(self._noted, found.end() - 1)
            if end is None:
                return None
            position = end.end()
        return None


current: Final = ContextVar[RawAnswer]("current")
"""The answer that the running task waits for."""


class NotingNetwork(httpcore.AsyncNetworkBackend):
    """Opens connections that note in `current` what is read from them."""

    def __init__(self) -> None:
        self._dial = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to `host`."""
        return _NotingStream(await self._dial.connect_tcp(host, port, timeout, local_address, socket_options))


class _NotingStream(httpcore.AsyncNetworkStream):
    """A connection, plain or under TLS."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109 - as above
        """Read and note."""
        data = await self._stream.read(max_bytes, timeout)
        current.get().on_read(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109 - as above
        """Write."""
        current.get().on_write(buffer)
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        """Close."""
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - as above
    ) -> httpcore.AsyncNetworkStream:
        """Return the connection under TLS, of which the decrypted bytes are noted."""
        return _NotingStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection tells of itself."""
        return self._stream.get_extra_info(info)
