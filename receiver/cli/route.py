"""`receiver route`: show which destinations an event goes to, and why not to the others."""

from rich.text import Text

from receiver.cli.client import missing, with_client
from receiver.cli.database import no_event
from receiver.cli.options import EventKey, Json
from receiver.cli.terminal import print_json, stdout


def route(key: EventKey, json: Json = False) -> None:
    """Show which destinations a stored event goes to, and which filter keeps it from the others."""
    with missing(no_event(key)):
        rows = with_client(lambda client: client.route_event(key))
    if json:
        print_json({"data": rows, "next": None})
        return
    for row in rows:
        verdict = "[green]yes[/]" if row["refused"] is None else "no "
        stdout.print(verdict, Text(f"{row['destination']}{': ' + row['refused'] if row['refused'] else ''}"))
    if not rows:
        stdout.print("No destination is configured.")
