"""`receiver events`: the stored events."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final

import typer
from rich.table import Table
from rich.text import Text

from receiver.api.models import ShownEvent
from receiver.cli.client import missing, with_client
from receiver.cli.completion import complete_destination, complete_model
from receiver.cli.database import no_event
from receiver.cli.export_import import export, import_
from receiver.cli.options import (
    CURSOR_HELP,
    MAX_ID,
    EventKey,
    Json,
    Limit,
    Reason,
    read_pair,
    since_option,
    until_option,
)
from receiver.cli.terminal import (
    count,
    moment,
    print_json,
    print_line,
    print_list,
    print_note,
    print_result,
    print_rows,
    print_title,
    size,
    stdout,
)
from receiver.client import Client
from receiver.db.rows import DeliveryState, EventState, EventStatus
from receiver.db.views import DeliveryWithLog, FileWithLog
from receiver.unrecognized import Recovered

events = typer.Typer(
    help="Show, fetch, export, import, recover, promote and erase events.", no_args_is_help=True
)

_INDENT: Final = " " * 12


@events.command("list")
def list_(
    source: Annotated[str | None, typer.Option(help="Only events of this source.")] = None,
    state: Annotated[EventState | None, typer.Option(help="Only events in this state.")] = None,
    status: Annotated[EventStatus | None, typer.Option(help="Only events with this status.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Only events of this model.", autocompletion=complete_model)
    ] = None,
    caller: Annotated[str | None, typer.Option(help="Only events of this caller's jobs.")] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Only events of jobs with this metadata. Repeatable."),
    ] = None,
    key: Annotated[str | None, typer.Option(help="Only the event of the job with this key.")] = None,
    delivery_state: Annotated[
        DeliveryState | None, typer.Option(help="Only events with a delivery in this state.")
    ] = None,
    destination: Annotated[
        str | None,
        typer.Option(help="Only events with a delivery to it.", autocompletion=complete_destination),
    ] = None,
    since: Annotated[datetime | None, since_option("events received")] = None,
    until: Annotated[datetime | None, until_option("events received")] = None,
    limit: Limit = 50,
    cursor: Annotated[
        int | None, typer.Option("--cursor", "--before", help=CURSOR_HELP, min=0, max=MAX_ID)
    ] = None,
    json: Json = False,
) -> None:
    """List events, newest first."""
    wanted = dict(read_pair(text) for text in metadata or ())
    page = with_client(
        lambda client: client.list_events(
            limit=limit,
            cursor=None if cursor is None else str(cursor),
            source=source,
            state=state,
            status=status,
            model=model,
            caller=caller,
            metadata=wanted,
            idempotency_key=key,
            delivery_state=delivery_state,
            destination=destination,
            since=since,
            until=until,
        )
    )
    columns = ("seq", "request_id", "status", "model", "state", "received_at", "media", "deliveries")
    table = partial(print_rows, page.data, *columns, none="No events.")
    print_list(page.data, table, json=json, next_=page.next)


@events.command()
def show(
    key: EventKey,
    exact: Annotated[
        bool, typer.Option("--exact", help="With --json: the exact bytes of the body, too, as base64.")
    ] = False,
    json: Json = False,
) -> None:
    """Show one event with its receipts, its files, its deliveries and every attempt at them."""
    with missing(no_event(key)):
        event = with_client(lambda client: client.show_event(key, exact=exact))
    print_result(event, partial(_print_event, event), json=json)


@events.command()
def fetch(
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="Clipia's id of the generation.")],
    source: Annotated[
        str | None,
        typer.Option(
            help="The source whose webhook would have brought it. Required if several are configured and the "
            "job was submitted elsewhere."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Ask Clipia for a result that never arrived, and store it as an event, which is then forwarded.

    It is also for jobs that were submitted elsewhere with the same account. If the event is stored already,
    it is only shown.
    """

    async def run(client: Client) -> tuple[bool, ShownEvent]:
        found = await client.fetch_event(request_id, source=source)
        return found["stored"], await client.show_event(found["event_id"])

    is_new, event = with_client(run)
    print_note("The result is stored." if is_new else "The event was stored before; Clipia was not asked.")
    print_result(event, partial(_print_event, event), json=json)


events.command()(export)
events.command("import")(import_)


@events.command()
def recover(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the result; change nothing.")] = False,
    reason: Reason = None,
    json: Json = False,
) -> None:
    """Recover events that an earlier release did not recognize and this release can read.

    Each becomes the event of its request_id and is forwarded like a new one. If that event has arrived in the
    meantime, it becomes one more receipt of it. Run it with --dry-run first. You can stop it and run it again
    at any time.
    """

    async def run(client: Client) -> list[Recovered]:
        found: list[Recovered] = []
        cursor = None
        while True:
            page = await client.recover_events(cursor=cursor, dry_run=dry_run, reason=reason)
            found += page.data
            cursor = page.next
            for each in page.data:
                if not json and each.outcome != "unrecognized":
                    print_line(f"{each.outcome:<9}  {each.request_id}  event {each.event_id}")
            if cursor is None:
                return found

    found = with_client(run)
    if json:
        print_json({"data": [asdict(each) for each in found], "next": None})
        return
    counts = Counter(each.outcome for each in found)
    verb = "to recover" if dry_run else "recovered"
    print_note(
        f"{count(counts['accepted'], 'event')} {verb}; {counts['duplicate']} had arrived again, "
        f"{counts['conflict']} with another body; {counts['unrecognized']} cannot be read"
    )


@events.command()
def promote(
    key: EventKey,
    receipt: Annotated[
        int,
        typer.Argument(
            metavar="RECEIPT", min=0, max=MAX_ID, help="Its number in `receiver events show EVENT`."
        ),
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the result; change nothing.")] = False,
    reason: Reason = None,
    json: Json = False,
) -> None:
    """Make the body of a conflicting webhook the body of its event, and send it to all destinations.

    The former body is kept on a receipt, so you can promote it in turn. Deliveries of it that are pending are
    canceled; messages that were sent are not taken back. Run it with --dry-run first.
    """
    done = with_client(lambda client: client.promote_receipt(key, receipt, dry_run=dry_run, reason=reason))
    if json:
        print_json(asdict(done))
        return
    verb = "would get" if dry_run else "has"
    print_line(
        f"Event {done.event_id} {verb} the body of the receipt {done.receipt}: its status was "
        f"{done.status_before} and {'would be' if dry_run else 'is'} {done.status}."
    )
    print_line(
        f"Files: {done.files_added} new, {done.files_kept} kept, {done.files_superseded} superseded. "
        f"Deliveries canceled: {done.deliveries_canceled}."
    )
    print_line(f"Destinations that get it: {', '.join(done.destinations) or 'none'}.")
    if done.replay_id is not None:
        print_line(f"Progress: receiver replays show {done.replay_id}")
    if done.former_receipt is not None:
        print_line(f"The former body is on the receipt {done.former_receipt}.")


@events.command()
def erase(key: EventKey, reason: Reason = None, json: Json = False) -> None:
    """Erase one event for good: its body, its files and deliveries, and the input and metadata of its job.

    A tombstone stays, so that a late webhook is still a duplicate. Forwarded messages, exports and backups
    are not changed. An event with a pending file or delivery cannot be erased.
    """
    with missing(no_event(key)):
        erased = with_client(lambda client: client.erase_event(key, reason=reason))
    if json:
        print_json(asdict(erased))
        return
    print_line(f"Event {erased.id} is erased, {count(erased.files, 'file')} deleted.")
    for uri in erased.files_elsewhere:
        print_line(f"Not in the storage of RECEIVER_STORAGE_URL; delete it yourself: {uri}")


def _print_event(event: ShownEvent) -> None:
    facts = Table(box=None, show_header=False)
    if event.get("recoverable"):
        stdout.print("This release can read it: run `receiver events recover`.\n")
    values: Mapping[str, Any] = event
    for name in ("id", "request_id", "source", "origin", "state", "reason", "status", "model", "cost"):
        if values[name] is not None:
            facts.add_row(name, Text(str(values[name])))
    facts.add_row("received", moment(event["received_at"]))
    stdout.print(facts)
    _print_receipts(event)
    print_title("Media", event["media"])
    for file in event["media"]:
        _print_file(file)
    print_title("Deliveries", event["deliveries"])
    for delivery in event["deliveries"]:
        _print_work(delivery, delivery["destination"])


def _print_receipts(event: ShownEvent) -> None:
    print_title("Receipts", event["receipts"])
    for receipt in event["receipts"]:
        more = f"  and {receipt['repeated']:,} more" if receipt["repeated"] else ""
        print_line(
            f"  {receipt['seq']:>3}  {moment(receipt['received_at'])}  {receipt['outcome']}  "
            f"secret {receipt['secret_id']}{more}"
        )
    unseen = event["receipts_total"] - sum(1 + receipt["repeated"] for receipt in event["receipts"])
    if unseen:
        print_line(f"  … and {unseen:,} more requests")


def _print_file(file: FileWithLog) -> None:
    field = f"{file['field']}: " if file["field"] else ""
    lines = [file["uri"], None, file["warning"]]
    if file["size"] is not None:
        lines[1] = f"{size(file['size'])}, {file['content_type']}, sha256 {file['sha256']}"
    _print_work(file, f"{file['position']:02d}-{file['variant']} {field}{file['url']}", lines)


def _print_work(work: FileWithLog | DeliveryWithLog, label: str, lines: Iterable[str | None] = ()) -> None:
    print_line(f"  {work['state']:<9} {label}")
    for line in filter(None, lines):
        print_line(f"{_INDENT}{line}")
    if not work["attempt_log"] and work["error"]:
        print_line(f"{_INDENT}{work['error']}")
    for attempt in work["attempt_log"]:
        line = f"{_INDENT}attempt {attempt['number']}: {moment(attempt['started_at'])} {attempt['outcome']}"
        error = f": {attempt['error']}" if attempt["error"] else ""
        print_line(f"{line} after {attempt['duration_ms']} ms{error}")
    if work["state"] == "pending":
        due = moment(work["next_attempt_at"]) if work["next_attempt_at"] else "when its media is stored"
        print_line(f"{_INDENT}next attempt: {due}")
