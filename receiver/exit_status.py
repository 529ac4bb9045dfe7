"""How a command ends: with a sentence on standard error and an exit status if it fails.

docs/operating.md has the table of all statuses.

The sentence consists of our own words and an exception's class. A library's text may quote a secret, and a
traceback ends with that text, so RECEIVER_LOG_LEVEL=DEBUG adds only the traceback's frames.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, TextIO

from receiver.error_texts import error_text, traceback_lines
from receiver.errors import PermanentError, RequestError, SettingsError, TransientError, UsageError

FAILED: Final = 1
"""The command has ended, and its result is no: a problem was found, nothing matched. Or it hit a bug."""
MISUSED: Final = 2
"""A setting or the command line is wrong."""
NO_WORKER: Final = 3
"""No running worker does the work that the command waits for."""
NOT_FOUND: Final = 4
"""There is no object with this id."""
REJECTED: Final = 5
"""The receiver rejects the call, or Clipia refuses it: a repetition would not help."""
UNAVAILABLE: Final = 6
"""The database, the receiver, Clipia or the storage gave no answer: a repetition may help."""
TIMED_OUT: Final = 124
"""The time of --timeout is over; the command `timeout` uses the same status."""
INTERRUPTED: Final = 130
"""Ctrl-C, as shells report it."""

_NOT_FOUND_CODES: Final = frozenset({"not_found", "model_not_found"})


def run(command: Callable[[], object]) -> None:
    """Run a command. If it fails, exit with the status of its error."""
    # A stream that was closed before the start is None; libraries that print would crash.
    sys.stdout = sys.stdout or _null_stream()
    sys.stderr = sys.stderr or _null_stream()
    try:
        try:
            command()
        finally:
            # Flushed here so that a full disk is reported: the interpreter would flush it too late for that.
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()  # the reader, such as `head`, has closed the pipe
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - the last place that can report it
        _drop_output()
        _print_error(error_text(error))
        if os.environ.get("RECEIVER_LOG_LEVEL", "").strip().upper() == "DEBUG":
            sys.stderr.write("\n".join(traceback_lines(error)) + "\n")
        sys.exit(status_of(error))


def status_of(error: Exception) -> int:
    """Return the exit status of a command that ends with this error."""
    code = error.code if isinstance(error, RequestError) else None
    if isinstance(error, SettingsError | UsageError) or code == "invalid_request":
        return MISUSED
    if code in _NOT_FOUND_CODES:
        return NOT_FOUND
    if isinstance(error, TransientError) or code == "service_unavailable":
        return UNAVAILABLE
    return REJECTED if isinstance(error, PermanentError) else FAILED


def _print_error(message: str) -> None:
    mark = "\x1b[1;31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{mark} {message}\n")
        sys.stderr.flush()


def _null_stream() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _drop_output() -> None:
    """Discard the rest of the buffer if it cannot be written: the interpreter would fail on it at exit."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
