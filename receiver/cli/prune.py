"""`receiver prune`: delete old events that need no more work."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated, Final

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn

from receiver.cli.client import with_client
from receiver.cli.options import DryRun, Json, Reason
from receiver.cli.terminal import count, moment, print_json, print_note, progress_bar, stdout
from receiver.client import Client
from receiver.retention import Pruned

_NUMBERS: Final = [each.name for each in fields(Pruned) if each.type is int]


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
    reason: Reason = None,
    json: Json = False,
) -> None:
    """Delete old events with their receipts, deliveries and attempts, and the inputs of old jobs.

    Jobs keep their key, price and result; files are kept without --media. An event is kept while it has a
    pending file or delivery or (without --dead-letters) a dead letter, its job has not ended, or a replay has
    yet to send it. You can stop this command and run it again at any time.
    """

    async def run(client: Client) -> Pruned:
        prune_some = partial(
            client.prune_events, dead_letters=dead_letters, media=media, dry_run=dry_run, reason=reason
        )
        return await _watch(Pruned(before=datetime.now(UTC)), _prune(prune_some, older_than.days))

    done = with_client(run)
    if json:
        print_json({name: value for name, value in asdict(done).items() if name not in {"next", "run"}})
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


async def _prune(prune_some: Callable[..., Awaitable[Pruned]], days: int) -> AsyncIterator[Pruned]:
    """Prune batch by batch; yield the sums so far."""
    done = await prune_some(older_than_days=days)
    yield done
    while done.next is not None:
        batch = await prune_some(before=done.before, next=done.next, run=done.run)
        sums = {name: getattr(done, name) + getattr(batch, name) for name in _NUMBERS}
        done = replace(done, next=batch.next, **sums)
        yield done


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
