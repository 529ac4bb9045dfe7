"""`receiver migrate`: upgrade the database's schema."""

import asyncio

from receiver.cli.database import opened_database
from receiver.cli.remote import local_only
from receiver.cli.terminal import stdout
from receiver.db import migrate as migrations
from receiver.db.requirements import require_usable
from receiver.settings import Settings


@local_only("it changes the tables of this machine's database; run it where the receiver runs")
def migrate() -> None:
    """Upgrade the database's schema to this release; safe to run at any time, and several times at once."""
    settings = Settings.load()
    asyncio.run(_migrate(settings))


async def _migrate(settings: Settings) -> None:
    async with opened_database(settings) as database:
        await require_usable(database, durable_without=settings.durable_without)
        before = await migrations.current(database)
        await migrations.upgrade(database)
        after = await migrations.current(database)
    if before != after:
        stdout.print(f"Migrated from {before or 'an empty database'} to {after}.")
    elif after != (needed := migrations.head()):
        stdout.print(
            f"The schema ({after}) is newer than this release ({needed}), and this release can use it."
        )
    else:
        stdout.print(f"The schema is up to date ({after}).")
