"""HTTP answers byte by byte: the status line counts, however odd the rest of the answer is.

h11 reads the head of an answer as a whole. One header that it does not like, and it tells no status; a length
that is not kept, and the exchange fails. So the bytes are noted on their way to it, and answers that only
announce another one (1xx) do not reach it.
"""

import re
import ssl
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, Final

import httpcore
import httpx

MAX_HEAD: Final = 128 * 1024
"""Bytes of an answer that are noted; h11 takes no longer head."""

_STATUS_LINE: Final = re.compile(
    rb"[\r\n]*(HTTP/[0-9](?:\.[0-9])?[ \t]+([1-9][0-9]{2})(?![0-9])[^\n]*\n)", re.IGNORECASE
)
"""More than h11 takes: the status is plain to see with two spaces, too, or without its words."""
_LINE_ENDS: Final = re.compile(rb"[\r\n]*")
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_FOLD: Final = re.compile(rb"\r?\n[ \t]+")
_LENGTH: Final = re.compile(r"([0-9]{1,20})(?:\s*,\s*\1)*", re.ASCII)
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,20})[^\n]*\n")
_SWITCHING_PROTOCOLS: Final = 101
_NO_CONTENT: Final = 204


class RawAnswer:
    """The bytes that have come back for one request, without the answers that only announce it (1xx)."""

    def __init__(self) -> None:
        self.has_begun = False
        """Whether anything came."""
        self.status: int | None = None
        """The status; None until its line is complete, and if it is no answer of HTTP/1."""
        self._is_asked = False
        self._is_announcement = False
        self._is_passed_on = False
        self._noted = bytearray()
        self._fields = 0
        """Where the fields begin in `_noted`, after the status line."""
        self._size = 0

    def on_write(self, data: bytes) -> None:
        """Take note that something of the request is sent: only what comes after that answers it."""
        # A proxy's answer to CONNECT is none to the request. Nothing at all is written at the end of each.
        self._is_asked = self._is_asked or (data != b"" and not data.startswith(b"CONNECT "))

    def on_read(self, data: bytes) -> bytes:
        """Note bytes that have come, and return those that h11 is to read now.

        Raises RemoteProtocolError for what is no answer: h11 would wait for the rest of it.
        """
        if not self._is_asked:
            return data
        self.has_begun = self.has_begun or data != b""
        if not self._is_passed_on:
            self._noted += data
            if not self._find_answer():
                return b""
            if self.status is None:
                raise httpcore.RemoteProtocolError("no status line")
            self._is_passed_on = True
            self._size = len(self._noted)
            return bytes(self._noted)
        self._size += len(data)
        self._noted += data[: max(0, MAX_HEAD - len(self._noted))]
        return data

    @property
    def headers(self) -> httpx.Headers:
        """The fields of the head, as far as they have come: odd ones beside them do no harm."""
        end = _END_OF_HEAD.search(self._noted, max(0, self._fields - 1))
        head = bytes(self._noted[self._fields : end and end.end()])
        fields = (line.partition(b":") for line in _FOLD.sub(b" ", head).split(b"\n"))
        return httpx.Headers([(name.strip(), value.strip()) for name, colon, value in fields if colon])

    def is_exact(self) -> bool:
        """Return whether this answer has come to its end, and nothing after it."""
        return self.status is not None and self._find_end() == self._size

    def _find_answer(self) -> bool:
        """Drop what comes before the answer itself; return False while that may still come."""
        while True:
            if self._is_announcement:
                end = _END_OF_HEAD.search(self._noted)
                # Its fields may be odd or many: they are nothing to h11, which would hang up for them.
                del self._noted[: end.end() if end else -2]
                if end is None:
                    return False
                self._is_announcement = False
            line = _STATUS_LINE.match(self._noted)
            if line is None:
                # A server may end a body with a line end beyond its length: it comes before the next answer.
                del self._noted[: _LINE_ENDS.match(self._noted).end()]  # type: ignore[union-attr] # it fits all
                is_possible = b"HTTP/".startswith(self._noted[:5].upper()) and b"\n" not in self._noted
                return not is_possible or len(self._noted) > MAX_HEAD
            status = int(line[2])
            if status >= 200 or status == _SWITCHING_PROTOCOLS:
                self.status, self._fields = status, line.end() - line.start(1)
                del self._noted[: line.start(1)]
                return True
            self._is_announcement = True
            del self._noted[: line.end() - 1]

    def _find_end(self) -> int | None:
        """Return the length of the answer; None if it is not known, or not yet."""
        head = _END_OF_HEAD.search(self._noted, self._fields - 1)
        if head is None:
            return None
        headers = self.headers
        length = _LENGTH.fullmatch(headers.get("content-length", "0" if self.status == _NO_CONTENT else ""))
        if "transfer-encoding" in headers:
            return None if self.status == _NO_CONTENT else _find_last_chunk(self._noted, head.end())
        if length is None or (self.status == _NO_CONTENT and int(length[1])):
            # The body that a 204 announces, and must not have, may come late.
            return None
        return head.end() + int(length[1])


def _find_last_chunk(data: bytearray, position: int) -> int | None:
    """Return where a chunked body ends that begins at a position; None if its end is not in the data."""
    while chunk := _CHUNK.match(data, position):
        size = int(chunk[1], 16)
        if size == 0:
            end = _END_OF_HEAD.search(data, chunk.end() - 1)
            return end and end.end()
        position = chunk.end() + size + len(b"\r\n")
        if position > len(data):
            return None
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
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to `host`."""
        return _NotingStream(await self._dial.connect_tcp(host, port, timeout, local_address, socket_options))


class _NotingStream(httpcore.AsyncNetworkStream):
    """A connection, plain or under TLS."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._answer: RawAnswer | None = None
        self._has_more = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read and note until there is something for h11, or the end."""
        self._answer = answer = current.get()
        while data := await self._stream.read(max_bytes, timeout):
            if passed := answer.on_read(data):
                return passed
        return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
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
        timeout: float | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Return the connection under TLS, of which the decrypted bytes are noted."""
        return _NotingStream(await self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        """Return what the connection tells of itself."""
        if info != "is_readable":
            return self._stream.get_extra_info(info)
        # The pool asks this of an idle connection, and drops it if so. Bytes after an answer may sit in h11
        # already, which would take them for the answer to the next event.
        if self._answer is not None:
            self._has_more, self._answer = not self._answer.is_exact(), None
        return self._has_more or self._stream.get_extra_info(info)
