"""`receiver route`: show which destinations an event goes to, and why not to the others."""

from rich.text import Text

from receiver.cli.database import find_event, with_database
from receiver.cli.options import EventKey, Json
from receiver.cli.terminal import print_json, stdout
from receiver.core.routing import mismatch
from receiver.db import inbox, job_events, reads
from receiver.db.database import Database
from receiver.errors import ReceiverError
from receiver.lanes.targets import facts_of
from receiver.settings import Settings


def route(key: EventKey, json: Json = False) -> None:
    """Show which destinations a stored event goes to, and which filter keeps it from the others."""

    async def run(settings: Settings, database: Database) -> list[dict[str, str | None]]:
        async with database.read() as connection:
            found = await find_event(connection, key, reads.find_event)
            if found["state"] in ("unrecognized", "erased"):
                raise ReceiverError(f"the event is {found['state']}: it goes to no destination")
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
        print_json({"data": rows, "next": None})
        return
    for row in rows:
        verdict = "[green]yes[/]" if row["refused"] is None else "no "
        stdout.print(verdict, Text(f"{row['destination']}{': ' + row['refused'] if row['refused'] else ''}"))
    if not rows:
        stdout.print("No destination is configured.")
