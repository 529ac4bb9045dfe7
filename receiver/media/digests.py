"""Digests that a response states about its own body.

Only unambiguous ones are used: a wrong guess would reject a good file for ever.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from itertools import chain

import httpx

_MEMBER = re.compile(r"(sha-256|sha-512)=:([A-Za-z0-9+/=]+):")
_ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}
_SIZES = {"md5": 16, "sha256": 32, "sha512": 64}
_HEX_MD5 = re.compile(r'"([0-9a-f]{32})"')


def stated_digests(headers: httpx.Headers) -> dict[str, bytes]:
    """Return the digests that the body must have, each under hashlib's name of its algorithm.

    From `Repr-Digest`, `Content-Digest`, `Content-MD5`, Google's `x-goog-hash` and S3's `ETag`. Malformed
    digests are left out, and so are algorithms with two different digests.
    """
    found: dict[str, set[bytes]] = {}
    for algorithm, digest in chain(_standard(headers), _google(headers), _s3(headers)):
        if len(digest) == _SIZES[algorithm]:
            found.setdefault(algorithm, set()).add(digest)
    return {algorithm: digests.pop() for algorithm, digests in found.items() if len(digests) == 1}


def _standard(headers: httpx.Headers) -> Iterator[tuple[str, bytes]]:
    for name in ("repr-digest", "content-digest"):
        for member in headers.get_list(name, split_commas=True):
            if match := _MEMBER.fullmatch(member.strip()):
                yield _ALGORITHMS[match[1]], _decode(match[2])
    for value in headers.get_list("content-md5"):
        yield "md5", _decode(value)


def _google(headers: httpx.Headers) -> Iterator[tuple[str, bytes]]:
    # Google states the digest of the stored bytes. If it unpacks gzip on the way, it sends other bytes.
    if headers.get("x-goog-stored-content-encoding", "identity") == "identity":
        for part in headers.get_list("x-goog-hash", split_commas=True):
            if part.strip().startswith("md5="):
                yield "md5", _decode(part.strip().removeprefix("md5="))


def _s3(headers: httpx.Headers) -> Iterator[tuple[str, bytes]]:
    # An ETag is certainly an MD5 only if S3 took the object in one piece, so that the tag has no dash, and
    # encrypted it with its own keys.
    etag = _HEX_MD5.fullmatch(headers.get("etag", ""))
    if etag and headers.get("x-amz-server-side-encryption") == "AES256":
        yield "md5", bytes.fromhex(etag[1])


def _decode(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        return b""
