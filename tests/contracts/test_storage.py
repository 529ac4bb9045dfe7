"""The contract of every storage: each test runs on a local folder, and on servers for S3, Google and Azure.

The server for Google knows neither its signatures nor its conditions; Azurite checks both of Azure's.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import httpx
import pytest
from support.media import Bucket, chunked, s3_server
from support.servers_azurite import KEY, Container, azurite

from receiver.errors import MediaUnavailable, StorageUnavailable
from receiver.media import Storage, open_storage

MIB = 1024 * 1024
SMALL = bytes(range(256)) * 4
# More than one part of a multipart upload, and not a multiple of a block.
LARGE = (bytes(range(251)) * 50_000)[: 11 * MIB + 12_345]


@pytest.fixture(scope="module")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """Run an S3 server for the tests of this module."""
    with s3_server(tmp_path_factory.mktemp("s3")) as bucket, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("GOOGLE_BEARER_TOKEN", "test")
        yield bucket


@pytest.fixture(scope="module")
def container(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """Run Azurite for the tests of this module."""
    assert pytestconfig.cache is not None
    cache, folder = pytestconfig.cache.mkdir("azurite"), tmp_path_factory.mktemp("azurite")
    with azurite(cache, folder) as container, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
        yield container


def storage_url(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> str:
    """Return the URL of a storage of a kind; its server runs then."""
    if kind == "file":
        return f"file:{tmp_path}/media"
    if kind == "az":
        azure: Container = request.getfixturevalue("container")
        return azure.url
    bucket: Bucket = request.getfixturevalue("bucket")
    return bucket.url if kind == "s3" else bucket.google_url


@pytest.fixture(params=["file", "s3", "gs", "az"])
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Storage]:
    """Open a storage."""
    storage = open_storage(storage_url(request, request.param, tmp_path))
    yield storage
    await storage.close()


@pytest.fixture
def leftovers(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], int]:
    """Count the leftovers of failed writes: unfinished files, open uploads."""
    kind = request.node.callspec.params["storage"]
    if kind in {"s3", "gs"}:
        bucket: Bucket = request.getfixturevalue("bucket")
        return bucket.open_uploads
    if kind == "az":
        # Azure has no uploads to abort: it drops blocks that no list of blocks names.
        container: Container = request.getfixturevalue("container")
        return lambda: len(container.list_keys())
    return lambda: len(list((tmp_path / "media" / ".incoming").glob("*")))


def files_below(folder: Path) -> list[str]:
    """List every file."""
    return [str(path) for path in folder.rglob("*") if path.is_file()]


async def read(storage: Storage, key: str) -> bytes:
    """Read a whole file."""
    return b"".join([block async for block in storage.open(key)])


@pytest.mark.parametrize("data", [b"", b"x", SMALL, LARGE], ids=["empty", "byte", "small", "large"])
async def test_a_stored_file_can_be_read(storage: Storage, data: bytes) -> None:
    """D10: a stored file has every byte, and its size is known."""
    await storage.put("aa/0-image.png", chunked(data, 65_536))
    assert await read(storage, "aa/0-image.png") == data
    assert await storage.stat("aa/0-image.png") == len(data)


async def test_blocks_are_read_bounded(storage: Storage) -> None:
    """D10: a large file is returned in blocks of plain bytes, not at once."""
    await storage.put("aa/1-video.mp4", chunked(LARGE, 65_536))
    blocks = [block async for block in storage.open("aa/1-video.mp4")]
    assert all(type(block) is bytes for block in blocks)
    assert max(map(len, blocks)) <= 4 * MIB
    assert b"".join(blocks) == LARGE


async def test_reading_can_stop_early(storage: Storage) -> None:
    """D10: if a reader stops early no file and no connection stays open."""
    await storage.put("aa/2-video.mp4", chunked(LARGE, 65_536))
    async with aclosing(storage.open("aa/2-video.mp4")) as blocks:
        first = await anext(blocks)
    assert LARGE.startswith(first)


async def test_putting_again_replaces(storage: Storage) -> None:
    """D11: a download that is repeated after a crash ends with one file, the last one."""
    await storage.put("ab/0-image.png", chunked(LARGE, 65_536))
    await storage.put("ab/0-image.png", chunked(SMALL))
    assert await read(storage, "ab/0-image.png") == SMALL


async def test_racing_writers_leave_one_whole_file(storage: Storage) -> None:
    """D11: if two workers store the same file at once, their bytes are not mixed."""
    contents = [bytes([number]) * MIB for number in range(4)]
    await asyncio.gather(*(storage.put("ac/0-image.png", chunked(data, 65_536)) for data in contents))
    assert await read(storage, "ac/0-image.png") in contents


@pytest.mark.parametrize("size", [0, len(SMALL), 6 * MIB, len(LARGE)])
@pytest.mark.parametrize(
    "error", [MediaUnavailable("cut", reason="truncated"), OSError("foreign"), ValueError("x")]
)
async def test_a_failing_source_leaves_no_file(
    storage: Storage, leftovers: Callable[[], int], size: int, error: Exception
) -> None:
    """D10: an error of the source is raised unchanged, and no file and no part of it stays."""
    before = leftovers()

    async def source() -> AsyncGenerator[bytes]:
        async for chunk in chunked(LARGE[:size], 65_536):
            yield chunk
        raise error

    with pytest.raises(type(error)) as caught:
        await storage.put("ad/0-image.png", source())
    assert caught.value is error
    assert await storage.stat("ad/0-image.png") is None
    assert leftovers() == before


async def test_a_failing_source_leaves_the_old_file(storage: Storage) -> None:
    """D10: if a replacement fails, the old file stays."""
    await storage.put("ae/0-image.png", chunked(SMALL))

    async def source() -> AsyncGenerator[bytes]:
        yield LARGE
        raise MediaUnavailable("cut", reason="truncated")

    with pytest.raises(MediaUnavailable):
        await storage.put("ae/0-image.png", source())
    assert await read(storage, "ae/0-image.png") == SMALL


@pytest.mark.parametrize("size", [0, MIB, len(LARGE)])
async def test_a_cancelled_write_leaves_no_file(
    storage: Storage, leftovers: Callable[[], int], size: int
) -> None:
    """D10: if a write is cancelled in the middle of a file, its part is removed."""
    before = leftovers()
    waiting = asyncio.Event()
    ended: list[bool] = []

    async def source() -> AsyncGenerator[bytes]:
        try:
            async for chunk in chunked(LARGE[:size], 65_536):
                yield chunk
            waiting.set()
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async with aclosing(source()) as chunks:
        task = asyncio.create_task(storage.put("af/0-image.png", chunks))
        await waiting.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == [True]
    assert await storage.stat("af/0-image.png") is None
    assert leftovers() == before


async def test_a_missing_file_is_said_to_be_missing(storage: Storage) -> None:
    """D10: for a missing file reading raises FileNotFoundError, its size is None, and deleting it passes."""
    assert await storage.stat("ag/0-image.png") is None
    with pytest.raises(FileNotFoundError):
        await read(storage, "ag/0-image.png")
    await storage.delete("ag/0-image.png")


async def test_a_deleted_file_is_gone(storage: Storage) -> None:
    """D10: a deleted file can no longer be read."""
    await storage.put("ah/0-image.png", chunked(SMALL))
    await storage.delete("ah/0-image.png")
    assert await storage.stat("ah/0-image.png") is None


@pytest.mark.parametrize(
    "key",
    [
        "",
        ".",
        "..",
        "../x",
        "a/../../x",
        "a/./x",
        "/etc/passwd",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "a\nb",
        "a b",
        "a%2e%2e",
        ".incoming/x",
        "a/.hidden",
        "a.",
        "CON",
        "Image.png",
        "\u00e9.png",
        "\uff0e\uff0e/x",
        "a" * 300,
        "/".join("a" * 9),
        "-rf",
        "a?b",
        "a#b",
    ],
)
async def test_a_key_cannot_leave_the_storage(storage: Storage, key: str, tmp_path: Path) -> None:
    """D12: every method rejects an invalid key before it reads or writes."""
    with pytest.raises(ValueError, match="Not a storage key"):
        await storage.put(key, chunked(SMALL))
    with pytest.raises(ValueError, match="Not a storage key"):
        await read(storage, key)
    with pytest.raises(ValueError, match="Not a storage key"):
        await storage.stat(key)
    with pytest.raises(ValueError, match="Not a storage key"):
        await storage.delete(key)
    with pytest.raises(ValueError, match="Not a storage key"):
        storage.uri(key)
    assert files_below(tmp_path) == []


async def test_the_uri_names_the_file(storage: Storage, tmp_path: Path) -> None:
    """D11: the URI names the storage and the key, and no secret."""
    assert storage.uri("ai/0-image.png") in {
        f"file://{tmp_path}/media/ai/0-image.png",
        "s3://files/some/prefix/ai/0-image.png",
        "gs://files/some/prefix/ai/0-image.png",
        "az://files/some/prefix/ai/0-image.png",
    }


@pytest.mark.parametrize("data", [SMALL, LARGE], ids=["small", "large"])
async def test_a_link_shows_the_file(storage: Storage, data: bytes, request: pytest.FixtureRequest) -> None:
    """D14: a link needs no credentials and has the file's type, so that a browser shows the picture.

    The signature of a link to Google has a test of its own: the server here checks no signatures.
    """
    await storage.put("ak/0-image.png", chunked(data, 65_536), content_type="image/png")
    kind = request.node.callspec.params["storage"]
    if kind == "gs":
        link = f"{request.getfixturevalue('bucket').endpoint}/files/some/prefix/ak/0-image.png"
    else:
        found = await storage.link("ak/0-image.png", seconds=60)
        if kind == "file":
            assert found is None
            return
        assert found is not None
        link = found
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(link, headers={"Authorization": "Bearer test"} if kind == "gs" else {})
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
        assert answer.content == data
        if kind == "az":
            assert (await client.get(link.replace("ak/0", "ak/1"))).status_code == 403


@pytest.mark.parametrize("seconds", [-1, 0, 7 * 86_400 + 1])
async def test_a_link_holds_for_a_week_at_most(
    storage: Storage, seconds: int, request: pytest.FixtureRequest
) -> None:
    """D14: the server would reject a link that lives longer."""
    if request.node.callspec.params["storage"] == "file":
        assert await storage.link("al/0-image.png", seconds=seconds) is None
        return
    with pytest.raises(ValueError, match="604800"):
        await storage.link("al/0-image.png", seconds=seconds)


@pytest.mark.parametrize("kind", ["s3", "gs", "az"])
async def test_a_missing_bucket_is_no_missing_file(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """D16: without its bucket a storage is unavailable; its files do not count as missing."""
    url = storage_url(request, kind, tmp_path)
    storage = open_storage(url.replace("//files/", "//elsewhere/"))
    with pytest.raises(StorageUnavailable, match="RECEIVER_STORAGE_URL"):
        await read(storage, "am/0-image.png")
    with pytest.raises(StorageUnavailable, match="RECEIVER_STORAGE_URL"):
        await storage.check()


async def test_the_check_leaves_no_file(
    storage: Storage, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """D16: the check really writes, reads and deletes."""
    assert await storage.check() is None
    assert files_below(tmp_path) == []
    kind = request.node.callspec.params["storage"]
    if kind != "file":
        server = request.getfixturevalue("container" if kind == "az" else "bucket")
        assert not [key for key in server.list_keys() if "probe" in key]


async def test_the_check_compares_the_bytes(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """D16: the check fails if a storage returns other bytes than it was given, or none."""

    async def other(_key: str) -> AsyncGenerator[bytes]:
        yield b"something else"

    async def nothing(key: str) -> AsyncGenerator[bytes]:
        raise FileNotFoundError(key)
        yield b""

    for instead in (other, nothing):
        monkeypatch.setattr(storage, "open", instead)
        with pytest.raises(StorageUnavailable, match="reads back"):
            await storage.check()


async def test_a_sweep_spares_files_in_use(storage: Storage) -> None:
    """D10: the cleanup deletes neither finished files nor writes in progress."""
    started, go_on = asyncio.Event(), asyncio.Event()

    async def source() -> AsyncGenerator[bytes]:
        yield SMALL
        started.set()
        await go_on.wait()
        yield SMALL

    await storage.put("aj/0-image.png", chunked(SMALL))
    task = asyncio.create_task(storage.put("aj/1-image.png", source()))
    await started.wait()
    assert await storage.sweep() == 0
    go_on.set()
    await task
    assert await read(storage, "aj/0-image.png") == SMALL
    assert await read(storage, "aj/1-image.png") == SMALL * 2
