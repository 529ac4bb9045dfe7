"""`RECEIVER_STORAGE_URL`, and what is special to each storage."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from mediakit import Bucket, chunked, response, s3_server, site

from receiver.errors import SettingsError, StorageUnavailable
from receiver.media import open_storage
from receiver.media.storage import s3
from receiver.media.storage.local import LocalStorage


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set what an S3 client needs."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Run an S3 server for the tests of this module."""
    with s3_server(tmp_path_factory.mktemp("s3")) as bucket:
        yield bucket


@pytest.mark.parametrize(
    "url",
    [
        "",
        "data/media",
        "/srv/media",
        "ftp://host/path",
        "file:",
        "file://host/path",
        "file:data?x=y",
        "file:data#x",
        "file:data%00",
        "s3:bucket",
        "s3:///prefix",
        "s3://bucket/x#y",
        "s3://key:secret@bucket/x",
        "s3://bucket?endpoint=",
        "s3://bucket?unknown=1",
        "s3://bucket?endpoint=nonsense",
        "s3://bucket?region=",
        "s3://[bucket",
    ],
)
def test_nonsense_stops_the_start(url: str) -> None:
    """D16: a URL that names no storage is refused, with the setting's name and without its secrets."""
    with pytest.raises(SettingsError, match="RECEIVER_STORAGE_URL") as caught:
        open_storage(url)
    assert "secret@" not in str(caught.value)


def test_a_relative_folder_is_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D12: `file:data/media` is relative to where the service was started, and stays there."""
    monkeypatch.chdir(tmp_path)
    storage = open_storage("file:data/my%20media")
    monkeypatch.chdir("/")
    assert storage.uri("a.png") == f"file://{tmp_path}/data/my%20media/a.png"
    assert open_storage("file:///srv/media").uri("a.png") == "file:///srv/media/a.png"


def test_opening_a_folder_touches_nothing(tmp_path: Path) -> None:
    """D16: the folder is made by the first write, not by reading the settings."""
    open_storage(f"file:{tmp_path}/media")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """D16: without obstore the message says what to install."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "receiver.media.storage.s3", raising=False)
    with pytest.raises(SettingsError, match=r"clipia-receiver\[s3\]"):
        open_storage("s3://bucket")


@pytest.mark.usefixtures("credentials")
def test_a_bucket_needs_no_options() -> None:
    """D16: on AWS itself the endpoint and region come from elsewhere."""
    assert open_storage("s3://bucket").uri("a.png") == "s3://bucket/a.png"


async def test_a_link_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    """D12: a link planted in the folder is not followed out of it, neither to write nor to read."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "link").symlink_to(outside)
    (tmp_path / "media" / "file.txt").symlink_to(outside / "secret.txt")
    storage = LocalStorage(tmp_path / "media")
    with pytest.raises(StorageUnavailable):
        await storage.put("link/x", chunked(b"x"))
    for key in ("link/secret.txt", "file.txt"):
        with pytest.raises(StorageUnavailable):
            await anext(storage.open(key))
        with pytest.raises(StorageUnavailable):
            await storage.stat(key)
    assert [path.name for path in outside.iterdir()] == ["secret.txt"]


async def test_the_janitor_removes_abandoned_parts(tmp_path: Path) -> None:
    """D10: what a crash left in the middle of a write is removed after a day, not earlier."""
    storage = LocalStorage(tmp_path)
    assert await storage.sweep() == 0
    incoming = tmp_path / ".incoming"
    incoming.mkdir()
    day = 24 * 60 * 60
    for name, age in (("old", day + 60), ("young", day - 60)):
        (incoming / name).write_bytes(b"part")
        os.utime(incoming / name, (time.time() - age, time.time() - age))
    assert await storage.sweep() == 1
    assert [path.name for path in incoming.iterdir()] == ["young"]


@pytest.mark.parametrize("path", ["file/media", "file"])
async def test_a_folder_that_cannot_be_used_says_what_to_do(tmp_path: Path, path: str) -> None:
    """D16: the message of the check names the folder and the setting."""
    (tmp_path / "file").write_bytes(b"not a folder")
    with pytest.raises(StorageUnavailable, match="RECEIVER_STORAGE_URL") as caught:
        await LocalStorage(tmp_path / path).check()
    assert caught.value.reason == "error"
    assert str(tmp_path) in str(caught.value)


async def test_a_file_where_a_folder_should_be_is_an_error(tmp_path: Path) -> None:
    """D16: a key below another file cannot be stored; the other file stays as it is."""
    storage = LocalStorage(tmp_path)
    await storage.put("a", chunked(b"a"))
    with pytest.raises(StorageUnavailable):
        await storage.put("a/b", chunked(b"b"))
    assert await storage.stat("a") == 1
    assert list((tmp_path / ".incoming").iterdir()) == []


async def test_a_folder_has_no_size(tmp_path: Path) -> None:
    """D12: a folder is not a stored file."""
    (tmp_path / "folder").mkdir()
    assert await LocalStorage(tmp_path).stat("folder") is None


@pytest.mark.usefixtures("credentials")
async def test_a_bucket_that_is_not_there_says_what_to_check(bucket: Bucket) -> None:
    """D16: a missing bucket fails every way of writing, and the message keeps the secret out."""
    storage = open_storage(f"s3://missing/x?endpoint={bucket.endpoint}&region=us-east-1")
    with pytest.raises(StorageUnavailable, match="RECEIVER_STORAGE_URL") as caught:
        await storage.check()
    assert caught.value.reason == "error"
    assert "very-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(StorageUnavailable):
        await storage.put("a.mp4", chunked(bytes(12_000_000), 1_000_000))


@pytest.mark.usefixtures("credentials")
async def test_a_refusing_server_makes_every_method_unavailable() -> None:
    """D16: an answer that is no success is a condition to wait for, whatever was asked."""
    answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    async with site(answer) as server:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1")
        with pytest.raises(StorageUnavailable):
            await storage.stat("a.png")
        with pytest.raises(StorageUnavailable):
            await anext(storage.open("a.png"))
        with pytest.raises(StorageUnavailable):
            await storage.delete("a.png")


@pytest.mark.usefixtures("credentials")
async def test_a_read_that_breaks_off_is_noticed() -> None:
    """D9: an object that ends before its length is an error, not a shorter file."""
    facts = ("Last-Modified: Sat, 21 Nov 2026 00:00:00 GMT", 'ETag: "x"')
    async with site(response(bytes(2_000_000), *facts, length=5_000_000)) as server:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1")
        with pytest.raises(StorageUnavailable):
            async for _ in storage.open("a.mp4"):
                pass


@pytest.mark.usefixtures("credentials")
async def test_uploads_carry_a_checksum(bucket: Bucket) -> None:
    """D10: the server is told the SHA-256 of what it should have got."""
    seen: list[bytes] = []

    async def answer(request: bytes, writer: object) -> None:  # noqa: ARG001
        seen.append(request)

    async with site(answer) as server:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1")
        with pytest.raises(StorageUnavailable):
            await storage.put("a.png", chunked(b"x" * 100))
    assert b"x-amz-checksum-sha256" in seen[0].lower()
    assert bucket.list_keys() == []


@pytest.mark.usefixtures("credentials")
async def test_a_part_that_fails_ends_the_upload() -> None:
    """D10: when the server refuses a part, the upload is aborted there and the source is read no further."""
    started = "<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>"

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        if request.startswith(b"POST"):
            writer.write(response(started.encode(), "Connection: close"))
        elif b"partNumber=2" in request:
            writer.write(response(b"", "Connection: close", status="403 Forbidden"))
        else:
            writer.write(response(b"", 'ETag: "x"', "Connection: close"))

    async def endless() -> AsyncGenerator[bytes, None]:
        # Bounded: 100 MB are stored if the refused part does not end it.
        for _ in range(100):
            yield bytes(1_000_000)

    async with site(answer) as server, aclosing(endless()) as source:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1")
        with pytest.raises(StorageUnavailable):
            await storage.put("a.mp4", source)
        assert [
            request for request in server.requests if request.startswith(b"DELETE /files/a.mp4?uploadId=u1 ")
        ]


async def test_a_stopped_upload_reads_no_further() -> None:
    """D10: when the caller was cancelled while the server was busy, the next read ends the upload."""
    source = s3._Source(chunked(b"x" * 100))
    assert len(await source.peek(10)) == 100
    source.stop()
    with pytest.raises(s3._Stopped):
        await anext(source)
