"""Input and output of the commands: results on standard output, notes on standard error."""

import getpass
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

import orjson
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, ProgressColumn
from rich.table import Table
from rich.text import Text

from receiver.errors import ReceiverError

_UNLIMITED: Final = 1_000_000
_GAP: Final = 2
"""The spaces around a cell."""
_TEXT_WIDTH: Final = 18
"""A column of sentences is not made narrower than this."""
_SPARE: Final = (
    *("seq", "path", "attempts", "caller", "model", "media", "source", "status"),
    *("created_at", "received_at", "request_id"),
)
"""Columns that a narrow terminal does without, the least important first."""
_KEYS: Final = ("id", "request_id")
"""The first of them names a row, and is never left out."""
_DEAD: Final = re.compile(r"^ *dead(?= |$)|\b\d+ dead\b")


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


# A pipe or a file has no width. Rich would take 80 columns for it, and break lines that programs read.
stdout: Final = Console(highlight=False, width=None if _is_terminal(sys.stdout) else _UNLIMITED)
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


def print_rows(
    rows: Sequence[Mapping[str, object]],
    *columns: str,
    none: str,
    wrapped: str = "",
) -> None:
    """Print a table, or the line `none` if there are no rows.

    On a terminal that is too narrow, cells wrap at their spaces, first those of the column `wrapped`, which
    has sentences. Then less important columns are left out. If that is not enough, each row is a list of its
    values. No id is ever broken, so it can be copied.
    """
    if not rows:
        stdout.print(none)
        return
    cells = [{name: _cell(row[name]) for name in columns} for row in rows]
    full = _widths(cells, lambda cell, _name: cell.cell_len)
    least = _widths(cells, lambda cell, name: _least(cell, name == wrapped))
    shown = _most_important(columns, least)
    if not shown:
        _print_records(cells)
        return
    table = Table(box=None)
    widths = _shrink({name: full[name] for name in shown}, least)
    for name, width in widths.items():
        table.add_column(name, width=width - _GAP, overflow="fold")
    for row in cells:
        table.add_row(*(row[name] for name in widths))
    stdout.print(table)
    if left_out := [name for name in columns if name not in shown]:
        print_note(f"Left out, because the terminal is narrow: {', '.join(left_out)}.")


def _widths(rows: Sequence[Mapping[str, Text]], width_of: Callable[[Text, str], int]) -> dict[str, int]:
    """Return the width of each column with its gap; the heading is one of its cells."""
    return {
        name: max(cell_len(name), *(width_of(row[name], name) for row in rows)) + _GAP for name in rows[0]
    }


def _most_important(columns: Sequence[str], least: Mapping[str, int]) -> list[str]:
    """Return the columns that fit the terminal; none if those that may not be left out are too wide."""
    key = next((name for name in columns if name in _KEYS), columns[0])
    spare = [name for name in _SPARE if name in columns and name != key]
    shown = set(columns) - set(spare)
    width = sum(least[name] for name in shown)
    if width > stdout.width:
        return []
    for name in reversed(spare):
        if width + least[name] <= stdout.width:
            shown.add(name)
            width += least[name]
    return [name for name in columns if name in shown]


def _least(cell: Text, has_sentences: bool) -> int:
    """Return the least width of a cell: that of its longest word, or a readable one for sentences."""
    if has_sentences:
        return min(cell.cell_len, _TEXT_WIDTH)
    return max(map(cell_len, cell.plain.split(" ")))


def _shrink(widths: dict[str, int], least: Mapping[str, int]) -> dict[str, int]:
    """Take from the widest columns until all fit the terminal, but from none more than to its least width."""
    # One alone may be wider than the screen, and is then cut to it in one step.
    found = {name: max(least[name], min(width, stdout.width)) for name, width in widths.items()}
    while sum(found.values()) > stdout.width:
        widest = max((name for name in found if found[name] > least[name]), key=lambda name: found[name])
        found[widest] -= 1
    return found


def _print_records(rows: Sequence[Mapping[str, Text]]) -> None:
    for number, row in enumerate(rows):
        if number:
            stdout.print()
        for name, cell in row.items():
            stdout.print(Text(f"{name}: ").append_text(cell), soft_wrap=True)


def _cell(value: object) -> Text:
    if isinstance(value, datetime):
        return Text(moment(value))
    if isinstance(value, dict):
        value = ", ".join(f"{number} {state}" for state, number in sorted(value.items()))
    return colored("-" if value in (None, "") else str(value))


def colored(text: str) -> Text:
    """Return text in which the state `dead`, or the number of dead letters, is red."""
    found = Text(text)
    found.highlight_regex(_DEAD, "red")
    return found


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
    stdout.print(colored(line), soft_wrap=True)


def print_note(note: str) -> None:
    """Print a note on standard error: programs read the result from standard output."""
    stderr.print(Text(note), soft_wrap=True)
