"""`receiver deliveries`: what goes where, and dead letters."""

import contextlib
import math
from collections.abc import Awaitable, Callable, Collection
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated
from uuid import UUID

import typer
from rich.table import Table
from rich.text import Text
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from receiver.cli.database import with_database
from receiver.cli.terminal import Json, moment, print_json, stderr, stdout, user_name, wide
from receiver.cli.waiting import name_of
from receiver.core.lane_names import destination_lane
from receiver.db import outbox, reads, unserved, workers
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.outbox import DeadLetters
from receiver.db.rows import DeliveryState
from receiver.db.unserved import Taken
from receiver.db.views import ListedDelivery
from receiver.errors import ReceiverError
from receiver.settings import Settings

BATCH = 1000
COLLISIONS = 5

deliveries = typer.Typer(
    help="Look at deliveries, retry dead letters, and move or discard those of a removed destination.",
    no_args_is_help=True,
)

_Dead = Annotated[bool, typer.Option("--dead", help="Dead letters, too.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count.")]
_Destination = Annotated[str | None, typer.Option(help="Only to this destination.")]


@deliveries.command("list")
def list_(
    state: Annotated[DeliveryState | None, typer.Option(help="Only in this state.")] = None,
    destination: _Destination = None,
    since: Annotated[datetime | None, typer.Option(help="Only made at or after this time (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only made before this time (UTC).")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=1000)] = 50,
    before: Annotated[str | None, typer.Option(help="The next page: the id of the last row.")] = None,
    json: Json = False,
) -> None:
    """List deliveries, newest first, with the reason of the last failure."""
    cursor = None if before is None else _id(before)

    async def query(_settings: Settings, database: Database) -> list[ListedDelivery]:
        async with database.read() as connection:
            return await reads.list_deliveries(
                connection,
                limit=limit,
                before=cursor,
                state=state,
                destination=destination,
                since=_utc(since),
                until=_utc(until),
            )

    found = with_database(query)
    if json:
        print_json(found)
        return
    table = Table(box=None)
    for name in ("id", "destination", "state", "attempts", "request", "made", "reason"):
        # An id that is cut off is of no use; a reason may take several lines.
        table.add_column(name, no_wrap=name != "reason")
    for row in found:
        table.add_row(
            str(row["id"]),
            row["destination"],
            row["state"],
            str(row["attempts"]),
            Text(row["request_id"]),
            moment(row["created_at"]),
            Text((row["error"] or "-")[:100]),
        )
    wide.print(table if found else "No deliveries.")


@deliveries.command()
def retry(
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...", help="Dead letters by id.")] = None,
    destination: _Destination = None,
    since: Annotated[datetime | None, typer.Option(help="Only given up at or after this time (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only given up before this time (UTC).")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All dead letters.")] = False,
    json: Json = False,
) -> None:
    """Have dead letters delivered after all: the same delivery id, with all its tries before it."""
    which = DeadLetters(
        ids=[_id(each) for each in ids or ()],
        destination=destination,
        since=_utc(since),
        until=_utc(until),
    )
    if which == DeadLetters(ids=[]) and not everything:
        raise ReceiverError("say which dead letters: ids, --destination, --since, --until, or --all")
    by = f"{user_name()} on the command line"

    async def run(settings: Settings, database: Database) -> dict[str, int]:
        done: dict[str, int] = {}
        async with database.read() as connection:
            began = (await connection.execute(select(db_time(0.0)))).scalar_one()
        # Those that are refused again at once are for the next call.
        once = replace(which, not_restarted_since=began)
        while True:
            async with database.write() as connection:
                batch = await outbox.restart(connection, once, by=by, limit=BATCH)
            for name, count in batch.items():
                done[name] = done.get(name, 0) + count
            if sum(batch.values()) < BATCH:
                break
        for name in sorted(done.keys() - {each.name for each in settings.all_destinations}):
            stderr.print(f"{name!r} is not configured: see `receiver deliveries move` and `discard`.")
        return done

    done = with_database(run)
    if json:
        print_json({"restarted": done})
    elif done:
        for name, count in sorted(done.items()):
            stdout.print(f"{name}: {count} restarted")
    else:
        stderr.print("No dead letter fits.")
        raise typer.Exit(1)


@deliveries.command()
def move(
    destination: Annotated[str, typer.Argument(metavar="FROM", help="One that is not configured any more.")],
    to: Annotated[str, typer.Argument(metavar="TO", help="One that is.")],
    dead: _Dead = False,
    dry_run: _DryRun = False,
    json: Json = False,
) -> None:
    """Give the deliveries of a removed or renamed destination to another one.

    They have all their time and tries again. An event that the other one has got, or is still tried with, is
    not sent twice. Replays that are not through go to the other one, too.

    What is not moved is a dead letter three days after a worker first missed the destination: then `--dead`
    moves it. A delivery that a worker has under way is left, and so is one of a killed worker for a minute at
    most: it is told, so repeat this.
    """

    async def run(settings: Settings, database: Database) -> dict[str, int]:
        known = {each.name: each for each in settings.all_destinations}
        _require_removed(destination, known)
        if to not in known:
            raise ReceiverError(f"there is no destination {to!r}; configured: {', '.join(known) or 'none'}")
        if dry_run:
            async with database.read() as connection:
                found = await unserved.count_free(connection, destination, dead=dead)
                had = await unserved.count_free(connection, destination, dead=dead, had_by=to)
            return await _with_rest(database, destination, {"moved": found - had, "discarded": had})
        waits = known[to].when == "media_stored"
        batch = partial(unserved.move, to=to, waits=waits)
        return await _take(database, destination, batch, to=to, dead=dead)

    _print_taken(with_database(run), destination, json=json, dry_run=dry_run)


@deliveries.command()
def discard(
    destination: Annotated[str, typer.Argument(metavar="FROM", help="One that is not configured any more.")],
    dead: _Dead = False,
    dry_run: _DryRun = False,
    json: Json = False,
) -> None:
    """End the deliveries of a removed destination as canceled: nothing of them is sent any more.

    Replays that are not through leave it out; one that was for it alone is canceled.

    What is left alone is a dead letter three days after a worker first missed the destination: then `--dead`
    discards it. A delivery that a worker has under way is left, and so is one of a killed worker for a minute
    at most: it is told, so repeat this.
    """

    async def run(settings: Settings, database: Database) -> dict[str, int]:
        _require_removed(destination, {each.name for each in settings.all_destinations})
        if dry_run:
            async with database.read() as connection:
                found = await unserved.count_free(connection, destination, dead=dead)
            return await _with_rest(database, destination, {"discarded": found})
        return await _take(database, destination, unserved.discard, to=None, dead=dead)

    _print_taken(with_database(run), destination, json=json, dry_run=dry_run)


def _require_removed(destination: str, known: Collection[str]) -> None:
    if destination in known:
        raise ReceiverError(
            f"{destination!r} is configured, so its deliveries are tried: remove it from the settings first"
        )


async def _take(
    database: Database, destination: str, take: Callable[..., Awaitable[Taken]], *, to: str | None, dead: bool
) -> dict[str, int]:
    """Move or discard all of them, a batch at a time, and say what replays do from now on."""
    by = f"{user_name()} on the command line"
    async with database.read() as connection:
        seen = await workers.find_runs(connection)
    for each in seen:
        if each.is_running and destination_lane(destination) in each.lanes:
            stderr.print(
                f"{name_of(each)} still has {destination!r} and may add to it: restart it, and repeat this."
            )
    async with database.write() as connection:
        replays = await unserved.redirect_replays(connection, destination, to=to)
    done = Taken()
    while True:
        batch = await _take_batch(database, partial(take, destination=destination, dead=dead, by=by))
        done += batch
        if batch.moved + batch.discarded < BATCH:
            return await _with_rest(database, destination, vars(done) | {"replays": replays})


async def _with_rest(database: Database, destination: str, done: dict[str, int]) -> dict[str, int]:
    """Add how many deliveries are left because a worker has claimed them, and say when to come back."""
    async with database.read() as connection:
        count, seconds = await unserved.count_under_way(connection, destination)
    if count:
        stderr.print(
            f"{count} to {destination!r} under way: a worker has claimed them, or had when it was killed. "
            f"Repeat this in {max(1, math.ceil(seconds))} s."
        )
    return done | {"under_way": count}


async def _take_batch(database: Database, take: Callable[..., Awaitable[Taken]]) -> Taken:
    for _ in range(COLLISIONS):
        # A replay may send an event to the other destination meanwhile: the next time it is found.
        with contextlib.suppress(IntegrityError):
            async with database.write() as connection:
                return await take(connection, limit=BATCH)
    raise ReceiverError("a replay adds the same deliveries right now: call this again later")


def _print_taken(done: dict[str, int], destination: str, *, json: bool, dry_run: bool) -> None:
    if json:
        print_json(done)
        return
    would = "would be " if dry_run else ""
    parts = [f"{count} {would}{name}" for name, count in done.items() if count and name != "under_way"]
    if parts:
        stdout.print(", ".join(parts))
        return
    if not done["under_way"]:
        stderr.print(f"No delivery to {destination!r} is left to do.")
    raise typer.Exit(1)


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ReceiverError(f"{text!r} is no delivery's id; `receiver deliveries list` shows them") from None


def _utc(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time else None
