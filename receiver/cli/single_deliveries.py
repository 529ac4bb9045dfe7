"""`receiver deliveries show`, `failures`, and `discard` with the id of a delivery."""

import shlex
from functools import partial
from typing import Annotated, Any, Final
from uuid import UUID

import typer

from receiver.cli.client import missing, with_client
from receiver.cli.completion import complete_destination
from receiver.cli.options import Json
from receiver.cli.terminal import moment, print_json, print_line, print_list, print_result, stdout
from receiver.client import Client
from receiver.db.deliveries import FailureGroup, ShownDelivery
from receiver.errors import RequestError

_INDENT: Final = " " * 12

_Id = Annotated[str, typer.Argument(metavar="ID", help="The delivery's id.")]


def show(
    delivery_id: _Id,
    message: Annotated[
        bool,
        typer.Option("--message", help="Print the message of the last attempt in place of the attempts."),
    ] = False,
    json: Json = False,
) -> None:
    """Show one delivery with every attempt, and the start of the consumer's answers.

    The message is made again from the rows as they are now: a file that was stored since, or a newer release,
    may make it differ from the message that was sent.
    """
    with missing(no_delivery(delivery_id)):
        if message:
            print_json(with_client(lambda client: client.show_message(delivery_id)))
            return
        found = with_client(lambda client: client.show_delivery(delivery_id))
    print_result(found, partial(_print_delivery, found), json=json)


def _print_delivery(found: ShownDelivery) -> None:
    print_line(f"{found['state']:<10}  {found['destination']}  delivery {found['id']}")
    print_line(f"{_INDENT}event {found['event_id']}, request {found['request_id']}")
    if found["replay_id"] is not None:
        print_line(f"{_INDENT}of the replay {found['replay_id']}")
    for attempt in found["attempt_log"]:
        error = f": {attempt['error']}" if attempt["error"] else ""
        took = f" after {attempt['duration_ms']} ms" if attempt["number"] else ""
        line = f"attempt {attempt['number']}: {moment(attempt['started_at'])} {attempt['outcome']}"
        print_line(f"{_INDENT}{line}{took}{error}")
        if attempt["answer"]:
            print_line(f"{_INDENT}  answer: {attempt['answer']}")
    if not found["attempt_log"] and found["error"]:
        print_line(f"{_INDENT}{found['error']}")
    if found["state"] == "pending":
        due = moment(found["next_attempt_at"]) if found["next_attempt_at"] else "when its media is stored"
        print_line(f"{_INDENT}next attempt: {due}")


def failures(
    destination: Annotated[
        str | None,
        typer.Option(help="Only deliveries to this destination.", autocompletion=complete_destination),
    ] = None,
    json: Json = False,
) -> None:
    """Group failing deliveries and dead letters by destination and cause, with the next command for each."""
    found = with_client(lambda client: client.list_failures(destination=destination))
    rows: list[Any] = [{**each, "command": next_command(each)} for each in found]
    print_list(rows, partial(_print_failures, found), json=json, next_=None)


def next_command(group: FailureGroup) -> str:
    """Return the command that shows more about failures, or ends them."""
    if group["state"] == "dead":
        cause = shlex.quote(group["cause"])
        return f"receiver deliveries retry --destination {group['destination']} --cause {cause}"
    return f"receiver deliveries show {group['example']}"


def _print_failures(found: list[FailureGroup]) -> None:
    for each in found:
        times = f"{moment(each['first'])} to {moment(each['last'])}"
        print_line(f"{each['destination']}: {each['count']} {each['state']}: {each['cause']}")
        print_line(f"    {times}, for example {each['example']}")
        print_line(f"    $ {next_command(each)}")
    if not found:
        stdout.print("No delivery fails, and there is no dead letter.")


def is_delivery(text: str) -> bool:
    """Return whether an argument is the id of a delivery."""
    try:
        UUID(text)
    except ValueError:
        return False
    return True


def discard_one(delivery_id: str, *, reason: str | None, json: bool) -> None:
    """Discard one delivery."""

    async def run(client: Client) -> None:
        await client.discard_delivery(delivery_id, reason=reason)

    with missing(no_delivery(delivery_id)):
        with_client(run)
    if json:
        print_json({"discarded": 1})
    else:
        print_line("1 discarded")


def no_delivery(delivery_id: str) -> RequestError:
    """Return the error for an id that names no delivery."""
    return RequestError(
        f"there is no delivery {delivery_id!r}; `receiver deliveries list` shows them", code="not_found"
    )
