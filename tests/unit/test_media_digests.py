"""Digests that a response states about its body."""

import base64
import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from receiver.errors import MediaBlocked, MediaDoubtful
from receiver.media.container_formats import unchecked
from receiver.media.digests import stated_digests
from receiver.media.inspection import Inspection

BODY = b"the body of a file"
MD5, SHA256, SHA512 = (hashlib.new(name, BODY).digest() for name in ("md5", "sha256", "sha512"))


def b64(digest: bytes) -> str:
    """Encode a digest like a header."""
    return base64.b64encode(digest).decode()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("Repr-Digest", f"sha-256=:{b64(SHA256)}:")], {"sha256": SHA256}),
        (
            [("Repr-Digest", f"crc32c=:AAAA:, sha-512=:{b64(SHA512)}:, sha-256=:{b64(SHA256)}:")],
            {"sha256": SHA256, "sha512": SHA512},
        ),
        ([("Content-Digest", f"sha-256=:{b64(SHA256)}:")], {"sha256": SHA256}),
        ([("Content-MD5", b64(MD5))], {"md5": MD5}),
        ([("x-goog-hash", "crc32c=n03x6A=="), ("x-goog-hash", f"md5={b64(MD5)}")], {"md5": MD5}),
        ([("x-goog-hash", f"crc32c=n03x6A==,md5={b64(MD5)}")], {"md5": MD5}),
        ([("ETag", f'"{MD5.hex()}"'), ("x-amz-server-side-encryption", "AES256")], {"md5": MD5}),
    ],
)
def test_reads_stated_digests(headers: list[tuple[str, str]], expected: dict[str, bytes]) -> None:
    """D9: the forms of RFC 9530, Content-MD5, Google and S3 are read."""
    assert stated_digests(httpx.Headers(headers)) == expected


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("ETag", f'"{MD5.hex()}"')],
        [("ETag", f'"{MD5.hex()}"'), ("x-amz-server-side-encryption", "aws:kms")],
        [("ETag", f'"{MD5.hex()}-3"'), ("x-amz-server-side-encryption", "AES256")],
        [("ETag", f'W/"{MD5.hex()}"'), ("x-amz-server-side-encryption", "AES256")],
        [("x-goog-hash", f"md5={b64(MD5)}"), ("x-goog-stored-content-encoding", "gzip")],
        [("Content-MD5", "not base64")],
        [("Content-MD5", b64(SHA256))],
        [("Content-MD5", b64(MD5)), ("x-goog-hash", f"md5={b64(bytes(16))}")],
        [("Repr-Digest", "sha-256=unquoted")],
        [("Repr-Digest", "sha-256=:====:")],
        [("Repr-Digest", f"sha-256=:{b64(MD5)}:")],
    ],
)
def test_ignores_doubtful_digests(headers: list[tuple[str, str]]) -> None:
    """D9: a weak, composite, encrypted, malformed or contradictory digest is ignored."""
    assert stated_digests(httpx.Headers(headers)) == {}


def inspect(*, stated: dict[str, bytes], max_bytes: int = 1000, **framing: Any) -> Inspection:
    """Feed the body to an inspection."""
    inspection = Inspection(max_bytes=max_bytes, stated=stated, walk=unchecked, **framing)
    inspection.feed(BODY[:5])
    inspection.feed(BODY[5:])
    return inspection


def test_a_body_that_matches_passes() -> None:
    """D9: size and SHA-256 are those of the body, and every stated digest is compared."""
    inspection = inspect(stated={"md5": MD5, "sha256": SHA256, "sha512": SHA512})
    assert inspection.find_doubt() is None
    assert (inspection.size, inspection.sha256) == (len(BODY), SHA256.hex())


@pytest.mark.parametrize(
    ("stated", "seen_sha256", "keep_doubtful", "passes"),
    [
        (MD5, None, False, True),
        (bytes(16), None, False, False),
        (bytes(16), SHA512.hex(), False, False),
        (bytes(16), SHA256.hex(), False, True),
        (bytes(16), None, True, True),
    ],
)
async def test_a_body_in_doubt_passes_if_it_was_seen_before(
    *, stated: bytes, seen_sha256: str | None, keep_doubtful: bool, passes: bool
) -> None:
    """D9: a body in doubt is rejected, unless the attempt before had the same one or it must be kept."""

    async def parts() -> AsyncIterator[bytes]:
        yield BODY[5:]

    inspection = Inspection(
        max_bytes=1000,
        stated={"md5": stated},
        walk=unchecked,
        seen_sha256=seen_sha256,
        keep_doubtful=keep_doubtful,
    )
    with contextlib.nullcontext() if passes else pytest.raises(MediaDoubtful, match="md5"):
        assert [part async for part in inspection.stream(BODY[:5], parts())] == [BODY[:5], BODY[5:]]
    assert (inspection.warning is not None) == (passes and stated != MD5)


@pytest.mark.parametrize("name", ["md5", "sha256", "sha512"])
def test_a_body_that_differs_is_in_doubt(name: str) -> None:
    """D9: if a body differs from the stated digest, it is in doubt until the same body comes again."""
    wrong = {"md5": MD5, "sha256": SHA256, "sha512": SHA512}[name][::-1]
    doubt = inspect(stated={name: wrong}).find_doubt()
    assert doubt is not None
    assert (doubt.reason, doubt.sha256) == ("digest", SHA256.hex())


def test_the_limit_counts_every_byte() -> None:
    """D7: a file of exactly the limit passes, one byte more does not."""
    assert inspect(stated={}, max_bytes=len(BODY)).find_doubt() is None
    with pytest.raises(MediaBlocked) as caught:
        inspect(stated={}, max_bytes=len(BODY) - 1)
    assert caught.value.reason == "too_large"


def test_a_body_without_an_end_is_in_doubt() -> None:
    """D9: without length, chunks and end of the container, only a second equal body removes the doubt."""
    doubt = inspect(stated={}, is_framed=False).find_doubt()
    assert doubt is not None
    assert (doubt.reason, doubt.sha256) == ("length", SHA256.hex())


@pytest.mark.parametrize("is_framed", [True, False])
def test_a_short_body_is_in_doubt(*, is_framed: bool) -> None:
    """D9: two equal cuts count as the server's file only if HTTP has framed them."""
    doubt = inspect(stated={}, min_bytes=len(BODY) + 1, is_framed=is_framed).find_doubt()
    assert doubt is not None
    assert (doubt.reason, doubt.sha256 is not None) == ("truncated", is_framed)
