"""`receiver rejections`: requests to the callback that were rejected, and why."""

from datetime import datetime
from functools import partial
from typing import Annotated

import typer

from receiver.api.rejections import readable
from receiver.cli.database import query_database
from receiver.cli.options import CURSOR_HELP, MAX_ID, Json, Limit, since_option, until_option
from receiver.cli.terminal import moment, print_json, print_line, print_list, print_rows, print_title, size
from receiver.core.diagnosis import Cause
from receiver.core.request_values import split_page
from receiver.db import rejections as sql
from receiver.db.rejections import Rejection
from receiver.errors import ReceiverError

rejections = typer.Typer(help="Show rejected requests to the callback, and why.", no_args_is_help=True)


@rejections.command("list")
def list_(
    source: Annotated[str | None, typer.Option(help="Only requests to this source.")] = None,
    cause: Annotated[
        Cause | None, typer.Option(metavar="CAUSE", help="Only requests with this cause.")
    ] = None,
    since: Annotated[datetime | None, since_option("requests received")] = None,
    until: Annotated[datetime | None, until_option("requests received")] = None,
    limit: Limit = 50,
    cursor: Annotated[int | None, typer.Option(help=CURSOR_HELP, min=0, max=MAX_ID)] = None,
    json: Json = False,
) -> None:
    """List rejected requests, newest first, each with its cause and its diagnosis."""
    found = query_database(
        partial(
            sql.list_rejections,
            limit=limit + 1,
            before=cursor,
            source=source,
            cause=cause,
            since=since,
            until=until,
        )
    )
    rows, next_ = split_page(found, limit, "id")
    columns = ("id", "received_at", "source", "path", "cause", "diagnosis")
    print_rejections = partial(print_rows, rows, *columns, none="No rejected requests.", wrapped="diagnosis")
    print_list(rows, print_rejections, json=json, next_=next_)


@rejections.command()
def show(
    rejection_id: Annotated[
        int, typer.Argument(metavar="ID", help="The id in `receiver rejections list`.", min=0, max=MAX_ID)
    ],
    json: Json = False,
) -> None:
    """Show one rejected request: its diagnosis, its headers and the start of its body."""
    found = query_database(partial(sql.find, rejection_id=rejection_id))
    if found is None:
        raise ReceiverError(f"there is no rejected request with the id {rejection_id}; old ones are deleted")
    if json:
        print_json(readable(found))
    else:
        _print(found)


def _print(found: Rejection) -> None:
    print_line(
        f"{moment(found['received_at'])}  {found['path']}  from {found['peer'] or 'an unknown address'}"
    )
    print_line(f"source {found['source']}, reason {found['reason']}, cause {found['cause']}")
    print_line(f"\n{found['diagnosis']}")
    print_title("Headers", found["headers"])
    for name, value in found["headers"]:
        print_line(f"  {name}: {value}")
    body = readable(found)["body"]
    if body is None:
        print_line("\nThe body was not read.")
        return
    kept, whole = len(found["body"] or b""), found["body_size"] or 0
    cut = "" if kept == whole else f", of which {size(kept)} are kept"
    print_line(f"\nBody, {size(whole)}{cut}:")
    # A body is a stranger's: an escape sequence in it could change the terminal.
    print_line(
        "".join(
            each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in body
        )
    )
