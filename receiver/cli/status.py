"""`receiver status`: the service on one screen."""

import asyncio
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from receiver.cli.client import with_client
from receiver.cli.options import Json
from receiver.cli.terminal import moment, print_json, size, stdout
from receiver.client import Client
from receiver.status import DestinationStatus, Status, age, state_of

WATCH_SECONDS: Final = 2.0
BARS: Final = "▁▂▃▄▅▆▇█"


def status(
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Read it again every two seconds, until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """Show lanes, destinations, workers, jobs and disks on one screen, and the next command for each problem.

    The disks are those of the machine that reads them: this one, or the receiver at --url.
    """

    async def run(client: Client) -> None:
        if json:
            print_json(await client.show_status())
            return
        if not watch:
            stdout.print(screen(await client.show_status()), crop=False)
            return
        with Live(console=stdout, screen=stdout.is_terminal, auto_refresh=False) as live:
            while True:
                live.update(screen(await client.show_status()), refresh=True)
                await asyncio.sleep(WATCH_SECONDS)

    with_client(run)


def screen(found: Status) -> Group:
    """Return the screen of a status."""
    parts: list[RenderableType] = [_head(found)]
    if found["problems"]:
        parts.append(Text("\nProblems", style="bold red"))
        for problem in found["problems"]:
            # A command that is wrapped cannot be copied.
            command = Text(f"    $ {problem['command']}", style="cyan", no_wrap=True, overflow="ignore")
            parts += [Text(f"  {problem['text']}"), command]
    else:
        parts.append(Text("\nNo problems found.", style="green"))
    lanes = [
        (each["lane"], each["rows"], age(each["oldest_seconds"]) if each["rows"] else "-")
        for each in found["lanes"]
    ]
    parts.append(_table("lane", ("waiting", "oldest"), lanes))
    columns = ("waiting", "oldest", "failing", "dead", "delivered/min", "failed/min")
    parts.append(_table("destination", columns, [_destination(each) for each in found["destinations"]]))
    parts.append(Text())
    for worker in found["workers"]:
        state = "running" if worker["running"] else "not seen"
        seen = age(worker["seen_seconds_ago"])
        lanes_text = ", ".join(worker["lanes"])
        parts.append(Text(f"worker {worker['host']}:{worker['pid']}  {state} ({seen} ago)  {lanes_text}"))
    parts += [
        Text(_by_minute("events of 1 h", found["events_last_hour"])),
        Text(_by_minute("delivered in 1 h", found["delivered_last_hour"])),
        Text(_by_minute("failed attempts of 1 h", found["failed_last_hour"])),
    ]
    parts.append(Text(f"jobs of 24 h: {_counts(found['jobs_last_day'])}"))
    parts.append(Text(f"rejected requests of 1 h: {_counts(found['rejections_last_hour'])}"))
    for disk in found["disks"]:
        free, total = disk["free_bytes"], disk["total_bytes"]
        space = "no answer" if free is None or total is None else f"{size(free)} of {size(total)} free"
        parts.append(Text(f"disk of the {disk['holds']}: {space} ({disk['path']})"))
    parts += _retention(found)
    return Group(*parts)


def _retention(found: Status) -> Iterator[Text]:
    if plan := found["retention"]:
        yield Text(f"retention: {plan['older_than_days']} days, the next run at {moment(plan['next_at'])}")
    if last := found["last_retention"]:
        ended = moment(last["finished_at"]) if last["finished_at"] else "not ended"
        yield Text(f"last run of retention: {last['state']} ({ended}), {last['events']} events deleted")


def _destination(each: DestinationStatus) -> tuple[Any, ...]:
    return (
        each["name"] + ("" if state_of(each) == "ready" else f" ({state_of(each)})"),
        each["pending"],
        age(each["oldest_seconds"]) if each["pending"] else "-",
        _red(each["failing"]),
        _red(each["dead"]),
        f"{each['delivered_per_minute']:g}",
        f"{each['failed_per_minute']:g}",
    )


def _head(found: Status) -> Text:
    webhook = found["last_webhook_at"]
    last = "no webhook yet" if webhook is None else f"last webhook {_since(webhook, found['at'])} ago"
    paused = ", submissions paused" if found["submissions_paused"] else ""
    return Text(f"{moment(found['at'])}  {found['database']}, {last}{paused}", style="bold")


def _since(then: datetime, now: datetime) -> str:
    return age(max(0.0, (now - then).total_seconds()))


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column(title, overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(each if isinstance(each, Text) else Text(str(each)) for each in row))
    return Group(Text(), table)


def _red(number: int) -> Text:
    return Text(str(number), style="red" if number else "")


def _by_minute(title: str, counts: Sequence[int]) -> str:
    """Return the counts of minutes as a line of bars, if the terminal can show them, and their sum."""
    total = f"{title}: {sum(counts)}"
    if not any(counts) or not stdout.encoding.startswith("utf"):
        return total
    highest = max(counts)
    bars = "".join(" " if not each else BARS[(each * len(BARS) - 1) // highest] for each in counts)
    return f"{total}, {highest} in a minute at most\n  {bars}"


def _counts(numbers: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in sorted(numbers.items())) or "none"
