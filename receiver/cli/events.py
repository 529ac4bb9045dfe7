"""`receiver events`: the ledger of what came in."""

import base64
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final, TypeVar

import orjson
import typer
from rich.table import Table
from rich.text import Text
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver import recovery, retention
from receiver.cli.database import with_database
from receiver.cli.terminal import (
    Json,
    moment,
    print_json,
    print_line,
    print_title,
    progress_bar,
    size,
    stderr,
    stdout,
    wide,
)
from receiver.core.lenient_json import display_fields
from receiver.db import reads, transfer
from receiver.db.database import Database
from receiver.db.rows import EventState, EventStatus
from receiver.db.views import DeliveryWithLog, EventDetails, EventSummary, FileWithLog
from receiver.errors import ReceiverError
from receiver.files import open_private
from receiver.media import open_storage
from receiver.recovery import Recovered
from receiver.retention import Erased
from receiver.settings import Settings

events = typer.Typer(help="Look at stored events, export, import and erase them.", no_args_is_help=True)

T = TypeVar("T")

BATCH: Final = 200
"""Lines of an export that are read or written in one transaction."""


@events.command("list")
def list_(
    source: Annotated[str | None, typer.Option(help="Only of this source.")] = None,
    state: Annotated[EventState | None, typer.Option(help="Only in this state.")] = None,
    status: Annotated[EventStatus | None, typer.Option(help="Only with this status.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    since: Annotated[datetime | None, typer.Option(help="Only received at or after this time (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only received before this time (UTC).")] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=1000)] = 50,
    before: Annotated[int | None, typer.Option(help="The next page: the `seq` of the last row.")] = None,
    json: Json = False,
) -> None:
    """List events, newest first."""

    async def query(connection: AsyncConnection) -> list[EventSummary]:
        return await reads.list_events(
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

    async def query(connection: AsyncConnection) -> EventDetails | None:
        return await reads.show_event(connection, key)

    event = _read(query)
    if event is None:
        raise ReceiverError(f"there is no event with the id or request_id {key!r}")
    if not json:
        _print_event(event)
        return
    shown = {name: value for name, value in event.items() if name != "body"}
    shown["receipts"] = [
        {**each, "body": None if each["body"] is None else base64.b64encode(each["body"]).decode("ascii")}
        for each in event["receipts"]
    ]
    print_json(shown | display_fields(event["body"]))


@events.command()
def export(
    file: Annotated[str, typer.Argument(help="Where to: a file, or - for standard output.")],
    since: Annotated[datetime | None, typer.Option(help="Only from this time on (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Only before this time (UTC).")] = None,
) -> None:
    """Write the ledger as JSON lines: events with their raw bodies and all that hangs on them, jobs, replays.

    Stop the receiver's workers first, or what they do meanwhile is not in it.
    """

    async def run(_settings: Settings, database: Database) -> dict[str, int]:
        bounds = {"since": since.replace(tzinfo=UTC) if since else None}
        bounds["until"] = until.replace(tzinfo=UTC) if until else None
        async with database.read() as connection:
            counts = await transfer.count(connection, **bounds)
        with _open_output(file) as output, progress_bar() as progress:
            task = progress.add_task("lines", total=sum(counts.values()))
            output.write(orjson.dumps({"type": "ledger", "version": transfer.VERSION}) + b"\n")
            written = 0
            for kind in transfer.KINDS:
                after = 0
                while True:
                    async with database.read() as connection:
                        lines, after = await transfer.read(
                            connection, kind, after=after, limit=BATCH, **bounds
                        )
                    if not lines:
                        break
                    output.writelines(orjson.dumps(line) + b"\n" for line in lines)
                    written += len(lines)
                    progress.advance(task, len(lines))
            output.write(orjson.dumps({"type": "end", "lines": written}) + b"\n")
        return counts

    counts = with_database(run)
    _say(", ".join(f"{count} {kind}s" for kind, count in counts.items()) + " exported")


@events.command("import")
def import_(file: Annotated[str, typer.Argument(help="An export: a file, or - for standard input.")]) -> None:
    """Read an export into this database. What is here already stays as it is, so it can be repeated.

    What was delivered stays delivered; what was pending is delivered from here. Leave the old workers off.
    """

    async def run(_settings: Settings, database: Database) -> Counter[str]:
        done: Counter[str] = Counter()
        with _open_input(file) as source, progress_bar() as progress:
            task = progress.add_task("lines", total=None)
            for number, lines in _batches(source):
                try:
                    async with database.write() as connection:
                        done += await transfer.write(connection, lines)
                except (AttributeError, KeyError, TypeError, ValueError, StatementError) as error:
                    # A driver's text could quote the statement and its values.
                    reason = "" if isinstance(error, StatementError) else f": {error}"
                    last = number + len(lines) - 1
                    raise ReceiverError(
                        f"{file}: one of the lines {number} to {last} is not from an export "
                        f"({type(error).__name__}{reason}); the lines before them are imported"
                    ) from None
                progress.advance(task, len(lines))
        return done

    done = with_database(run)
    _say(", ".join(f"{count} {what}" for what, count in sorted(done.items())) or "nothing in it")


@events.command()
def recover(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done.")] = False,
    json: Json = False,
) -> None:
    """Take up events that were not recognized when they came and that this release can read.

    Each becomes the event of its request_id and is forwarded like a new one; if that has come meanwhile, it
    becomes one more delivery of it. Try it with --dry-run first. It can be ended and repeated at any time.
    """

    async def run(_settings: Settings, database: Database) -> list[Recovered]:
        found = []
        async for each in recovery.recover(database, dry_run=dry_run):
            found.append(each)
            if not json and each.outcome != "unrecognized":
                print_line(f"{each.outcome:<9}  {each.request_id}  event {each.event_id}")
        return found

    found = with_database(run)
    if json:
        print_json([asdict(each) for each in found])
        return
    counts = Counter(each.outcome for each in found)
    verb = "to take up" if dry_run else "taken up"
    _say(
        f"{counts['accepted']} events {verb}; {counts['duplicate']} had come again, "
        f"{counts['conflict']} with another body; {counts['unrecognized']} are not readable"
    )


@events.command()
def erase(
    key: Annotated[str, typer.Argument(metavar="ID", help="An event's id, or Clipia's request_id.")],
    json: Json = False,
) -> None:
    """Erase one event for good: its body, its files and deliveries, and the input and metadata of its job.

    A tombstone stays, so that a late webhook is still a duplicate. Messages that were forwarded, exports and
    backups are not touched. While something is left to do for the event it is refused.
    """

    async def run(settings: Settings, database: Database) -> Erased | None:
        storage = open_storage(settings.storage_url.get_secret_value())
        try:
            return await retention.erase(database, storage, key)
        finally:
            await storage.close()

    erased = with_database(run)
    if erased is None:
        raise ReceiverError(f"there is no event with the id or request_id {key!r}")
    if json:
        print_json(asdict(erased))
        return
    print_line(f"Event {erased.id} is erased, {erased.files} files deleted.")
    for uri in erased.files_elsewhere:
        print_line(f"In another storage than RECEIVER_STORAGE_URL, delete it there: {uri}")


def _batches(source: Iterable[bytes]) -> Iterator[tuple[int, list[transfer.Line]]]:
    """Yield lines in batches, each with the number of its first line; check the head."""
    numbered = enumerate(map(_line, source), start=1)
    _, head = next(numbered, (0, {}))
    if head.get("type") != "ledger" or head.get("version") != transfer.VERSION:
        raise ReceiverError(f"this is no export of version {transfer.VERSION}: its first line says otherwise")
    last: transfer.Line = {}
    read = 0
    while batch := list(islice(numbered, BATCH)):
        lines = [line for _, line in batch]
        if lines[-1].get("type") == "end":
            last = lines.pop()
        read += len(lines)
        if lines:
            yield batch[0][0], lines
    if last.get("lines") != read:
        raise ReceiverError(
            "the export ends before its end: was it cut off? What there was of it is imported"
        )


def _line(text: bytes) -> transfer.Line:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ReceiverError(f"a line is not JSON: {error}; was the export cut off?") from None
    if not isinstance(value, dict):
        raise ReceiverError("a line is no JSON object")
    return value


@contextmanager
def _open_output(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdout.buffer
        return
    try:
        with open(name, "xb", opener=open_private) as output:
            yield output
    except OSError as error:
        raise ReceiverError(f"{name} cannot be written: {error.strerror}") from None


@contextmanager
def _open_input(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
        return
    try:
        with Path(name).open("rb") as source:
            yield source
    except OSError as error:
        raise ReceiverError(f"{name} cannot be read: {error.strerror}") from None


def _say(message: str) -> None:
    stderr.print(message)


def _print_event(event: EventDetails) -> None:
    facts = Table(box=None, show_header=False)
    if event.get("recoverable"):
        stdout.print("This release can read it: `receiver events recover` takes it up.\n")
    values: Mapping[str, Any] = event
    for name in ("id", "request_id", "source", "origin", "state", "reason", "status", "model", "cost"):
        if values[name] is not None:
            facts.add_row(name, Text(str(values[name])))
    facts.add_row("received", moment(event["received_at"]))
    stdout.print(facts)
    print_title("Receipts", event["receipts"])
    for receipt in event["receipts"]:
        more = f"  and {receipt['repeated']:,} more" if receipt["repeated"] else ""
        stdout.print(
            f"  {moment(receipt['received_at'])}  {receipt['outcome']}  secret {receipt['secret_id']}{more}"
        )
    unseen = event["receipts_total"] - sum(1 + receipt["repeated"] for receipt in event["receipts"])
    if unseen:
        stdout.print(f"  … and {unseen:,} deliveries on further receipts")
    print_title("Media", event["media"])
    for file in event["media"]:
        field = f"{file['field']}: " if file["field"] else ""
        lines = [file["uri"], None, file["warning"]]
        if file["size"] is not None:
            lines[1] = f"{size(file['size'])}, {file['content_type']}, sha256 {file['sha256']}"
        _print_work(file, f"{file['position']:02d}-{file['variant']} {field}{file['url']}", lines)
    print_title("Deliveries", event["deliveries"])
    for delivery in event["deliveries"]:
        _print_work(delivery, delivery["destination"])


def _print_work(work: FileWithLog | DeliveryWithLog, label: str, lines: Iterable[str | None] = ()) -> None:
    print_line(f"  {work['state']:<9} {label}")
    for line in filter(None, lines):
        print_line(f"            {line}")
    if not work["attempt_log"] and work["error"]:
        print_line(f"            {work['error']}")
    for attempt in work["attempt_log"]:
        line = (
            f"            attempt {attempt['number']}: {moment(attempt['started_at'])} {attempt['outcome']}"
        )
        error = f": {attempt['error']}" if attempt["error"] else ""
        print_line(f"{line} after {attempt['duration_ms']} ms{error}")
    if work["state"] == "pending":
        due = moment(work["next_attempt_at"]) if work["next_attempt_at"] else "when its media is stored"
        print_line(f"            next attempt: {due}")


def _read(query: Callable[[AsyncConnection], Awaitable[T]]) -> T:
    async def use(_settings: Settings, database: Database) -> T:
        async with database.read() as connection:
            return await query(connection)

    return with_database(use)


def _counts(states: dict[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "-"
