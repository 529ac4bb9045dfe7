"""Input and output of the commands: results on standard output, notes on standard error."""

import getpass
import os
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from receiver.errors import ReceiverError

stdout: Final = Console(highlight=False)
# For tables: Rich would cut ids off at the width of the terminal, which wraps a long line on its own.
wide: Final = Console(highlight=False, width=max(160, stdout.width))
stderr: Final = Console(stderr=True, highlight=False)


def user_name() -> str:
    """Return the name of the user that runs this command; a container's user may have only a number."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


def operator() -> str:
    """Return the name that goes on record for a change that this command makes."""
    return f"{user_name()} on the command line"


def read_file(name: str) -> bytes:
    """Return the content of a file, or of standard input if its name is -. Raises ReceiverError."""
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise ReceiverError(f"{name} cannot be read: {error.strerror}") from None


def print_json(value: Any) -> None:
    """Print one JSON document, indented."""
    sys.stdout.write(
        orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str).decode() + "\n"
    )


def print_result(value: Any, text: str | Callable[[], None], *, json: bool) -> None:
    """Print a result: as JSON, or else a line of text or the output of a function."""
    if json:
        print_json(value)
    elif isinstance(text, str):
        print_line(text)
    else:
        text()


def print_list(
    rows: Sequence[Any], table: Callable[[], None], *, json: bool, next_: str | None = None
) -> None:
    """Print a list, as JSON in the shape of the API's; `next_` is the cursor of the following page."""
    print_result({"data": rows, "next": next_}, table, json=json)
    if next_ is not None and not json:
        print_note(f"For more, add --cursor {next_}")


def print_rows(rows: Sequence[Mapping[str, object]], *columns: str, none: str, wrapped: str = "") -> None:
    """Print a table, or the line `none` if there are no rows; the cells of the column `wrapped` may wrap."""
    table = Table(box=None)
    for name in columns:
        table.add_column(name, no_wrap=name != wrapped)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in columns))
    wide.print(table if rows else none)


def _cell(value: object) -> Text:
    if isinstance(value, datetime):
        return Text(moment(value))
    if isinstance(value, dict):
        value = ", ".join(f"{number} {state}" for state, number in sorted(value.items()))
    return Text("-" if value in (None, "") else str(value))


def amount(number: object, noun: str) -> str:
    """Return a number with its noun; Clipia may leave the number out."""
    return f"an unknown number of {noun}" if number is None else f"{number} {noun}"


def count(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun in the singular or plural, which is `noun` with an s by default."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def size(number: int) -> str:
    """Return a number of bytes for people: `12.3 KiB`."""
    amount = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{number} B" if unit == "B" else f"{amount:.1f} {unit}"


def moment(time: datetime) -> str:
    """Return a time for people, in UTC."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def progress_bar(*columns: ProgressColumn) -> Progress:
    """Make a progress bar; it is drawn only on a terminal, and not in a log or in a mail from cron."""
    return Progress(*columns, console=stderr, disable=not stderr.is_terminal)


def print_title(title: str, rows: Sized) -> None:
    """Print the heading of a list."""
    stdout.print(f"\n[bold]{title}[/]" + ("" if rows else ": none"))


def print_line(line: str) -> None:
    """Print a line of a result; brackets in it are not markup, and it is not wrapped."""
    stdout.print(Text(line), soft_wrap=True)


def print_note(note: str) -> None:
    """Print a note on standard error: programs read the result from standard output."""
    stderr.print(Text(note), soft_wrap=True)
