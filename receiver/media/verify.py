"""Verification of a stored file against its record."""

import hashlib
from collections.abc import Callable
from typing import Literal

import structlog

from receiver.core.output_files import Kind
from receiver.errors import StorageUnavailable
from receiver.media.file_types import SNIFF_BYTES, is_page
from receiver.media.storage import Storage

Finding = Literal["intact", "missing", "changed", "unreadable", "not_media"]

log = structlog.get_logger()


def _log(key: str, error: StorageUnavailable) -> None:
    log.warning("stored file cannot be read", key=key, error=str(error))


async def verify(
    storage: Storage,
    key: str,
    *,
    kind: Kind,
    url: str,
    field: str | None,
    size: int,
    sha256: str,
    on_unreadable: Callable[[str, StorageUnavailable], None] = _log,
) -> Finding:
    """Read a file and compare it with its record.

    A file is `unreadable` if the storage works but cannot read this one, such as an object that was moved to
    an archive; `on_unreadable` gets the error. An unchanged file is `not_media` if it is a page that the host
    sent in place of the file: earlier releases did not recognize these. Raises StorageUnavailable if the
    storage itself does not work.
    """
    digest = hashlib.sha256()
    length = 0
    head = b""
    try:
        async for block in storage.open(key):
            digest.update(block)
            head += block[: SNIFF_BYTES - len(head)]
            length += len(block)
    except FileNotFoundError:
        return "missing"
    except StorageUnavailable as error:
        await storage.check()
        on_unreadable(key, error)
        return "unreadable"
    if length != size or digest.hexdigest() != sha256:
        return "changed"
    return "not_media" if is_page(head, kind, url, field) else "intact"
