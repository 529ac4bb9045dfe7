"""`receiver deliveries`: what goes where, and dead letters."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.table import Table
from rich.text import Text
from sqlalchemy import select

from receiver.cli.database import with_database
from receiver.cli.terminal import Json, moment, print_json, stderr, stdout, user_name, wide
from receiver.db import ledger, outbox
from receiver.db.clock import db_time
from receiver.db.engine import Database
from receiver.db.outbox import DeadLetters
from receiver.db.rows import DeliveryState
from receiver.errors import ReceiverError
from receiver.settings import Settings

BATCH = 1000

deliveries = typer.Typer(help="Look at deliveries, and retry dead letters.", no_args_is_help=True)

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

    async def query(_settings: Settings, database: Database) -> list[dict[str, Any]]:
        async with database.read() as connection:
            return await ledger.list_deliveries(
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
    for name in ("id", "destination", "state", "tries", "request", "made", "reason"):
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

    async def run(_settings: Settings, database: Database) -> dict[str, int]:
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


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise ReceiverError(f"{text!r} is no delivery's id; `receiver deliveries list` shows them") from None


def _utc(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time else None
