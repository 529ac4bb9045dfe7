"""HTTP answers byte by byte: the status counts, even if the rest of the answer is invalid.

The parser reads the head of an answer as a whole. If it finds an invalid header, it reports no status, and
if the body is shorter than announced the exchange fails: the event would be sent again. So the bytes are
recorded on their way to the parser, and interim answers (1xx) do not reach it.
"""

import re
from typing import Final

import httpx

MAX_HEAD_BYTES: Final = 128 * 1024
"""How much of an answer is recorded, and the longest head; the parser would limit each field only."""

_STATUS_LINE: Final = re.compile(
    rb"[\r\n]*(HTTP/[0-9](?:\.[0-9])?[ \t]+([1-9][0-9]{2})(?![0-9])[^\n]*\n)", re.IGNORECASE
)
"""More lenient than the parser: it also takes two spaces before the status, or no text after it."""
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_FOLD: Final = re.compile(rb"\r?\n[ \t]+")
_FRAMING: Final = re.compile(rb"\n[ \t]*(content-length|transfer-encoding)[ \t]*:([^\n]*)", re.IGNORECASE)
_LENGTH: Final = re.compile(rb"([0-9]{1,20})(?:\s*,\s*\1)*")
_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,20})[^\n]*\n")
_SWITCHING_PROTOCOLS: Final = 101
_NO_CONTENT: Final = 204


class RawAnswer:
    """The bytes that have come back for one request, without interim answers (1xx)."""

    def __init__(self) -> None:
        self.has_begun = False
        """Whether any byte has arrived."""
        self.status = 0
        """The status; 0 until its line is complete, and if the answer is not HTTP/1."""
        self.is_cut = False
        """Whether we closed the connection before the whole request was sent."""
        self.text = b""
        """The start of the body of an answer that is no 2xx, without its framing."""
        self._is_interim = False
        self._is_passed_on = False
        self._recorded = bytearray()
        self._fields = 0
        """The position of the fields in `_recorded`, after the status line."""
        self._size = 0

    def on_read(self, data: bytes) -> bytes:
        """Record bytes that have arrived, and return those that the parser is to read now.

        Raises RemoteProtocolError if they cannot begin an answer, or if its head is too long.
        """
        self.has_begun = True
        if not self._is_passed_on:
            # Hold the bytes back until the status line is complete: the parser must not see interim answers.
            self._recorded += data
            if not self._find_answer():
                return b""
            if not self.status:
                raise httpx.RemoteProtocolError("no status line")
            self._is_passed_on = True
            self._size = len(self._recorded)
            data = bytes(self._recorded)
        else:
            self._size += len(data)
            self._recorded += data[: max(0, MAX_HEAD_BYTES - len(self._recorded))]
        if self._size > MAX_HEAD_BYTES and not _END_OF_HEAD.search(
            self._recorded, self._fields - 1, MAX_HEAD_BYTES
        ):
            raise httpx.RemoteProtocolError("the head is too long")
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
        return self.status != 0 and self._find_end() == self._size

    def _find_answer(self) -> bool:
        """Drop the bytes before the answer itself; return False while nothing else has arrived."""
        while True:
            if self._is_interim:
                end = _END_OF_HEAD.search(self._recorded)
                # the parser would close the connection if its fields are invalid or too many.
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
        # Not from `headers`, which would take 12 µs.
        fields = _FOLD.sub(b" ", self._recorded[self._fields - 1 : head.end()])
        found = [(name.lower(), value.strip()) for name, value in _FRAMING.findall(fields)]
        if any(name == b"transfer-encoding" for name, _ in found):
            return None if self.status == _NO_CONTENT else _find_last_chunk(self._recorded, head.end())
        length = self._announced([value for _, value in found])
        return None if length is None else head.end() + length

    def _announced(self, values: list[bytes]) -> int | None:
        """Return the length that the fields Content-Length announce, or None if it cannot be relied on."""
        default = b"0" if self.status == _NO_CONTENT else b""
        length = _LENGTH.fullmatch(b",".join(values) if values else default)
        if length is None or (self.status == _NO_CONTENT and int(length[1])):
            # A 204 must have no body. If it announces one anyway, that body may arrive late.
            return None
        return int(length[1])


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
