"""Walks through the containers of media files, which find files that were cut or damaged.

Each format is a generator that follows the structure as the bytes stream by, and gets them from its cursor.
It returns as soon as it has passed the end of the container; bytes behind that are ignored. If the file was
cut, it still waits for more. A walk decodes no content and keeps no byte that it skips. If a format does not
contain the length of a file, its walk promises less: `docs/media.md` has the list.
"""

import re
from collections.abc import Callable, Generator
from typing import Final, TypeAlias, TypeVar

T = TypeVar("T")

# A walk yields when it needs more bytes than the cursor has.
Wait: TypeAlias = Generator[None, None, T]

MAX_PIECES: Final = 1_000_000
"""Pieces of a file that are followed: millions of tiny ones would block the event loop.

A GIF of 64 MiB has about 260,000.
"""


class DamagedFile(Exception):
    """The structure of the file breaks the rules of its format."""


class Cursor:
    """The position of a walk in the stream. `max_pieces` limits the calls of `take`."""

    def __init__(self, *, max_pieces: int = MAX_PIECES) -> None:
        self.position = 0
        self.may_end = False
        self.spare = 0
        self._data = b""
        self._at = 0
        self._pieces_left = max_pieces

    def feed(self, part: bytes) -> None:
        """Append the next part of the stream."""
        self._data = self._data[self._at :] + part
        self._at = 0

    @property
    def left(self) -> int:
        """The number of bytes that were fed and that the walk has not used yet."""
        return len(self._data) - self._at

    def take(self, size: int) -> Wait[bytes]:
        """Return the next `size` bytes. Only for small pieces: the cursor keeps incomplete ones in memory."""
        self._pieces_left -= 1
        if self._pieces_left < 0:
            raise DamagedFile("too many pieces")
        while len(self._data) - self._at < size:
            yield
        taken = self._data[self._at : self._at + size]
        self._advance(size)
        return taken

    def skip(self, size: int) -> Wait[None]:
        """Skip `size` bytes."""
        while (available := len(self._data) - self._at) < size:
            self._advance(available)
            size -= available
            yield
        self._advance(size)

    def find(self, pattern: re.Pattern[bytes], *, overlap: int) -> Wait[bytes]:
        """Skip to the end of the next match and return it; a part may end after `overlap` bytes of one."""
        while (match := pattern.search(self._data, self._at)) is None:
            self._advance(max(0, len(self._data) - self._at - overlap))
            yield
        self._advance(match.end() - self._at)
        return match[0]

    def _advance(self, size: int) -> None:
        self._at += size
        self.position += size


Walk: TypeAlias = Callable[[Cursor], Wait[None]]
_END = object()


class Follower:
    """Feeds a stream to a walk."""

    def __init__(self, walk: Walk, *, max_pieces: int = MAX_PIECES) -> None:
        self._cursor = Cursor(max_pieces=max_pieces)
        self._steps = walk(self._cursor)
        self._is_done = False
        self._goes_on = False

    def feed(self, part: bytes) -> None:
        """Continue the walk through `part`. Raises DamagedFile."""
        if self._is_done:
            self._goes_on = self._goes_on or bool(part)
            return
        self._cursor.feed(part)
        self._is_done = next(self._steps, _END) is _END

    @property
    def is_complete(self) -> bool:
        """Whether the file may end at this byte."""
        return self._is_done or (self._cursor.may_end and self._cursor.left <= self._cursor.spare)

    @property
    def ends_here(self) -> bool:
        """Whether the container ends at exactly this byte."""
        may_end = self._is_done or self._cursor.may_end
        return may_end and not self._cursor.left and not self._goes_on


def unchecked(cursor: Cursor) -> Wait[None]:
    """Accept any end: the format does not contain a length."""
    yield from cursor.skip(0)


def png(cursor: Cursor) -> Wait[None]:
    """Walk from chunk to chunk until IEND."""
    yield from cursor.skip(8)
    while True:
        head = yield from cursor.take(8)
        if not head[4:].isalpha():
            raise DamagedFile("not a PNG chunk")
        yield from cursor.skip(int.from_bytes(head[:4], "big") + 4)
        if head[4:] == b"IEND":
            return


# The markers that a length follows, and EOI. TEM, the restarts and SOI have no length.
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_JPEG_END = b"\xff\xd9"


def jpeg(cursor: Cursor) -> Wait[None]:
    """Walk through the segments and the compressed data to EOI; a thumbnail's EOI is inside a segment."""
    yield from cursor.skip(2)
    while (yield from cursor.find(_JPEG_MARKER, overlap=1)) != _JPEG_END:
        length = int.from_bytes((yield from cursor.take(2)), "big")
        yield from cursor.skip(max(0, length - 2))


_GIF_TRAILER, _GIF_EXTENSION, _GIF_IMAGE, _GIF_FILL = b"\x3b", b"\x21", b"\x2c", b"\x00"


def gif(cursor: Cursor) -> Wait[None]:
    """Walk from block to block until the trailer."""
    screen = yield from cursor.take(13)
    yield from cursor.skip(_colour_table(screen[10]))
    while (block := (yield from cursor.take(1))) != _GIF_TRAILER:
        if block == _GIF_FILL:
            continue
        if block == _GIF_IMAGE:
            descriptor = yield from cursor.take(9)
            yield from cursor.skip(_colour_table(descriptor[8]))
        elif block != _GIF_EXTENSION:
            raise DamagedFile("not a GIF block")
        yield from cursor.skip(1)
        while size := (yield from cursor.take(1))[0]:
            yield from cursor.skip(size)


def _colour_table(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


# Encoders that stream a WAV cannot go back to its size; they write 0, 0x7FFFFFFF, 0xFFFFFFFF or about that.
_RIFF_UNKNOWN = 0x7FFF_0000


def riff(cursor: Cursor) -> Wait[None]:
    """Skip as many bytes as the header says (WebP, WAV)."""
    head = yield from cursor.take(8)
    size = int.from_bytes(head[4:], "little")
    if size < _RIFF_UNKNOWN:
        yield from cursor.skip(size)


def iso(*required: bytes) -> Walk:
    """Return a walk from box to box (MP4, MOV, AVIF); the file may end after any once all `required` came."""

    def walk(cursor: Cursor) -> Wait[None]:
        missing = set(required)
        cursor.spare = 7  # bytes of padding after the last box: too few for another one
        while True:
            cursor.may_end = not missing
            head = yield from cursor.take(8)
            cursor.may_end = False
            size, kind = int.from_bytes(head[:4], "big"), head[4:]
            missing.discard(kind)
            body = size - 8
            if size == 1:
                body = int.from_bytes((yield from cursor.take(8)), "big") - 16
            if not missing and (body < 0 or head[:3] == b"TAG"):
                return  # the last box extends to the end of the file, or a tag or other bytes follow it
            if body < 0:
                raise DamagedFile("not a box")
            yield from cursor.skip(body)

    return walk


def ebml(cursor: Cursor) -> Wait[None]:
    """Walk to the end of the segment (WebM, Matroska), if its size is known."""
    yield from cursor.skip(4)
    yield from cursor.skip((yield from _ebml_size(cursor)) or 0)
    yield from cursor.skip(4)
    yield from cursor.skip((yield from _ebml_size(cursor)) or 0)


def _ebml_size(cursor: Cursor) -> Wait[int | None]:
    first = (yield from cursor.take(1))[0]
    more = 8 - first.bit_length()
    rest = yield from cursor.take(more)
    value = int.from_bytes(bytes([first & (0x7F >> more)]) + rest, "big")
    return None if value == (1 << 7 * (more + 1)) - 1 else value


def ogg(cursor: Cursor) -> Wait[None]:
    """Walk from page to page; the file may end after any. Many encoders omit the end-of-stream flag."""
    while True:
        cursor.may_end = cursor.position > 0
        for letter in b"OggS":
            if (yield from cursor.take(1))[0] != letter:
                return
            cursor.may_end = False
        head = yield from cursor.take(23)
        lengths = yield from cursor.take(head[22])
        yield from cursor.skip(sum(lengths))


def flac(cursor: Cursor) -> Wait[None]:
    """Walk through the metadata to the first frame: frames do not contain their length."""
    yield from cursor.skip(4)
    is_last = False
    while not is_last:
        head = yield from cursor.take(4)
        is_last = bool(head[0] & 0x80)
        yield from cursor.skip(int.from_bytes(head[1:], "big"))
    yield from cursor.take(16)


_MP3_COUNT_OFFSETS = (36, 21, 13)


def mp3(cursor: Cursor) -> Wait[None]:
    """Walk to the size in the Xing or Info header, or to the first frame if the file has no such header.

    Most encoders count that size from the first frame, a few include the tag in front of it. So a file that
    has exactly that many bytes may end there, too.
    """
    head = yield from cursor.take(10)
    if head[:3] == b"ID3":
        size = sum((byte & 0x7F) << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
        yield from cursor.skip(size + (10 if head[5] & 0x10 else 0))
        head = b""
    start = cursor.position - len(head)
    frame = head + (yield from cursor.take(52 - len(head)))
    for offset in _MP3_COUNT_OFFSETS:
        if frame[offset : offset + 4] in {b"Xing", b"Info"}:
            flags = frame[offset + 7]
            at = offset + (12 if flags & 1 else 8)
            size = int.from_bytes(frame[at : at + 4], "big") if flags & 2 else 0
            if size > cursor.position:
                yield from cursor.skip(size - cursor.position)
                cursor.may_end = True
                yield from cursor.take(1)
                cursor.may_end = False
            yield from cursor.skip(max(0, start + size - cursor.position))
            return
