"""Options and arguments that several commands share."""

from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

DryRun = Annotated[bool, typer.Option("--dry-run", help="Only count; change nothing.")]
EventKey = Annotated[str, typer.Argument(metavar="EVENT", help="The event's id, or Clipia's request_id.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Limit = Annotated[int, typer.Option(help="Print at most this many rows.", min=1, max=1000)]
CURSOR_HELP: Final = "Continue here: the `next` of the page before."
MAX_PORT: Final = 65_535


def since_option(noun: str) -> Any:
    """Make the option `--since`; `noun` names the rows and the time that counts, as in `events received`."""
    return typer.Option(
        metavar="TIME",
        callback=_in_utc,
        help=f"Only {noun} at or after this time (UTC): 2026-01-31 or 2026-01-31T12:00:00.",
    )


def until_option(noun: str) -> Any:
    """Make the option `--until`."""
    return typer.Option(metavar="TIME", callback=_in_utc, help=f"Only {noun} before this time (UTC).")


def _in_utc(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time else None
