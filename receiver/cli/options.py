"""Options and arguments that several commands share."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from receiver.core.request_values import read_moment
from receiver.errors import UsageError

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count; change nothing.")]
EventKey = Annotated[str, typer.Argument(metavar="EVENT", help="The event's id, or Clipia's request_id.")]
Reason = Annotated[str | None, typer.Option(help="Goes on record with the action.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Limit = Annotated[int, typer.Option(help="Print at most this many rows.", min=1, max=1000)]
MAX_ID: Final = 2**63 - 1
"""The largest number of a row in both databases."""
CURSOR_HELP: Final = "Continue here: the `next` of the page before."
MAX_PORT: Final = 65_535


def read_time(text: str) -> datetime:
    """Read a time or an age. Raises BadParameter."""
    try:
        return read_moment(text, now=datetime.now(UTC))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def since_option(noun: str) -> Any:
    """Make the option `--since`; `noun` names the rows and the time that counts, as in `events received`."""
    return typer.Option(
        metavar="TIME",
        parser=read_time,
        help=f"Only {noun} at or after this time: 2026-01-31, 2026-01-31T12:00 (UTC), or ago: 90m, 2h, 7d.",
    )


def until_option(noun: str) -> Any:
    """Make the option `--until`."""
    return typer.Option(metavar="TIME", parser=read_time, help=f"Only {noun} before this time (UTC).")


def read_pair(text: str) -> tuple[str, str]:
    """Return the name and the value of `--metadata`. Raises UsageError."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--metadata {text!r}: write NAME=VALUE")
    return name, value
