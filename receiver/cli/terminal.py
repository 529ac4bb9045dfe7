"""What commands print with."""

import getpass
import os
import sys
from collections.abc import Sized
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import orjson
import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.text import Text

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

stdout: Final = Console(highlight=False)
# For tables: an id that is cut off is of no use, so the terminal wraps long lines and we don't.
wide: Final = Console(highlight=False, width=max(160, stdout.width))
stderr: Final = Console(stderr=True, highlight=False)


def user_name() -> str:
    """Return who runs this command, for the record; a container's user may have no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


def print_json(value: Any) -> None:
    """Print one JSON document, indented; for programs and for people."""
    sys.stdout.write(
        orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str).decode() + "\n"
    )


def amount(number: object, noun: str) -> str:
    """Return a number with its noun; Clipia may leave it out."""
    return f"an unknown number of {noun}" if number is None else f"{number} {noun}"


def size(count: int) -> str:
    """Return a number of bytes for people: `12.3 KiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"


def moment(time: datetime) -> str:
    """Return a time for people, in UTC."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Make a progress bar, which is drawn on a terminal only: a cron mail or a log has no use for it."""
    return Progress(*columns, console=stderr, disable=not stderr.is_terminal)


def print_title(title: str, rows: Sized) -> None:
    """Print the heading of a part that may have nothing in it."""
    stdout.print(f"\n[bold]{title}[/]" + ("" if rows else ": none"))


def print_line(line: str) -> None:
    """Print a line as it is; somebody else's words are no markup."""
    stdout.print(Text(line), soft_wrap=True)
