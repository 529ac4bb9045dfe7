"""`receiver media`: check the stored files, make links to them, and give up downloads."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final

import typer

from receiver.cli.database import find_event, no_event, opened_storage, with_database
from receiver.cli.options import DryRun, EventKey, Json, since_option
from receiver.cli.terminal import (
    count,
    operator,
    print_json,
    print_line,
    print_note,
    print_result,
    progress_bar,
    stdout,
)
from receiver.db import outbox, reads
from receiver.db.database import Database
from receiver.db.selection import Selection
from receiver.db.views import FileToVerify
from receiver.errors import ReceiverError, StorageUnavailable
from receiver.media import Storage
from receiver.media.verify import verify as verify_file
from receiver.settings import Settings

PAGE_ROWS: Final = 200

media = typer.Typer(
    help="Verify stored files, print links to them, and give up downloads.", no_args_is_help=True
)


@dataclass
class _Findings:
    intact: int = 0
    flagged: list[dict[str, Any]] = field(default_factory=list)
    """Intact files that were stored with a warning."""
    damaged: list[dict[str, Any]] = field(default_factory=list)

    async def add(self, storage: Storage, row: FileToVerify) -> None:
        errors: list[str] = []

        def keep(_key: str, error: StorageUnavailable) -> None:
            errors.append(str(error))

        shown = {name: value for name, value in row.items() if name not in ("url", "field")}
        finding = await verify_file(
            storage,
            row["storage_key"],
            kind=row["kind"],
            url=row["url"],
            field=row["field"],
            size=row["size"],
            sha256=row["sha256"],
            on_unreadable=keep,
        )
        if finding != "intact":
            self.damaged.append(shown | {"finding": finding, "error": errors[0] if errors else None})
            return
        self.intact += 1
        if row["warning"]:
            self.flagged.append(shown)


@media.command()
def verify(
    since: Annotated[datetime | None, since_option("files stored")] = None, json: Json = False
) -> None:
    """Read every stored file and compare it with its checksum. The exit status is 0 if all are intact.

    A web page that was stored in place of a file is damaged. A file that was stored with a warning is intact
    if it has not changed since.
    """

    async def run(settings: Settings, database: Database) -> _Findings:
        findings = _Findings()
        async with opened_storage(settings) as storage:
            async with database.read() as connection:
                total = await reads.count_stored(connection, since=since)
            with progress_bar() as progress:
                task = progress.add_task("files", total=total)
                async for row in _stored_files(database, since):
                    await findings.add(storage, row)
                    progress.advance(task)
        return findings

    findings = with_database(run)
    print_result(vars(findings), partial(_print_findings, findings), json=json)
    if findings.damaged:
        raise typer.Exit(1)


async def _stored_files(database: Database, since: datetime | None) -> AsyncIterator[FileToVerify]:
    after = None
    while True:
        async with database.read() as connection:
            page = await reads.list_stored(connection, limit=PAGE_ROWS, after=after, since=since)
        for row in page:
            yield row
        if not page:
            return
        after = page[-1]["id"]


def _print_findings(found: _Findings) -> None:
    for row in found.damaged:
        error = f": {row['error']}" if row["error"] else ""
        print_line(f"{row['finding']:<10} {row['uri']} of {row['request_id']}{error}")
    for row in found.flagged:
        print_line(f"{'flagged':<10} {row['uri']} of {row['request_id']}: {row['warning']}")
    warned = f" ({len(found.flagged)} with a warning)" if found.flagged else ""
    stdout.print(f"{found.intact} intact{warned}, {len(found.damaged)} damaged")
    if found.damaged:
        print_line(
            "Download damaged files again with `receiver replay --media REQUEST_ID...`; --to NAME sends the "
            "messages to one destination only."
        )
    if found.flagged:
        print_line("Download flagged files again with `receiver replay --media --force REQUEST_ID...`.")


@media.command()
def link(
    key: EventKey,
    hours: Annotated[int, typer.Option(help="Hours until the links expire.", min=1, max=168)] = 1,
    json: Json = False,
) -> None:
    """Print links to an event's stored files that work without credentials for the bucket."""

    async def run(settings: Settings, database: Database) -> list[dict[str, Any]]:
        async with database.read() as connection:
            event = await find_event(connection, key, reads.show_event)
        stored = [row for row in event["media"] if row["state"] == "stored"]
        async with opened_storage(settings) as storage:
            return [await _link(storage, row, hours * 3600) for row in stored]

    links = with_database(run)
    if json:
        print_json({"data": links, "next": None})
        return
    for each in links:
        print_line(each["link"])


async def _link(storage: Storage, row: Mapping[str, Any], seconds: int) -> dict[str, Any]:
    if row["uri"] != storage.uri(row["storage_key"]):
        raise ReceiverError(f"{row['uri']} is not in the storage of RECEIVER_STORAGE_URL")
    found = await storage.link(row["storage_key"], seconds=seconds)
    if found is None:
        raise ReceiverError(
            "only files in a bucket (s3://, gs://, az://) can have links; these are in a folder"
        )
    return {name: row[name] for name in ("variant", "uri", "content_type")} | {"link": found}


@media.command("give-up")
def give_up(
    event: EventKey,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Give up an event's pending downloads, so that its messages are sent without these files.

    The files become `gone`; `receiver replay --media` can still download them later.
    """

    async def run(_settings: Settings, database: Database) -> int:
        async with database.read() if dry_run else database.write() as connection:
            seqs = (await Selection(ids=(event,)).find_seqs(connection))[event]
            if not seqs:
                raise no_event(event)
            if dry_run:
                return sum([await outbox.count_pending_media(connection, seq) for seq in seqs])
            return sum([await outbox.give_up_media(connection, seq, by=operator()) for seq in seqs])

    number = with_database(run)
    if json:
        print_json({"given_up": number})
    elif number:
        stdout.print(f"{count(number, 'file')} {'would be ' if dry_run else ''}given up")
    else:
        print_note(f"No download of {event} is pending.")
        raise typer.Exit(1)
