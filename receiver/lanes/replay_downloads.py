"""The files that a replay downloads again."""

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
    """Files to download again, by their ids."""

    files: list[uuid.UUID] = field(default_factory=list)
    intact: list[uuid.UUID] = field(default_factory=list)
    """Intact files, which are downloaded again because the order says `force`."""
    urls: dict[uuid.UUID, str] = field(default_factory=dict)
    """The URLs of files that were skipped and no longer are."""
    added: list[tuple[int, NewMedia]] = field(default_factory=list)
    """Files that were never listed, each with its event's `seq`."""
    events: set[int] = field(default_factory=set)
    """The `seq` of the events with files to download."""


async def find_wanted(
    database: Database,
    storage: Storage,
    files: Mapping[int, Sequence[MediaRow]],
    *,
    force: bool,
    rules: FileRules | None,
) -> Wanted:
    """Return the files that are missing, changed or not media, and with `force` the intact ones too.

    Skipped files are wanted if `rules` no longer skip them, and files are added that releases before 0010 did
    not list. Raises StorageUnavailable.
    """
    wanted = Wanted()
    for seq, row in ((seq, row) for seq, rows in files.items() for row in rows):
        if row.state not in {"skipped", "pending"}:
            is_intact = await _is_intact(storage, row)
            if force or not is_intact:
                (wanted.intact if is_intact else wanted.files).append(row.id)
                wanted.events.add(seq)
    if rules is not None:
        await _add_unskipped(wanted, database, files, rules)
    return wanted


async def _add_unskipped(
    wanted: Wanted, database: Database, files: Mapping[int, Sequence[MediaRow]], rules: FileRules
) -> None:
    # Releases before 0010 did not record the field, and did not search all of the output for files.
    unclear = [
        seq
        for seq, rows in files.items()
        if not rows or any(row.state == "skipped" or row.field is None for row in rows)
    ]
    async with database.read() as connection:
        for seq in unclear:
            # One at a time: the bodies of a hundred events would need a lot of memory.
            for event in (await inbox.load_events(connection, [seq])).values():
                _list_again(wanted, event, files[seq], rules)


def _list_again(wanted: Wanted, event: StoredEvent, rows: Sequence[MediaRow], rules: FileRules) -> None:
    """Add the files of an event that are no longer skipped, and those without a row."""
    try:
        refs = parse(event.body).list_files(rules).files
    except UnrecognizedBody:
        return
    found = _unskipped(refs, rows)
    added = _unlisted(refs, rows) if not rows or any(row.field is None for row in rows) else []
    wanted.urls.update(found)
    wanted.files.extend(found)
    wanted.added.extend((event.seq, file) for file in added)
    if found or any(file.skipped is None for file in added):
        wanted.events.add(event.seq)


def _unskipped(refs: Sequence[MediaRef], rows: Sequence[MediaRow]) -> dict[uuid.UUID, str]:
    """Return the URLs of skipped rows that the rules no longer skip."""
    urls = {name: ref.url for ref in refs if ref.skip is None for name in (ref.field, ref.url)}
    skipped = [row for row in rows if row.state == "skipped"]
    return {row.id: url for row in skipped if (url := urls.get(row.field or row.url))}


def _unlisted(refs: Sequence[MediaRef], rows: Sequence[MediaRow]) -> list[NewMedia]:
    """Return the files without a row. Storage keys contain the position, so theirs follow the others."""
    new = _without_row(refs, rows)
    first = 1 + max((row.position for row in rows), default=-1)
    positions = {position: first + n for n, position in enumerate(sorted({ref.position for ref in new}))}
    return [NewMedia.of(replace(ref, position=positions[ref.position])) for ref in new]


def _without_row(refs: Sequence[MediaRef], rows: Sequence[MediaRow]) -> list[MediaRef]:
    known = {row.field for row in rows} | {row.url for row in rows}
    present = {ref.url for ref in refs}
    # If Clipia has given a file another URL since, a row without a field is matched by its position.
    moved = {(row.position, row.variant) for row in rows if row.field is None and row.url not in present}
    return [
        ref
        for ref in refs
        if known.isdisjoint({ref.field, ref.url}) and (ref.position, ref.variant) not in moved
    ]


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
    # A file that cannot be read now may be readable later, and the CDN may no longer have it. So it is not
    # downloaded again, and its event is sent as recorded.
    return found in {"intact", "unreadable"}
