"""Alembic's entry: use the connection of `receiver migrate` if there is one, else RECEIVER_DATABASE_URL."""

import asyncio

from alembic import context
from sqlalchemy import Connection

from receiver.db.database import Database
from receiver.db.operation_tables import metadata
from receiver.db.version import VERSION_TABLE
from receiver.settings import Settings


def run(connection: Connection) -> None:
    context.configure(
        connection=connection, target_metadata=metadata, compare_type=True, version_table=VERSION_TABLE
    )
    with context.begin_transaction():
        context.run_migrations()


async def run_on_own_connection() -> None:
    database = Database(Settings.load().database_url.get_secret_value())
    async with database.write() as connection:
        await connection.run_sync(run)
    await database.close()


if (handed_over := context.config.attributes.get("connection")) is not None:
    run(handed_over)
else:
    asyncio.run(run_on_own_connection())
