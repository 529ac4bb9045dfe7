"""How commands come to the database."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from receiver.db import migrate
from receiver.db.database import Database
from receiver.logs import configure_logging
from receiver.settings import Settings

T = TypeVar("T")


def with_database(use: Callable[[Settings, Database], Awaitable[T]]) -> T:
    """Run `use` on the service's database. Raises SettingsError and DatabaseUnavailable."""
    # The command itself says what goes wrong; the log would say it twice.
    configure_logging(level="CRITICAL")
    settings = Settings.load()

    async def run() -> T:
        database = Database(settings.database_url.get_secret_value())
        try:
            await migrate.require_current(database)
            return await use(settings, database)
        finally:
            await database.close()

    return asyncio.run(run())
