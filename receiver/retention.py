"""Retention: what was settled long ago is deleted, and one event is erased when a person asks for that.

A run goes through the events by `seq`, a batch at a time, and each batch is a short transaction: a run that
ends in the middle has deleted whole events, and the next one goes on where it has stopped. Then it deletes
the inputs of jobs that ended long ago.

Files are deleted outside of any transaction, after their events were made tombstones and before the records
of the files go: a run that is killed in between leaves no file that no record names.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from receiver.db import pruning
from receiver.db.database import Database
from receiver.db.pruning import StoredFile
from receiver.errors import RequestError
from receiver.media import Storage

SHORTEST: Final = timedelta(days=30)
"""Deduplication reaches as far back as events are kept: Clipia's tries and ours have to fit in."""
BATCH: Final = 500
"""Events that one transaction looks at, and jobs whose inputs it deletes."""
FILES: Final = 10_000
"""Files of old events that one transaction deletes at most, unless they are of one event.

Each statement has a time limit, and on SQLite every webhook waits for the transaction.
"""
SPAN: Final = 20_000
"""Jobs that one statement goes through at most."""
AT_ONCE: Final = 8
"""Files that are deleted from the storage at the same time."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """How far a run has come."""

    before: datetime
    """Events that were received before this moment are old, by the database's clock."""
    events: int = 0
    """Old ones that were deleted, or would be."""
    kept: int = 0
    """Old ones that are not: something is left to do for them, or somebody is at work on them."""
    files: int = 0
    """Their files that were deleted from the storage, or would be."""
    files_elsewhere: int = 0
    """Their files that are not in the storage of the settings, and stay."""
    jobs: int = 0
    """Jobs that ended before that moment and whose input was deleted, or would be."""


@dataclass(frozen=True, kw_only=True)
class Erased:
    """What was erased of one event."""

    id: UUID
    request_id: str
    files: int
    """Files that were deleted from the storage."""
    files_elsewhere: list[str]
    """Where files are that are not in the storage of the settings, and stay."""


async def begin(database: Database, *, older_than: timedelta) -> Pruned:
    """Begin a run. Raises DatabaseUnavailable, and RequestError for an age below SHORTEST."""
    if older_than < SHORTEST:
        raise RequestError(
            f"events are kept for {SHORTEST.days} days at least: a webhook that comes again after its event "
            "was deleted is taken for a new one, and forwarded again",
            code="invalid_request",
        )
    async with database.read() as connection:
        return Pruned(before=await pruning.moment_ago(connection, seconds=older_than.total_seconds()))


async def prune(
    database: Database,
    done: Pruned,
    *,
    dead_letters: bool = False,
    dry_run: bool = False,
    storage: Storage | None = None,
) -> AsyncIterator[Pruned]:
    """Delete old events that nothing is left to do for; yield after each batch how far the run has come.

    An event with a dead letter is kept unless `dead_letters`; files are deleted from `storage` if there is
    one. The part of the events ends with the first batch that has no old event in it. Raises
    DatabaseUnavailable and StorageUnavailable.
    """
    after = 0
    while True:
        began = time.monotonic()
        files: list[StoredFile] = []
        async with database.read() if dry_run else database.write() as connection:
            old, after = await pruning.find_old(
                connection, after=after, before=done.before, limit=BATCH, files=FILES
            )
            found = old if dry_run else await pruning.lock(connection, old, dead_letters=dead_letters)
            settled = await pruning.select_finished(connection, found, dead_letters=dead_letters)
            if storage is not None:
                files = [*await pruning.list_files(connection, settled)]
            if not dry_run:
                await (pruning.erase_events if files else pruning.delete_events)(connection, settled)
        ours, elsewhere = ([], []) if storage is None else _sort(storage, files)
        if storage is not None and files and not dry_run:
            await _delete(storage, ours)
            async with database.write() as connection:
                # One that a webhook has locked stays a tombstone until the next run.
                settled = await pruning.lock(connection, settled, dead_letters=dead_letters)
                await pruning.delete_events(connection, settled)
        done = replace(
            done,
            events=done.events + len(settled),
            kept=done.kept + len(old) - len(settled),
            files=done.files + len(ours),
            files_elsewhere=done.files_elsewhere + len(elsewhere),
        )
        if not dry_run:
            # Half of the time belongs to live traffic.
            await asyncio.sleep(time.monotonic() - began)
        yield done
        if not old:
            break
    async for further in _prune_jobs(database, done, dry_run=dry_run):
        yield further


async def _prune_jobs(database: Database, done: Pruned, *, dry_run: bool) -> AsyncIterator[Pruned]:
    """Delete the inputs of jobs that ended long ago; keys, prices and results stay."""
    async with database.read() as connection:
        last = await pruning.last_job(connection)
    after = 0
    while after < last:
        began = time.monotonic()
        until = min(after + SPAN, last)
        async with database.read() as connection:
            found = await pruning.find_inputs(
                connection, after=after, until=until, before=done.before, limit=BATCH
            )
        if found and not dry_run:
            async with database.write() as connection:
                await pruning.delete_inputs(connection, found, before=done.before)
        after = found[-1] if len(found) == BATCH else until
        if not dry_run:
            await asyncio.sleep(time.monotonic() - began)
        done = replace(done, jobs=done.jobs + len(found))
        yield done


async def erase(database: Database, storage: Storage, key: str) -> Erased | None:
    """Erase an event, which is meant by its id or its `request_id`; return None if there is none.

    Its body, its deliveries, its files, and the input and the metadata of its job are deleted. A tombstone
    stays, so that a late delivery is still a duplicate. After a failure the same call goes on.

    Raises RequestError if work is left for the event, or if several sources have this `request_id`;
    DatabaseUnavailable and StorageUnavailable.
    """
    async with database.write() as connection:
        found = await pruning.find_events(connection, key)
        if not found:
            return None
        if len(found) > 1:
            raise RequestError(
                "events of several sources have this request_id: name one by its id",
                code="ambiguous",
            )
        event = found[0]
        locked = await pruning.lock(connection, [event.seq], dead_letters=True)
        if not await pruning.select_finished(connection, locked, dead_letters=True):
            left = await pruning.list_unfinished(connection, event.seq) or ["something else is at work on it"]
            raise RequestError(f"the event cannot be erased yet: {', '.join(left)}", code="not_settled")
        files = await pruning.list_files(connection, locked)
        await pruning.erase_events(connection, locked)
        await pruning.erase_jobs(connection, locked)
    ours, elsewhere = _sort(storage, files)
    await _delete(storage, ours)
    async with database.write() as connection:
        await pruning.delete_records(connection, [event.seq])
    return Erased(
        id=event.id,
        request_id=event.request_id,
        files=len(ours),
        files_elsewhere=[file.uri for file in elsewhere],
    )


def _sort(storage: Storage, files: Collection[StoredFile]) -> tuple[list[StoredFile], list[StoredFile]]:
    """Return which files are in this storage, and which in another one, where an earlier setting put them."""
    ours: list[StoredFile] = []
    elsewhere: list[StoredFile] = []
    for file in files:
        (ours if storage.uri(file.key) == file.uri else elsewhere).append(file)
    return ours, elsewhere


async def _delete(storage: Storage, files: list[StoredFile]) -> None:
    for start in range(0, len(files), AT_ONCE):
        some = (storage.delete(file.key) for file in files[start : start + AT_ONCE])
        # To its end, whichever fails: what is under way is not left behind.
        for result in await asyncio.gather(*some, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
