"""The receiver that a command works with: one elsewhere over its API, or the database of this machine."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Final, ParamSpec, TypeVar

import httpx
import typer

from receiver.app import create_local_app
from receiver.cli.database import opened_database, silence_logs
from receiver.cli.terminal import operator, read_file
from receiver.client import Client
from receiver.config_file import read_remote
from receiver.db import migrate
from receiver.errors import ReceiverError, RequestError
from receiver.settings import Settings
from receiver.submitter import Submitter

T = TypeVar("T")
P = ParamSpec("P")

_FILE_MARK: Final = "@"


@dataclass(frozen=True, kw_only=True)
class Remote:
    """The options `--url` and `--token`."""

    url: str | None = None
    token: str | None = None


_remote: Final[ContextVar[Remote]] = ContextVar("remote")


def choose(url: str | None, token: str | None) -> None:
    """Keep the options `--url` and `--token` for the command that runs next."""
    _remote.set(Remote(url=url, token=token))


def _given() -> Remote:
    # The group's callback sets it, which does not run if a test calls the function of a command.
    return _remote.get(Remote())


def with_client(
    use: Callable[[Client], Awaitable[T]], *, caller: str | None = None, prepares: bool = False
) -> T:
    """Run `use` with a client of the receiver at --url or RECEIVER_URL, or else of this machine's database.

    On this machine the calls come from `caller`, by default from the user of the command. `prepares` makes
    the tables of an empty SQLite database. Raises SettingsError, DatabaseUnavailable and ReceiverUnavailable.
    """
    silence_logs()
    given = _given()
    token = given.token
    if token is not None and token.startswith(_FILE_MARK):
        token = read_file(token[1:]).decode(errors="surrogateescape")
    remote = read_remote(os.environ, url=given.url, token=token)

    async def run() -> T:
        if remote is not None:
            async with Client(*remote) as client:
                return await use(client)
        async with _local_client(caller or operator(), prepares=prepares) as client:
            return await use(client)

    return asyncio.run(run())


@asynccontextmanager
async def _local_client(caller: str, *, prepares: bool) -> AsyncIterator[Client]:
    settings = Settings.load()
    async with opened_database(settings) as database:
        if prepares:
            await migrate.prepare(database, durable_without=settings.durable_without)
        else:
            await migrate.require_current(database)
        submitter = Submitter.configured(settings, database)
        try:
            app = create_local_app(settings, database, submitter, caller=caller)
            async with Client("http://localhost", "-", transport=httpx.ASGITransport(app)) as client:
                yield client
        finally:
            await submitter.close()


def local_only(reason: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a command end with a usage error if --url is given; RECEIVER_URL alone does not change it."""

    def decorate(command: Callable[P, T]) -> Callable[P, T]:
        @wraps(command)
        def run(*arguments: P.args, **options: P.kwargs) -> T:
            if _given().url is not None:
                raise typer.BadParameter(
                    f"this command takes no receiver elsewhere: {reason}", param_hint="--url"
                )
            return command(*arguments, **options)

        return run

    return decorate


def is_remote() -> bool:
    """Return whether --url or RECEIVER_URL names a receiver elsewhere."""
    given = _given()
    return bool(given.url if given.url is not None else os.environ.get("RECEIVER_URL", "").strip())


@contextmanager
def missing(error: ReceiverError) -> Iterator[None]:
    """Raise `error`, which names the key, if a call in the block finds no such object."""
    try:
        yield
    except RequestError as found:
        if found.code == "not_found":
            raise error from None
        raise
