"""Which files a replay has downloaded again."""

import uuid
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from receiver.db import inbox
from receiver.db.engine import Database
from receiver.db.rows import MediaRow, StoredEvent
from receiver.errors import UnrecognizedBody
from receiver.media import Storage
from receiver.media.verify import verify
from receiver.outputs import FileRules
from receiver.webhook import parse


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Files that are to be downloaded again, by their ids."""

    files: list[uuid.UUID] = field(default_factory=list)
    intact: list[uuid.UUID] = field(default_factory=list)
    """Files that are what they should be, and are wanted again all the same."""
    urls: dict[uuid.UUID, str] = field(default_factory=dict)
    """The URLs of files that were skipped and no longer are."""
    events: set[int] = field(default_factory=set)
    """The `seq` of the events of all of these."""


async def find_wanted(
    database: Database,
    storage: Storage,
    files: Mapping[int, Sequence[MediaRow]],
    *,
    force: bool,
    rules: FileRules | None,
) -> Wanted:
    """Return what is missing, changed or no media, and with `force` what is intact, too.

    Files that were skipped are wanted if `rules` no longer skip them. Raises StorageUnavailable.
    """
    wanted = Wanted()
    skipped: dict[int, list[MediaRow]] = defaultdict(list)
    for seq, rows in files.items():
        for row in rows:
            if row.state == "skipped":
                skipped[seq].append(row)
            elif row.state != "pending":
                intact = await _is_intact(storage, row)
                if force or not intact:
                    (wanted.intact if intact else wanted.files).append(row.id)
                    wanted.events.add(seq)
    if skipped and rules is not None:
        async with database.read() as connection:
            events = await inbox.load_events(connection, skipped)
        for seq, event in events.items():
            urls = _allowed(event, rules)
            # Releases before 0010 did not record the field.
            found = {row.id: url for row in skipped[seq] if (url := urls.get(row.field or row.url))}
            wanted.urls.update(found)
            wanted.files.extend(found)
            wanted.events.update({seq} if found else ())
    return wanted


async def _is_intact(storage: Storage, row: MediaRow) -> bool:
    if row.state != "stored" or row.storage_key is None or row.size is None or row.sha256 is None:
        return False
    found = await verify(
        storage, row.storage_key, kind=row.kind, url=row.url, size=row.size, sha256=row.sha256
    )
    # An unreadable file may be readable later, and the CDN may not have it any more: it is sent as it is
    # on record, and the order goes on.
    return found in {"intact", "unreadable"}


def _allowed(event: StoredEvent, rules: FileRules) -> dict[str, str]:
    """Return the URLs of an event's files that are fetched now, by where they stand and by themselves."""
    try:
        files = parse(event.body).list_files(rules).files
    except UnrecognizedBody:
        return {}
    return {name: ref.url for ref in files if ref.skip is None for name in (ref.field, ref.url)}
