"""`receiver rejections`: requests to the callback that were rejected, and why."""

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Annotated

import typer

from receiver.api.models import ShownRejection, ShownRejectionGroup
from receiver.cli.client import missing, with_client
from receiver.cli.options import CURSOR_HELP, MAX_ID, Json, Limit, since_option, until_option
from receiver.cli.terminal import moment, print_line, print_list, print_result, print_rows, print_title, size
from receiver.core.diagnosis import Cause
from receiver.errors import RequestError
from receiver.rejections import MAX_BODY_BYTES

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
    page = with_client(
        lambda client: client.list_rejections(
            limit=limit,
            cursor=None if cursor is None else str(cursor),
            source=source,
            cause=cause,
            since=since,
            until=until,
        )
    )
    columns = ("id", "received_at", "source", "path", "cause", "diagnosis")
    table = partial(print_rows, page.data, *columns, none="No rejected requests.", wrapped="diagnosis")
    print_list(page.data, table, json=json, next_=page.next)


@rejections.command()
def causes(
    since: Annotated[datetime | None, since_option("requests received")] = None, json: Json = False
) -> None:
    """Group rejected requests by source and cause, the newest first, with what to do."""
    found = with_client(lambda client: client.group_rejections(since=since))
    print_list(found, partial(_print_groups, found), json=json, next_=None)


def _print_groups(found: Sequence[ShownRejectionGroup]) -> None:
    for each in found:
        times = f"{moment(each['first'])} to {moment(each['last'])}"
        print_line(f"{each['source']}: {each['count']} {each['cause']}, {times}, such as {each['example']}")
        print_line(f"    {each['diagnosis']}")
        print_line(f"    {each['remedy']}")
    if not found:
        print_line("No rejected requests.")


@rejections.command()
def show(
    rejection_id: Annotated[
        int, typer.Argument(metavar="ID", help="The id in `receiver rejections list`.", min=0, max=MAX_ID)
    ],
    json: Json = False,
) -> None:
    """Show one rejected request: its diagnosis, its headers and the start of its body."""
    absent = f"there is no rejected request with the id {rejection_id}; old ones are deleted"
    with missing(RequestError(absent, code="not_found")):
        found = with_client(lambda client: client.show_rejection(rejection_id))
    print_result(found, partial(_print, found), json=json)


def _print(found: ShownRejection) -> None:
    print_line(
        f"{moment(found['received_at'])}  {found['path']}  from {found['peer'] or 'an unknown address'}"
    )
    print_line(f"source {found['source']}, reason {found['reason']}, cause {found['cause']}")
    print_line(f"\n{found['diagnosis']}\n{found['remedy']}")
    print_title("Headers", found["headers"])
    for name, value in found["headers"]:
        print_line(f"  {name}: {value}")
    body = found["body"]
    if body is None:
        print_line("\nThe body was not read.")
        return
    whole = found["body_size"] or 0
    cut = "" if whole <= MAX_BODY_BYTES else f", of which {size(MAX_BODY_BYTES)} are kept"
    print_line(f"\nBody, {size(whole)}{cut}:")
    # A body is a stranger's: an escape sequence in it could change the terminal.
    print_line(
        "".join(
            each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in body
        )
    )
