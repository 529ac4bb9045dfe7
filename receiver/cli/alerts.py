"""`receiver alerts`: conditions that an operator is told of."""

from functools import partial
from typing import Annotated

import typer

from receiver.cli.client import with_client
from receiver.cli.options import Json
from receiver.cli.terminal import print_list, print_rows
from receiver.core.alerting import AlertKind
from receiver.db.alerts import AlertState

alerts = typer.Typer(help="Show alerts, with the next command for each.", no_args_is_help=True)


@alerts.command("list")
def list_(
    state: Annotated[AlertState | None, typer.Option(help="Only alerts in this state.")] = None,
    alert: Annotated[
        AlertKind | None, typer.Option(metavar="ALERT", help="Only alerts of this kind.")
    ] = None,
    json: Json = False,
) -> None:
    """List alerts, open ones first; resolved ones are kept for 30 days.

    Workers raise them if a destination has `alerts = true` or `alerts = "only"`.
    """
    page = with_client(lambda client: client.list_alerts(state=state, alert=alert))
    columns = ("raised_at", "resolved_at", "alert", "text", "command")
    table = partial(print_rows, page.data, *columns, none="No alerts.", wrapped="text")
    print_list(page.data, table, json=json, next_=page.next)
