"""Whether a stored file is still what was stored."""

import hashlib
from typing import Literal

from receiver.media.storage import Storage

Finding = Literal["intact", "missing", "changed"]


async def verify(storage: Storage, key: str, *, size: int, sha256: str) -> Finding:
    """Read a file and compare it with its record. Raises StorageUnavailable."""
    digest = hashlib.sha256()
    length = 0
    try:
        async for block in storage.open(key):
            digest.update(block)
            length += len(block)
    except FileNotFoundError:
        return "missing"
    return "intact" if length == size and digest.hexdigest() == sha256 else "changed"
