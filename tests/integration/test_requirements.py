"""An unusable database is detected before a webhook arrives, and the probe leaves no event."""

import asyncio
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select, text
from support.payloads import SECRET, body, signed
from support.servers import Postgres

from receiver.api.operations import PROBE_CACHE_SECONDS
from receiver.app import create_app
from receiver.db import migrate
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.requirements import require_rights, require_usable
from receiver.db.tables import events, probes, sources
from receiver.errors import DatabaseUnavailable, SettingsError
from receiver.ingest import make_event
from receiver.settings import Settings


class Restricted:
    """A migrated database, and a role with the documented rights."""

    def __init__(self, server: Postgres) -> None:
        self._server = server
        self.name = server.url(template="migrated").rpartition("/")[2]
        self.role = f"role_{uuid.uuid4().hex[:12]}"
        self.url = f"postgresql://{self.role}@127.0.0.1:{server.port}/{self.name}"
        self.sql(
            f"CREATE ROLE {self.role} LOGIN",
            f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {self.role}",
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {self.role}",
        )

    def sql(self, *statements: str) -> None:
        """Run statements as the owner of the tables."""
        for statement in statements:
            self._server.sql(statement.replace("ROLE_NAME", self.role), database=self.name)

    async def ready(self) -> int:
        """Return the status of /readyz."""
        settings = Settings.load(database_url=self.url, clipia_webhook_secret=SECRET)
        app = create_app(settings, worker=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://receiver") as client,
        ):
            return (await client.get("/readyz")).status_code


@pytest.fixture
def restricted(postgres: Postgres) -> Restricted:
    """A database with a role that has only the rights that the service needs."""
    return Restricted(postgres)


async def count(database: Database) -> list[int]:
    """Count the events, receipts, sources and probes."""
    async with database.read() as connection:
        return [
            (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for table in (events, all_receipts, sources, probes)
        ]


async def test_a_role_that_may_not_connect_is_told_so(restricted: Restricted) -> None:
    """C3: if a right is revoked, the database is unavailable and the URL is not blamed."""
    restricted.sql(f"REVOKE CONNECT ON DATABASE {restricted.name} FROM PUBLIC")
    database = Database(restricted.url)
    with pytest.raises(DatabaseUnavailable, match="lacks a right"):
        async with database.read():
            pass
    await database.close()


async def test_a_probe_leaves_no_event(database: Database) -> None:
    """G13: a probe inserts an event, a receipt and a source, rolls them back, and commits its own row."""
    for _ in range(3):
        await database.probe()
    assert await count(database) == [0, 0, 0, 1]
    event = make_event("clipia", body("r-1"), received_at=time.time(), secret_id="one", signed_at=time.time())
    assert await database.insert_arrivals([event]) == set()
    await database.probe()
    assert await count(database) == [1, 1, 1, 1]


async def test_probes_wait_for_no_other(postgres: Postgres) -> None:
    """G13: if a process hangs in its probe, the others stay ready."""
    url = postgres.url(template="migrated")
    hanging, other = Database(url), Database(url)
    async with hanging.write() as connection:
        await connection.execute(text("INSERT INTO sources (name) VALUES ('probe-of-another')"))
        await connection.execute(
            text(
                "INSERT INTO events (id, source, request_id, origin, state, body, body_sha256, received_at) "
                "VALUES (gen_random_uuid(), 'probe', 'probe', 'webhook', 'received', 'x', 'x'::bytea, now())"
            )
        )
        async with asyncio.timeout(1.5):
            await other.probe()
        await connection.rollback()
    for database in (hanging, other):
        await database.close()


@pytest.mark.parametrize(
    "damage",
    [
        "REVOKE ALL ON SEQUENCE events_seq_seq FROM ROLE_NAME",
        "REVOKE ALL ON SEQUENCE receipts_seq_seq FROM ROLE_NAME",
        "REVOKE INSERT ON events FROM ROLE_NAME",
        "REVOKE INSERT ON receipts FROM ROLE_NAME",
        "REVOKE INSERT ON sources FROM ROLE_NAME",
        "REVOKE SELECT ON events FROM ROLE_NAME",
        "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM ROLE_NAME",
        "ALTER TABLE events DROP COLUMN model",
        "DROP TABLE receipts",
        "ALTER TABLE receipts ADD COLUMN since TIMESTAMPTZ NOT NULL",
        "ALTER TABLE events ADD CHECK (source = 'another')",
        "ALTER ROLE ROLE_NAME SET default_transaction_read_only = on",
    ],
)
async def test_readiness_needs_the_rights_of_webhooks(restricted: Restricted, damage: str) -> None:
    """G13: /readyz answers 200 with the documented rights, and 503 if a webhook could not be stored."""
    assert await restricted.ready() == 200
    restricted.sql(damage)
    assert await restricted.ready() == 503


async def test_a_missing_right_is_no_mistake_of_ours(restricted: Restricted) -> None:
    """C3: if a right is missing, each method raises DatabaseUnavailable, which is answered 503."""
    restricted.sql(
        "REVOKE ALL ON SEQUENCE events_seq_seq FROM ROLE_NAME", "REVOKE ALL ON probes FROM ROLE_NAME"
    )
    database = Database(restricted.url)
    event = make_event("clipia", body("r-1"), received_at=time.time(), secret_id="one", signed_at=time.time())
    with pytest.raises(DatabaseUnavailable, match="lacks a right"):
        await database.insert_arrivals([event])
    with pytest.raises(DatabaseUnavailable, match="lacks a right"):
        async with database.read() as connection:
            await connection.execute(select(probes))
    await database.close()


async def test_missing_rights_are_named(restricted: Restricted) -> None:
    """The error names each missing right, including the worker's, and the statements that grant it."""
    database = Database(restricted.url)
    await require_rights(database)
    restricted.sql(
        "REVOKE USAGE ON SEQUENCE attempts_seq_seq FROM ROLE_NAME",
        "REVOKE UPDATE ON deliveries FROM ROLE_NAME",
    )
    with pytest.raises(SettingsError) as told:
        await require_rights(database)
    assert "UPDATE on deliveries, USAGE on attempts_seq_seq" in str(told.value)
    granting = str(told.value).partition(", run ")[2]
    restricted.sql(granting)
    await require_rights(database)
    await database.close()


@pytest.fixture(params=["LATIN1", "SQL_ASCII"])
async def odd_encoding(request: pytest.FixtureRequest, postgres: Postgres) -> AsyncIterator[Database]:
    """A database with an encoding other than UTF8."""
    name = f"encoding_{request.param}_{uuid.uuid4().hex[:8]}".lower()
    postgres.sql(
        f"CREATE DATABASE {name} ENCODING '{request.param}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
    )
    database = Database(f"postgresql://postgres@127.0.0.1:{postgres.port}/{name}")
    yield database
    await database.close()


async def test_another_encoding_is_an_error(odd_encoding: Database) -> None:
    """B9: the error tells how to make a database with UTF8; another one cannot store a Cyrillic name."""
    with pytest.raises(SettingsError, match=r"encoding is .* CREATE DATABASE name ENCODING 'UTF8'"):
        await require_usable(odd_encoding)
    with pytest.raises(SettingsError, match="encoding"):
        await migrate.prepare(odd_encoding)


async def test_sqlite_holds_every_text_in_each_encoding(tmp_path: Path) -> None:
    """B9: all encodings of SQLite store the same texts: a file in UTF-16 takes each webhook."""
    path = tmp_path / "wide.db"
    with closing(sqlite3.connect(path)) as made:
        made.execute("PRAGMA encoding = 'UTF-16le'")
        made.execute("CREATE TABLE other (a)")
        made.commit()
    database = Database(f"sqlite:///{path}")
    await migrate.prepare(database)
    event = make_event(
        "clipia", body("r-1", model="кот 🐈"), received_at=time.time(), secret_id="one", signed_at=time.time()
    )
    assert await database.insert_arrivals([event]) == set()
    assert await database.insert_arrivals([event]) == {event.raw_id}
    async with database.read() as connection:
        assert (await connection.exec_driver_sql("PRAGMA encoding")).scalar_one() == "UTF-16le"
        row = (await connection.execute(select(events.c.model, events.c.body))).one()
    assert row.body == body("r-1", model="кот 🐈")
    await database.close()


async def test_storage_that_is_durable_without_a_flush_is_taken_by_name(postgres: Postgres) -> None:
    """C7: fsync and full_page_writes may be off if a setting names them; otherwise the error names them."""
    database = Database(postgres.url(template="migrated"))
    try:
        for name in ("fsync", "full_page_writes"):
            postgres.sql(f"ALTER SYSTEM SET {name} = off")
        postgres.sql("SELECT pg_reload_conf()")
        await asyncio.sleep(0.5)  # until the server's processes have read it
        with pytest.raises(SettingsError, match=r"fsync = off and full_page_writes = off") as told:
            await require_usable(database)
        assert "RECEIVER_DURABLE_WITHOUT=fsync,full_page_writes" in str(told.value)
        with pytest.raises(SettingsError, match="full_page_writes = off"):
            await require_usable(database, durable_without=["fsync"])
        await require_usable(database, durable_without=["fsync", "full_page_writes"])
        async with database.write() as connection:
            name = (await connection.execute(text("SELECT current_database()"))).scalar_one()
        postgres.sql(f"ALTER DATABASE {name} SET synchronous_commit = off")
        await database.close()
        database = Database(database.url)
        # It is always an error, because PostgreSQL confirms a commit before it writes.
        with pytest.raises(SettingsError, match="synchronous_commit = off"):
            await require_usable(database, durable_without=["fsync", "full_page_writes"])
    finally:
        for name in ("fsync", "full_page_writes"):
            postgres.sql(f"ALTER SYSTEM RESET {name}")
        postgres.sql("SELECT pg_reload_conf()")
        await database.close()


async def test_a_deleted_file_takes_no_webhook(migrated_sqlite: Path, tmp_path: Path) -> None:
    """C3: if SQLite's file is deleted or replaced, webhooks and probes are answered 503 until it is back."""
    file, elsewhere = tmp_path / "receiver.db", tmp_path / "elsewhere.db"
    file.write_bytes(migrated_sqlite.read_bytes())
    settings = Settings.load(database_url=f"sqlite:///{file}", clipia_webhook_secret=SECRET)
    app = create_app(settings, worker=False)
    content = body("r-1")

    async def statuses(client: httpx.AsyncClient) -> tuple[int, int]:
        # The answer of a probe is reused for a second.
        await asyncio.sleep(PROBE_CACHE_SECONDS + 0.1)
        ready = await client.get("/readyz")
        sent = await client.post("/clipia/webhook", content=content, headers=signed(content))
        return ready.status_code, sent.status_code

    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://receiver") as client,
    ):
        assert await statuses(client) == (200, 200)
        file.rename(elsewhere)
        assert await statuses(client) == (503, 503)
        file.write_bytes(migrated_sqlite.read_bytes())
        assert await statuses(client) == (503, 503)
        elsewhere.rename(file)
        assert await statuses(client) == (200, 200)
