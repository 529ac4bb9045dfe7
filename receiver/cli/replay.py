"""`receiver replay` and `receiver replays`: send stored events again."""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, Final
from uuid import UUID

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from receiver.cli.client import missing, with_client
from receiver.cli.completion import complete_destination, complete_model
from receiver.cli.options import CURSOR_HELP, MAX_ID, Json, Limit, Reason, since_option, until_option
from receiver.cli.terminal import (
    count,
    moment,
    print_json,
    print_line,
    print_list,
    print_note,
    print_result,
    print_rows,
    progress_bar,
    stdout,
    user_name,
)
from receiver.cli.waiting import GaveUp, Patience, Timeout, find_missing
from receiver.client import Client
from receiver.core.lane_names import REPLAY_LANE, destination_lane
from receiver.core.request_values import MAX_CALLER_LENGTH, first_problem
from receiver.db.views import ReplayDetails
from receiver.errors import RequestError, UsageError
from receiver.replays import ReplayRequest
from receiver.status import WorkerStatus

POLL_SECONDS: Final = 0.5
"""Time between two queries for a replay's progress."""
MAX_REASON_LENGTH: Final = 60

replays = typer.Typer(help="Show, watch and cancel replays.", no_args_is_help=True)

_Ids = Annotated[list[str] | None, typer.Argument(metavar="EVENT", help="Ids or request_ids of events.")]
_DeliveryState = Annotated[
    str | None, typer.Option(help="Only events with a delivery in this state: pending, delivered, dead.")
]
_To = Annotated[
    list[str] | None,
    typer.Option(
        help="Only to this destination. Repeatable. Default: to all.", autocompletion=complete_destination
    ),
]
_Media = Annotated[
    bool, typer.Option("--media", help="First download missing, changed and non-media files again.")
]
_Force = Annotated[bool, typer.Option("--force", help="With --media: download intact files again, too.")]
_Key = Annotated[str | None, typer.Option(help="Idempotency key: the same key is the same replay.")]
_Wait = Annotated[bool, typer.Option("--wait/--no-wait", help="Show the progress until the replay ends.")]
_ReplayId = Annotated[UUID, typer.Argument(metavar="REPLAY", help="The replay's id.")]


def replay(
    ids: _Ids = None,
    since: Annotated[datetime | None, since_option("events received")] = None,
    until: Annotated[datetime | None, until_option("events received")] = None,
    status: Annotated[str | None, typer.Option(help="Only events with this status: OK or ERROR.")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Only events of this model; a glob such as 'seedance-*'.", autocompletion=complete_model
        ),
    ] = None,
    source: Annotated[str | None, typer.Option(help="Only events of this source.")] = None,
    caller: Annotated[str | None, typer.Option(help="Only events of this caller's jobs.")] = None,
    destination: Annotated[
        str | None,
        typer.Option(help="Only events with a delivery to it.", autocompletion=complete_destination),
    ] = None,
    delivery_state: _DeliveryState = None,
    everything: Annotated[bool, typer.Option("--all", help="Replay all events.")] = False,
    to: _To = None,
    media: _Media = False,
    force: _Force = False,
    rate: Annotated[float | None, typer.Option(help="Send at most this many events per second.")] = None,
    reason: Annotated[str, typer.Option(help="A reason, for the record.")] = "",
    key: _Key = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count, by destination.")] = False,
    wait: _Wait = True,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Send stored events again, with the same event ids, new delivery ids and the replay's id.

    The replay is stored first, and workers carry it out: if this command ends, the replay goes on, and
    `receiver replays show REPLAY --wait` watches it. Each destination's filter applies. The exit status is 1
    for a replay with dead letters, 3 if no running worker can carry it out, and 124 after --timeout.
    """
    patience = Patience(timeout, waits=wait)
    selection = _given(
        ids=ids, since=since, until=until, status=status, model=model, source=source, caller=caller
    ) | _given(destination=destination, delivery_state=delivery_state)
    if not selection and not everything:
        raise UsageError("say which events: ids, a filter such as --since, or --all")
    options = {"all": everything, "media": media, "force": force, "rate": rate, "reason": reason}
    request = _read({"selection": selection, **_given(to=to), **options})
    if dry_run:
        _dry_run(request, json=json)
    else:
        _order(request, key=key, patience=patience if wait else None, json=json)


def _given(**values: object) -> dict[str, object]:
    """Return the options that were given."""
    return {name: value for name, value in values.items() if value not in (None, [])}


def _read(values: Mapping[str, object]) -> ReplayRequest:
    try:
        return ReplayRequest.model_validate(values)
    except ValidationError as error:
        path, message = first_problem(error)
        name = next((part for part in reversed(path) if not part.isdigit()), "replay")
        # Ids are an argument, and not an option.
        option = "ids" if name == "ids" else "--" + name.replace("_", "-")
        raise UsageError(f"{option}: {message}") from None


def _dry_run(request: ReplayRequest, *, json: bool) -> None:
    found = with_client(lambda client: client.count_replay(request))
    if json:
        print_json(found)
        return
    stdout.print(count(found["events"], "event"))
    for name, number in found["deliveries"].items():
        stdout.print(f"{name}: {count(number, 'delivery', 'deliveries')}")


def _order(request: ReplayRequest, *, key: str | None, patience: Patience | None, json: bool) -> None:
    async def run(client: Client) -> tuple[ReplayDetails, int]:
        order = await client.order_replay(request, key=key)
        if not json:
            print_note(f"Replay {order['id']}: {count(order['matched'], 'event')}")
        return await _watch(client, order, patience) if patience else (order, 0)

    found, status = with_client(run, caller=f"cli-{user_name()}"[:MAX_CALLER_LENGTH])
    if json:
        print_json(found)
    elif patience:
        _print(found)
    if status:
        raise typer.Exit(status)


@replays.command("list")
def list_(
    limit: Limit = 50,
    cursor: Annotated[int | None, typer.Option(help=CURSOR_HELP, min=0, max=MAX_ID)] = None,
    json: Json = False,
) -> None:
    """List replays, newest first, each with its caller and its reason."""
    page = with_client(
        lambda client: client.list_replays(limit=limit, cursor=None if cursor is None else str(cursor))
    )
    rows = [
        {
            **row,
            "events": f"{row['handled']} of {row['matched']}",
            "deliveries": row["ordered"],
            "reason": row["reason"][:MAX_REASON_LENGTH],
        }
        for row in page.data
    ]
    columns = ("id", "state", "caller", "created_at", "events", "deliveries", "reason")
    table = partial(print_rows, rows, *columns, none="No replays.")
    print_list(page.data, table, json=json, next_=page.next)


@replays.command()
def show(
    replay_id: _ReplayId,
    wait: Annotated[bool, typer.Option("--wait", help="Show the progress until the replay ends.")] = False,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Show a replay and the states of its deliveries; with --wait the exit status is that of `replay`."""
    patience = Patience(timeout, waits=wait)

    async def run(client: Client) -> tuple[ReplayDetails, int]:
        order = await _find(client, replay_id)
        return await _watch(client, order, patience) if wait else (order, 0)

    found, status = with_client(run)
    print_result(found, partial(_print, found), json=json)
    if status:
        raise typer.Exit(status)


@replays.command()
def cancel(replay_id: _ReplayId, reason: Reason = None) -> None:
    """Cancel a replay and its pending deliveries; messages that were sent cannot be recalled."""
    with missing(_no_replay(replay_id)):
        _print(with_client(lambda client: client.cancel_replay(replay_id, reason=reason)))


async def _find(client: Client, replay_id: UUID) -> ReplayDetails:
    with missing(_no_replay(replay_id)):
        return await client.show_replay(replay_id)


def _no_replay(replay_id: UUID) -> RequestError:
    return RequestError(f"there is no replay {replay_id}", code="not_found")


async def _watch(client: Client, order: ReplayDetails, patience: Patience) -> tuple[ReplayDetails, int]:
    """Return the replay and the exit status once it has ended, or once waiting is of no use."""
    again = f"`receiver replays show {order['id']} --wait` watches it again."
    progress = progress_bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with progress:
        task = progress.add_task("delivered", total=None, rate="")
        try:
            order = await _wait(client, order, patience, progress, task)
        except GaveUp as over:
            print_note(f"The replay has not ended, and this command stops waiting: {over}.")
            print_note(again)
            return await _find(client, order["id"]), over.status
        except BaseException:
            print_note(f"The replay goes on; {again}")
            raise
    return order, 1 if order["state"] == "failed" or _count(order, "dead") else 0


async def _wait(
    client: Client,
    order: ReplayDetails,
    patience: Patience,
    progress: Progress,
    task: TaskID,
) -> ReplayDetails:
    """Return the replay when it has ended, and show its progress until then. Raises GaveUp."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    sent_before = sent = _ended(order)
    missing: str | None = None
    while order["state"] == "pending" or _count(order, "pending"):
        patience.check(missing)
        await asyncio.sleep(min(POLL_SECONDS, patience.left))
        order = await _find(client, order["id"])
        progressed, sent = _ended(order) != sent, _ended(order)
        missing = None if progressed else _missing_worker(order, await client.list_workers())
        rate = (sent - sent_before) / (loop.time() - began)
        progress.update(task, completed=sent, total=_expected(order), rate=f"{rate:.0f}/s")
    return order


def _expected(order: ReplayDetails) -> int | None:
    """Return the number of its deliveries, estimated from the events handled so far; None at first."""
    if order["state"] != "pending":
        return order["ordered"]
    return round(order["ordered"] * order["matched"] / order["handled"]) if order["handled"] else None


def _missing_worker(order: ReplayDetails, seen: Sequence[WorkerStatus]) -> str | None:
    """Return what has to be started or changed before the replay can continue; None if it continues."""
    if order["state"] == "pending":
        # A worker's step needs all destinations of the order.
        return find_missing(seen, [REPLAY_LANE, *map(destination_lane, order["destinations"])])
    waiting = sorted(name for name, states in order["deliveries"].items() if states.get("pending"))
    missing = [find_missing(seen, [destination_lane(name)]) for name in waiting]
    # As long as a worker serves one of them, the replay makes progress.
    return missing[0] if missing and all(missing) else None


def _count(order: ReplayDetails, *states: str) -> int:
    return sum(counts.get(state, 0) for counts in order["deliveries"].values() for state in states)


def _ended(order: ReplayDetails) -> int:
    return _count(order, "delivered", "dead", "canceled")


def _print(order: ReplayDetails) -> None:
    print_line(f"Replay {order['id']}: {order['state']}, {order['handled']} of {order['matched']} events")
    print_line(
        f"  by {order['caller']}, {moment(order['created_at'])}: {order['reason'] or 'no reason given'}"
    )
    if order["error"]:
        print_line(f"  {order['error']}")
    if order["media"]:
        print_line(f"  {count(order['downloads'], 'file')} downloaded again")
    for name, counts in sorted(order["deliveries"].items()):
        states = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
        print_line(f"  {name}: {states}")
