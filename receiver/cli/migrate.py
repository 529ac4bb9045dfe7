"""`receiver migrate`: bring the database's schema up to date."""

import asyncio

from receiver.cli.terminal import stdout
from receiver.db import migrate as migrations
from receiver.db.database import Database
from receiver.db.requirements import require_usable
from receiver.settings import Settings


def migrate() -> None:
    """Bring the database's schema to what this release needs; safe to run at any time, by several at once."""
    settings = Settings.load()
    asyncio.run(_migrate(settings))


async def _migrate(settings: Settings) -> None:
    database = Database(settings.database_url.get_secret_value())
    try:
        await require_usable(database, durable_without=settings.durable_without)
        before = await migrations.current(database)
        await migrations.upgrade(database)
        after = await migrations.current(database)
    finally:
        await database.close()
    if before != after:
        stdout.print(f"Migrated from {before or 'an empty database'} to {after}.")
    elif after != (needed := migrations.head()):
        stdout.print(f"The schema ({after}) is newer than this release ({needed}), which can run on it.")
    else:
        stdout.print(f"The schema is up to date ({after}).")
