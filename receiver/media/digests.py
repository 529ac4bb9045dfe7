"""Digests that a response states about its own body.

Only those that leave no doubt are used: a wrong guess would refuse a good file for ever.
"""

import base64
import binascii
import re

import httpx

_MEMBER = re.compile(r"(sha-256|sha-512)=:([A-Za-z0-9+/=]+):")
_ALGORITHMS = {"sha-256": "sha256", "sha-512": "sha512"}
_SIZES = {"md5": 16, "sha256": 32, "sha512": 64}
_HEX_MD5 = re.compile(r'"([0-9a-f]{32})"')


def stated_digests(headers: httpx.Headers) -> dict[str, bytes]:
    """Return hashlib's name of an algorithm → the digest that the body must have.

    From `Repr-Digest`, `Content-Digest`, `Content-MD5`, Google's `x-goog-hash` and S3's `ETag`. What is
    malformed or contradicts itself is left out.
    """
    found: dict[str, set[bytes]] = {}
    for algorithm, digest in _read(headers):
        if len(digest) == _SIZES[algorithm]:
            found.setdefault(algorithm, set()).add(digest)
    return {algorithm: digests.pop() for algorithm, digests in found.items() if len(digests) == 1}


def _read(headers: httpx.Headers) -> list[tuple[str, bytes]]:
    found = [
        (_ALGORITHMS[match[1]], _decode(match[2]))
        for name in ("repr-digest", "content-digest")
        for member in headers.get_list(name, split_commas=True)
        if (match := _MEMBER.fullmatch(member.strip()))
    ]
    found += [("md5", _decode(value)) for value in headers.get_list("content-md5")]
    # Google states the digest of what it stores, which is not what it sends when it unpacks gzip on the way.
    if headers.get("x-goog-stored-content-encoding", "identity") == "identity":
        parts = [part.strip() for part in headers.get_list("x-goog-hash", split_commas=True)]
        found += [("md5", _decode(part.removeprefix("md5="))) for part in parts if part.startswith("md5=")]
    # An ETag is surely an MD5 where S3 took the object in one piece (no dash) and encrypted it with its own
    # keys.
    etag = _HEX_MD5.fullmatch(headers.get("etag", ""))
    if etag and headers.get("x-amz-server-side-encryption") == "AES256":
        found.append(("md5", bytes.fromhex(etag[1])))
    return found


def _decode(value: str) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except binascii.Error:
        return b""
