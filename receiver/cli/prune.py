"""`receiver prune`: delete old events that need no more work."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import asdict
from datetime import timedelta
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from receiver import retention
from receiver.cli.database import opened_storage, with_database
from receiver.cli.options import DryRun, Json
from receiver.cli.terminal import count, moment, print_json, print_note, progress_bar, stdout
from receiver.db.database import Database
from receiver.retention import Pruned
from receiver.settings import Settings


def _age(text: str) -> timedelta:
    found = re.fullmatch("([0-9]{1,5})([dw])", text)
    if found is None:
        raise typer.BadParameter("write days or weeks, such as 90d or 12w")
    number, unit = found.groups()
    return timedelta(days=int(number) * (7 if unit == "w" else 1))


def prune(
    older_than: Annotated[
        timedelta,
        typer.Option(parser=_age, metavar="AGE", help="The events' age: 90d or 12w, and at least 30d."),
    ],
    dead_letters: Annotated[
        bool, typer.Option("--dead-letters", help="Delete events with dead letters, too.")
    ] = False,
    media: Annotated[bool, typer.Option("--media", help="Delete the files of these events, too.")] = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Delete old events with their receipts, deliveries and attempts, and the inputs of old jobs.

    Jobs keep their key, price and result; files are kept without --media. An event is kept while it has a
    pending file or delivery or (without --dead-letters) a dead letter, its job has not ended, or a replay has
    yet to send it. You can stop this command and run it again at any time.
    """

    async def run(settings: Settings, database: Database) -> Pruned:
        done = await retention.begin(database, older_than=older_than)
        async with AsyncExitStack() as stack:
            storage = None
            if media:
                storage = await stack.enter_async_context(opened_storage(settings))
            batches = retention.prune(
                database, done, dead_letters=dead_letters, dry_run=dry_run, storage=storage
            )
            return await _watch(done, batches)

    done = with_database(run)
    if json:
        print_json(asdict(done))
        return
    verb = "to delete" if dry_run else "deleted"
    stdout.print(
        f"{count(done.events, 'event')} received before {moment(done.before)} {verb}, "
        f"{done.kept} of that age kept"
    )
    if done.files or done.jobs:
        stdout.print(f"{count(done.files, 'file')} and the inputs of {count(done.jobs, 'job')} {verb}")
    if done.rejections:
        stdout.print(f"{count(done.rejections, 'rejected request')} {verb}")
    if done.actions:
        stdout.print(f"{count(done.actions, 'record')} of operators' actions {verb}")
    if done.files_elsewhere:
        print_note(
            f"{count(done.files_elsewhere, 'file')} not deleted: they are not in the storage of "
            "RECEIVER_STORAGE_URL."
        )


async def _watch(done: Pruned, batches: AsyncIterator[Pruned]) -> Pruned:
    """Show a run's progress until it ends; Ctrl-C ends it after the current batch."""
    stopped = False

    async def run() -> None:
        nonlocal done
        async for done in batches:
            progress.update(bar, completed=done.events)
            if stopped:
                break

    progress = progress_bar(TextColumn("events"), BarColumn(), MofNCompleteColumn())
    bar = progress.add_task("events", total=None)
    with progress:
        task = asyncio.create_task(run())
        try:
            await asyncio.shield(task)
        except BaseException:
            stopped = True
            await asyncio.wait([task])
            print_note(f"{count(done.events, 'event')} until then; run the same command again to continue.")
            raise
    return done
