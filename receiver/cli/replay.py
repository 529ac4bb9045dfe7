"""`receiver replay` and `receiver replays`: send stored events again."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from uuid import UUID

import typer
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from receiver.cli.database import with_database
from receiver.cli.terminal import (
    Json,
    moment,
    print_json,
    print_line,
    progress_bar,
    stderr,
    stdout,
    user_name,
    wide,
)
from receiver.cli.waiting import GaveUp, Patience, Timeout, find_missing
from receiver.core.lane_names import REPLAY_LANE, destination_lane
from receiver.core.request_checks import first_problem
from receiver.db import workers
from receiver.db.database import Database
from receiver.db.views import ReplayCounts, ReplayDetails, ReplayHead
from receiver.errors import ReceiverError
from receiver.process import make_replays
from receiver.replays import ReplayRequest, Replays
from receiver.settings import Settings

LOOK: Final = 0.5
"""Seconds between looks at a replay's progress."""

replays = typer.Typer(help="Look at replays.", no_args_is_help=True)


def replay(
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids of events, or Clipia's request_ids.")
    ] = None,
    since: Annotated[datetime | None, typer.Option(help="Received at or after this time (UTC).")] = None,
    until: Annotated[datetime | None, typer.Option(help="Received before this time (UTC).")] = None,
    status: Annotated[str | None, typer.Option(help="OK or ERROR.")] = None,
    model: Annotated[str | None, typer.Option(help="A model, or a glob such as 'seedance-*'.")] = None,
    source: Annotated[str | None, typer.Option(help="A source.")] = None,
    caller: Annotated[str | None, typer.Option(help="Who submitted the job.")] = None,
    destination: Annotated[str | None, typer.Option(help="With a delivery to this destination.")] = None,
    delivery_state: Annotated[
        str | None, typer.Option(help="With a delivery that is pending, delivered or dead.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All events.")] = False,
    to: Annotated[
        list[str] | None, typer.Option(help="Send to this destination only. Repeatable. Default: to all.")
    ] = None,
    media: Annotated[
        bool, typer.Option("--media", help="Download again what is missing, changed or no media.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="With --media: download again what is intact, too.")
    ] = False,
    rate: Annotated[float | None, typer.Option(help="Events per second at most.")] = None,
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: the same one again is the same replay.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count, by destination.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Show the progress until it has ended.")
    ] = True,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Send stored events again: the same event ids, with new delivery ids and the replay's id.

    The order is on record before anything is sent, and workers carry it out: ending this command does not end
    it, and `receiver replays show ID` goes on watching. A destination's filter holds for replays, too.
    The exit status is 1 for a replay with dead letters, 3 if no worker is running that would carry it out,
    and 124 after --timeout.
    """
    if timeout is not None and not wait:
        raise ReceiverError("--timeout is for a command that waits, without --no-wait")
    patience = Patience(timeout)
    choice = {
        "ids": tuple(ids) if ids else None,
        "since": _utc(since),
        "until": _utc(until),
        "status": status,
        "model": model,
        "source": source,
        "caller": caller,
        "destination": destination,
        "delivery_state": delivery_state,
    }
    selection = {name: value for name, value in choice.items() if value is not None}
    if not selection and not everything:
        raise ReceiverError("say which events: ids, a filter such as --since, or --all")
    request = _read(
        {
            "selection": selection,
            "all": everything,
            **({"to": tuple(to)} if to else {}),
            "media": media,
            "force": force,
            "rate": rate,
            "reason": reason,
        }
    )

    async def count(settings: Settings, database: Database) -> ReplayCounts:
        return await make_replays(settings, database).dry_run(request)

    async def run(settings: Settings, database: Database) -> tuple[ReplayDetails, int]:
        orders = make_replays(settings, database)
        order = await orders.order(request, key=key, caller=f"cli-{user_name()}"[:63])
        if not json:
            stderr.print(f"Replay {order['id']}: {order['matched']} events")
        return await _watch(database, orders, order, patience) if wait else (order, 0)

    if dry_run:
        counts = with_database(count)
        (print_json if json else _print_counts)(counts)
        return
    found, ended_with = with_database(run)
    if json:
        print_json(found)
    elif wait:
        _print(found)
    if ended_with:
        raise typer.Exit(ended_with)


def _read(values: dict[str, Any]) -> ReplayRequest:
    try:
        return ReplayRequest.model_validate(values)
    except ValidationError as error:
        path, message = first_problem(error)
        name = next((part for part in reversed(path) if not part.isdigit()), "replay")
        # Ids have no option of their own.
        option = "ids" if name == "ids" else "--" + name.replace("_", "-")
        raise ReceiverError(f"{option}: {message}") from None


def _print_counts(found: ReplayCounts) -> None:
    stdout.print(f"{found['events']} events")
    for name, count in found["deliveries"].items():
        stdout.print(f"{name}: {count} deliveries")


@replays.command("list")
def list_(
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=1000)] = 50, json: Json = False
) -> None:
    """List replays, newest first: who ordered them, and why."""

    async def run(settings: Settings, database: Database) -> list[ReplayHead]:
        return await make_replays(settings, database).list_orders(limit=limit)

    found = with_database(run)
    if json:
        print_json(found)
        return
    table = Table(box=None)
    for name in ("id", "state", "by", "ordered", "events", "deliveries", "reason"):
        table.add_column(name, no_wrap=True)
    for row in found:
        table.add_row(
            str(row["id"]),
            row["state"],
            Text(row["caller"]),
            moment(row["created_at"]),
            f"{row['handled']} of {row['matched']}",
            str(row["ordered"]),
            Text(row["reason"][:60] or "-"),
        )
    wide.print(table if found else "No replays.")


@replays.command()
def show(
    replay_id: Annotated[UUID, typer.Argument(metavar="ID")],
    wait: Annotated[bool, typer.Option("--wait", help="Show the progress until it has ended.")] = False,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Show a replay and what became of its deliveries; with --wait the exit status is that of `replay`."""
    if timeout is not None and not wait:
        raise ReceiverError("--timeout needs --wait")
    patience = Patience(timeout)

    async def run(settings: Settings, database: Database) -> tuple[ReplayDetails, int]:
        orders = make_replays(settings, database)
        order = await _find(orders, replay_id)
        return await _watch(database, orders, order, patience) if wait else (order, 0)

    found, ended_with = with_database(run)
    if json:
        print_json(found)
    else:
        _print(found)
    if ended_with:
        raise typer.Exit(ended_with)


@replays.command()
def cancel(replay_id: Annotated[UUID, typer.Argument(metavar="ID")]) -> None:
    """Stop a replay: what was not sent yet will not be."""

    async def run(settings: Settings, database: Database) -> ReplayDetails:
        orders = make_replays(settings, database)
        await _find(orders, replay_id)
        if not await orders.cancel(replay_id, by=f"{user_name()} on the command line"):
            raise ReceiverError("the replay has ended")
        return await _find(orders, replay_id)

    _print(with_database(run))


async def _find(orders: Replays, replay_id: UUID) -> ReplayDetails:
    found = await orders.show(replay_id)
    if found is None:
        raise ReceiverError(f"there is no replay {replay_id}")
    return found


async def _watch(
    database: Database, orders: Replays, order: ReplayDetails, patience: Patience
) -> tuple[ReplayDetails, int]:
    """Return the replay, and the exit status, when it has ended or there is no use in waiting."""
    progress = progress_bar(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    loop = asyncio.get_running_loop()
    began = loop.time()
    sent_first = sent = _ended(order)
    missing: str | None = None
    with progress:
        task = progress.add_task("delivered", total=None, rate="")
        try:
            while order["state"] == "pending" or _count(order, "pending"):
                patience.check(missing)
                await asyncio.sleep(min(LOOK, patience.left))
                order = await _find(orders, order["id"])
                progressed, sent = _ended(order) != sent, _ended(order)
                missing = None if progressed else await _find_missing(database, order)
                # How many deliveries there will be is reckoned from the events that were looked at so far.
                total: int | None = order["ordered"]
                if order["state"] == "pending":
                    total = (
                        round(order["ordered"] * order["matched"] / order["handled"])
                        if order["handled"]
                        else None
                    )
                rate = (sent - sent_first) / (loop.time() - began)
                progress.update(task, completed=sent, total=total, rate=f"{rate:.0f}/s")
        except GaveUp as over:
            stderr.print(Text(f"The replay has not ended, and this command stops waiting: {over}."))
            stderr.print(f"`receiver replays show {order['id']} --wait` watches it again.")
            return order, over.status
        except BaseException:
            stderr.print(
                f"The replay goes on; `receiver replays show {order['id']} --wait` watches it again."
            )
            raise
    return order, 1 if order["state"] == "failed" or _count(order, "dead") else 0


async def _find_missing(database: Database, order: ReplayDetails) -> str | None:
    """Return in words what is missing so that the replay goes on; None if nothing is."""
    async with database.read() as connection:
        seen = await workers.find_runs(connection)
    if order["state"] == "pending":
        # A worker's step needs all destinations of the order.
        return find_missing(seen, [REPLAY_LANE, *map(destination_lane, order["destinations"])])
    waiting = sorted(name for name, states in order["deliveries"].items() if states.get("pending"))
    missing = [find_missing(seen, [destination_lane(name)]) for name in waiting]
    # As long as one of them works there is progress to watch.
    return missing[0] if all(missing) else None


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
        print_line(f"  {order['downloads']} files downloaded again")
    for name, counts in sorted(order["deliveries"].items()):
        print_line(f"  {name}: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items())))


def _utc(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time else None
