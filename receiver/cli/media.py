"""`receiver media`: whether the stored files are still what was stored, and links to them."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from receiver.cli.database import with_database
from receiver.cli.terminal import Json, print_json, print_line, progress_bar, stderr, stdout, user_name
from receiver.db import outbox, reads
from receiver.db.database import Database
from receiver.db.selection import Selection
from receiver.errors import ReceiverError
from receiver.media import Storage, open_storage
from receiver.media.verify import verify as verify_file
from receiver.settings import Settings

PAGE = 200

media = typer.Typer(help="Look after stored files.", no_args_is_help=True)


@media.command()
def verify(
    since: Annotated[datetime | None, typer.Option(help="Only stored at or after this time (UTC).")] = None,
    json: Json = False,
) -> None:
    """Read every stored file and compare it with its checksum. The exit status is 0 if all are intact.

    Pages that came in place of a file are no files. A file that was stored with a warning is intact if it is
    as it was stored.
    """
    start = since.replace(tzinfo=UTC) if since else None

    async def run(settings: Settings, database: Database) -> dict[str, Any]:
        storage = open_storage(settings.storage_url.get_secret_value())
        found: dict[str, Any] = {"intact": 0, "flagged": [], "damaged": []}
        errors: dict[str, str] = {}
        try:
            async with database.read() as connection:
                total = await reads.count_stored(connection, since=start)
            with progress_bar() as progress:
                task = progress.add_task("files", total=total)
                before = None
                while True:
                    async with database.read() as connection:
                        page = await reads.list_stored(connection, limit=PAGE, after=before, since=start)
                    if not page:
                        return found
                    before = page[-1]["id"]
                    for row in page:
                        shown = {key: value for key, value in row.items() if key not in ("url", "field")}
                        finding = await verify_file(
                            storage,
                            row["storage_key"],
                            kind=row["kind"],
                            url=row["url"],
                            field=row["field"],
                            size=row["size"],
                            sha256=row["sha256"],
                            on_unreadable=lambda key, error: errors.update({key: str(error)}),
                        )
                        if finding == "intact":
                            found["intact"] += 1
                            if row["warning"]:
                                found["flagged"].append(shown)
                        else:
                            why = {"finding": finding, "error": errors.pop(row["storage_key"], None)}
                            found["damaged"].append(shown | why)
                        progress.advance(task)
        finally:
            await storage.close()

    found = with_database(run)
    if json:
        print_json(found)
    else:
        _print_findings(found)
    if found["damaged"]:
        raise typer.Exit(1)


def _print_findings(found: Mapping[str, Any]) -> None:
    damaged, flagged = found["damaged"], found["flagged"]
    for row in damaged:
        why = f": {row['error']}" if row["error"] else ""
        print_line(f"{row['finding']:<10} {row['uri']} of {row['request_id']}{why}")
    for row in flagged:
        print_line(f"{'flagged':<10} {row['uri']} of {row['request_id']}: {row['warning']}")
    warned = f" ({len(flagged)} with a warning)" if flagged else ""
    stdout.print(f"{found['intact']} intact{warned}, {len(damaged)} damaged")
    if damaged:
        stdout.print(
            "Download damaged ones again with: receiver replay --media REQUEST_ID... (and --to, or to all)"
        )
    if flagged:
        stdout.print("Download flagged ones again with: receiver replay --media --force REQUEST_ID...")


@media.command()
def link(
    key: Annotated[str, typer.Argument(metavar="ID", help="An event's id, or Clipia's request_id.")],
    hours: Annotated[int, typer.Option(help="How long the links hold.", min=1, max=168)] = 1,
    json: Json = False,
) -> None:
    """Print links to an event's stored files, for people without credentials for the bucket."""

    async def run(settings: Settings, database: Database) -> list[dict[str, Any]]:
        async with database.read() as connection:
            event = await reads.show_event(connection, key)
        if event is None:
            raise ReceiverError(f"there is no event with the id or request_id {key!r}")
        storage = open_storage(settings.storage_url.get_secret_value())
        try:
            return [
                await _link(storage, row, hours * 3600) for row in event["media"] if row["state"] == "stored"
            ]
        finally:
            await storage.close()

    links = with_database(run)
    if json:
        print_json(links)
        return
    for each in links:
        print_line(each["link"])


async def _link(storage: Storage, row: Mapping[str, Any], seconds: int) -> dict[str, Any]:
    if row["uri"] != storage.uri(row["storage_key"]):
        raise ReceiverError(f"{row['uri']} is not in the storage of RECEIVER_STORAGE_URL")
    found = await storage.link(row["storage_key"], seconds=seconds)
    if found is None:
        raise ReceiverError("files in a folder have no links; those in a bucket (s3://, gs://, az://) do")
    return {name: row[name] for name in ("variant", "uri", "content_type")} | {"link": found}


@media.command("give-up")
def give_up(
    event: Annotated[str, typer.Argument(metavar="EVENT", help="Its id or its request_id.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
    json: Json = False,
) -> None:
    """End the downloads of an event that are still tried, so that its messages go out without these files.

    They are `gone` then; `receiver replay --media` downloads them after all.
    """

    async def run(_settings: Settings, database: Database) -> int:
        async with database.read() if dry_run else database.write() as connection:
            seqs = (await Selection(ids=(event,)).find_seqs(connection))[event]
            if not seqs:
                raise ReceiverError(f"there is no event {event!r}")
            if dry_run:
                return sum([await outbox.count_pending_media(connection, seq) for seq in seqs])
            by = f"{user_name()} on the command line"
            return sum([await outbox.give_up_media(connection, seq, by=by) for seq in seqs])

    count = with_database(run)
    if json:
        print_json({"given_up": count})
    elif count:
        stdout.print(f"{count} files {'would be ' if dry_run else ''}given up")
    else:
        stderr.print(f"No file of {event} is left to download.")
        raise typer.Exit(1)
