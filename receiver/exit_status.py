"""How a command ends: with a sentence on standard error and an exit status if it fails.

The sentence consists of our own words and an exception's class. A library's text may quote a secret, and a
traceback ends with that text, so RECEIVER_LOG_LEVEL=DEBUG adds only the traceback's frames.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from receiver.error_texts import error_text, traceback_lines
from receiver.errors import SettingsError


def run(command: Callable[[], object]) -> None:
    """Run a command. If it fails, exit with 2 for wrong settings and with 1 for other failures."""
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
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the last place that can report it
        _drop_output()
        _print_error(error_text(error))
        if os.environ.get("RECEIVER_LOG_LEVEL", "").strip().upper() == "DEBUG":
            sys.stderr.write("\n".join(traceback_lines(error)) + "\n")
        sys.exit(2 if isinstance(error, SettingsError) else 1)


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
