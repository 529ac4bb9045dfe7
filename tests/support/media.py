"""Support for tests of `receiver.media`: small files of every type, raw HTTP servers, an S3 server."""

import asyncio
import re
import ssl
import struct
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from receiver.core.output_files import Kind
from receiver.media.storage.local import LocalStorage
from support.servers import end, free_port, wait_for_port

NOISE = bytes(range(1, 255)) * 4


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A small but complete file."""

    kind: Kind
    extension: str
    data: bytes
    # Cuts that the format cannot show, because it does not announce the bytes behind them.
    unseen: range = range(0)


def _png() -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    pixels = zlib.compress(NOISE[: 16 * 49], 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _jpeg() -> bytes:
    def segment(marker: int, data: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data

    thumbnail = b"Exif\0\0\xff\xd8 a thumbnail with its own end \xff\xd9"
    scan = NOISE.replace(b"\xff", b"\xff\x00") + b"\xff\xd0" + NOISE + b"\xff\x00"
    app0 = segment(0xE0, b"JFIF\0" + bytes(9))
    return b"\xff\xd8" + app0 + segment(0xE1, thumbnail) + segment(0xDA, bytes(10)) + scan + b"\xff\xff\xd9"


def _gif() -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    extension = b"\x21\xf9\x04" + bytes(4) + b"\x00"
    image = b"\x2c" + struct.pack("<HHHHB", 0, 0, 8, 8, 0x80) + bytes(6) + b"\x02"
    blocks = b"".join(bytes([200]) + b"\x3b" * 200 for _ in range(3))
    return screen + extension + image + blocks + b"\x00" + b"\x00" + b"\x3b"


def _riff(form: bytes, data: bytes) -> bytes:
    return b"RIFF" + struct.pack("<I", len(data) + 4) + form + data


def _wav() -> bytes:
    data = b"fmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16) + b"data"
    return _riff(b"WAVE", data + struct.pack("<I", len(NOISE)) + NOISE)


def box(name: bytes, data: bytes) -> bytes:
    """Return a box of the ISO base media format (MP4, MOV, AVIF)."""
    return struct.pack(">I", len(data) + 8) + name + data


def _mp4(brand: bytes) -> bytes:
    wide = struct.pack(">I", 1) + b"mdat" + struct.pack(">Q", len(NOISE) + 16) + NOISE
    return box(b"ftyp", brand + bytes(4) + b"iso2") + box(b"moov", NOISE[:200]) + wide


def _avif() -> bytes:
    return box(b"ftyp", b"mif1" + bytes(4) + b"miafavif") + box(b"meta", NOISE)


def _webm() -> bytes:
    header = b"\x1a\x45\xdf\xa3\x87\x42\x82\x84webm"
    return header + b"\x18\x53\x80\x67" + struct.pack(">Q", (1 << 56) | len(NOISE)) + NOISE


def _ogg() -> bytes:
    def page(flags: int, count: int) -> bytes:
        head = b"OggS" + struct.pack("<BBQIIIB", 0, flags, 0, 1, 0, 0, count)
        return head + b"\xfe" * count + b"\x55" * 254 * count

    return page(2, 1) + page(4, 3)


def _mp3() -> bytes:
    info = bytearray(400)
    info[:4] = b"\xff\xfb\x90\x00"
    info[36:44] = b"Info\x00\x00\x00\x03"
    info[44:52] = struct.pack(">II", 4, 1600)
    return (
        b"ID3\x04\x00\x00\x00\x00\x00\x20" + bytes(32) + bytes(info) + (b"\xff\xfb\x90\x00" + NOISE[:396]) * 3
    )


def _flac() -> bytes:
    info = b"\x80\x00\x00\x22" + bytes(34)
    return b"fLaC" + info + b"\xff\xf8" + NOISE


SAMPLES = {
    "image/png": Sample(kind="image", extension=".png", data=_png()),
    "image/jpeg": Sample(kind="image", extension=".jpg", data=_jpeg()),
    "image/gif": Sample(kind="image", extension=".gif", data=_gif()),
    "image/webp": Sample(kind="image", extension=".webp", data=_riff(b"WEBP", b"VP8 " + NOISE)),
    "image/avif": Sample(kind="image", extension=".avif", data=_avif()),
    "video/mp4": Sample(kind="video", extension=".mp4", data=_mp4(b"isom")),
    "video/quicktime": Sample(kind="video", extension=".mov", data=_mp4(b"qt  ")),
    "video/webm": Sample(kind="video", extension=".webm", data=_webm()),
    # The size in an MP3's header may count the tag in front, so a file of exactly that size is whole.
    "audio/mpeg": Sample(kind="audio", extension=".mp3", data=_mp3(), unseen=range(1600, 1601)),
    "audio/wav": Sample(kind="audio", extension=".wav", data=_wav()),
    "audio/ogg": Sample(kind="audio", extension=".ogg", data=_ogg(), unseen=range(282, 283)),
    "audio/flac": Sample(kind="audio", extension=".flac", data=_flac(), unseen=range(58, 1060)),
    "audio/mp4": Sample(kind="audio", extension=".m4a", data=_mp4(b"M4A ")),
    "audio/webm": Sample(kind="audio", extension=".weba", data=_webm()),
    "audio/aac": Sample(kind="audio", extension=".aac", data=b"\xff\xf1" + NOISE, unseen=range(16, 1018)),
}
PNG = SAMPLES["image/png"].data


async def chunked(data: bytes, size: int = 700) -> AsyncIterator[bytes]:
    """Iterate over `data` in pieces."""
    for at in range(0, len(data), size):
        yield data[at : at + size]


def stored_files(root: Path) -> dict[str, bytes]:
    """Return everything below a storage folder, unfinished files included."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def response(body: bytes, *headers: str, status: str = "200 OK", length: int | None = -1) -> bytes:
    """Return a raw response. Its Content-Length is the body's, another one, or missing (None)."""
    lines = [f"HTTP/1.1 {status}", *headers]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length < 0 else length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@dataclass(kw_only=True)
class Site:
    """A raw HTTP server on 127.0.0.1 and the requests that it got."""

    port: int
    requests: list[bytes]

    @property
    def origin(self) -> str:
        """The value of RECEIVER_MEDIA_HOSTS."""
        return f"http://127.0.0.1:{self.port}"


@asynccontextmanager
async def site(answer: bytes | Answer, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Site]:
    """Answer every request with the same bytes or with a function, and close the connection."""
    requests: list[bytes] = []
    answering: set[asyncio.Future[None]] = set()

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        # Requests that arrive meanwhile come behind it.
        number = len(requests)
        requests.append(request)
        if length := re.search(rb"(?i)\r\ncontent-length: ([0-9]+)", request):
            request += await reader.readexactly(int(length[1]))
            requests[number] = request
        if callable(answer):
            await answer(request, writer)
        else:
            writer.write(answer)
            await writer.drain()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(task := asyncio.ensure_future(respond(reader, writer)))
        # The client hung up, or the test is over: many of these tests are about that.
        with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await task
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    async with server:
        try:
            yield Site(port=server.sockets[0].getsockname()[1], requests=requests)
        finally:
            # Since Python 3.12 the server waits for its handlers at its end.
            for task in answering:
                task.cancel()


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """A bucket on a local S3 server."""

    endpoint: str
    name: str

    @property
    def url(self) -> str:
        """The value of RECEIVER_STORAGE_URL."""
        return f"s3://{self.name}/some/prefix?endpoint={self.endpoint}&region=us-east-1"

    @property
    def google_url(self) -> str:
        """The same bucket through Google's XML API, of which the server supports enough."""
        return f"gs://{self.name}/some/prefix?endpoint={self.endpoint}"

    def open_uploads(self) -> int:
        """Count the multipart uploads that were neither completed nor aborted."""
        return httpx.get(f"{self.endpoint}/{self.name}?uploads", trust_env=False).text.count("<Upload>")

    def list_keys(self) -> list[str]:
        """List the objects."""
        listing = httpx.get(f"{self.endpoint}/{self.name}", trust_env=False).text
        return [part.partition("</Key>")[0] for part in listing.split("<Key>")[1:]]


@contextmanager
def s3_server(directory: Path) -> Iterator[Bucket]:
    """Run an S3 server with one empty bucket; any credentials will do."""
    port = free_port()
    with (directory / "moto.log").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=output,
            stderr=output,
        )
        try:
            wait_for_port(port, process)
            bucket = Bucket(endpoint=f"http://127.0.0.1:{port}", name="files")
            httpx.put(f"{bucket.endpoint}/{bucket.name}", trust_env=False).raise_for_status()
            yield bucket
        finally:
            end(process)


def local_storage(root: Path) -> LocalStorage:
    """Return a storage in a folder that does not exist yet."""
    return LocalStorage(root / "media")
