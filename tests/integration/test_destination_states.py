"""The state of destinations that all processes share: pauses, and open circuits."""

import time
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import select, update
from support.events import insert_event
from support.payloads import body
from support.servers import Postgres

from receiver.db import destinations as sql
from receiver.db import migrate
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.destinations import FRESH_SECONDS, Circuit
from receiver.db.operation_tables import circuits
from receiver.db.tables import events
from receiver.ingest import make_event


def opened(process: uuid.UUID, destination: str = "orders", error: str = "no answer") -> Circuit:
    """Return a circuit that a process has opened."""
    since = datetime.now(UTC)
    return Circuit(destination=destination, process=process, owner="web-1:41", open_since=since, error=error)


async def test_a_pause_keeps_its_author_and_ends_once(database: Database) -> None:
    """A second pause changes no row, and only the first resumption of a pause ends it."""
    async with database.write() as connection:
        await sql.pause(connection, "orders", by="mia", reason="migration")
        await sql.pause(connection, "orders", by="tom", reason=None)
        state = (await sql.read_pauses(connection))["orders"]
        assert state.pause is not None
        assert (state.pause.by, state.pause.reason, state.resumed) == ("mia", "migration", None)
        assert await sql.resume(connection, "orders")
        assert not await sql.resume(connection, "orders")
        state = (await sql.read_pauses(connection))["orders"]
        assert state.pause is None
        assert state.resumed is not None
        assert 0 <= state.resumed < 60
        await sql.pause(connection, "orders", by="tom", reason=None)
        state = (await sql.read_pauses(connection))["orders"]
        assert state.pause is not None
        assert state.pause.by == "tom"


async def test_a_circuit_is_open_while_a_process_reports_it(database: Database) -> None:
    """A process closes its own circuit only, and that of a process that does not report it any more ends."""
    first, second = uuid.uuid4(), uuid.uuid4()
    async with database.write() as connection:
        await sql.report(connection, [opened(first), opened(first, "mail"), opened(second)])
        await sql.report(connection, [opened(first, error="refused")])
        found = {(each.destination, each.process): each.error for each in await sql.read_circuits(connection)}
        assert found == {
            ("orders", first): "refused",
            ("mail", first): "no answer",
            ("orders", second): "no answer",
        }
        await sql.withdraw(connection, first, ["orders"])
        assert {(each.destination, each.process) for each in await sql.read_circuits(connection)} == {
            ("mail", first),
            ("orders", second),
        }
        old = db_time(-FRESH_SECONDS - 1)
        await connection.execute(update(circuits).where(circuits.c.process == second).values(reported_at=old))
        assert [each.destination for each in await sql.read_circuits(connection)] == ["mail"]
        await sql.withdraw(connection, first, [])
        assert list((await connection.execute(select(circuits.c.destination))).scalars()) == ["mail"]


async def test_the_migration_keeps_a_filled_database(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """C15: a database of the schema before, with events, becomes one with the tables, and back."""
    postgres: Postgres = request.getfixturevalue("postgres")
    for url in (f"sqlite:///{tmp_path / 'old.db'}", postgres.url()):
        database = Database(url)
        await migrate.upgrade(database, "0014")
        async with database.write() as connection:
            event = make_event(
                "clipia", body("r-1"), received_at=time.time(), secret_id="a", signed_at=time.time()
            )
            await insert_event(connection, event)
        for step in ("0015", "0014", "0015"):
            if step == "0014":
                await migrate.apply(database, lambda config: command.downgrade(config, "0014"))
            else:
                await migrate.upgrade(database, step)
            async with database.read() as connection:
                assert (await connection.execute(select(events.c.request_id))).scalars().all() == ["r-1"]
        async with database.write() as connection:
            await sql.pause(connection, "orders", by="mia", reason=None)
            await sql.report(connection, [opened(uuid.uuid4())])
        await database.close()
