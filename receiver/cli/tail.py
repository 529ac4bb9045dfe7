"""`receiver tail`: events, deliveries, failures and rejected requests as they happen."""

import asyncio
import math
import sys
import time
from typing import Annotated, Final

import orjson
import typer
from rich.text import Text

from receiver.cli.client import with_client
from receiver.cli.completion import complete_destination
from receiver.cli.options import Json
from receiver.cli.remote import is_remote
from receiver.cli.terminal import moment, print_note, stdout
from receiver.client import Client
from receiver.db.tail import FAILURES, TailItem
from receiver.errors import DatabaseUnavailable, ReceiverUnavailable

STREAM_SECONDS: Final = 300.0
"""How long one stream lasts; the command then continues with the next one."""
LOCAL_SECONDS: Final = 0.5
"""In this process an answer arrives as a whole, when it has ended."""
PAUSE_SECONDS: Final = 2.0
"""Time until the next attempt if the receiver is away."""


def tail(
    destination: Annotated[
        str | None,
        typer.Option(help="Only attempts at deliveries to it.", autocompletion=complete_destination),
    ] = None,
    failures: Annotated[
        bool, typer.Option("--failures", help="Only failed attempts, dead letters and rejected requests.")
    ] = False,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Continue after this cursor of --json.")
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.0, help="Stop after this time; 0 prints what is there."),
    ] = None,
    json: Json = False,
) -> None:
    """Print new events, deliveries, failures and rejected requests as they happen, until Ctrl-C.

    With --json each line is one object. If the receiver is away for a moment, the command goes on where it
    was.
    """
    ends_at = time.monotonic() + (math.inf if timeout is None else timeout)

    async def run(client: Client) -> None:
        cursor = after
        while True:
            left = max(0.0, ends_at - time.monotonic())
            stream = client.stream_tail(
                after=cursor,
                wait=min(left, STREAM_SECONDS if is_remote() else LOCAL_SECONDS),
                destination=destination,
                failures=failures,
            )
            try:
                async for cursor, item in stream:
                    if item is not None:
                        _print_item(cursor, item, json=json)
            except (ReceiverUnavailable, DatabaseUnavailable) as error:
                if cursor is None or not left:
                    raise
                print_note(f"{error} The next attempt is in {PAUSE_SECONDS:.0f} s.")
                await asyncio.sleep(min(left, PAUSE_SECONDS))
            if not left:
                return

    with_client(run)


def _print_item(cursor: str, item: TailItem, *, json: bool) -> None:
    if json:
        sys.stdout.write(orjson.dumps({"cursor": cursor, **item}, option=orjson.OPT_UTC_Z).decode() + "\n")
        sys.stdout.flush()
        return
    style = "red" if item["kind"] in FAILURES else "green" if item["kind"] == "delivered" else ""
    stdout.print(Text(line_of(item), style=style), soft_wrap=True)


def line_of(item: TailItem) -> str:
    """Return an item as one line."""
    parts = [moment(item["at"]), f"{item['kind']:<9}", item.get("destination") or item.get("source") or "-"]
    if "request_id" in item:
        parts.append(item["request_id"])
    parts += [str(item[name]) for name in ("status", "model") if item["kind"] == "event" and name in item]
    if item.get("attempt"):
        parts.append(f"attempt {item['attempt']}")
    if "rejection_id" in item:
        parts.append(f"rejection {item['rejection_id']}")
    return "  ".join(parts) + (f"  {item['text']}" if "text" in item else "")
