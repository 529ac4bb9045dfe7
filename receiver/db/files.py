"""Files as the API serves them."""

from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import select

from receiver.db.connection import SqlConnection
from receiver.db.rows import MediaState
from receiver.db.tables import events, media


@dataclass(frozen=True, kw_only=True)
class ServedFile:
    """A file; the fields after `error` are set if it is stored."""

    id: UUID
    state: MediaState
    error: str | None
    size: int | None
    sha256: str | None
    content_type: str | None
    storage_key: str | None
    uri: str | None


_COLUMNS = [media.c[name] for name in ServedFile.__dataclass_fields__]


async def find_file(connection: SqlConnection, file_id: UUID) -> ServedFile | None:
    """Return a file by its id; None if there is none, or if its event is erased."""
    statement = (
        select(*_COLUMNS)
        .join(events, media.c.event_seq == events.c.seq)
        # Its rows are deleted after its objects, so in between a file would seem to be lost.
        .where(media.c.id == file_id, events.c.state != "erased")
    )
    row = (await connection.execute(statement)).mappings().one_or_none()
    return None if row is None else ServedFile(**row)
