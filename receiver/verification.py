"""Verification of the stored files: each is read and compared with its record, a part of them per call."""

import time
from datetime import datetime
from typing import Final
from uuid import UUID

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.core.output_files import Kind
from receiver.db import reads
from receiver.db.database import Database
from receiver.db.views import FileToVerify
from receiver.errors import StorageUnavailable
from receiver.media import Storage
from receiver.media.verify import Finding
from receiver.media.verify import verify as verify_file

PAGE_ROWS: Final = 200
"""Files that one call verifies at most."""
CALL_SECONDS: Final = 10.0
"""After this time a call verifies no further file."""


class FlaggedFile(TypedDict):
    """An intact file that was stored with a warning."""

    id: UUID
    kind: Kind
    storage_key: str
    uri: str
    size: int
    sha256: str
    warning: str | None
    request_id: str
    """That of its event."""


class DamagedFile(FlaggedFile):
    """A file that is not as its record says, or no media."""

    finding: Finding
    error: str | None
    """The reason if it cannot be read."""


class Verified(TypedDict):
    """The result for a part of the stored files."""

    intact: int
    flagged: list[FlaggedFile]
    """Those of the intact ones that were stored with a warning."""
    damaged: list[DamagedFile]
    total: int | None
    """How many files there are; of the first part alone."""
    next: str | None
    """The `cursor` of the following part; null on the last one."""


async def verify_part(
    database: Database, storage: Storage, *, after: UUID | None, since: datetime | None
) -> Verified:
    """Verify the files that follow `after`. Raises DatabaseUnavailable and StorageUnavailable."""
    began = time.monotonic()
    async with database.read() as connection:
        total = None if after is not None else await reads.count_stored(connection, since=since)
        page = await reads.list_stored(connection, limit=PAGE_ROWS, after=after, since=since)
    found = Verified(intact=0, flagged=[], damaged=[], total=total, next=None)
    for number, row in enumerate(page, start=1):
        await _verify(storage, row, found)
        is_late = time.monotonic() - began > CALL_SECONDS
        if number == PAGE_ROWS or (is_late and number < len(page)):
            found["next"] = str(row["id"])
            break
    return found


async def _verify(storage: Storage, row: FileToVerify, found: Verified) -> None:
    errors: list[str] = []

    def keep(_key: str, error: StorageUnavailable) -> None:
        errors.append(str(error))

    finding = await verify_file(
        storage,
        row["storage_key"],
        kind=row["kind"],
        url=row["url"],
        field=row["field"],
        size=row["size"],
        sha256=row["sha256"],
        on_unreadable=keep,
    )
    shown = FlaggedFile(
        id=row["id"],
        kind=row["kind"],
        storage_key=row["storage_key"],
        uri=row["uri"],
        size=row["size"],
        sha256=row["sha256"],
        warning=row["warning"],
        request_id=row["request_id"],
    )
    if finding != "intact":
        found["damaged"].append(DamagedFile(**shown, finding=finding, error=errors[0] if errors else None))
        return
    found["intact"] += 1
    if row["warning"]:
        found["flagged"].append(shown)
