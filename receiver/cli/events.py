"""`receiver events`: the ledger of what came in."""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import orjson
import typer
from rich.table import Table
from rich.text import Text
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.cli.terminal import Json, moment, print_json, print_line, print_title, size, stdout, wide
from receiver.db import ledger, migrate
from receiver.db.engine import Database
from receiver.errors import ReceiverError
from receiver.settings import Settings

events = typer.Typer(help="Look at stored events.", no_args_is_help=True)

T = TypeVar("T")


@events.command("list")
def list_(
    source: Annotated[str | None, typer.Option(help="Only of this source.")] = None,
    state: Annotated[
        str | None, typer.Option(help="Only in this state: received, fetching, ready or unrecognized.")
    ] = None,
    status: Annotated[str | None, typer.Option(help="Only with this status: OK or ERROR.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Only received at or after this time (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only received before this time (UTC).")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=1000)] = 50,
    before: Annotated[int | None, typer.Option(help="The next page: the `seq` of the last row.")] = None,
    json: Json = False,
) -> None:
    """List events, newest first."""

    async def query(connection: AsyncConnection) -> list[dict[str, Any]]:
        return await ledger.list_events(
            connection,
            limit=limit,
            before=before,
            source=source,
            state=state,
            status=status,
            model=model,
            since=since.replace(tzinfo=UTC) if since else None,
            until=until.replace(tzinfo=UTC) if until else None,
        )

    found = _read(query)
    if json:
        print_json(found)
        return
    table = Table(box=None)
    for name in ("seq", "request", "status", "model", "state", "received", "media", "deliveries"):
        table.add_column(name, no_wrap=True)
    for row in found:
        table.add_row(
            str(row["seq"]),
            Text(row["request_id"]),
            row["status"] or "-",
            Text(row["model"] or "-"),
            row["state"],
            moment(row["received_at"]),
            _counts(row["media"]),
            _counts(row["deliveries"]),
        )
    wide.print(table if found else "No events.")


@events.command()
def show(
    key: Annotated[str, typer.Argument(metavar="ID", help="An event's id, or Clipia's request_id.")],
    json: Json = False,
) -> None:
    """Show one event with its receipts, media, deliveries and every try at them."""

    async def query(connection: AsyncConnection) -> dict[str, Any] | None:
        return await ledger.show_event(connection, key)

    event = _read(query)
    if event is None:
        raise ReceiverError(f"there is no event with the id or request_id {key!r}")
    raw = event.pop("body")
    try:
        event["body"] = orjson.loads(raw)
    except orjson.JSONDecodeError:
        event["body_base64"] = base64.b64encode(raw).decode()
    if json:
        print_json(event)
        return
    _print_event(event)


def _print_event(event: dict[str, Any]) -> None:
    facts = Table(box=None, show_header=False)
    for name in ("id", "request_id", "source", "origin", "state", "reason", "status", "model", "cost"):
        if event[name] is not None:
            facts.add_row(name, Text(str(event[name])))
    facts.add_row("received", moment(event["received_at"]))
    stdout.print(facts)
    print_title("Receipts", event["receipts"])
    for receipt in event["receipts"]:
        stdout.print(
            f"  {moment(receipt['received_at'])}  {receipt['outcome']}  secret {receipt['secret_id']}"
        )
    print_title("Media", event["media"])
    for file in event["media"]:
        _print_work(file, f"{file['position']:02d}-{file['variant']} {file['url']}")
    print_title("Deliveries", event["deliveries"])
    for delivery in event["deliveries"]:
        _print_work(delivery, delivery["destination"])


def _print_work(work: dict[str, Any], label: str) -> None:
    print_line(f"  {work['state']:<9} {label}")
    if work.get("uri"):
        print_line(f"            {work['uri']}")
        print_line(f"            {size(work['size'])}, {work['content_type']}, sha256 {work['sha256']}")
    for attempt in work["tries"]:
        line = f"            try {attempt['number']}: {moment(attempt['started_at'])} {attempt['outcome']}"
        error = f": {attempt['error']}" if attempt["error"] else ""
        print_line(f"{line} in {attempt['duration_ms']} ms{error}")
    if work["state"] == "pending":
        due = moment(work["next_attempt_at"]) if work["next_attempt_at"] else "when its media is stored"
        print_line(f"            next try: {due}")


def _read(query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    settings = Settings.load()

    async def run() -> T:
        database = Database(settings.database_url.get_secret_value())
        try:
            await migrate.require_current(database)
            async with database.read() as connection:
                return await query(connection)
        finally:
            await database.close()

    return asyncio.run(run())


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "-"
