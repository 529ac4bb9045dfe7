"""Retention: old, finished events are pruned, and a single event is erased on request.

A run goes through the events by `seq`, a batch at a time, and each batch is a short transaction. If a run is
killed, it has deleted whole events, and the next run continues there. At its end a run deletes the inputs of
jobs that ended long ago, old rejected requests, and old actions of operators.

Files are deleted outside of transactions: after their events became tombstones, and before their records are
deleted. So each file has a record until it is deleted, even if a run is killed in between.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from receiver.db import audit, pruning, rejections
from receiver.db.database import Database
from receiver.db.pruning import StoredFile
from receiver.errors import RequestError
from receiver.media import Storage

MIN_AGE: Final = timedelta(days=30)
"""Events deduplicate for as long as they are kept, so Clipia's attempts and ours must fit into that time."""
POSITION: Final = "^(events|inputs|records)-[0-9]{1,18}$"
"""The pattern of a position in a run: the kind of rows, and the last one that was searched."""
CONCURRENT_DELETIONS: Final = 8
"""Files that are deleted from the storage at the same time."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The size of one transaction: a statement has a time limit, and on SQLite webhooks wait for it."""

    events: int = 500
    """Events, or jobs that lose their inputs."""
    files: int = 10_000
    """Files of old events; a single event may have more."""
    jobs: int = 20_000
    """Jobs that one statement searches for old inputs."""


LIMITS: Final = Limits()


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """The progress of a run; after a dry run the numbers say what a run would delete."""

    before: datetime
    """Events received before this moment are old, by the database's clock."""
    events: int = 0
    """Old events that were deleted."""
    kept: int = 0
    """Old events that were kept: they are unfinished, or locked by other work."""
    files: int = 0
    """Files that were deleted from the storage."""
    files_elsewhere: int = 0
    """Files of deleted events that are not in the configured storage, and are kept."""
    jobs: int = 0
    """Jobs that ended before that moment and lost their inputs."""
    rejections: int = 0
    """Rejected requests of before that moment that were deleted."""
    actions: int = 0
    """Actions of operators before that moment whose records were deleted."""
    next: str | None = None
    """Where another call continues the run; None at its end."""
    run: UUID | None = None
    """The record of the run, for the calls that continue it; None for a dry run."""


@dataclass(frozen=True, kw_only=True)
class Erased:
    """The result of erasing one event."""

    id: UUID
    request_id: str
    files: int
    """Files that were deleted from the storage."""
    files_elsewhere: list[str]
    """The URIs of files that are not in the configured storage, and are kept."""


async def begin(database: Database, *, older_than: timedelta) -> Pruned:
    """Begin a run. Raises DatabaseUnavailable, and RequestError if `older_than` is below MIN_AGE."""
    if older_than < MIN_AGE:
        raise RequestError(
            f"events must be kept for at least {MIN_AGE.days} days: if a webhook is repeated after its event "
            "was deleted, it is forwarded a second time",
            code="invalid_request",
        )
    async with database.read() as connection:
        return Pruned(before=await pruning.moment_ago(connection, seconds=older_than.total_seconds()))


async def resume(database: Database, *, before: datetime, position: str | None) -> Pruned:
    """Continue a run at its position. Raises DatabaseUnavailable, and RequestError as `begin` does."""
    latest = await begin(database, older_than=MIN_AGE)
    if before > latest.before:
        raise RequestError(f"before: write a time {MIN_AGE.days} days ago or earlier", code="invalid_request")
    return Pruned(before=before, next=position)


async def prune(
    database: Database,
    done: Pruned,
    *,
    dead_letters: bool = False,
    dry_run: bool = False,
    storage: Storage | None = None,
    limits: Limits = LIMITS,
) -> AsyncGenerator[Pruned, None]:
    """Delete old finished events, inputs of jobs, and other old records; yield the progress after each batch.

    It goes on from the position of `done`.

    An event with a dead letter is kept unless `dead_letters`. Files are deleted if a `storage` is given.
    Raises DatabaseUnavailable and StorageUnavailable.
    """
    run = _Run(database, storage, dead_letters, dry_run, limits)
    kind, _, after = (done.next or "events-0").partition("-")
    if kind == "events":
        async for progress in run.prune_events(done, int(after)):
            yield (done := progress)
    if kind != "records":
        async for progress in run.prune_inputs(done, int(after) if kind == "inputs" else 0):
            yield (done := progress)
    yield await run.prune_records(done)


@dataclass(frozen=True)
class _Run:
    database: Database
    storage: Storage | None
    dead_letters: bool
    dry_run: bool
    limits: Limits

    async def prune_events(self, done: Pruned, after: int) -> AsyncIterator[Pruned]:
        """Delete finished events. The first batch without an old event is the last."""
        is_last = False
        while not is_last:
            began = time.monotonic()
            old, finished, files, after = await self._take_batch(after, done.before)
            is_last = not old
            ours, elsewhere = ([], []) if self.storage is None else _sort(self.storage, files)
            deleted = len(finished)
            if self.storage is not None and files and not self.dry_run:
                await _delete(self.storage, ours)
                deleted = await self._delete_tombstones(finished)
            done = replace(
                done,
                events=done.events + deleted,
                kept=done.kept + len(old) - deleted,
                files=done.files + len(ours),
                files_elsewhere=done.files_elsewhere + len(elsewhere),
                next="inputs-0" if is_last else f"events-{after}",
            )
            await self._rest(began)
            yield done

    async def _take_batch(
        self, after: int, before: datetime
    ) -> tuple[Sequence[int], Sequence[int], Sequence[StoredFile], int]:
        """Delete the next finished events; if they have files in the storage, make them tombstones.

        Returns all old events of the batch, the finished ones, their files, and the last `seq` searched.
        """
        async with self.database.read() if self.dry_run else self.database.write() as connection:
            old, last = await pruning.find_old(
                connection, after=after, before=before, limit=self.limits.events, files=self.limits.files
            )
            found: Sequence[int] = old
            if not self.dry_run:
                found = await pruning.lock(connection, old, dead_letters=self.dead_letters)
            finished = await pruning.select_finished(connection, found, dead_letters=self.dead_letters)
            files = [] if self.storage is None else await pruning.list_files(connection, finished)
            if not self.dry_run:
                await (pruning.erase_events if files else pruning.delete_events)(connection, finished)
        return old, finished, files, last

    async def _delete_tombstones(self, seqs: Sequence[int]) -> int:
        """Delete tombstones, and return how many; one that a webhook has locked is left for the next run."""
        async with self.database.write() as connection:
            locked = await pruning.lock(connection, seqs, dead_letters=self.dead_letters)
            await pruning.delete_events(connection, locked)
        return len(locked)

    async def prune_inputs(self, done: Pruned, after: int) -> AsyncIterator[Pruned]:
        """Delete the inputs of jobs that ended long ago; keys, prices and results are kept."""
        async with self.database.read() as connection:
            last = await pruning.last_job(connection)
        limit = self.limits.events
        while after < last:
            began = time.monotonic()
            until = min(after + self.limits.jobs, last)
            async with self.database.read() as connection:
                found = await pruning.find_inputs(
                    connection, after=after, until=until, before=done.before, limit=limit
                )
            if found and not self.dry_run:
                async with self.database.write() as connection:
                    await pruning.delete_inputs(connection, found, before=done.before)
            after = found[-1] if len(found) == limit else until
            await self._rest(began)
            done = replace(done, jobs=done.jobs + len(found), next=f"inputs-{after}")
            yield done

    async def prune_records(self, done: Pruned) -> Pruned:
        """Delete old rejected requests and actions; they are few enough for one transaction."""
        async with self.database.read() if self.dry_run else self.database.write() as connection:
            rejected = await rejections.prune(connection, done.before, dry_run=self.dry_run)
            done_before = await audit.prune(connection, done.before, dry_run=self.dry_run)
        return replace(done, rejections=rejected, actions=done_before, next=None)

    async def _rest(self, began: float) -> None:
        """Sleep for as long as the batch took, to leave half of the time to live traffic."""
        if not self.dry_run:
            await asyncio.sleep(time.monotonic() - began)


async def erase(database: Database, storage: Storage, key: str) -> Erased | None:
    """Erase an event by its id or its `request_id`; return None if there is none.

    Its body, its deliveries, its files, the input and the metadata of its job, and rejected requests with its
    `request_id` are deleted. A tombstone is kept, so that a late webhook is still a duplicate. After a
    failure the same call can be repeated.

    Raises RequestError if the event is unfinished, or if several sources have this `request_id`;
    DatabaseUnavailable and StorageUnavailable.
    """
    async with database.write() as connection:
        found = await pruning.find_events(connection, key)
        if not found:
            return None
        if len(found) > 1:
            raise RequestError(
                "events of several sources have this request_id: give the id of one of them",
                code="ambiguous",
            )
        event = found[0]
        locked = await pruning.lock(connection, [event.seq], dead_letters=True)
        if not await pruning.select_finished(connection, locked, dead_letters=True):
            left = await pruning.list_unfinished(connection, event.seq) or ["other work has locked it"]
            raise RequestError(f"the event cannot be erased yet: {', '.join(left)}", code="not_settled")
        files = await pruning.list_files(connection, locked)
        await pruning.erase_events(connection, locked)
        await pruning.erase_jobs(connection, locked)
        await rejections.erase(connection, event.request_id)
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
    """Return the files in this storage, and those in a storage of earlier settings."""
    ours: list[StoredFile] = []
    elsewhere: list[StoredFile] = []
    for file in files:
        (ours if storage.uri(file.key) == file.uri else elsewhere).append(file)
    return ours, elsewhere


async def _delete(storage: Storage, files: list[StoredFile]) -> None:
    for start in range(0, len(files), CONCURRENT_DELETIONS):
        some = (storage.delete(file.key) for file in files[start : start + CONCURRENT_DELETIONS])
        # `return_exceptions` waits for all deletions, even if one fails.
        for result in await asyncio.gather(*some, return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
