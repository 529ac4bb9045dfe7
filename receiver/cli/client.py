"""The receiver that a command works with: one elsewhere over its API, or the database of this machine."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

import httpx

from receiver.cli.database import opened_database, silence_logs
from receiver.cli.remote import find_remote
from receiver.cli.terminal import operator
from receiver.client import Client
from receiver.errors import ReceiverError, RequestError
from receiver.settings import Settings
from receiver.tracing import OFF, Tracer, start_tracing

T = TypeVar("T")


def with_client(
    use: Callable[[Client], Awaitable[T]],
    *,
    caller: str | None = None,
    prepares: bool = False,
    is_traced: bool = False,
) -> T:
    """Run `use` with a client of the receiver at --url or RECEIVER_URL, or else of this machine's database.

    On this machine the calls come from `caller`, by default from the user of the command. `prepares` makes
    the tables of an empty SQLite database. `is_traced` lets calls on this machine make spans. Raises
    SettingsError, DatabaseUnavailable and ReceiverUnavailable.
    """
    silence_logs()
    remote = find_remote()

    async def run() -> T:
        if remote is not None:
            async with Client(*remote) as client:
                return await use(client)
        tracer = start_tracing() if is_traced else OFF
        async with _local_client(caller or operator(), tracer, prepares=prepares) as client:
            return await use(client)

    return asyncio.run(run())


@asynccontextmanager
async def _local_client(caller: str, tracer: Tracer, *, prepares: bool) -> AsyncIterator[Client]:
    # Most of a second of CPU, which a command for a receiver elsewhere does not need.
    from receiver.app import create_local_app  # noqa: PLC0415
    from receiver.db import migrate  # noqa: PLC0415
    from receiver.submitter import Submitter  # noqa: PLC0415

    settings = Settings.load()
    async with opened_database(settings) as database:
        if prepares:
            await migrate.prepare(database, durable_without=settings.durable_without)
        else:
            await migrate.require_current(database)
        submitter = Submitter.configured(settings, database, tracer=tracer)
        try:
            app = create_local_app(settings, database, submitter, caller=caller)
            transport = httpx.ASGITransport(app)
            async with Client("http://localhost", "-", transport=transport) as client:
                yield client
        finally:
            await submitter.close()
            await tracer.close()


@contextmanager
def missing(error: ReceiverError) -> Iterator[None]:
    """Raise `error`, which names the key, if a call in the block finds no such object."""
    try:
        yield
    except RequestError as found:
        if found.code == "not_found":
            raise error from None
        raise
