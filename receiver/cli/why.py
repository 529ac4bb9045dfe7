"""`receiver why`: the state of one object, its reason and the next command."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Annotated, Final

import typer

from receiver.cli.client import with_client
from receiver.cli.options import Json
from receiver.cli.terminal import moment, print_line, print_result
from receiver.exit_status import NOT_FOUND
from receiver.explain import Explanation
from receiver.explain.facts import Outcome

STATUSES: Final[Mapping[Outcome, int]] = MappingProxyType(
    {"delivered": 0, "waiting": 10, "needs_action": 11, "ended": 12, "unknown": NOT_FOUND}
)
"""The exit status of each outcome."""


def why(
    key: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="The id of an event, a job or a delivery, a request_id, a job's key, or a file's URL.",
        ),
    ],
    json: Json = False,
) -> None:
    """Explain in one sentence why an object is in its state, with the facts and the next command.

    The exit status is 0 if all is delivered, 10 if something is awaited that comes by itself, 11 if a person
    has to act, 12 if it has ended without being delivered everywhere, and 4 if the id is unknown.
    """
    found = with_client(lambda client: client.explain_object(key))
    print_result(found, partial(_print_explanation, found), json=json)
    if status := STATUSES[found["outcome"]]:
        raise typer.Exit(status)


def _print_explanation(found: Explanation) -> None:
    print_line(f"{found['state']}: {found['verdict']}")
    if found["facts"]:
        print_line("")
    for fact in found["facts"]:
        print_line(f"  {moment(fact['at'])}  {fact['text']}")
    if found["commands"]:
        print_line("")
    for command in found["commands"]:
        print_line(f"  $ {command}")
