"""Downloads from real servers: stored, rejected and unfinished files."""

import asyncio
import base64
import contextlib
import gzip
import hashlib
import math
import ssl
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, tzinfo
from email.utils import format_datetime
from pathlib import Path
from typing import Any, cast

import httpcore
import pytest
from support.media import PNG, SAMPLES, Answer, box, local_storage, response, site, stored_files
from support.servers import free_port

from receiver.core.output_files import Kind
from receiver.errors import (
    MediaBlocked,
    MediaDoubtful,
    MediaMissing,
    MediaUnavailable,
    NotMedia,
    SettingsError,
    StorageUnavailable,
)
from receiver.media import Downloader, DownloadLimits, MediaHosts, Storage, StoredFile
from receiver.media.download import _pace
from receiver.media.file_types import SNIFF_BYTES
from receiver.media.network import GuardedNetwork
from receiver.media.pools import open_pool
from receiver.media.storage.local import LocalStorage

QUICK = DownloadLimits(
    image_bytes=100_000,
    connect_seconds=2,
    header_seconds=1,
    idle_seconds=0.3,
    total_seconds=60,
    min_bytes_per_second=1000,
    rate_window_seconds=0.2,
)


@contextlib.asynccontextmanager
async def downloader(
    *origins: str, storage: Storage, limits: DownloadLimits = QUICK
) -> AsyncIterator[Downloader]:
    """Open a downloader that may fetch from `origins`."""
    opened = Downloader(hosts=MediaHosts.parse(origins), storage=storage, limits=limits)
    await opened.start()
    try:
        yield opened
    finally:
        await opened.close()


async def fetch(
    answer: bytes | Answer, root: Path, *, kind: Kind = "image", limits: DownloadLimits = QUICK, **before: Any
) -> StoredFile:
    """Download a server's answer."""
    async with (
        site(answer) as server,
        downloader(server.origin, storage=local_storage(root), limits=limits) as opened,
    ):
        return await opened.save(
            url=f"{server.origin}/works/secret-name.svg?token=x", kind=kind, stem="ab/00-image", **before
        )


async def failure_of(
    answer: bytes | Answer,
    root: Path,
    error: type[Exception] = MediaUnavailable,
    *,
    limits: DownloadLimits = QUICK,
    **options: Any,
) -> Any:
    """Download a server's answer, expect an error and an empty storage, and return the error."""
    with pytest.raises(error) as caught:
        await fetch(answer, root, limits=limits, **options)
    assert type(caught.value) is error
    assert stored_files(root) == {}
    return caught.value


@pytest.mark.parametrize("content_type", SAMPLES)
async def test_stores_every_type(content_type: str, tmp_path: Path) -> None:
    """D13: every type is stored under our key with its own extension; size, digest and type are recorded."""
    sample = SAMPLES[content_type]
    stored = await fetch(response(sample.data, "Content-Type: text/html"), tmp_path, kind=sample.kind)
    key = f"ab/00-image{sample.extension}"
    assert stored == StoredFile(
        key=key,
        uri=f"file://{tmp_path}/media/{key}",
        size=len(sample.data),
        sha256=hashlib.sha256(sample.data).hexdigest(),
        content_type=content_type,
        is_media=True,
        warning=None,
    )
    assert stored_files(tmp_path) == {f"media/{key}": sample.data}


def in_chunks(data: bytes, size: int = 500) -> bytes:
    """Return a chunked response."""
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    body = b"".join(f"{len(piece):x}\r\n".encode() + piece + b"\r\n" for piece in [*pieces, b""])
    return response(body, "Transfer-Encoding: chunked", length=None)


async def test_stores_a_chunked_file(tmp_path: Path) -> None:
    """D9: a file without a length but in chunks has a certain end."""
    assert (await fetch(in_chunks(PNG), tmp_path)).size == len(PNG)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"<svg onload=alert(1) xmlns='http://www.w3.org/2000/svg'/>", "image"),
        (b"GIF89a" + bytes(20) + b"<svg/onload=alert(1)>*/=alert(1)//;", "image"),
        (b"<html><body>a preview</body></html>", "file"),
        (SAMPLES["video/mp4"].data, "image"),
        (PNG, "audio"),
    ],
)
async def test_a_file_of_another_type_is_kept_as_bytes(data: bytes, kind: Kind, tmp_path: Path) -> None:
    """D13: a drawing, a polyglot or another kind of file is kept as bytes, which browsers do not render."""
    stored = await fetch(response(data, "Content-Type: image/png"), tmp_path, kind=kind)
    assert (stored.key, stored.content_type) == ("ab/00-image.bin", "application/octet-stream")
    assert stored_files(tmp_path) == {"media/ab/00-image.bin": data}


async def test_only_the_first_bytes_decide_the_type(tmp_path: Path) -> None:
    """D13: the verdict depends on the file, and not on the sizes of the parts."""
    head = box(b"ftyp", b"isom" + bytes(4) + b"iso2") + box(b"moov", bytes(200))
    data = head + box(b"mdat", bytes(SNIFF_BYTES - len(head) - 8) + b"<script>")
    assert (await fetch(response(data), tmp_path, kind="video")).key == "ab/00-image.mp4"


def cut_points(size: int, *, count: int) -> list[int]:
    """Return about `count` places to cut, both ends included."""
    return sorted({0, 1, 10, 16, *range(0, size, max(1, size // count)), size - 2, size - 1})


async def fail_all(
    answers: list[bytes], root: Path, *, kind: Kind = "image", reasons: tuple[str, ...] = ("truncated",)
) -> None:
    """Download once per answer, and expect one of the reasons and an empty storage each time."""
    queue = iter(answers)

    async def answer(_request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(next(queue))

    patient = replace(QUICK, header_seconds=10, idle_seconds=10)
    async with (
        site(answer) as server,
        downloader(server.origin, storage=local_storage(root), limits=patient) as opened,
    ):
        for _ in answers:
            with pytest.raises(MediaUnavailable) as caught:
                await opened.save(url=f"{server.origin}/x", kind=kind, stem="ab/00-image")
            assert caught.value.reason in reasons
    assert stored_files(root) == {}


@pytest.mark.parametrize("framing", ["length", "chunked"])
async def test_a_broken_connection_stores_no_file(framing: str, tmp_path: Path) -> None:
    """D9: if the connection is cut, at any of a hundred places, no truncated file is stored."""
    whole = response(PNG) if framing == "length" else in_chunks(PNG)
    body = whole.index(b"\r\n\r\n") + 4
    await fail_all([whole[: body + cut] for cut in cut_points(len(whole) - body, count=100)], tmp_path)


@pytest.mark.parametrize("content_type", SAMPLES)
async def test_a_file_that_was_cut_before_it_was_sent_is_not_stored(
    content_type: str, tmp_path: Path
) -> None:
    """D9: if the length fits the cut file, the end of the container shows the cut."""
    sample = SAMPLES[content_type]
    cuts = [cut for cut in cut_points(len(sample.data), count=25) if cut not in sample.unseen]
    # The first letters of some signatures, or an empty body, are taken for a text.
    reasons = ("truncated", "page")
    answers = [response(sample.data[:cut]) for cut in cuts]
    await fail_all(answers, tmp_path, kind=sample.kind, reasons=reasons)


async def test_without_framing_the_container_decides(tmp_path: Path) -> None:
    """D9: without a length or chunks a file is stored only if its container ends at the end of the answer."""
    cuts = cut_points(len(PNG), count=25)
    await fail_all(
        [response(PNG[:cut], length=None) for cut in cuts], tmp_path, reasons=("truncated", "page")
    )
    for data in (PNG + b"x", b"\x0a\x0b\x0c\x00" * 50):
        error = await failure_of(response(data, length=None), tmp_path, MediaDoubtful)
        assert error.reason == "length"
    assert (await fetch(response(PNG, length=None), tmp_path)).warning is None


@pytest.mark.parametrize("length", [-1, None])
async def test_a_cut_without_framing_is_not_proved_by_a_second_one(
    length: int | None, tmp_path: Path
) -> None:
    """D9: two equal cuts count as the file if HTTP frames them, else only at the last attempt."""
    cut, digest = PNG[:700], hashlib.sha256(PNG[:700]).hexdigest()
    if length is None:
        await failure_of(response(cut, length=None), tmp_path, MediaDoubtful, seen_sha256=digest)
    stored = await fetch(
        response(cut, length=length), tmp_path, seen_sha256=digest, keep_doubtful=length is None
    )
    assert (stored.warning, stored.is_media) == ("The file ends early, after 700 bytes", True)


BLEMISHED = {
    "a GIF without a trailer": (SAMPLES["image/gif"].data[:-1], "image"),
    "a JPEG without an EOI": (SAMPLES["image/jpeg"].data[:-2], "image"),
    "a PNG with a broken chunk": (PNG[:37] + bytes(4) + PNG[41:], "image"),
    "a WebP whose size is too large": (b"RIFF\xff\xff\x00\x00" + SAMPLES["image/webp"].data[8:], "image"),
    "an MP4 with an unknown tag": (SAMPLES["video/mp4"].data + b"XTAGxtag" * 16, "video"),
    "a WAV whose size is 8 too large": (
        b"RIFF" + (len(SAMPLES["audio/wav"].data)).to_bytes(4, "little") + SAMPLES["audio/wav"].data[8:],
        "audio",
    ),
    "a stale Content-MD5": (PNG, "image"),
    "nine bytes": (b"\x00\x01\x02" * 3, "image"),
}


@pytest.mark.parametrize("blemish", BLEMISHED)
async def test_a_blemish_that_comes_twice_is_stored_and_flagged(blemish: str, tmp_path: Path) -> None:
    """D9: if a framed body is in doubt, the first one is not trusted, and an equal second one is."""
    data, kind = cast("tuple[bytes, Kind]", BLEMISHED[blemish])
    headers = [f"Content-MD5: {base64.b64encode(bytes(16)).decode()}"] if "MD5" in blemish else []
    answer = response(data, *headers)
    error = await failure_of(answer, tmp_path, MediaDoubtful, kind=kind)
    assert error.retry_after == 5.0
    await failure_of(answer, tmp_path, MediaDoubtful, kind=kind, seen_sha256="00" * 32)
    stored = await fetch(answer, tmp_path, kind=kind, seen_sha256=error.sha256)
    assert (stored.sha256, stored.warning) == (hashlib.sha256(data).hexdigest(), str(error))
    assert list(stored_files(tmp_path).values()) == [data]


async def test_a_body_that_is_never_the_same_is_kept_in_the_end(tmp_path: Path) -> None:
    """D9: on the last attempt a body in doubt is better than none: it is stored with a warning."""
    data = SAMPLES["image/gif"].data[:-1]
    stored = await fetch(response(data), tmp_path, seen_sha256="00" * 32, keep_doubtful=True)
    assert stored.warning == f"The file ends early, after {len(data)} bytes"


async def test_a_short_body_is_never_stored(tmp_path: Path) -> None:
    """D9: if a body is shorter than its length, it is never stored, even at the last attempt."""
    cut = response(PNG[:700], length=len(PNG))
    digest = hashlib.sha256(PNG[:700]).hexdigest()
    assert (await failure_of(cut, tmp_path, seen_sha256=digest, keep_doubtful=True)).reason == "truncated"


@pytest.mark.parametrize("data", [b"<html><body>Not found</body></html>", b""])
async def test_a_page_is_not_the_file_yet(data: bytes, tmp_path: Path) -> None:
    """D15: a page or an empty body is stored only at the last attempt, and then not as media."""
    answer = response(data, "Content-Type: image/png")
    assert (await failure_of(answer, tmp_path, NotMedia)).reason == "page"
    stored = await fetch(answer, tmp_path, keep_doubtful=True)
    assert (stored.is_media, stored.key, stored.content_type) == (
        False,
        "ab/00-image.bin",
        "application/octet-stream",
    )
    assert stored_files(tmp_path) == {"media/ab/00-image.bin": data}


async def test_a_damaged_file_is_not_stored(tmp_path: Path) -> None:
    """D9: if the structure of a file is damaged, it is downloaded again later."""
    data = bytearray(PNG)
    data[37:41] = b"\0\0\0\0"
    assert (await failure_of(response(bytes(data)), tmp_path, MediaDoubtful)).reason == "damaged"


async def test_a_stated_digest_is_compared(tmp_path: Path) -> None:
    """D9: a body must match the digest that the server states."""
    good, bad = (base64.b64encode(hashlib.sha256(data).digest()).decode() for data in (PNG, b"other"))
    answer = response(PNG, f"Repr-Digest: sha-256=:{bad}:")
    assert (await failure_of(answer, tmp_path, MediaDoubtful)).reason == "digest"
    await fetch(response(PNG, f"Repr-Digest: sha-256=:{good}:"), tmp_path)


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Temporary", "308 Permanent"])
async def test_a_redirect_to_an_allowed_origin_is_followed(status: str, tmp_path: Path) -> None:
    """D4: another allowed origin is visited, at the path of the redirect, and its file is stored."""
    async with (
        site(response(PNG)) as sink,
        site(response(b"", f"Location: {sink.origin}/a b#c", status=status)) as server,
        downloader(server.origin, sink.origin, storage=local_storage(tmp_path)) as opened,
    ):
        stored = await opened.save(url=f"{server.origin}/x", kind="image", stem="ab/00-image")
        assert opened._pool.connections == []
    assert stored.sha256 == hashlib.sha256(PNG).hexdigest()
    assert [request.split(b"\r\n")[0] for request in sink.requests] == [b"GET /a%20b HTTP/1.1"]


@pytest.mark.parametrize("location", ["/elsewhere/a.png?x=1", "a.png?x=1", "//{host}/elsewhere/a.png?x=1"])
async def test_a_relative_redirect_is_followed(location: str, tmp_path: Path) -> None:
    """D4: a redirect without a scheme or a host is relative to the URL that sent it."""

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        path = request.split(b" ")[1]
        host = request.split(b"Host: ")[1].split(b"\r\n")[0].decode()
        moved = response(b"", f"Location: {location.format(host=host)}", status="302 Found")
        writer.write(moved if path == b"/elsewhere/" else response(PNG))

    async with site(answer) as server, downloader(server.origin, storage=local_storage(tmp_path)) as opened:
        await opened.save(url=f"{server.origin}/elsewhere/", kind="image", stem="ab/00-image")
        assert server.requests[1].startswith(b"GET /elsewhere/a.png?x=1 HTTP/1.1")


@pytest.mark.parametrize(
    "location",
    ["{sink}/x", "http://user:secret@{host}/x", "https://127.0.0.1/x", "file:///etc/passwd", "http://[/x"],
)
async def test_a_redirect_to_another_origin_is_blocked(location: str, tmp_path: Path) -> None:
    """D4: the target of a redirect is vetted like any URL, and if it is not allowed, it is never visited."""
    async with site(response(PNG)) as sink:
        place = location.format(sink=sink.origin, host=sink.origin.removeprefix("http://"))
        answer = response(b"", f"Location: {place}", status="302 Found")
        error = await failure_of(answer, tmp_path, MediaBlocked)
        assert error.reason == "redirect"
        assert "secret" not in str(error)
        assert sink.requests == []


async def test_a_redirect_gets_no_way_around_the_guard(tmp_path: Path) -> None:
    """D3: the host of a redirect is resolved anew, and a forbidden address is not connected to."""
    lookups: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        lookups.append(f"{host}:{port}")
        return ["127.0.0.1"]

    answer = response(b"", "Location: https://media.clipia.ai/x", status="302 Found")
    async with (
        site(answer) as server,
        downloader(server.origin, "media.clipia.ai", storage=local_storage(tmp_path)) as opened,
    ):
        network = GuardedNetwork(MediaHosts.parse([server.origin, "media.clipia.ai"]), resolve=resolve)
        opened._pool = open_pool(network, ssl.create_default_context())
        with pytest.raises(MediaBlocked) as caught:
            await opened.save(url=f"{server.origin}/x", kind="image", stem="ab/00-image")
    assert (caught.value.reason, lookups) == ("address", ["media.clipia.ai:443"])


async def test_redirects_in_a_circle_end(tmp_path: Path) -> None:
    """D4: after more than four redirects the file is unavailable, which may pass."""
    requests = 0

    async def answer(_request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        requests += 1
        writer.write(response(b"", "Location: /x", status="302 Found"))

    assert (await failure_of(answer, tmp_path)).reason == "redirect"
    assert requests == 5


async def test_the_environment_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D5: no proxy and no credentials of the environment reach a download, and no cookie survives one."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login someone password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with site(response(b"")) as canary, site(response(PNG, "Set-Cookie: session=1; Path=/")) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, canary.origin)
            monkeypatch.setenv(name.lower(), canary.origin)
        monkeypatch.setenv("NO_PROXY", "")
        monkeypatch.setenv("no_proxy", "")
        async with downloader(server.origin, storage=local_storage(tmp_path)) as opened:
            for _ in range(2):
                await opened.save(url=f"{server.origin}/x?y=z", kind="image", stem="ab/00-image")
        assert canary.requests == []
        head, *lines = server.requests[1].decode().split("\r\n")
        assert head == "GET /x?y=z HTTP/1.1"
        assert {line.partition(":")[0].lower() for line in lines if line} == {
            "host",
            "user-agent",
            "accept",
            "accept-encoding",
        }
        assert "Accept-Encoding: identity" in lines


class CountingDial(httpcore.AsyncNetworkBackend):
    """Connects as usual, and counts the bytes that are read."""

    def __init__(self) -> None:
        self.taken = 0

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        """Connect."""
        stream = await httpcore.AnyIOBackend().connect_tcp(*args, **kwargs)
        read = stream.read

        async def count(*args: Any, **kwargs: Any) -> bytes:
            data = await read(*args, **kwargs)
            self.taken += len(data)
            return data

        # Patched on the stream itself: the class is httpcore's, and other connections must not be counted.
        stream.read = count  # type: ignore[method-assign]  # replaced on purpose
        return stream


async def test_an_endless_file_ends_at_the_limit(tmp_path: Path) -> None:
    """D7: at most one read beyond the limit is taken from the network, and no file is stored."""

    async def endless(_request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(response(b"", "Transfer-Encoding: chunked", length=None))
        # Finite: without the limit, the file ends and is rejected for another reason.
        for _ in range(200):
            writer.write(b"10000\r\n" + bytes(65_536) + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    dial = CountingDial()
    async with site(endless) as server, downloader(server.origin, storage=local_storage(tmp_path)) as opened:
        network = GuardedNetwork(MediaHosts.parse([server.origin]), dial=dial)
        opened._pool = open_pool(network, ssl.create_default_context())
        with pytest.raises(MediaBlocked) as caught:
            await opened.save(url=f"{server.origin}/x", kind="image", stem="ab/00-image")
    assert caught.value.reason == "too_large"
    assert QUICK.image_bytes < dial.taken <= QUICK.image_bytes + 2 * 65_536
    assert stored_files(tmp_path) == {}


async def test_a_declared_size_above_the_limit_is_never_read(tmp_path: Path) -> None:
    """D7: the Content-Length is enough to reject a file; each kind has its own limit."""
    answer = response(PNG, length=QUICK.image_bytes + 1)
    assert (await failure_of(answer, tmp_path, MediaBlocked)).reason == "too_large"
    assert [DownloadLimits().max_bytes(kind) >> 20 for kind in ("image", "audio", "video", "file")] == [
        64,
        256,
        2048,
        2048,
    ]


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "GZIP", "aws-chunked,zstd", "x-gzip"])
async def test_a_compressed_file_is_rejected(encoding: str, tmp_path: Path) -> None:
    """D8: a compressed body is never unpacked: a bomb is rejected by its header, and requested again."""
    bomb = gzip.compress(bytes(3_000_000))
    assert len(bomb) < QUICK.image_bytes
    error = await failure_of(response(bomb, f"Content-Encoding: {encoding}"), tmp_path)
    assert error.reason == "encoding"


@pytest.mark.parametrize(
    "encoding", ["identity", "aws-chunked", "none", "UTF-8", "binary", "", "identity, aws-chunked", "7bit"]
)
async def test_other_codings_are_no_compression(encoding: str, tmp_path: Path) -> None:
    """D8: words in Content-Encoding that change no byte are ignored."""
    await fetch(response(PNG, f"Content-Encoding: {encoding}"), tmp_path)


def pausing(*pieces: bytes, pause: float = 0.1) -> Answer:
    """Send the pieces with pauses between them, and then no more."""

    async def answer(_request: bytes, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(pause)
        await asyncio.sleep(30)

    return answer


HEAD = response(b"", length=50_000)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (pausing(), "timeout"),
        (pausing(*(bytes([byte]) for byte in HEAD)), "timeout"),
        (pausing(*[b"HTTP/1.1 103 Early Hints\r\n\r\n"] * 50), "timeout"),
        (pausing(HEAD), "timeout"),
        (pausing(HEAD + PNG), "timeout"),
        (pausing(HEAD + PNG[:500], *[b"x"] * 100), "too_slow"),
        (pausing(in_chunks(PNG)[:300], *[b"5;x=" + b"y" * 10 + b"\r\nabcde\r\n"] * 100), "too_slow"),
        (
            pausing(response(b"", "Transfer-Encoding: chunked", length=None) + b"5;x=", *[b"y"] * 200),
            "timeout",
        ),
    ],
    ids=[
        "silent",
        "drip-head",
        "hints",
        "no-body",
        "stalled",
        "drip-body",
        "drip-chunks",
        "drip-chunk-head",
    ],
)
async def test_a_slow_server_is_given_up(answer: Answer, reason: str, tmp_path: Path) -> None:
    """D7: silence ends in time, and so does a drip at any place of the answer."""
    async with asyncio.timeout(10):
        error = await failure_of(answer, tmp_path)
    assert error.reason == reason


@pytest.mark.parametrize("answer", [pausing(), pausing(HEAD + PNG[:500])], ids=["silent", "stalled"])
async def test_an_abandoned_download_holds_no_connection(answer: Answer, tmp_path: Path) -> None:
    """D7: if a host falls silent, or a shutdown cancels a download, no connection stays open."""
    storage = local_storage(tmp_path)
    async with site(answer) as server, downloader(server.origin, storage=storage) as opened:
        url = f"{server.origin}/a.png"
        for number in range(3):
            with pytest.raises(MediaUnavailable):
                await opened.save(url=url, kind="image", stem=f"ab/{number:02d}-image")
        cancelled = asyncio.create_task(opened.save(url=url, kind="image", stem="ab/03-image"))
        await asyncio.sleep(0.1)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert opened._pool.connections == []


async def test_a_download_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """D7: if a file comes fast enough but does not end, the time limit of the whole download ends it."""
    answer = pausing(HEAD + PNG[:500], *[b"x" * 200] * 1000, pause=0.05)
    async with asyncio.timeout(10):
        error = await failure_of(answer, tmp_path, limits=replace(QUICK, total_seconds=0.5))
    assert error.reason == "timeout"


async def test_a_slow_storage_is_not_blamed_on_the_server() -> None:
    """D7: the rate counts only time spent waiting for the server."""

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"0123456789"

    limits = replace(QUICK, rate_window_seconds=1)
    received = 0
    async for part in _pace(parts(), limits, math.inf):
        received += len(part)
        await asyncio.sleep(0.06)
    assert received == 200


@pytest.mark.parametrize(
    "status", ["400 Bad", "401 No", "403 Forbidden", "404 Not Found", "410 Gone", "451 Law"]
)
async def test_a_file_that_is_gone_is_missing(status: str, tmp_path: Path) -> None:
    """D15: a 4xx that waiting does not cure means that the file is missing."""
    assert (await failure_of(response(b"", status=status), tmp_path, MediaMissing)).reason == "missing"


@pytest.mark.parametrize(
    "status",
    [
        *("204 None", "206 Partial", "300 Choices", "302 Found", "304 Not Modified"),
        *("408 Slow", "425 Early", "429 Many", "500 Error", "503 Busy"),
    ],
)
async def test_other_answers_are_tried_again(status: str, tmp_path: Path) -> None:
    """D15: every other status than 200 may pass, also a redirect without a target."""
    error = await failure_of(response(b"", status=status), tmp_path)
    assert (error.reason, error.retry_after) == ("status", None)


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("120", 120, 120),
        ("0", 0, 0),
        ("999999999", 86_400, 86_400),
        ("1" * 5000, 86_400, 86_400),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 86_400, 86_400),
    ],
)
async def test_retry_after_is_passed_on(value: str, low: float, high: float, tmp_path: Path) -> None:
    """D15: seconds and dates are understood, and an absurd value delays the file by a day at most."""
    error = await failure_of(response(b"", f"Retry-After: {value}", status="503 Busy"), tmp_path)
    assert error.retry_after is not None
    assert low <= error.retry_after <= high


@pytest.mark.parametrize("zone", [UTC, None], ids=["GMT", "-0000"])
async def test_a_retry_after_date_is_counted_from_now(zone: tzinfo | None, tmp_path: Path) -> None:
    """D15: an HTTP date is in GMT, even if it has no zone."""
    when = (datetime.now(UTC) + timedelta(seconds=600)).replace(tzinfo=zone)
    value = format_datetime(when, usegmt=zone is UTC)
    error = await failure_of(response(b"", f"Retry-After: {value}", status="503 Busy"), tmp_path)
    assert error.retry_after is not None
    assert 500 <= error.retry_after <= 600


ABSURD_DATES = ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Mon, 01 Jan 2027 00:00:00 +99999999999999"]


@pytest.mark.parametrize(
    "value", ["", "soon", "-5", "1_0", "1e9", "\u0661", "Wed, 99 Oct 2015", *ABSURD_DATES]
)
async def test_a_strange_retry_after_is_ignored(value: str, tmp_path: Path) -> None:
    """D15: a value that is neither seconds nor a date is ignored."""
    answer = response(b"", f"Retry-After: {value}", status="429 Many")
    assert (await failure_of(answer, tmp_path)).retry_after is None


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
    ],
)
async def test_a_broken_answer_is_no_answer(answer: bytes, tmp_path: Path) -> None:
    """D9: if an answer is not HTTP, or its head is too large, the connection counts as failed."""
    assert (await failure_of(answer, tmp_path)).reason == "connect"


async def test_a_closed_port_is_unavailable(tmp_path: Path) -> None:
    """D15: a server that is down may come back."""
    origin = f"http://127.0.0.1:{free_port()}"
    async with downloader(origin, storage=local_storage(tmp_path)) as opened:
        with pytest.raises(MediaUnavailable) as caught:
            await opened.save(url=f"{origin}/x", kind="image", stem="ab/00-image")
    assert caught.value.reason == "connect"


async def test_a_full_storage_is_its_own_error(tmp_path: Path) -> None:
    """D16: the storage's error passes through, and the connection is closed."""

    class FullStorage(LocalStorage):
        async def put(
            self,
            key: str,
            chunks: AsyncIterator[bytes],
            *,
            content_type: str = "",
        ) -> None:
            await anext(chunks)
            raise StorageUnavailable("full", reason="full")

    async with (
        site(response(PNG)) as server,
        downloader(server.origin, storage=FullStorage(tmp_path)) as opened,
    ):
        with pytest.raises(StorageUnavailable):
            await opened.save(url=f"{server.origin}/x", kind="image", stem="ab/00-image")
        assert opened._pool.connections == []


async def test_bytes_behind_the_announced_length_are_left(tmp_path: Path) -> None:
    """D7: if a server sends more than it announces, the file has the announced bytes."""
    movie = box(b"ftyp", b"isom" + bytes(4)) + box(b"moov", bytes(200)) + box(b"mdat", bytes(3_000_000))
    stored = await fetch(response(movie + bytes(100_000), length=len(movie)), tmp_path, kind="video")
    assert stored_files(tmp_path) == {"media/ab/00-image.mp4": movie}
    assert stored.sha256 == hashlib.sha256(movie).hexdigest()


async def test_a_cancelled_download_leaves_no_file(tmp_path: Path) -> None:
    """D10: if a worker is stopped in the middle of a download, neither a file nor a connection remains."""
    async with (
        site(pausing(response(bytes(4_000_000), length=5_000_000))) as server,
        downloader(server.origin, storage=local_storage(tmp_path), limits=DownloadLimits()) as opened,
    ):
        task = asyncio.create_task(opened.save(url=f"{server.origin}/x", kind="image", stem="ab/00-image"))
        while not stored_files(tmp_path):  # noqa: ASYNC110 - a folder sends no event
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert opened._pool.connections == []
    assert stored_files(tmp_path) == {}


async def test_a_repeated_download_ends_with_one_file(tmp_path: Path) -> None:
    """D11: if a download is repeated after a crash behind the rename, the same bytes are stored again."""
    first = await fetch(response(PNG), tmp_path)
    assert await fetch(response(PNG), tmp_path) == first
    assert stored_files(tmp_path) == {"media/ab/00-image.png": PNG}


@pytest.mark.parametrize(
    ("path", "requested"),
    [
        ("/a b.png#t=5", "/a%20b.png"),
        ("/caf\u00e9/\u732b.png?prompt=gr\u00fcn x", "/caf%C3%A9/%E7%8C%AB.png?prompt=gr%C3%BCn%20x"),
        ("/100%.png?sig=a%2Fb+c/d=", "/100%25.png?sig=a%2Fb+c/d="),
    ],
)
async def test_a_url_is_encoded(path: str, requested: str, tmp_path: Path) -> None:
    """D1: blanks, letters of any alphabet and a fragment do not prevent a download; an escape is kept."""
    async with (
        site(response(PNG)) as server,
        downloader(server.origin, storage=local_storage(tmp_path)) as opened,
    ):
        await opened.save(url=server.origin + path, kind="image", stem="ab/00-image")
        assert server.requests[0].decode("ascii").split(" ")[1] == requested


async def test_a_url_that_is_not_allowed_makes_no_connection(tmp_path: Path) -> None:
    """D1: the allow-list comes before the network."""
    async with (
        site(response(PNG)) as server,
        downloader("media.clipia.ai", storage=local_storage(tmp_path)) as opened,
    ):
        with pytest.raises(MediaBlocked):
            await opened.save(url=f"{server.origin}/x", kind="image", stem="ab/00-image")
        assert server.requests == []


class Unreachable(httpcore.AsyncNetworkBackend):
    """Connects to any address, and fails."""

    async def connect_tcp(self, *args: Any, **kwargs: Any) -> httpcore.AsyncNetworkStream:
        """Fail."""
        raise httpcore.ConnectError("unreachable")


@pytest.mark.parametrize("network", [Unreachable(), httpcore.AsyncMockBackend([response(PNG)])])
async def test_a_missing_guard_stops_the_start(network: httpcore.AsyncNetworkBackend, tmp_path: Path) -> None:
    """D3: if a pool tries to connect to a forbidden address, the start fails, whether it connects or not."""
    hosts = MediaHosts.parse(["media.clipia.ai"])
    opened = Downloader(hosts=hosts, storage=local_storage(tmp_path), limits=QUICK)
    opened._pool = open_pool(network, ssl.create_default_context())
    with pytest.raises(SettingsError, match="guard"):
        await opened.start()
