"""`receiver retention`: the runs of retention."""

from functools import partial
from typing import Annotated

import typer

from receiver.cli.client import with_client
from receiver.cli.options import Json
from receiver.cli.terminal import print_list, print_rows

retention = typer.Typer(help="Show the runs of retention and their results.", no_args_is_help=True)


@retention.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="Print at most this many rows.", min=1, max=200)] = 50,
    json: Json = False,
) -> None:
    """List the runs of the schedule and of `receiver prune`, newest first.

    A pending run is under way, is tried again after its error, or its process was killed.
    """
    page = with_client(lambda client: client.list_retention_runs(limit=limit))
    columns = ("created_at", "by", "state", "events", "kept", "files", "jobs", "finished_at", "error")
    table = partial(print_rows, page.data, *columns, none="No runs.", wrapped="error")
    print_list(page.data, table, json=json, next_=page.next)
