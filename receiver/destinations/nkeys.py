"""NATS identities: a user's NKey, alone or with a JWT as in `.creds` files.

The client library needs the package `nkeys` for them, which has no wheel. Here `cryptography` signs instead.
"""

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from receiver.masking import register_secret

MAX_FILE_BYTES: Final = 64 * 1024

_SEED: Final = re.compile(rb"\bSU[A-Z2-7]{56}\b")
_JWT: Final = re.compile(rb"\beyJ[\w-]+\.[\w-]+\.[\w-]+")
_PREFIX: Final = 2
"""Bytes before the key in a raw seed; in base32 they are `SU`."""
_USER: Final = 20 << 3
"""The first byte of a user's raw public key; in base32 it is `U`."""
_CRC: Final = 2


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A user's key and, if the server's accounts are defined by JWTs, the user's JWT."""

    key: Ed25519PrivateKey = field(repr=False)
    jwt: bytes | None = field(repr=False)

    @property
    def public_key(self) -> str:
        """The key's public half as NATS writes it: `U…`."""
        raw = bytes([_USER]) + self.key.public_key().public_bytes_raw()
        return base64.b32encode(raw + _checksum(raw)).decode().rstrip("=")

    def sign(self, nonce: str) -> bytes:
        """Return the signature of a server's nonce, in base64."""
        return base64.b64encode(self.key.sign(nonce.encode()))


def read_identity(path: str, *, with_jwt: bool) -> Identity:
    """Read a `.creds` file, or a file with an NKey seed. Raises OSError, and ValueError for other content."""
    with Path(path).open("rb") as file:
        content = file.read(MAX_FILE_BYTES)
    seed, jwt = _SEED.search(content), _JWT.search(content) if with_jwt else None
    if seed is None or (with_jwt and jwt is None):
        raise ValueError("no seed of a user, or no JWT")
    for secret in (seed[0], *([jwt[0]] if jwt else [])):
        register_secret(secret.decode())
    raw = base64.b32decode(seed[0] + b"=" * (-len(seed[0]) % 8))
    content, checksum = raw[:-_CRC], raw[-_CRC:]
    if checksum != _checksum(content):
        raise ValueError("the checksum of the seed is wrong")
    key = Ed25519PrivateKey.from_private_bytes(content[_PREFIX:])
    return Identity(key=key, jwt=jwt[0] if jwt else None)


def _checksum(raw: bytes) -> bytes:
    """Return the CRC-16/XMODEM of a key."""
    return binascii.crc_hqx(raw, 0).to_bytes(_CRC, "little")
