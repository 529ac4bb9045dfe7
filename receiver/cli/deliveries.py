"""`receiver deliveries`: deliveries, dead letters, and deliveries to a removed destination."""

import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Final
from uuid import UUID

import typer

from receiver.api.models import RestartedMany
from receiver.cli.client import with_client
from receiver.cli.completion import complete_destination
from receiver.cli.options import CURSOR_HELP, DryRun, Json, Limit, Reason, since_option, until_option
from receiver.cli.single_deliveries import discard_one, failures, is_delivery, show
from receiver.cli.terminal import count, print_json, print_list, print_note, print_rows, stdout
from receiver.client import Client
from receiver.db.rows import DeliveryState
from receiver.errors import UsageError
from receiver.removed_deliveries import Redirected

MAX_ERROR_LENGTH: Final = 100
_CHANGES: Final = ("moved", "discarded", "replays")
_MOVE_COUNTS: Final = ("moved", "discarded")
_DISCARD_COUNTS: Final = ("discarded",)

deliveries = typer.Typer(
    help="List and show deliveries, retry dead letters, and move or discard those of a removed destination.",
    no_args_is_help=True,
)

_Dead = Annotated[bool, typer.Option("--dead", help="Include its dead letters.")]
_Destination = Annotated[
    str | None, typer.Option(help="Only deliveries to this destination.", autocompletion=complete_destination)
]
_Cause = Annotated[
    str | None,
    typer.Option(help="Only deliveries that fail for this cause of `receiver deliveries failures`."),
]
_Removed = Annotated[
    str, typer.Argument(metavar="FROM", help="The destination that is no longer in the settings.")
]


@deliveries.command("list")
def list_(
    state: Annotated[DeliveryState | None, typer.Option(help="Only deliveries in this state.")] = None,
    destination: _Destination = None,
    since: Annotated[datetime | None, since_option("deliveries made")] = None,
    until: Annotated[datetime | None, until_option("deliveries made")] = None,
    cause: _Cause = None,
    limit: Limit = 50,
    cursor: Annotated[str | None, typer.Option("--cursor", "--before", help=CURSOR_HELP)] = None,
    json: Json = False,
) -> None:
    """List deliveries, newest first, each with the reason of its last failure."""
    page = with_client(
        lambda client: client.list_deliveries(
            limit=limit,
            cursor=None if cursor is None else str(_id(cursor)),
            state=state,
            destination=destination,
            since=since,
            until=until,
            cause=cause,
        )
    )
    rows = [{**row, "error": (row["error"] or "")[:MAX_ERROR_LENGTH]} for row in page.data]
    columns = ("id", "destination", "state", "attempts", "request_id", "created_at", "error")
    table = partial(print_rows, rows, *columns, none="No deliveries.", wrapped="error")
    print_list(page.data, table, json=json, next_=page.next)


@deliveries.command()
def retry(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID", help="Ids of dead letters.")] = None,
    destination: _Destination = None,
    since: Annotated[datetime | None, since_option("dead letters given up")] = None,
    until: Annotated[datetime | None, until_option("dead letters given up")] = None,
    cause: _Cause = None,
    everything: Annotated[bool, typer.Option("--all", help="Retry all dead letters.")] = False,
    reason: Reason = None,
    json: Json = False,
) -> None:
    """Deliver dead letters again: each keeps its delivery id and the log of its attempts.

    The exit status is 1 if no dead letter matches.
    """
    if not (ids or destination or since or until or cause or everything):
        raise UsageError("say which dead letters: ids, --destination, --since, --until, --cause, or --all")
    chosen = [_id(each) for each in ids or ()]

    async def run(client: Client) -> Counter[str]:
        return await _retry(
            partial(
                client.retry_dead_letters,
                ids=chosen,
                destination=destination,
                since=since,
                until=until,
                cause=cause,
                all=everything,
                reason=reason,
            )
        )

    done = with_client(run)
    if json:
        print_json({"restarted": done})
    elif done:
        for name, number in sorted(done.items()):
            stdout.print(f"{name}: {number} restarted")
    else:
        print_note("No dead letter matches.")
        raise typer.Exit(1)


async def _retry(retry_some: Callable[..., Awaitable[RestartedMany]]) -> Counter[str]:
    """Call until no dead letter is left; return their number by destination."""
    done: Counter[str] = Counter()
    gone: set[str] = set()
    began: datetime | None = None
    more = True
    while more:
        # A dead letter that fails again at once is not restarted twice by one command.
        answer = await retry_some(not_restarted_since=began)
        done.update(answer["restarted"])
        gone.update(answer["not_configured"])
        more, began = answer["more"], answer["began"]
    for name in sorted(gone):
        print_note(f"{name!r} is not configured: see `receiver deliveries move` and `discard`.")
    return done


@deliveries.command()
def move(
    destination: _Removed,
    to: Annotated[
        str,
        typer.Argument(
            metavar="TO", help="A destination that is in the settings.", autocompletion=complete_destination
        ),
    ],
    dead: _Dead = False,
    dry_run: DryRun = False,
    reason: Reason = None,
    json: Json = False,
) -> None:
    """Move the deliveries of a removed or renamed destination to another one.

    Their time limit and their attempts start anew. An event that the other destination has received, or that
    is pending for it, is not sent twice. Replays that have not ended go to the other destination, too.

    Three days after a worker first missed the destination, its deliveries are dead letters, which only --dead
    moves. Deliveries that a worker has claimed stay until it is done with them, or for up to a minute if it
    was killed. The command prints their number, and when to run it again.
    """

    async def run(client: Client) -> dict[str, int]:
        move_some = partial(
            client.move_deliveries, destination, to=to, dead=dead, dry_run=dry_run, reason=reason
        )
        return await _repeat(move_some, destination, _MOVE_COUNTS if dry_run else _CHANGES)

    _print_taken(with_client(run), destination, json=json, dry_run=dry_run)


deliveries.command()(show)
deliveries.command()(failures)


@deliveries.command()
def discard(
    destination: Annotated[
        str,
        typer.Argument(
            metavar="ID|FROM", help="A delivery's id, or a destination that is no longer in the settings."
        ),
    ],
    dead: _Dead = False,
    dry_run: DryRun = False,
    reason: Reason = None,
    json: Json = False,
) -> None:
    """Cancel one delivery, or those of a removed destination: they are not sent any more.

    With an id, the delivery has to be pending or dead, and no worker may be attempting it now.

    Replays that have not ended leave the destination out; a replay to this destination alone is canceled.

    Three days after a worker first missed the destination, its deliveries are dead letters, which only --dead
    discards. Deliveries that a worker has claimed stay until it is done with them, or for up to a minute if
    it was killed. The command prints their number, and when to run it again.
    """
    if is_delivery(destination):
        if dead or dry_run:
            option = "--dry-run" if dry_run else "--dead"
            raise UsageError(
                f"{option} is for the deliveries of a destination; see `receiver deliveries show` for one"
            )
        discard_one(destination, reason=reason, json=json)
        return

    async def run(client: Client) -> dict[str, int]:
        discard_some = partial(
            client.discard_deliveries, destination, dead=dead, dry_run=dry_run, reason=reason
        )
        return await _repeat(discard_some, destination, _DISCARD_COUNTS if dry_run else _CHANGES)

    _print_taken(with_client(run), destination, json=json, dry_run=dry_run)


async def _repeat(
    take: Callable[[], Awaitable[Redirected]], destination: str, numbers: Sequence[str]
) -> dict[str, int]:
    """Call until nothing is left, and print which deliveries stay for now; return the numbers."""
    answer = await take()
    for name in answer["still_in"]:
        print_note(
            f"{name} still has {destination!r} and may add deliveries to it: restart it, then run this "
            "command again."
        )
    answers = [answer]
    while answer["more"]:
        answers.append(answer := await take())
    if claimed := answer["under_way"]:
        print_note(
            f"{count(claimed, 'delivery', 'deliveries')} to {destination!r} under way: claimed by a running "
            "worker, or by one that was killed. "
            f"Run this command again in {max(1, math.ceil(answer['under_way_seconds']))} s."
        )
    values: Sequence[Mapping[str, Any]] = answers
    return {**{name: sum(each[name] for each in values) for name in numbers}, "under_way": claimed}


def _print_taken(done: dict[str, int], destination: str, *, json: bool, dry_run: bool) -> None:
    if json:
        print_json(done)
        return
    would = "would be " if dry_run else ""
    parts = [f"{number} {would}{name}" for name, number in done.items() if number and name != "under_way"]
    if parts:
        stdout.print(", ".join(parts))
        return
    if not done["under_way"]:
        print_note(f"There is no delivery to {destination!r} to move or discard.")
    raise typer.Exit(1)


def _id(text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is not the id of a delivery; `receiver deliveries list` shows them"
        ) from None
