"""`receiver route`: to which destinations an event goes, and why not to the others."""

from typing import Annotated

import typer
from rich.text import Text

from receiver.cli.database import with_database
from receiver.cli.terminal import Json, print_json, stdout
from receiver.core.routing import mismatch
from receiver.db import inbox, job_events, reads
from receiver.db.database import Database
from receiver.errors import ReceiverError
from receiver.lanes.targets import facts_of
from receiver.settings import Settings


def route(
    key: Annotated[str, typer.Argument(metavar="EVENT", help="An event's id, or Clipia's request_id.")],
    json: Json = False,
) -> None:
    """Show to which destinations a stored event goes, and which filter keeps it from the others."""

    async def run(settings: Settings, database: Database) -> list[dict[str, str | None]]:
        async with database.read() as connection:
            found = await reads.show_event(connection, key)
            if found is None:
                raise ReceiverError(f"there is no event with the id or request_id {key!r}")
            if found["state"] == "unrecognized":
                raise ReceiverError("the event was not recognized, so it goes nowhere")
            if found["state"] == "erased":
                raise ReceiverError("the event was erased, so it goes nowhere")
            seq = found["seq"]
            event = (await inbox.load_events(connection, [seq]))[seq]
            refs = await job_events.load_refs(connection, [seq])
        facts = facts_of(event, found["model"], refs.get(seq))
        return [
            {"destination": each.name, "refused": mismatch(each.filter, facts)}
            for each in settings.all_destinations
        ]

    rows = with_database(run)
    if json:
        print_json(rows)
        return
    for row in rows:
        verdict = "[green]yes[/]" if row["refused"] is None else "no "
        stdout.print(verdict, Text(f"{row['destination']}{': ' + row['refused'] if row['refused'] else ''}"))
    if not rows:
        stdout.print("No destination is configured.")
