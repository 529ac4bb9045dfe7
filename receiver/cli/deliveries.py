"""`receiver deliveries`: deliveries, dead letters, and deliveries to a removed destination."""

import contextlib
import math
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import Annotated, Final
from uuid import UUID

import typer
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from receiver.cli.database import query_database, with_database
from receiver.cli.options import CURSOR_HELP, DryRun, Json, Limit, since_option, until_option
from receiver.cli.terminal import count, operator, print_json, print_list, print_note, print_rows, stdout
from receiver.cli.waiting import process_name
from receiver.core.lane_names import destination_lane
from receiver.core.request_values import split_page
from receiver.db import outbox, reads, removed_destinations, workers
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.outbox import DeadLetters
from receiver.db.removed_destinations import Taken
from receiver.db.rows import DeliveryState
from receiver.errors import ReceiverError
from receiver.settings import Settings

BATCH_ROWS: Final = 1000
"""One transaction changes at most this many deliveries."""
MAX_COLLISIONS: Final = 5
MAX_ERROR_LENGTH: Final = 100

deliveries = typer.Typer(
    help="List deliveries, retry dead letters, and move or discard those of a removed destination.",
    no_args_is_help=True,
)

_Dead = Annotated[bool, typer.Option("--dead", help="Include its dead letters.")]
_Destination = Annotated[str | None, typer.Option(help="Only deliveries to this destination.")]
_Removed = Annotated[
    str, typer.Argument(metavar="FROM", help="The destination that is no longer in the settings.")
]


@deliveries.command("list")
def list_(
    state: Annotated[DeliveryState | None, typer.Option(help="Only deliveries in this state.")] = None,
    destination: _Destination = None,
    since: Annotated[datetime | None, since_option("deliveries made")] = None,
    until: Annotated[datetime | None, until_option("deliveries made")] = None,
    limit: Limit = 50,
    cursor: Annotated[str | None, typer.Option("--cursor", "--before", help=CURSOR_HELP)] = None,
    json: Json = False,
) -> None:
    """List deliveries, newest first, each with the reason of its last failure."""
    found = query_database(
        partial(
            reads.list_deliveries,
            limit=limit + 1,
            before=None if cursor is None else _id(cursor),
            state=state,
            destination=destination,
            since=since,
            until=until,
        )
    )
    page, next_ = split_page(found, limit, "id")
    rows = [{**row, "error": (row["error"] or "")[:MAX_ERROR_LENGTH]} for row in page]
    columns = ("id", "destination", "state", "attempts", "request_id", "created_at", "error")
    table = partial(print_rows, rows, *columns, none="No deliveries.", wrapped="error")
    print_list(page, table, json=json, next_=next_)


@deliveries.command()
def retry(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids of dead letters.")] = None,
    destination: _Destination = None,
    since: Annotated[datetime | None, since_option("dead letters given up")] = None,
    until: Annotated[datetime | None, until_option("dead letters given up")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Retry all dead letters.")] = False,
    json: Json = False,
) -> None:
    """Deliver dead letters again: each keeps its delivery id and the log of its attempts.

    The exit status is 1 if no dead letter matches.
    """
    selected = DeadLetters(
        ids=[_id(each) for each in ids or ()], destination=destination, since=since, until=until
    )
    if selected == DeadLetters(ids=[]) and not everything:
        raise ReceiverError("say which dead letters: ids, --destination, --since, --until, or --all")

    async def run(settings: Settings, database: Database) -> dict[str, int]:
        done: dict[str, int] = {}
        async with database.read() as connection:
            began = (await connection.execute(select(db_time(0.0)))).scalar_one()
        # A dead letter that fails again at once is not restarted twice by one call.
        once = replace(selected, not_restarted_since=began)
        while True:
            async with database.write() as connection:
                batch = await outbox.restart(connection, once, by=operator(), limit=BATCH_ROWS)
            for name, number in batch.items():
                done[name] = done.get(name, 0) + number
            if sum(batch.values()) < BATCH_ROWS:
                break
        for name in sorted(done.keys() - {each.name for each in settings.all_destinations}):
            print_note(f"{name!r} is not configured: see `receiver deliveries move` and `discard`.")
        return done

    done = with_database(run)
    if json:
        print_json({"restarted": done})
    elif done:
        for name, number in sorted(done.items()):
            stdout.print(f"{name}: {number} restarted")
    else:
        print_note("No dead letter matches.")
        raise typer.Exit(1)


@deliveries.command()
def move(
    destination: _Removed,
    to: Annotated[str, typer.Argument(metavar="TO", help="A destination that is in the settings.")],
    dead: _Dead = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Move the deliveries of a removed or renamed destination to another one.

    Their time limit and their attempts start anew. An event that the other destination has received, or that
    is pending for it, is not sent twice. Replays that have not ended go to the other destination, too.

    Three days after a worker first missed the destination, its deliveries are dead letters, which only --dead
    moves. Deliveries that a worker has claimed stay until it is done with them, or for up to a minute if it
    was killed. The command prints their number, and when to run it again.
    """

    async def run(settings: Settings, database: Database) -> dict[str, int]:
        known = {each.name: each for each in settings.all_destinations}
        _require_removed(destination, known)
        if to not in known:
            raise ReceiverError(f"there is no destination {to!r}; configured: {', '.join(known) or 'none'}")
        if dry_run:
            async with database.read() as connection:
                found = await removed_destinations.count_free(connection, destination, dead=dead)
                had = await removed_destinations.count_free(connection, destination, dead=dead, had_by=to)
            return await _add_claimed(database, destination, {"moved": found - had, "discarded": had})
        waits = known[to].when == "media_stored"
        batch = partial(removed_destinations.move, to=to, waits=waits)
        return await _take(database, destination, batch, to=to, dead=dead)

    _print_taken(with_database(run), destination, json=json, dry_run=dry_run)


@deliveries.command()
def discard(destination: _Removed, dead: _Dead = False, dry_run: DryRun = False, json: Json = False) -> None:
    """Cancel the deliveries of a removed destination: they are not sent any more.

    Replays that have not ended leave the destination out; a replay to this destination alone is canceled.

    Three days after a worker first missed the destination, its deliveries are dead letters, which only --dead
    discards. Deliveries that a worker has claimed stay until it is done with them, or for up to a minute if
    it was killed. The command prints their number, and when to run it again.
    """

    async def run(settings: Settings, database: Database) -> dict[str, int]:
        _require_removed(destination, {each.name for each in settings.all_destinations})
        if dry_run:
            async with database.read() as connection:
                found = await removed_destinations.count_free(connection, destination, dead=dead)
            return await _add_claimed(database, destination, {"discarded": found})
        return await _take(database, destination, removed_destinations.discard, to=None, dead=dead)

    _print_taken(with_database(run), destination, json=json, dry_run=dry_run)


def _require_removed(destination: str, known: Collection[str]) -> None:
    if destination in known:
        raise ReceiverError(
            f"{destination!r} is configured, so workers deliver to it: remove it from the settings first"
        )


async def _take(
    database: Database, destination: str, take: Callable[..., Awaitable[Taken]], *, to: str | None, dead: bool
) -> dict[str, int]:
    """Redirect the replays, then move or discard all deliveries in batches."""
    async with database.read() as connection:
        seen = await workers.find_runs(connection)
    for each in seen:
        if each.is_running and destination_lane(destination) in each.lanes:
            print_note(
                f"{process_name(each)} still has {destination!r} and may add deliveries to it: restart it, "
                "then run this command again."
            )
    async with database.write() as connection:
        replays = await removed_destinations.redirect_replays(connection, destination, to=to)
    done = Taken()
    while True:
        batch = await _take_batch(database, partial(take, destination=destination, dead=dead, by=operator()))
        done += batch
        if batch.moved + batch.discarded < BATCH_ROWS:
            return await _add_claimed(database, destination, vars(done) | {"replays": replays})


async def _add_claimed(database: Database, destination: str, done: dict[str, int]) -> dict[str, int]:
    """Add the number of deliveries that a worker has claimed, and print when to run the command again."""
    async with database.read() as connection:
        claimed, seconds = await removed_destinations.count_under_way(connection, destination)
    if claimed:
        print_note(
            f"{count(claimed, 'delivery', 'deliveries')} to {destination!r} under way: claimed by a running "
            "worker, or by one that was killed. "
            f"Run this command again in {max(1, math.ceil(seconds))} s."
        )
    return done | {"under_way": claimed}


async def _take_batch(database: Database, take: Callable[..., Awaitable[Taken]]) -> Taken:
    for _ in range(MAX_COLLISIONS):
        # If a replay adds the same event for the other destination meanwhile, the next attempt finds it.
        with contextlib.suppress(IntegrityError):
            async with database.write() as connection:
                return await take(connection, limit=BATCH_ROWS)
    raise ReceiverError("a replay is adding the same deliveries: run this command again when it has ended")


def _print_taken(done: dict[str, int], destination: str, *, json: bool, dry_run: bool) -> None:
    if json:
        print_json(done)
        return
    would = "would be " if dry_run else ""
    parts = [f"{number} {would}{name}" for name, number in done.items() if number and name != "under_way"]
    if parts:
        stdout.print(", ".join(parts))
        return
    if not done["under_way"]:
        print_note(f"There is no delivery to {destination!r} to move or discard.")
    raise typer.Exit(1)


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ReceiverError(
            f"{text!r} is not the id of a delivery; `receiver deliveries list` shows them"
        ) from None
