"""`receiver events export` and `import`: events, jobs and replays as a file of JSON lines."""

import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from typing import Annotated, BinaryIO, Final

import orjson
import typer
from sqlalchemy.exc import StatementError

from receiver.cli.database import with_database
from receiver.cli.options import since_option, until_option
from receiver.cli.remote import local_only
from receiver.cli.terminal import count, print_note, progress_bar
from receiver.db import export_import
from receiver.db.database import Database
from receiver.errors import ReceiverError
from receiver.private_files import open_private
from receiver.settings import Settings

BATCH_LINES: Final = 200
"""Lines that are read or written in one transaction."""


@local_only("it reads all rows of this machine's database; run it where the receiver runs")
def export(
    file: Annotated[str, typer.Argument(help="The file to write; - for standard output.")],
    since: Annotated[datetime | None, since_option("rows made")] = None,
    until: Annotated[datetime | None, until_option("rows made")] = None,
) -> None:
    """Write all events with their bodies, receipts, files and deliveries, all jobs and all replays to a file.

    The file has one JSON object per line. Stop the workers first: a change that they make during the export
    may be missing from it.
    """

    async def run(_settings: Settings, database: Database) -> dict[str, int]:
        async with database.read() as connection:
            counts = await export_import.count(connection, since=since, until=until)
        with _opened(file, new=True) as output, progress_bar() as progress:
            task = progress.add_task("lines", total=sum(counts.values()))
            output.write(orjson.dumps({"type": "ledger", "version": export_import.VERSION}) + b"\n")
            written = 0
            async for lines in _read_batches(database, since, until):
                output.writelines(orjson.dumps(line) + b"\n" for line in lines)
                written += len(lines)
                progress.advance(task, len(lines))
            output.write(orjson.dumps({"type": "end", "lines": written}) + b"\n")
        return counts

    counts = with_database(run)
    print_note(", ".join(count(number, kind) for kind, number in counts.items()) + " exported")


async def _read_batches(
    database: Database, since: datetime | None, until: datetime | None
) -> AsyncIterator[list[export_import.Line]]:
    for kind in export_import.KINDS:
        after = 0
        while True:
            async with database.read() as connection:
                lines, after = await export_import.read(
                    connection, kind, after=after, limit=BATCH_LINES, since=since, until=until
                )
            if not lines:
                break
            yield lines


@local_only("it writes rows to this machine's database; run it where the receiver runs")
def import_(
    file: Annotated[str, typer.Argument(help="A file from `events export`; - for standard input.")],
) -> None:
    """Read an export into this database. Rows that exist already are not changed, so you can repeat it.

    Delivered messages are not sent again; pending ones are sent from this database. Keep the workers of the
    old database stopped, or both databases send them.
    """

    async def run(_settings: Settings, database: Database) -> Counter[str]:
        done: Counter[str] = Counter()
        with _opened(file) as source, progress_bar() as progress:
            task = progress.add_task("lines", total=None)
            for number, lines in _batches(source):
                try:
                    async with database.write() as connection:
                        done += await export_import.write(connection, lines)
                except (AttributeError, KeyError, TypeError, ValueError, StatementError) as error:
                    # The message of a StatementError may quote the statement and its values.
                    reason = "" if isinstance(error, StatementError) else f": {error}"
                    last = number + len(lines) - 1
                    raise ReceiverError(
                        f"{file}: one of the lines {number} to {last} is not from an export "
                        f"({type(error).__name__}{reason}); the lines before them are imported"
                    ) from None
                progress.advance(task, len(lines))
        return done

    done = with_database(run)
    print_note(", ".join(f"{number} {name}" for name, number in sorted(done.items())) or "an empty export")


def _batches(source: Iterable[bytes]) -> Iterator[tuple[int, list[export_import.Line]]]:
    """Yield lines in batches, each with the number of its first line; check the first and the last line."""
    numbered = enumerate(map(_line, source), start=1)
    _, head = next(numbered, (0, {}))
    if head.get("type") != "ledger" or head.get("version") != export_import.VERSION:
        raise ReceiverError(f"this is not an export of version {export_import.VERSION}: see its first line")
    last: export_import.Line = {}
    read = 0
    while batch := list(islice(numbered, BATCH_LINES)):
        lines = [line for _, line in batch]
        if lines[-1].get("type") == "end":
            last = lines.pop()
        read += len(lines)
        if lines:
            yield batch[0][0], lines
    if last.get("lines") != read:
        raise ReceiverError(
            "the export's last line is missing: was it cut off? The lines before it are imported"
        )


def _line(text: bytes) -> export_import.Line:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ReceiverError(f"a line is not JSON: {error}; was the export cut off?") from None
    if not isinstance(value, dict):
        raise ReceiverError("a line is not a JSON object")
    return value


@contextmanager
def _opened(name: str, *, new: bool = False) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdout.buffer if new else sys.stdin.buffer
        return
    try:
        with open(name, "xb" if new else "rb", opener=open_private if new else None) as file:
            yield file
    except OSError as error:
        raise ReceiverError(f"{name} cannot be {'written' if new else 'read'}: {error.strerror}") from None
