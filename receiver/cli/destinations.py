"""`receiver destinations`: list, pause, resume and test destinations."""

from functools import partial
from typing import Annotated, Final

import typer

from receiver.cli.client import with_client
from receiver.cli.completion import complete_destination
from receiver.cli.options import Json, Reason
from receiver.cli.terminal import count, moment, print_json, print_line, print_list, print_note, print_rows
from receiver.destination_control import ListedDestination
from receiver.status import age, pause_text, state_of

destinations = typer.Typer(help="List, pause, resume and test destinations.", no_args_is_help=True)

_Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="The destination's name in the settings.", autocompletion=complete_destination
    ),
]
_COLUMNS: Final = ("name", "kind", "state", "waiting", "oldest", "failing", "dead", "per_minute", "gets")


@destinations.command("list")
def list_(json: Json = False) -> None:
    """List destinations, and removed ones that have deliveries, with the next command of each."""
    rows = with_client(lambda client: client.list_destinations())
    print_list(rows, partial(_print, rows), json=json)


@destinations.command()
def pause(name: _Name, reason: Reason = None, json: Json = False) -> None:
    """Stop deliveries to a destination in all processes within a second; events wait.

    Deliveries under way end. The time of `give_up_after` begins anew when the destination is resumed.
    """
    found = with_client(lambda client: client.pause_destination(name, reason=reason))
    if json:
        print_json(found)
    else:
        print_line(pause_text(found))


@destinations.command()
def resume(name: _Name, reason: Reason = None, json: Json = False) -> None:
    """End the pause of a destination: workers deliver the events that waited."""
    found = with_client(lambda client: client.resume_destination(name, reason=reason))
    if json:
        print_json(found)
    else:
        print_line(
            f"{name} is not paused: {count(found['pending'], 'delivery is', 'deliveries are')} pending"
        )


@destinations.command("test")
def check(
    name: _Name,
    send: Annotated[
        bool, typer.Option("--send", help="Also send a message of the type ai.clipia.receiver.test.")
    ] = False,
    reason: Reason = None,
    json: Json = False,
) -> None:
    """Check the connection to a destination, and with --send also that it confirms a message.

    The process that serves the call connects: this one, or the receiver at --url. A worker on another machine
    may have another network. The exit status is 1 if the destination cannot be reached.
    """
    found = with_client(lambda client: client.test_destination(name, send=send, reason=reason))
    if json:
        print_json(found)
    else:
        for warning in found["warnings"]:
            print_note(f"warning: {warning}")
        sent = f", and confirmed the message {found['event_id']}" if found["event_id"] else ""
        result = f"reachable{sent}" if found["reachable"] else f"not reachable: {found['error']}"
        print_line(f"{name}: {result} ({found['seconds']:.3f} s)")
    if not found["reachable"]:
        raise typer.Exit(1)


def _print(rows: list[ListedDestination]) -> None:
    shown = [
        {
            **row,
            "kind": row["kind"] or "-",
            "state": state_of(row),
            "waiting": row["pending"],
            "oldest": age(row["oldest_seconds"]) if row["pending"] else None,
            "per_minute": row["delivered_per_minute"],
            "gets": row["gets"],
        }
        for row in rows
    ]
    print_rows(shown, *_COLUMNS, none="No destination is configured.", wrapped="gets")
    for row in rows:
        if row["command"]:
            print_line(f"{_sentence(row)}\n    $ {row['command']}")


def _sentence(row: ListedDestination) -> str:
    """Return the reason for the command of a destination."""
    if row["pause"] is not None:
        return pause_text(row)
    if not row["configured"]:
        return f"{row['name']} is not configured any more: move its deliveries, or discard them"
    if row["circuit"] is not None:
        return f"{row['name']} is down since {moment(row['circuit']['since'])}: {row['circuit']['error']}"
    return f"{row['name']} has {count(row['dead'], 'dead letter')}, the last one: {row['last_error']}"
