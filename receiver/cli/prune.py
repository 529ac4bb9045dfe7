"""`receiver prune`: delete events that were settled long ago."""

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
from receiver.cli.database import with_database
from receiver.cli.terminal import Json, moment, print_json, progress_bar, stderr, stdout
from receiver.db.database import Database
from receiver.media import open_storage
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
        typer.Option(
            parser=_age,
            metavar="AGE",
            help="Received longer ago than this, such as 90d or 12w; at least 30d.",
        ),
    ],
    dead_letters: Annotated[
        bool, typer.Option("--dead-letters", help="Also events with a delivery that was given up.")
    ] = False,
    media: Annotated[bool, typer.Option("--media", help="Also the files of these events.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    json: Json = False,
) -> None:
    """Delete old events with their receipts, files' records, deliveries and tries, and old jobs' inputs.

    Jobs stay with their key, price and result; files stay unless --media. What is not settled is kept: files
    and deliveries that are pending, dead letters, events that a replay has yet to reach or whose job is open.
    A run can be ended and repeated at any time.
    """

    async def run(settings: Settings, database: Database) -> Pruned:
        done = await retention.begin(database, older_than=older_than)
        async with AsyncExitStack() as stack:
            storage = None
            if media:
                storage = open_storage(settings.storage_url.get_secret_value())
                stack.push_async_callback(storage.close)
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
        f"{done.events} events received before {moment(done.before)} {verb}, {done.kept} as old kept"
    )
    if done.files or done.jobs:
        stdout.print(f"{done.files} files and the inputs of {done.jobs} jobs {verb}")
    if done.files_elsewhere:
        stderr.print(
            f"{done.files_elsewhere} files are in another storage than RECEIVER_STORAGE_URL, and stay.",
            soft_wrap=True,
        )


async def _watch(done: Pruned, batches: AsyncIterator[Pruned]) -> Pruned:
    """Show a run's progress until it ends; Ctrl-C ends it after the batch that is under way."""
    stopped = False

    async def go_through() -> None:
        nonlocal done
        async for done in batches:
            progress.update(bar, completed=done.events)
            if stopped:
                break

    progress = progress_bar(TextColumn("events"), BarColumn(), MofNCompleteColumn())
    bar = progress.add_task("events", total=None)
    with progress:
        going = asyncio.create_task(go_through())
        try:
            await asyncio.shield(going)
        except BaseException:
            stopped = True
            await asyncio.wait([going])
            stderr.print(f"{done.events} events until then; the same command again goes on.")
            raise
    return done
