"""HTTP answers byte by byte: the status counts, even if the rest of the answer is invalid.

h11 parses the head of an answer as a whole. If it finds an invalid header, it reports no status, and if the
body is shorter than announced the exchange fails: the event would be sent again. So the bytes are recorded on
their way to h11, and interim answers (1xx) do not reach it.
"""

import re
from contextvars import ContextVar
from typing import Any, Final

import httpcore
import httpx

MAX_HEAD_BYTES: Final = 128 * 1024
"""How much of an answer is recorded; h11 accepts no longer head."""

_STATUS_LINE: Final = re.compile(
    rb"[\r\n]*(HTTP/[0-9](?:\.[0-9])?[ \t]+([1-9][0-9]{2})(?![0-9])[^\n]*\n)", re.IGNORECASE
)
"""More lenient than h11: it also takes two spaces before the status, or no text after it."""
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_FOLD: Final = re.compile(rb"\r?\n[ \t]+")
_LENGTH: Final = re.compile(r"([0-9]{1,20})(?:\s*,\s*\1)*", re.ASCII)
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,20})[^\n]*\n")
_SWITCHING_PROTOCOLS: Final = 101
_NO_CONTENT: Final = 204


class RawAnswer:
    """The bytes that have come back for one request, without interim answers (1xx)."""

    def __init__(self) -> None:
        self.has_begun = False
        """Whether any byte has arrived."""
        self.status: int | None = None
        """The status; None until its line is complete, and if the answer is not HTTP/1."""
        self._is_requested = False
        self._is_interim = False
        self._is_passed_on = False
        self._recorded = bytearray()
        self._fields = 0
        """The position of the fields in `_recorded`, after the status line."""
        self._size = 0

    def on_write(self, data: bytes) -> None:
        """Record that a part of the request is sent: only later bytes can be its answer."""
        # A proxy's answer to CONNECT is not the answer to the request. CONNECT and the request each end with
        # an empty write.
        self._is_requested = self._is_requested or (data != b"" and not data.startswith(b"CONNECT "))

    def on_read(self, data: bytes) -> bytes:
        """Record bytes that have arrived, and return those that h11 is to read now.

        Raises RemoteProtocolError if they cannot begin an answer: h11 would go on waiting for one.
        """
        if not self._is_requested:
            return data
        self.has_begun = self.has_begun or data != b""
        if not self._is_passed_on:
            # Hold the bytes back until the status line is complete: h11 must not see interim answers.
            self._recorded += data
            if not self._find_answer():
                return b""
            if self.status is None:
                raise httpcore.RemoteProtocolError("no status line")
            self._is_passed_on = True
            self._size = len(self._recorded)
            return bytes(self._recorded)
        self._size += len(data)
        self._recorded += data[: max(0, MAX_HEAD_BYTES - len(self._recorded))]
        return data

    @property
    def headers(self) -> httpx.Headers:
        """The fields of the head that have arrived, without invalid ones."""
        end = _END_OF_HEAD.search(self._recorded, max(0, self._fields - 1))
        head = bytes(self._recorded[self._fields : end and end.end()])
        fields = (line.partition(b":") for line in _FOLD.sub(b" ", head).split(b"\n"))
        return httpx.Headers([(name.strip(), value.strip()) for name, colon, value in fields if colon])

    def is_exact(self) -> bool:
        """Return whether this answer is complete, and no byte has followed it."""
        return self.status is not None and self._find_end() == self._size

    def _find_answer(self) -> bool:
        """Drop the bytes before the answer itself; return False while nothing else has arrived."""
        while True:
            if self._is_interim:
                end = _END_OF_HEAD.search(self._recorded)
                # h11 would close the connection if its fields are invalid or too many.
                del self._recorded[: end.end() if end else -2]
                if end is None:
                    return False
                self._is_interim = False
            line = _STATUS_LINE.match(self._recorded)
            if line is None:
                # Some servers send a line end after the body, beyond its length; it arrives before the next
                # answer.
                self._recorded = self._recorded.lstrip(b"\r\n")
                is_possible = b"HTTP/".startswith(self._recorded[:5].upper()) and b"\n" not in self._recorded
                return not is_possible or len(self._recorded) > MAX_HEAD_BYTES
            status = int(line[2])
            if status >= 200 or status == _SWITCHING_PROTOCOLS:
                self.status, self._fields = status, line.end() - line.start(1)
                del self._recorded[: line.start(1)]
                return True
            self._is_interim = True
            del self._recorded[: line.end() - 1]

    def _find_end(self) -> int | None:
        """Return the length of the answer, or None if it is not known yet or never will be."""
        head = _END_OF_HEAD.search(self._recorded, self._fields - 1)
        if head is None:
            return None
        headers = self.headers
        length = _LENGTH.fullmatch(headers.get("content-length", "0" if self.status == _NO_CONTENT else ""))
        if "transfer-encoding" in headers:
            return None if self.status == _NO_CONTENT else _find_last_chunk(self._recorded, head.end())
        if length is None or (self.status == _NO_CONTENT and int(length[1])):
            # A 204 must have no body. If it announces one anyway, that body may arrive late.
            return None
        return head.end() + int(length[1])


def _find_last_chunk(data: bytearray, position: int) -> int | None:
    """Return the end of a chunked body that begins at `position`, or None if the data do not hold it."""
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
"""The answer that the current task waits for."""


class RecordingNetwork(httpcore.AnyIOBackend):
    """Opens connections that record in `current` the bytes that are read."""

    async def connect_tcp(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        """Connect, and record from the start."""
        return _RecordingStream(await super().connect_tcp(*args, **options))


class _RecordingStream(httpcore.AsyncNetworkStream):
    """A connection, plain or under TLS."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._answer: RawAnswer | None = None
        self._has_more = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Read and record until there are bytes for h11, or the connection ends."""
        self._answer = answer = current.get()
        while data := await self._stream.read(max_bytes, timeout):
            if passed := answer.on_read(data):
                return passed
        return b""

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        current.get().on_write(buffer)
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(self, *args: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        """Return the connection under TLS; its decrypted bytes are recorded."""
        return _RecordingStream(await self._stream.start_tls(*args, **options))

    def get_extra_info(self, info: str) -> Any:
        """Return an attribute of the connection; `is_readable` also covers bytes that h11 has already."""
        if info != "is_readable":
            return self._stream.get_extra_info(info)
        # The pool drops an idle connection that is readable. Bytes after an answer may be in h11's buffer
        # already, and h11 would take them for the answer to the next event.
        if self._answer is not None:
            self._has_more, self._answer = not self._answer.is_exact(), None
        return self._has_more or self._stream.get_extra_info(info)
