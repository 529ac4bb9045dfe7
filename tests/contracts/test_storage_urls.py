"""`RECEIVER_STORAGE_URL`, and the behaviour that is special to each storage."""

import asyncio
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

import obstore
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from support.commands import run_command
from support.media import Bucket, chunked, response, s3_server, site

from receiver.errors import SettingsError, StorageUnavailable
from receiver.media import open_storage
from receiver.media.storage import objects
from receiver.media.storage.local import LocalStorage

if TYPE_CHECKING:
    from obstore.store import RetryConfig

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "very-secret"}


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment of an S3 client."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


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
        "s3://bucket?endpoint=https://",
        "s3://bucket?endpoint=https://user:secret@host",
        "s3://bucket?endpoint=https://host?x=y",
        "s3://bucket?endpoint=https://host%23x",
        "s3://bucket?checksum=md5",
        "s3://bucket?checksum=",
        "s3://bucket?account=name",
        "gs:bucket",
        "gs:///prefix",
        "gs://bucket?region=x",
        "gs://bucket?endpoint=nonsense",
        "gs://key:secret@bucket",
        "az:container",
        "az:///prefix",
        "az://container?account=",
        "az://container?checksum=none",
        "az://name:secret@container",
        "az://container/with%20space",
        "az://container/\u00e9",
    ],
)
def test_nonsense_stops_the_start(url: str) -> None:
    """D16: an invalid URL is rejected, with the setting's name and without its secrets."""
    with pytest.raises(SettingsError, match="RECEIVER_STORAGE_URL") as caught:
        open_storage(url)
    assert "secret@" not in str(caught.value)


def test_a_relative_folder_is_below_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D12: `file:data/media` is relative to the working directory at the start, and stays there."""
    monkeypatch.chdir(tmp_path)
    storage = open_storage("file:data/my%20media")
    monkeypatch.chdir("/")
    assert storage.uri("a.png") == f"file://{tmp_path}/data/my%20media/a.png"
    assert open_storage("file:///srv/media").uri("a.png") == "file:///srv/media/a.png"


def test_opening_does_not_make_the_folder(tmp_path: Path) -> None:
    """D16: the first write makes the folder; reading the settings does not."""
    open_storage(f"file:{tmp_path}/media")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("scheme", "extra"), [("s3", "s3"), ("gs", "gcs"), ("az", "azure")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, extra: str) -> None:
    """D16: without obstore the message names the package to install."""
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, "receiver.media.storage.objects", raising=False)
    with pytest.raises(SettingsError, match=rf"clipia-receiver\[{extra}\]"):
        open_storage(f"{scheme}://bucket")


@pytest.mark.usefixtures("credentials")
def test_a_bucket_needs_no_options() -> None:
    """D16: on AWS itself the endpoint and region come from the environment."""
    assert open_storage("s3://bucket").uri("a.png") == "s3://bucket/a.png"


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("path", ["/storage/v1/s3", "/storage/v1/s3/"])
async def test_an_endpoint_may_have_a_path(path: str) -> None:
    """D16: a service with S3 below a path is reached there."""
    facts = ("Last-Modified: Sat, 21 Nov 2026 00:00:00 GMT", 'ETag: "x"', "Connection: close")
    async with site(response(b"", *facts)) as server:
        storage = open_storage(f"s3://files/prefix?endpoint={server.origin}{path}&region=us-east-1")
        await storage.put("a.png", chunked(b"x" * 100))
        assert await storage.stat("a.png") == 0
        await storage.delete("a.png")
        lines = [request.partition(b"\r\n")[0] for request in server.requests]
        assert lines == [
            b"PUT /storage/v1/s3/files/prefix/a.png HTTP/1.1",
            b"HEAD /storage/v1/s3/files/prefix/a.png HTTP/1.1",
            b"DELETE /storage/v1/s3/files/prefix/a.png HTTP/1.1",
        ]


@pytest.mark.parametrize(
    "url",
    ["gs://bucket/x", "az://container/x", "az://container/x?account=name", "az://container?account=a.b"],
)
def test_credentials_that_are_none_stop_the_start(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """D16: credentials that no client accepts are reported at start, and never quoted."""
    (tmp_path / "key.json").write_text('{"private_key": "very-secret"}')
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(tmp_path / "key.json"))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "very-secret")
    with pytest.raises(SettingsError, match="RECEIVER_STORAGE_URL") as caught:
        open_storage(url)
    assert "very-secret" not in str(caught.value)


async def test_a_link_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    """D12: a symbolic link in the folder is not followed out of it, neither to write nor to read."""
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
    """D10: an unfinished file of a crash is removed after a day, not earlier."""
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
async def test_an_unusable_folder_is_explained(tmp_path: Path, path: str) -> None:
    """D16: the message of the check names the folder and the setting."""
    (tmp_path / "file").write_bytes(b"not a folder")
    with pytest.raises(StorageUnavailable, match="RECEIVER_STORAGE_URL") as caught:
        await LocalStorage(tmp_path / path).check()
    assert caught.value.reason == "error"
    assert str(tmp_path) in str(caught.value)


async def test_a_file_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    """D16: a key below another file cannot be stored; the other file stays unchanged."""
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
async def test_a_missing_bucket_is_explained(bucket: Bucket) -> None:
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
async def test_a_rejecting_server_makes_every_method_unavailable() -> None:
    """D16: any status but success makes the storage unavailable, for every method."""
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
    """D10: the server gets the SHA-256 of the bytes, to compare."""
    seen: list[bytes] = []

    async def answer(request: bytes, _writer: object) -> None:
        seen.append(request)

    async with site(answer) as server:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1")
        with pytest.raises(StorageUnavailable):
            await storage.put("a.png", chunked(b"x" * 100))
    assert b"x-amz-checksum-sha256" in seen[0].lower()
    assert bucket.list_keys() == []


@pytest.mark.usefixtures("credentials")
async def test_checksums_can_be_switched_off() -> None:
    """D10: `checksum=none`, for services that reject S3's checksum headers, sends none, in parts neither."""
    async with site(response(b"", "Connection: close", status="403 Forbidden")) as server:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1&checksum=none")
        for size in (100, 6_000_000):
            with pytest.raises(StorageUnavailable):
                await storage.put("a.png", chunked(b"x" * size, 1_000_000))
        assert len(server.requests) == 2
        assert b"checksum" not in b"".join(server.requests).lower()


@pytest.mark.usefixtures("credentials")
async def test_credentials_need_no_right_to_delete(tmp_path: Path) -> None:
    """D16: if only the removal of the probe fails, the check passes with a warning that names the probe."""
    content = b""

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal content
        facts = ("Last-Modified: Sat, 21 Nov 2026 00:00:00 GMT", 'ETag: "x"', "Connection: close")
        if request.startswith(b"PUT"):
            content = request.rpartition(b"\r\n\r\n")[2]
            writer.write(response(b"", *facts))
        elif request.startswith(b"DELETE"):
            writer.write(response(b"", "Connection: close", status="403 Forbidden"))
        else:
            writer.write(response(content, *facts))

    async with site(answer) as server:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1")
        warning = await storage.check()
        assert warning is not None
        assert "s3://files/probe/" in warning
        assert "HTTP 403" in warning
        url = f"s3://files?endpoint={server.origin}&region=us-east-1"
        result = await asyncio.to_thread(
            run_command,
            "check",
            settings={"RECEIVER_STORAGE_URL": url, "CLIPIA_WEBHOOK_SECRET": "whsec_local"} | CREDENTIALS,
            cwd=tmp_path,
        )
        said = [line for line in result.stdout.decode().splitlines() if " storage:" in line]
        assert [line.split()[0] for line in said] == ["ok", "warning"]
        assert "s3://files/probe/" in said[1]
        assert result.returncode == 0, result.stdout


def open_bucket(
    origin: str, *, answer_seconds: float = objects.ANSWER_SECONDS, retries: "RetryConfig" = objects.RETRIES
) -> objects.ObjectStorage:
    """Open a bucket of a local server, with short timeouts."""
    options = {"endpoint": origin, "region": "us-east-1"}
    store = objects.open_store("s3", "files", "", options, credentials="", retries=retries)
    return objects.ObjectStorage(store, base="s3://files/", credentials="", answer_seconds=answer_seconds)


@pytest.mark.usefixtures("credentials")
async def test_a_file_may_take_long_but_not_stall() -> None:
    """D7: a read has no total timeout; silence ends it, before the answer and within the file."""
    parts, silent = 12, asyncio.Event()

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        if b"silent" in request:
            await silent.wait()
        count = parts // 4 if b"stalls" in request else parts
        facts = ("Last-Modified: Sat, 21 Nov 2026 00:00:00 GMT", 'ETag: "x"', "Connection: close")
        writer.write(response(b"", *facts, length=parts * 300_000))
        for _ in range(count):
            writer.write(bytes(300_000))
            await writer.drain()
            await asyncio.sleep(0.1)
        await silent.wait()

    async with site(answer) as server, asyncio.timeout(30):
        storage = open_bucket(server.origin, answer_seconds=0.5)
        assert sum([len(block) async for block in storage.open("long.mp4")]) == parts * 300_000
        for name in ("silent", "stalls"):
            with pytest.raises(StorageUnavailable, match="no answer"):
                async for _ in storage.open(f"{name}.mp4"):
                    pass
        with pytest.raises(StorageUnavailable, match="no answer"):
            await storage.delete("silent.mp4")
        options = storage._store.client_options
        assert options is not None
        assert "365d" in str(options["timeout"])


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("flaw", ["none", "replaced", "no progress", "short", "no tag", "odd date"])
async def test_a_read_goes_on_behind_a_break(flaw: str) -> None:
    """D9: if a connection breaks within a large file it is replaced, unless the file has changed."""
    data = bytes(range(250)) * 20_000
    calls = 0

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        found = re.search(rb"(?i)range: bytes=([0-9]+)-", request)
        start = int(found[1]) if found else 0
        step = 100_000 if flaw == "no progress" else 2_000_000
        tag = f"{calls}" if flaw == "replaced" else "x"
        year = "0000" if flaw == "odd date" else "2026"
        facts = [f"Last-Modified: Sat, 21 Nov {year} 00:00:00 GMT", "Connection: close"]
        facts += [] if flaw == "no tag" else [f'ETag: "{tag}"']
        length = len(data) - start
        if flaw == "short" and start:
            step = 0
        place = f"Content-Range: bytes {start}-{len(data) - 1}/{len(data)}"
        status = "206 Partial Content" if found else "200 OK"
        facts += [place] if found else []
        writer.write(response(data[start : start + step], *facts, status=status, length=length))
        await writer.drain()

    async with site(answer) as server, asyncio.timeout(60):
        # The client itself resumes a read only in its first half a minute, and never without retries.
        storage = open_bucket(server.origin, retries={"max_retries": 0})

        async def read() -> bytes:
            return b"".join([block async for block in storage.open("a.mp4")])

        if flaw == "none":
            assert await read() == data
        else:
            with pytest.raises(StorageUnavailable):
                await read()
        assert calls < 20


@pytest.mark.usefixtures("credentials")
@pytest.mark.parametrize("date", ["Sat, 01 Jan 0000 00:00:00 GMT", "Fri, 31 Dec 9999 23:59:59 -1200"])
async def test_a_date_that_is_none_makes_no_file_unreadable(date: str) -> None:
    """D16: invalid metadata of an object fail no read of its bytes."""
    async with site(response(b"x" * 100, f"Last-Modified: {date}", 'ETag: "x"')) as server:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1")
        assert b"".join([block async for block in storage.open("a.mp4")]) == b"x" * 100


class PanicException(BaseException):
    """The exception for a panic of the client's Rust code."""


@pytest.mark.usefixtures("credentials")
async def test_a_panic_of_the_client_is_a_failure_of_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """D16: a panic, which is no Exception, makes the storage unavailable and ends no worker."""

    async def panic(*_arguments: object, **_options: object) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    for name in ("put_async", "get_async", "head_async", "delete_async", "sign_async"):
        monkeypatch.setattr(obstore, name, panic)
    storage = open_storage("s3://files?endpoint=http://127.0.0.1:1&region=us-east-1")
    calls = [
        storage.put("a.png", chunked(b"x")),
        storage.put("a.png", chunked(bytes(6_000_000), 1_000_000)),
        anext(storage.open("a.png")),
        storage.stat("a.png"),
        storage.delete("a.png"),
        storage.link("a.png", seconds=60),
    ]
    for call in calls:
        with pytest.raises(StorageUnavailable, match="PanicException") as caught:
            await call
        assert "unwrap" not in str(caught.value)

    def panic_at_once(*_arguments: object, **_options: object) -> None:
        raise PanicException("at once")

    monkeypatch.setitem(objects._STORES, "s3", (panic_at_once, {}))
    with pytest.raises(SettingsError, match="PanicException"):
        open_storage("s3://files")


async def test_a_sas_token_signs_no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: links to Azure need the account's key; with a SAS token alone the error says so."""
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2024&sig=s3cret%3D")
    storage = open_storage("az://files?account=acc")
    with pytest.raises(StorageUnavailable, match="a SAS token signs no links; that takes the") as caught:
        await storage.link("a.png", seconds=60)
    assert "s3cret" not in str(caught.value)


async def test_a_link_to_google_is_signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """D14: a service account's key signs links by itself (V4); its own public key verifies the signature."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"client_email": "a@b.example", "private_key_id": "1", "private_key": pem.decode()}
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(account))
    link = await open_storage("gs://files/prefix").link("ab/0-image.png", seconds=600)
    assert link is not None
    parts = urlsplit(link)
    assert parts.path == "/files/prefix/ab/0-image.png"
    query = dict(parse_qsl(parts.query))
    assert query["X-Goog-Expires"] == "600"
    signed_query, _, signature = parts.query.partition("&X-Goog-Signature=")
    lines = ["GET", parts.path, signed_query, f"host:{parts.netloc}", "", "host", "UNSIGNED-PAYLOAD"]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    scope = query["X-Goog-Credential"].partition("/")[2]
    text = "\n".join(["GOOG4-RSA-SHA256", query["X-Goog-Date"], scope, digest])
    key.public_key().verify(bytes.fromhex(signature), text.encode(), padding.PKCS1v15(), hashes.SHA256())


@pytest.mark.usefixtures("credentials")
async def test_a_part_that_fails_ends_the_upload() -> None:
    """D10: if the server rejects a part, the upload is aborted and the source is read no further."""
    started = "<InitiateMultipartUploadResult><UploadId>u1</UploadId></InitiateMultipartUploadResult>"

    async def answer(request: bytes, writer: asyncio.StreamWriter) -> None:
        if request.startswith(b"POST"):
            writer.write(response(started.encode(), "Connection: close"))
        elif b"partNumber=2" in request:
            writer.write(response(b"", "Connection: close", status="403 Forbidden"))
        else:
            writer.write(response(b"", 'ETag: "x"', "Connection: close"))

    async def endless() -> AsyncGenerator[bytes, None]:
        # Bounded: 100 MB are stored if the rejected part does not end it.
        for _ in range(100):
            yield bytes(1_000_000)

    async with site(answer) as server, aclosing(endless()) as source:
        storage = open_storage(f"s3://files?endpoint={server.origin}&region=us-east-1")
        with pytest.raises(StorageUnavailable):
            await storage.put("a.mp4", source)
        deadline = time.monotonic() + 10
        # obstore raises before the abort has been answered.
        while not any(request.startswith(b"DELETE /files/a.mp4?uploadId=u1 ") for request in server.requests):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)


async def test_a_stopped_upload_reads_no_further() -> None:
    """D10: if the caller was cancelled while the server was busy, the next read ends the upload."""
    source = objects._Source(chunked(b"x" * 100))
    assert len(await source.peek(10)) == 100
    source.stop()
    with pytest.raises(objects._UploadCancelled):
        await anext(source)
