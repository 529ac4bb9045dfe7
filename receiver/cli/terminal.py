"""What commands print with."""

import sys
from typing import Any, Final

import orjson
from rich.console import Console

stdout: Final = Console(highlight=False)
# For tables: an id that is cut off is of no use, so the terminal wraps long lines and we don't.
wide: Final = Console(highlight=False, width=max(160, stdout.width))
stderr: Final = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON document, indented; for programs and for people."""
    sys.stdout.write(
        orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_NON_STR_KEYS, default=str).decode() + "\n"
    )


def size(count: int) -> str:
    """Return a number of bytes for people: `12.3 KiB`."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":  # noqa: PLR2004 - 1024 to the next unit
            break
        amount /= 1024
    return f"{count} B" if unit == "B" else f"{amount:.1f} {unit}"
