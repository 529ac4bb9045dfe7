"""`/v1/media/{id}` over HTTP: stored files, their ranges and headers, and redirects to a bucket."""

import asyncio
import hashlib
import json
import socket
import struct
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from support.events import World, opened, until, with_files
from support.media import Bucket, chunked, s3_server
from support.payloads import SECRET
from support.serving import serving

from receiver import retention
from receiver.api import files
from receiver.app import create_app
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.tables import deliveries, events, media
from receiver.media import open_storage
from receiver.media.storage.local import LocalStorage
from receiver.settings import Settings

READER, OTHER = "reader-0123456789abcdef", "other-0123456789abcdef"
MIB = 1024 * 1024
LARGE = (bytes(range(251)) * 50_000)[: 11 * MIB + 12_345]
INTERNAL = "https://receiver.internal/clipia"
HEADERS = {
    "cache-control": "private, no-cache",
    "content-security-policy": "default-src 'none'; sandbox",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "accept-ranges": "bytes",
}


class Site:
    """A receiver, a reader's client, and events with one file each."""

    def __init__(self, client: httpx.AsyncClient, world: World, storage_url: str) -> None:
        self.client = client
        self.world = world
        self.storage = open_storage(storage_url)
        self.numbers = iter(range(1000))

    async def add(self, data: bytes, *, key: str = "aa/bb/00-original.png", **changes: Any) -> str:
        """Store an event with a file; return the file's id."""
        request_id = f"r-{next(self.numbers)}"
        await self.world.add(with_files("https://media.clipia.ai", request_id, "/works/a.png"))
        await self.world.fan_out()
        row = (await self.world.rows(media))[-1]
        await self.storage.put(key, chunked(data, 65_536))
        values = {
            "state": "stored",
            "next_attempt_at": None,
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "content_type": "image/png",
            "storage_key": key,
            "uri": self.storage.uri(key),
        }
        await self.world.change(media, media.c.id == row["id"], **values | changes)
        await self.world.change(events, events.c.state == "fetching", state="ready")
        return str(row["id"])

    async def get(self, file_id: str, **headers: str) -> httpx.Response:
        """Get a file as a reader."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.get(f"/v1/media/{file_id}", headers=names)

    async def is_served(self, file_id: str) -> bool:
        """Return whether a file is sent."""
        return (await self.get(file_id)).status_code == 200

    async def error(self, file_id: str, **headers: str) -> tuple[int, str]:
        """Return status and code of an error in Clipia's shape."""
        response = await self.get(file_id, **headers)
        return response.status_code, response.json()["error"]["code"]


@asynccontextmanager
async def make_site(
    url: str, folder: Path, storage_url: str | None = None, *, worker: bool = False
) -> AsyncIterator[Site]:
    """Serve a receiver with a destination."""
    storage_url = storage_url or f"file:{folder / 'media'}"
    settings = Settings.load(
        database_url=url,
        storage_url=storage_url,
        internal_url=f"{INTERNAL}/",
        destinations=[{"name": "orders", "url": f"file:{folder / 'events.jsonl'}"}],
        clipia_webhook_secret=SECRET,
        api_tokens=f"reader:{READER}:read,other:{OTHER}:submit+operate",
    )
    database = Database(url)
    async with (
        serving(create_app(settings, worker=worker)) as base,
        opened(database, folder / "media") as world,
        httpx.AsyncClient(base_url=base, headers={"authorization": f"Bearer {READER}"}) as client,
    ):
        yield Site(client, world, storage_url)
    await database.close()


@pytest.fixture
async def site(migrated_sqlite: Path, tmp_path: Path) -> AsyncIterator[Site]:
    """A receiver with a folder."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    async with make_site(f"sqlite:///{path}", tmp_path) as made:
        yield made


async def test_a_file_is_sent_with_headers_that_make_it_harmless(database_url: str, tmp_path: Path) -> None:
    """D14: a file is a download of its verified type, which no browser guesses, shows or runs."""
    async with make_site(database_url, tmp_path) as site:
        file_id = await site.add(LARGE)
        found = await site.get(file_id)
        digest = hashlib.sha256(LARGE).hexdigest()
        assert (found.status_code, found.content == LARGE) == (200, True)
        assert HEADERS.items() <= dict(found.headers).items()
        assert found.headers["etag"] == f'"{digest}"'
        assert found.headers["content-type"] == "image/png"
        assert found.headers["content-disposition"] == f'attachment; filename="{file_id}.png"'
        head = await site.client.head(f"/v1/media/{file_id}")
        assert (head.status_code, head.content) == (200, b"")
        unequal = {"date", "x-request-id"}
        assert {name: value for name, value in head.headers.items() if name not in unequal} == {
            name: value for name, value in found.headers.items() if name not in unequal
        }
        # The link in the API is that of the message.
        event = await site.client.get("/v1/events/r-0", headers={"authorization": f"Bearer {OTHER}"})
        assert event.json()["media"][0]["link"] == f"{INTERNAL}/v1/media/{file_id}"


@pytest.mark.parametrize(
    ("recorded", "sent"),
    [
        ("video/mp4", "video/mp4"),
        ("text/html", "application/octet-stream"),
        ("image/svg+xml", "application/octet-stream"),
        ("image/png\r\nX-Injected: 1", "application/octet-stream"),
        (None, "application/octet-stream"),
    ],
)
async def test_only_known_types_are_sent(site: Site, recorded: str | None, sent: str) -> None:
    """D14: a row with another type, such as an imported one, is sent as bytes of no known type."""
    found = await site.get(await site.add(b"<script>", content_type=recorded))
    assert (found.content, found.headers["content-type"]) == (b"<script>", sent)


async def test_ranges_of_a_file_are_sent(site: Site) -> None:
    """One range is 206 with exactly these bytes; several are the whole file, and none of it is 416."""
    file_id = await site.add(LARGE)
    etag = f'"{hashlib.sha256(LARGE).hexdigest()}"'
    size = len(LARGE)
    for header, start, end in (
        ("bytes=0-0", 0, 1),
        (f"bytes={MIB - 1}-{3 * MIB}", MIB - 1, 3 * MIB + 1),
        ("bytes=-7", size - 7, size),
        ("bytes=5-", 5, size),
    ):
        for extra in (dict[str, str](), {"if_range": etag}):
            found = await site.get(file_id, range=header, **extra)
            assert (found.status_code, found.content == LARGE[start:end]) == (206, True), header
            assert found.headers["content-range"] == f"bytes {start}-{end - 1}/{size}"
            assert HEADERS.items() <= dict(found.headers).items()
    for headers in (
        {"range": "bytes=0-0,2-2"},
        {"range": "bytes=0-0", "if_range": '"another"'},
        {"range": "bytes=0-0", "if_range": f"W/{etag}"},
        {"range": f"bytes={size}-", "if_range": "Mon, 30 Nov 2026 12:00:00 GMT"},
    ):
        found = await site.get(file_id, **headers)
        assert (found.status_code, found.content == LARGE) == (200, True), headers
    beyond = await site.get(file_id, range=f"bytes={size}-")
    assert (beyond.status_code, beyond.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert beyond.headers["content-range"] == f"bytes */{size}"
    for tags in (etag, f'"x", W/{etag}'):
        same = await site.get(file_id, if_none_match=tags)
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    assert (await site.get(file_id, if_none_match='"x"')).status_code == 200


async def test_a_file_that_cannot_be_sent_is_an_error_in_words(site: Site, tmp_path: Path) -> None:
    """D14: unknown, unfinished, lost, changed, foreign and linked files are errors, and none is sent."""
    assert await site.error("x") == (404, "not_found")
    assert await site.error(str(uuid.uuid4())) == (404, "not_found")
    nothing: dict[str, Any] = {"storage_key": None, "uri": None, "size": None, "sha256": None}
    gone = await site.add(b"x", state="gone", error="no such file", **nothing)
    answer = await site.get(gone)
    assert answer.status_code == 409
    assert answer.json()["error"] == {
        "type": "invalid_request_error",
        "code": "not_stored",
        "message": "the file is gone: no such file",
    }
    lost = await site.add(b"lost", key="aa/lost.png")
    (tmp_path / "media/aa/lost.png").unlink()
    assert await site.error(lost) == (410, "file_missing")
    # The folder in place of a file, and an imported row of another storage or with any key.
    (tmp_path / "media/aa/lost.png").mkdir()
    assert await site.error(lost) == (410, "file_missing")
    assert await site.error(await site.add(b"x", uri="s3://files/aa/bb/00-original.png")) == (
        410,
        "file_missing",
    )
    assert await site.error(await site.add(b"x", storage_key="../receiver.db")) == (410, "file_missing")
    changed = await site.add(b"as stored", key="aa/changed.png")
    (tmp_path / "media/aa/changed.png").write_bytes(b"longer than stored")
    assert await site.error(changed) == (409, "file_changed")
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret!!!")
    (tmp_path / "media/aa/changed.png").unlink()
    (tmp_path / "media/aa/changed.png").symlink_to(secret)
    assert await site.error(changed) == (503, "service_unavailable")


async def test_a_folder_that_hangs_is_an_error_in_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: a network mount without its server keeps few threads, and its files come back."""
    file_id = await site.add(b"x")
    assert (await site.get(file_id)).status_code == 200
    back, threads, find = threading.Event(), list[threading.Thread](), LocalStorage._path

    def hang(storage: LocalStorage, key: str) -> Path:
        assert threading.current_thread() is not threading.main_thread()
        threads.append(threading.current_thread())
        assert back.wait(60)
        return find(storage, key)

    monkeypatch.setattr(files, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(LocalStorage, "_path", hang)
    try:
        for _ in range(files.MAX_HANGING + 3):
            assert await site.error(file_id) == (503, "service_unavailable")
        assert len(threads) == files.MAX_HANGING
    finally:
        back.set()
        monkeypatch.undo()
    await until(lambda: site.is_served(file_id))


async def test_an_erased_event_has_no_files(site: Site) -> None:
    """An erased event's files are not found, even while they are being deleted."""
    file_id = await site.add(b"x")
    await site.world.change(events, state="erased")
    assert await site.error(file_id) == (404, "not_found")
    await site.world.change(events, state="ready")
    assert await retention.erase(site.world.database, site.storage, "r-0")
    assert await site.error(file_id) == (404, "not_found")


async def test_a_changed_file_is_never_sent_to_its_end(site: Site, tmp_path: Path) -> None:
    """D14: a file with other bytes than those that were stored is cut, and the client can tell."""
    for data in (LARGE, b"small"):
        file_id = await site.add(data, key="aa/rotten.png")
        path = tmp_path / "media/aa/rotten.png"
        path.write_bytes(data[:-1] + b"?")
        with pytest.raises(httpx.RemoteProtocolError):
            await site.get(file_id)


async def test_the_link_is_in_the_message(migrated_sqlite: Path, tmp_path: Path) -> None:
    """A message has the same link as the API."""
    path, written = tmp_path / "receiver.db", tmp_path / "events.jsonl"
    path.write_bytes(migrated_sqlite.read_bytes())
    async with make_site(f"sqlite:///{path}", tmp_path) as site:
        site.world.add_destination("orders")
        file_id = await site.add(b"x")
        await site.world.change(deliveries, next_attempt_at=db_time(0.0))

    async def is_written() -> bool:
        return written.exists() and written.read_bytes().endswith(b"\n")

    async with make_site(f"sqlite:///{path}", tmp_path, worker=True):
        await until(is_written)
    (file,) = json.loads(written.read_bytes())["data"]["media"]
    assert (file["id"], file["link"]) == (file_id, f"{INTERNAL}/v1/media/{file_id}")


async def read_head(port: int, file_id: str) -> socket.socket:
    """Ask for a file on a connection of its own; return it once the answer has begun."""
    loop = asyncio.get_running_loop()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(0)
    await loop.sock_connect(connection, ("127.0.0.1", port))
    head = f"GET /v1/media/{file_id} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {READER}\r\n\r\n"
    await loop.sock_sendall(connection, head.encode())
    assert (await loop.sock_recv(connection, 12)) == b"HTTP/1.1 200"
    return connection


async def read_to_end(connection: socket.socket) -> int:
    """Read until the connection ends; return the number of bytes."""
    total = 0
    async with asyncio.timeout(10):
        while block := await asyncio.get_running_loop().sock_recv(connection, MIB):
            total += len(block)
    return total


def open_files(path: Path) -> int:
    """Count this process's descriptors of a file."""
    found = 0
    for each in Path("/proc/self/fd").iterdir():
        try:
            found += each.readlink() == path
        except FileNotFoundError:
            continue
    return found


async def test_a_client_that_reads_nothing_is_cut(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client that stops reading loses its connection, and its file is closed; others go on meanwhile."""
    monkeypatch.setattr(files, "STALL_SECONDS", 0.5)
    file_id = await site.add(LARGE)
    path = tmp_path / "media/aa/bb/00-original.png"
    port = urlsplit(str(site.client.base_url)).port
    assert port is not None
    with await read_head(port, file_id) as stalled:
        assert (await site.get(file_id)).content == LARGE

        async def is_closed() -> bool:
            return open_files(path) == 0

        await until(is_closed)
        assert await read_to_end(stalled) < len(LARGE)
    # The server's own way would be a traceback, and a connection that waits for the client for ever.
    assert "Exception in ASGI application" not in caplog.text


async def test_a_client_that_hangs_up_frees_its_place(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More downloads than a process sends at once are 503; a client that hangs up frees its place."""
    monkeypatch.setattr(files, "MAX_DOWNLOADS", 2)
    async with make_site(site.world.database.url, tmp_path) as small:
        file_id = await site.add(LARGE)
        port = urlsplit(str(small.client.base_url)).port
        assert port is not None
        held = [await read_head(port, file_id) for _ in range(2)]
        full = await small.get(file_id)
        assert (full.status_code, full.json()["error"]["code"]) == (503, "service_unavailable")
        assert full.headers["retry-after"]
        assert (await small.client.head(f"/v1/media/{file_id}")).status_code == 200
        # With a reset, so that the server notices at once.
        held[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        held[0].close()

        async def is_free() -> bool:
            return (await small.get(file_id)).status_code == 200

        await until(is_free)
        # The end of the block shuts the server down, which does not wait for the other one.
    held[1].close()


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Run an S3 server."""
    with s3_server(tmp_path_factory.mktemp("s3")) as made:
        yield made


async def test_a_file_in_a_bucket_is_a_redirect(
    bucket: Bucket, migrated_sqlite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D14: the link leads to a URL that is valid for minutes, is not cached, and needs no token of ours."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    async with make_site(f"sqlite:///{path}", tmp_path, bucket.url) as site:
        file_id = await site.add(LARGE)
        found = await site.get(file_id, range="bytes=0-9")
        assert (found.status_code, found.content) == (307, b"")
        assert (found.headers["cache-control"], found.headers["referrer-policy"]) == (
            "no-store",
            "no-referrer",
        )
        assert "X-Amz-Expires=300" in found.headers["location"]
        async with httpx.AsyncClient(trust_env=False) as stranger:
            whole = await stranger.get(found.headers["location"])
            part = await stranger.get(found.headers["location"], headers={"range": "bytes=0-9"})
        assert whole.content == LARGE
        assert part.content == LARGE[:10]
        lost = await site.add(b"x", key="aa/lost.png")
        await site.storage.delete("aa/lost.png")
        assert await site.error(lost) == (410, "file_missing")
