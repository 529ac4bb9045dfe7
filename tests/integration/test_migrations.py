"""The migrations make exactly the tables that the code declares, on both databases."""

import asyncio
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, inspect, text
from support.events import insert_event, plain
from support.servers import Postgres

from receiver.db import migrate, reads
from receiver.db.connection import Transaction
from receiver.db.database import Database
from receiver.db.operation_tables import metadata
from receiver.db.requirements import require_usable
from receiver.db.selection import Selection
from receiver.db.version import VERSION_TABLE
from receiver.errors import DatabaseUnavailable
from receiver.ingest import make_event

VERSIONS = Path(__file__).parents[2] / "migrations/versions"


async def test_no_drift(database: Database) -> None:
    """Alembic finds no difference between the migrated schema and the code."""

    def compare(connection: Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        return list(compare_metadata(context, metadata))

    async with database.write() as connection:
        assert await connection.run_sync(compare) == []


async def test_partial_indexes_are_partial(database: Database) -> None:
    """C13: the partial indexes have the conditions of the code, which autogenerate does not compare."""
    conditions = {"ix_events_received": "received", "ix_media_due": "pending", "ix_deliveries_due": "pending"}

    async def definition(connection: Transaction, name: str) -> str:
        query = (
            f"SELECT sql FROM sqlite_master WHERE name = '{name}'"
            if database.is_sqlite
            else f"SELECT indexdef FROM pg_indexes WHERE indexname = '{name}'"
        )
        return str((await connection.exec_driver_sql(query)).scalar_one())

    async with database.read() as connection:
        for name, state in conditions.items():
            assert f"'{state}'" in (await definition(connection, name)).split("WHERE")[1]


async def test_each_migration_keeps_a_filled_database(postgres: Postgres, tmp_path: Path) -> None:
    """C15: each migration from 0013 on keeps events and attempts, there, back and there again."""
    revisions = sorted(path.name[:4] for path in VERSIONS.glob("0*.py"))
    revisions = revisions[revisions.index("0013") :]
    assert len(revisions) > 5
    for url in (f"sqlite:///{tmp_path / 'old.db'}", postgres.url()):
        database = Database(url)
        await migrate.upgrade(database, revisions[0])
        async with database.write() as connection:
            await insert_event(connection, make_event("clipia", plain("r-1"), received_at=0.0))
            await connection.execute(
                text(
                    "INSERT INTO attempts (work_id, number, started_at, duration_ms, outcome) "
                    "SELECT id, 1, received_at, 7, 'retry' FROM events"
                )
            )
        for old, new in pairwise(revisions):
            for step in (new, old, new):
                if step == old:
                    await migrate.apply(database, partial(command.downgrade, revision=old))
                else:
                    await migrate.upgrade(database, step)
                async with database.read() as connection:
                    kept = "SELECT request_id, duration_ms FROM events JOIN attempts ON work_id = events.id"
                    assert (await connection.exec_driver_sql(kept)).all() == [("r-1", 7)]
        await database.close()


async def test_events_of_an_older_schema_are_found(database: Database) -> None:
    """C1: after the migrations of an older schema all stored events are found, with their receipts."""
    wanted = {(source, f"r-{number}") for source in ("clipia", "staging") for number in range(3)}
    async with database.write() as connection:
        for source, request_id in sorted(wanted):
            content = plain(request_id)
            event = make_event(
                source, content, received_at=time.time(), secret_id="one", signed_at=time.time()
            )
            await insert_event(connection, event)
    async with database.read() as connection:
        assert await reads.show_event(connection, "r-1") is not None
    await migrate.apply(database, lambda config: command.downgrade(config, "0005"))
    await migrate.upgrade(database)
    async with database.write() as connection:
        found = await reads.list_events(connection, limit=100)
        assert {(row["source"], row["request_id"]) for row in found} == wanted
        for row in found:
            for key in (str(row["id"]), row["id"].hex):
                shown = await reads.show_event(connection, key)
                assert shown is not None
                assert shown["id"] == row["id"]
        shown = await reads.show_event(connection, "r-1")
        assert shown is not None
        # If events of two sources have one request_id, it is the newest.
        assert (shown["source"], len(shown["receipts"])) == ("staging", 1)
        ids = await Selection(ids=("r-1", "r-7")).find_seqs(connection)
        assert {key: len(seqs) for key, seqs in ids.items()} == {"r-1": 2, "r-7": 0}
        again = make_event("clipia", plain("r-1"), received_at=time.time())
        assert await insert_event(connection, again) is None


async def test_upgrading_again_changes_nothing(database: Database) -> None:
    """If the schema is current, `migrate` makes no change."""
    await migrate.upgrade(database)
    assert await migrate.current(database) == migrate.head()
    await migrate.require_current(database)


async def test_a_migration_waits_for_another_one(postgres: Postgres) -> None:
    """C15: `migrate` waits for another migration, even if that takes longer than the lock timeout."""
    database = Database(postgres.url())
    async with asyncio.timeout(60):
        async with database.migrate() as connection:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": migrate.LOCK_ID})
            waiting = asyncio.create_task(migrate.upgrade(database))
            await asyncio.sleep(3)
            assert not waiting.done()
        await waiting
        await migrate.require_current(database)
    await database.close()


async def test_a_migration_that_collides_is_tried_again(postgres: Postgres) -> None:
    """C15: if a worker locks a table for longer than the lock timeout, the migration is tried again."""
    database = Database(postgres.url())
    async with asyncio.timeout(60):
        await migrate.upgrade(database, "0005")
        async with database.migrate() as connection:
            await connection.execute(text("LOCK TABLE events IN ROW EXCLUSIVE MODE"))
            waiting = asyncio.create_task(migrate.upgrade(database))
            await asyncio.sleep(6)
            assert not waiting.done()
        await waiting
        await migrate.require_current(database)
    await database.close()


async def test_an_unreachable_database_is_unavailable() -> None:
    """C3: if no server listens, each method raises DatabaseUnavailable."""
    database = Database("postgresql://nobody@127.0.0.1:1/x")
    with pytest.raises(DatabaseUnavailable, match="unavailable"):
        await migrate.upgrade(database)
    with pytest.raises(DatabaseUnavailable, match="unavailable"):
        await database.probe()
    await database.close()


async def test_sqlite_is_opened_durably(tmp_path: Path) -> None:
    """C7: every connection has WAL, synchronous=FULL and foreign keys; a missing folder is created."""
    database = Database(f"sqlite:///{tmp_path / 'new' / 'folder' / 'receiver.db'}")
    await require_usable(database)
    for transaction in (database.write, database.read):
        async with transaction() as connection:
            values = [
                (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys")
            ]
            assert values == ["wal", 2, 1]
            assert not await connection.run_sync(lambda sync: inspect(sync).get_table_names())
    await database.close()


async def test_sqlite_updates_are_not_lost(database: Database) -> None:
    """C14: transactions that read and then write are serialized by BEGIN IMMEDIATE, so no update is lost."""
    async with database.write() as connection:
        await connection.exec_driver_sql("CREATE TABLE counter (value INTEGER NOT NULL)")
        await connection.exec_driver_sql("INSERT INTO counter VALUES (0)")
    others = [Database(database.url) for _ in range(3)]
    lock = "" if database.is_sqlite else " FOR UPDATE"

    async def increment(one: Database) -> None:
        for _ in range(25):
            async with one.write() as connection:
                query = f"SELECT value FROM counter{lock}"
                value = (await connection.exec_driver_sql(query)).scalar_one()
                await connection.exec_driver_sql(f"UPDATE counter SET value = {value + 1}")

    await asyncio.gather(*(increment(one) for one in (database, *others)))
    async with database.read() as connection:
        assert (await connection.exec_driver_sql("SELECT value FROM counter")).scalar_one() == 100
    for one in others:
        await one.close()
