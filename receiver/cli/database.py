"""The service's database and storage for a command."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from receiver.db import migrate
from receiver.db.database import Database
from receiver.errors import RequestError
from receiver.logs import configure_logging
from receiver.media import Storage, open_storage
from receiver.settings import Settings

T = TypeVar("T")


def with_database(use: Callable[[Settings, Database], Awaitable[T]]) -> T:
    """Run `use` on the service's database. Raises SettingsError and DatabaseUnavailable."""
    silence_logs()
    settings = Settings.load()

    async def run() -> T:
        async with opened_database(settings) as database:
            await migrate.require_current(database)
            return await use(settings, database)

    return asyncio.run(run())


def silence_logs() -> None:
    """Log nothing: the command reports errors itself, and a log line would repeat them."""
    configure_logging(level="CRITICAL")


def no_event(key: str) -> RequestError:
    """Return the error for a key that matches no event."""
    return RequestError(f"there is no event with the id or request_id {key!r}", code="not_found")


@asynccontextmanager
async def opened_database(settings: Settings) -> AsyncIterator[Database]:
    """Open the database of RECEIVER_DATABASE_URL for the block."""
    database = Database(settings.database_url.get_secret_value())
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def opened_storage(settings: Settings) -> AsyncIterator[Storage]:
    """Open the storage of RECEIVER_STORAGE_URL for the block."""
    storage = open_storage(settings.storage_url.get_secret_value())
    try:
        yield storage
    finally:
        await storage.close()
