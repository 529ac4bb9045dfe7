"""How a command that cannot go on ends: in one sentence and an exit status.

The sentence holds our own words and an exception's class. A library's text could quote a secret, and a
traceback ends in that text; so RECEIVER_LOG_LEVEL=DEBUG shows where an exception was raised and nothing else.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from receiver.causes import cause
from receiver.errors import ReceiverError, SettingsError


def run(command: Callable[[], object]) -> None:
    """Run a command. If it fails, exit with 2 for wrong settings and with 1 for other failures."""
    # A stream that was closed before the start is None, which no library that prints expects.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    try:
        try:
            command()
        finally:
            # A full disk shows itself here, and not while the interpreter ends and nothing can be said.
            sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()  # the reader has all it wanted, such as `head`
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # noqa: BLE001 - the last place where one can be told
        _drop_output()
        _say(sentence(error))
        if os.environ.get("RECEIVER_LOG_LEVEL", "").strip().upper() == "DEBUG":
            sys.stderr.write("\n".join(frames(error)) + "\n")
        sys.exit(2 if isinstance(error, SettingsError) else 1)


def sentence(error: BaseException) -> str:
    """Return what went wrong for a person: our own message, or what the exception's class and number say."""
    if isinstance(error, ReceiverError):
        return str(error)
    if isinstance(error, BaseExceptionGroup):
        return sentence(error.exceptions[0])
    if isinstance(error, OSError):
        files = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
        return ": ".join([cause(error), *(name if name.isprintable() else ascii(name) for name in files)])
    return (
        f"unexpected {type(error).__name__}: set RECEIVER_LOG_LEVEL=DEBUG to see where, "
        "and report it with what that shows"
    )


def frames(error: BaseException) -> list[str]:
    """Return the lines of a traceback without the texts of the exceptions."""
    return list(_frames(error))


def _frames(error: BaseException) -> Iterator[str]:
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield f"{type(each).__module__}.{type(each).__qualname__} was raised at"
        yield from (line.rstrip("\n") for line in traceback.format_tb(each.__traceback__))
        each = each.__cause__ or each.__context__


def _say(message: str) -> None:
    mark = "\x1b[1;31merror:\x1b[0m" if sys.stderr.isatty() else "error:"
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{mark} {message}\n")
        sys.stderr.flush()


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _drop_output() -> None:
    """Let what is left in the buffer go nowhere: the interpreter would fail to write it once more."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
