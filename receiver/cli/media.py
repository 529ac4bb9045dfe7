"""`receiver media`: check the stored files, make links to them, and give up downloads."""

from datetime import datetime
from functools import partial
from typing import Annotated

import typer

from receiver.cli.client import missing, with_client
from receiver.cli.database import no_event
from receiver.cli.options import DryRun, EventKey, Json, Reason, since_option
from receiver.cli.terminal import (
    count,
    print_json,
    print_line,
    print_note,
    print_result,
    progress_bar,
    stdout,
)
from receiver.client import Client
from receiver.verification import Verified

media = typer.Typer(
    help="Verify stored files, print links to them, and give up downloads.", no_args_is_help=True
)


@media.command()
def verify(
    since: Annotated[datetime | None, since_option("files stored")] = None, json: Json = False
) -> None:
    """Read every stored file and compare it with its checksum. The exit status is 0 if all are intact.

    A web page that was stored in place of a file is damaged. A file that was stored with a warning is intact
    if it has not changed since.
    """

    async def run(client: Client) -> Verified:
        with progress_bar() as progress:
            task = progress.add_task("files", total=None)
            found = part = await client.verify_files(since=since)
            while True:
                progress.update(task, total=found["total"])
                progress.advance(task, part["intact"] + len(part["damaged"]))
                if part["next"] is None:
                    return found
                part = await client.verify_files(cursor=part["next"], since=since)
                found["intact"] += part["intact"]
                found["flagged"] += part["flagged"]
                found["damaged"] += part["damaged"]

    found = with_client(run)
    shown = {name: found[name] for name in ("intact", "flagged", "damaged")}
    print_result(shown, partial(_print_findings, found), json=json)
    if found["damaged"]:
        raise typer.Exit(1)


def _print_findings(found: Verified) -> None:
    for row in found["damaged"]:
        error = f": {row['error']}" if row["error"] else ""
        print_line(f"{row['finding']:<10} {row['uri']} of {row['request_id']}{error}")
    for file in found["flagged"]:
        print_line(f"{'flagged':<10} {file['uri']} of {file['request_id']}: {file['warning']}")
    warned = f" ({len(found['flagged'])} with a warning)" if found["flagged"] else ""
    stdout.print(f"{found['intact']} intact{warned}, {len(found['damaged'])} damaged")
    if found["damaged"]:
        print_line(
            "Download damaged files again with `receiver replay --media REQUEST_ID...`; --to NAME sends the "
            "messages to one destination only."
        )
    if found["flagged"]:
        print_line("Download flagged files again with `receiver replay --media --force REQUEST_ID...`.")


@media.command()
def link(
    key: EventKey,
    hours: Annotated[int, typer.Option(help="Hours until the links expire.", min=1, max=168)] = 1,
    json: Json = False,
) -> None:
    """Print links to an event's stored files that work without credentials for the bucket."""
    with missing(no_event(key)):
        links = with_client(lambda client: client.link_files(key, hours=hours))
    if json:
        print_json({"data": links, "next": None})
        return
    for each in links:
        print_line(each["link"])


@media.command("give-up")
def give_up(
    event: EventKey,
    dry_run: DryRun = False,
    reason: Reason = None,
    json: Json = False,
) -> None:
    """Give up an event's pending downloads, so that its messages are sent without these files.

    The files become `gone`; `receiver replay --media` can still download them later.
    """
    with missing(no_event(event)):
        done = with_client(lambda client: client.give_up_files(event, dry_run=dry_run, reason=reason))
    number = done["given_up"]
    if json:
        print_json({"given_up": number})
    elif number:
        stdout.print(f"{count(number, 'file')} {'would be ' if dry_run else ''}given up")
    else:
        print_note(f"No download of {event} is pending.")
        raise typer.Exit(1)
