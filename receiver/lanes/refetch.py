"""Which files a replay has downloaded again."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from receiver.core.output_files import FileRules, MediaRef
from receiver.core.payload import parse
from receiver.db import inbox
from receiver.db.database import Database
from receiver.db.rows import MediaRow, NewMedia, StoredEvent
from receiver.errors import UnrecognizedBody
from receiver.media import Storage
from receiver.media.verify import verify


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Files that are to be downloaded again, by their ids."""

    files: list[uuid.UUID] = field(default_factory=list)
    intact: list[uuid.UUID] = field(default_factory=list)
    """Files that are what they should be, and are wanted again all the same."""
    urls: dict[uuid.UUID, str] = field(default_factory=dict)
    """The URLs of files that were skipped and no longer are."""
    added: list[tuple[int, NewMedia]] = field(default_factory=list)
    """Files that were never listed, each with its event's `seq`."""
    events: set[int] = field(default_factory=set)
    """The `seq` of the events that have files to download."""


async def find_wanted(
    database: Database,
    storage: Storage,
    files: Mapping[int, Sequence[MediaRow]],
    *,
    force: bool,
    rules: FileRules | None,
) -> Wanted:
    """Return what is missing, changed or no media, and with `force` what is intact, too.

    Files that were skipped are wanted if `rules` no longer skip them, and files that releases before 0010 did
    not list are added. Raises StorageUnavailable.
    """
    wanted = Wanted()
    for seq, rows in files.items():
        for row in rows:
            if row.state not in {"skipped", "pending"}:
                intact = await _is_intact(storage, row)
                if force or not intact:
                    (wanted.intact if intact else wanted.files).append(row.id)
                    wanted.events.add(seq)
    if rules is not None:
        unclear = [seq for seq, rows in files.items() if not rows or any(map(_is_unclear, rows))]
        async with database.read() as connection:
            for seq in unclear:
                # One after the other: a hundred bodies take a lot of memory.
                for event in (await inbox.load_events(connection, [seq])).values():
                    _list_anew(wanted, event, files[seq], rules)
    return wanted


def _is_unclear(row: MediaRow) -> bool:
    """Whether only the event's output tells what is to be done."""
    # Releases before 0010 did not record the field, nor did they look for files everywhere.
    return row.state == "skipped" or row.field is None


def _list_anew(wanted: Wanted, event: StoredEvent, rows: Sequence[MediaRow], rules: FileRules) -> None:
    """Add the files of an event that are not skipped any more, and those that have no row."""
    try:
        refs = parse(event.body).list_files(rules).files
    except UnrecognizedBody:
        return
    urls = {name: ref.url for ref in refs if ref.skip is None for name in (ref.field, ref.url)}
    skipped = [row for row in rows if row.state == "skipped"]
    found = {row.id: url for row in skipped if (url := urls.get(row.field or row.url))}
    added = _unlisted(refs, rows) if not rows or any(row.field is None for row in rows) else []
    wanted.urls.update(found)
    wanted.files.extend(found)
    wanted.added.extend((event.seq, file) for file in added)
    if found or any(file.skipped is None for file in added):
        wanted.events.add(event.seq)


def _unlisted(refs: Sequence[MediaRef], rows: Sequence[MediaRow]) -> list[NewMedia]:
    """Return the files that have no row, behind the others: the storage's keys contain the position."""
    known = {row.field for row in rows} | {row.url for row in rows}
    present = {ref.url for ref in refs}
    # Clipia has named another URL since: such a row without a field is found by its place.
    moved = {(row.position, row.variant) for row in rows if row.field is None and row.url not in present}
    new = [
        ref
        for ref in refs
        if known.isdisjoint({ref.field, ref.url}) and (ref.position, ref.variant) not in moved
    ]
    behind = 1 + max((row.position for row in rows), default=-1)
    positions = {position: behind + n for n, position in enumerate(sorted({ref.position for ref in new}))}
    return [NewMedia.of(replace(ref, position=positions[ref.position])) for ref in new]


async def _is_intact(storage: Storage, row: MediaRow) -> bool:
    if row.state != "stored" or row.storage_key is None or row.size is None or row.sha256 is None:
        return False
    found = await verify(
        storage,
        row.storage_key,
        kind=row.kind,
        url=row.url,
        field=row.field,
        size=row.size,
        sha256=row.sha256,
    )
    # An unreadable file may be readable later, and the CDN may not have it any more: it is sent as it is
    # on record, and the order goes on.
    return found in {"intact", "unreadable"}
