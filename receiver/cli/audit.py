"""`receiver audit`: the actions of operators."""

from datetime import datetime
from functools import partial
from typing import Annotated

import typer

from receiver.cli.client import with_client
from receiver.cli.options import CURSOR_HELP, MAX_ID, Json, Limit, since_option, until_option
from receiver.cli.terminal import print_list, print_rows
from receiver.db.audit import Action

audit = typer.Typer(help="Show the actions of operators, with reasons and outcomes.", no_args_is_help=True)


@audit.command("list")
def list_(
    by: Annotated[
        str | None, typer.Option(help='Only actions of this token, or of "NAME on the command line".')
    ] = None,
    operation: Annotated[str | None, typer.Option(help="Only actions of this kind: cancel_job.")] = None,
    target: Annotated[str | None, typer.Option(help="Only actions on the object with this id.")] = None,
    since: Annotated[datetime | None, since_option("actions begun")] = None,
    until: Annotated[datetime | None, until_option("actions begun")] = None,
    limit: Limit = 50,
    cursor: Annotated[int | None, typer.Option(help=CURSOR_HELP, min=0, max=MAX_ID)] = None,
    json: Json = False,
) -> None:
    """List the actions of operators, newest first.

    An action without an outcome is under way, or its process died.
    """
    page = with_client(
        lambda client: client.list_actions(
            limit=limit,
            cursor=None if cursor is None else str(cursor),
            by=by,
            operation=operation,
            target=target,
            since=since,
            until=until,
        )
    )
    rows = [{**row, "outcome": _outcome(row)} for row in page.data]
    columns = ("at", "by", "operation", "target", "outcome", "reason")
    table = partial(print_rows, rows, *columns, none="No actions.", wrapped="reason")
    print_list(page.data, table, json=json, next_=page.next)


def _outcome(row: Action) -> str | None:
    if row["status"] is None:
        return None
    return row["code"] or ("only counted" if row["dry_run"] else "done")
