"""The options `--url` and `--token`, and the commands that cannot use them."""

import os
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Final, ParamSpec, TypeVar

import typer

from receiver.cli.terminal import read_file
from receiver.config_file import URL_VARIABLE, read_remote

T = TypeVar("T")
P = ParamSpec("P")

_FILE_MARK: Final = "@"


@dataclass(frozen=True, kw_only=True)
class Remote:
    """The options as they were given."""

    url: str | None = None
    token: str | None = None


_given: Final[ContextVar[Remote]] = ContextVar("remote")
# The group's callback sets it, which does not run if a test calls the function of a command.
_NOTHING: Final = Remote()


def choose(url: str | None, token: str | None) -> None:
    """Keep the options for the command that runs next."""
    _given.set(Remote(url=url, token=token))


def find_remote() -> tuple[str, str] | None:
    """Return URL and token of the receiver elsewhere; None for this machine's. Raises ReceiverError."""
    given = _given.get(_NOTHING)
    token = given.token
    if token is not None and token.startswith(_FILE_MARK):
        token = read_file(token[1:]).decode(errors="surrogateescape")
    return read_remote(os.environ, url=given.url, token=token)


def is_remote() -> bool:
    """Return whether --url or RECEIVER_URL names a receiver elsewhere."""
    url = _given.get(_NOTHING).url
    return bool((os.environ.get(URL_VARIABLE, "") if url is None else url).strip())


def local_only(reason: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a command end with a usage error if --url is given; RECEIVER_URL alone does not change it."""

    def decorate(command: Callable[P, T]) -> Callable[P, T]:
        @wraps(command)
        def run(*arguments: P.args, **options: P.kwargs) -> T:
            if _given.get(_NOTHING).url is not None:
                message = f"this command does not work with a receiver elsewhere: {reason}"
                raise typer.BadParameter(message, param_hint="--url")
            return command(*arguments, **options)

        return run

    return decorate
