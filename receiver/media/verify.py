"""Whether a stored file is still what was stored."""

import hashlib
from collections.abc import Callable
from typing import Literal

import structlog

from receiver.errors import StorageUnavailable
from receiver.media.storage import Storage

Finding = Literal["intact", "missing", "changed", "unreadable"]

log = structlog.get_logger()


def _log(key: str, error: StorageUnavailable) -> None:
    log.warning("stored file cannot be read", key=key, error=str(error))


async def verify(
    storage: Storage,
    key: str,
    *,
    size: int,
    sha256: str,
    on_unreadable: Callable[[str, StorageUnavailable], None] = _log,
) -> Finding:
    """Read a file and compare it with its record.

    A file is `unreadable` if it alone cannot be read, such as an object that was moved to an archive;
    `on_unreadable` is told why. Raises StorageUnavailable if the storage takes no other file either.
    """
    digest = hashlib.sha256()
    length = 0
    try:
        async for block in storage.open(key):
            digest.update(block)
            length += len(block)
    except FileNotFoundError:
        return "missing"
    except StorageUnavailable as error:
        await storage.check()
        on_unreadable(key, error)
        return "unreadable"
    return "intact" if length == size and digest.hexdigest() == sha256 else "changed"
