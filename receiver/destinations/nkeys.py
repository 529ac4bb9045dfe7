"""NATS identities: a user's NKey, alone or with a JWT as in `.creds` files.

The client library wants the package `nkeys` for them, which has no wheel. Ed25519 comes from `cryptography`.
"""

import base64
import binascii
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from receiver.masking import register_secret

MAX_FILE: Final = 64 * 1024

_SEED: Final = re.compile(rb"\bSU[A-Z2-7]{56}\b")
_JWT: Final = re.compile(rb"\beyJ[\w-]+\.[\w-]+\.[\w-]+")
_PREFIX: Final = 2
"""Bytes of a raw seed that show as `SU` in base32."""
_USER: Final = 20 << 3
"""The first byte of a user's raw public key, which shows as `U`."""
_CRC: Final = 2


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A user's key and, if an operator's accounts are used, its JWT."""

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
    """Read a `.creds` file, or one with an NKey seed. Raises OSError, and ValueError for other content."""
    with Path(path).open("rb") as file:
        content = file.read(MAX_FILE)
    seed, jwt = _SEED.search(content), _JWT.search(content) if with_jwt else None
    if seed is None or (with_jwt and jwt is None):
        raise ValueError("no user's seed, or no JWT")
    for secret in (seed[0], *([jwt[0]] if jwt else [])):
        register_secret(secret.decode())
    raw = base64.b32decode(seed[0] + b"=" * (-len(seed[0]) % 8))
    content, checksum = raw[:-_CRC], raw[-_CRC:]
    if checksum != _checksum(content):
        raise ValueError("a seed with a typing error")
    key = Ed25519PrivateKey.from_private_bytes(content[_PREFIX:])
    return Identity(key=key, jwt=jwt[0] if jwt else None)


def _checksum(raw: bytes) -> bytes:
    """Return the CRC-16/XMODEM of a key."""
    return binascii.crc_hqx(raw, 0).to_bytes(_CRC, "little")
