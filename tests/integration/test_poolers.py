"""pgbouncer is detected, and behind it the service uses no session state and no prepared statements."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
from sqlalchemy import text
from support.events import driver_of
from support.servers import PgBouncer, Postgres, Switch

from receiver.db import migrate
from receiver.db.database import Database
from receiver.db.postgresql import Postgresql
from receiver.db.sessions import IDLE_BEHIND_POOLER, Sessions

SOON = 20.0


def _sessions(database: Database) -> Sessions:
    assert isinstance(database._backend, Postgresql)
    return database._backend.sessions


@pytest.fixture(scope="module", params=["transaction", "session"])
def pooler(request: pytest.FixtureRequest, postgres: Postgres) -> Iterator[PgBouncer]:
    """A pgbouncer in each mode; in session mode each connection needs a session of the pool."""
    size = 2 if request.param == "transaction" else 20
    with PgBouncer(postgres, mode=request.param, pool_size=size) as running:
        yield running


@pytest.fixture
async def behind(pooler: PgBouncer) -> AsyncIterator[list[Database]]:
    """The connections of two processes to one database behind the pooler."""
    url = pooler.url(template="migrated")
    opened = [Database(url), Database(url)]
    yield opened
    for database in opened:
        await database.close()


async def ask(database: Database, statement: str) -> object:
    """Run a query and return its only value."""
    async with database.read() as connection:
        return (await connection.execute(text(statement))).scalar_one()


async def test_a_pooler_is_told_from_a_server(behind: list[Database], postgres: Postgres) -> None:
    """The pooler is detected in both modes; if there is none, statements are prepared by name and kept."""
    assert await ask(behind[0], "SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
    assert driver_of(behind[0]).is_pooled
    direct = Database(postgres.url())
    await ask(direct, "SELECT 1")
    assert await ask(direct, "SELECT count(*) FROM pg_prepared_statements WHERE name <> ''")
    assert not driver_of(direct).is_pooled
    await direct.close()


async def test_limits_hold_and_stay_with_the_transaction(behind: list[Database], postgres: Postgres) -> None:
    """Each transaction sets its own limits, and the pooler's next client does not inherit them."""
    names = ("lock_timeout", "idle_in_transaction_session_timeout")
    assert [await ask(behind[0], f"SHOW {name}") for name in names] == ["2s", "10s"]
    rows = await driver_of(behind[1]).fetch("SELECT current_setting('lock_timeout') AS value", ())
    assert [row["value"] for row in rows] == ["0"]
    direct = Database(postgres.url())
    assert [await ask(direct, f"SHOW {name}") for name in names] == ["2s", "10s"]
    rows = await driver_of(direct).fetch("SELECT current_setting('lock_timeout') AS value", ())
    assert [row["value"] for row in rows] == ["2s"]
    await direct.close()


async def test_every_statement_is_ones_own(behind: list[Database]) -> None:
    """If two processes run many statements at once on two sessions, each gets its own results."""

    async def transactions(database: Database, number: int) -> None:
        for step in range(15):
            async with database.write() as connection:
                for _ in range(2):
                    value = number * 1000 + step
                    statement = text(f"SELECT CAST(:value AS bigint) + {step % 5} AS answer")
                    answer = (await connection.execute(statement, {"value": value})).scalar_one()
                    assert answer == value + step % 5

    async def statements(database: Database) -> None:
        for step in range(40):
            mark = str(uuid.uuid4())
            rows = await driver_of(database).fetch(f"SELECT $1::text || '{step % 5}' AS answer", (mark,))
            assert [row["answer"] for row in rows] == [f"{mark}{step % 5}"]

    async with asyncio.timeout(3 * SOON):
        await asyncio.gather(
            *(transactions(database, number) for database in behind for number in range(4)),
            *(statements(database) for database in behind),
        )
    # A missing prepared statement counts as a lost session, and is prepared in a new one.
    assert [_sessions(database)._generation for database in behind] == [0, 0]


async def test_idle_connections_are_given_back(behind: list[Database], pooler: PgBouncer) -> None:
    """After many concurrent transactions few connections stay open, so other processes get a session."""
    database = behind[0]
    together = asyncio.Barrier(8)

    async def hold() -> None:
        async with database.read() as connection:
            if pooler.mode == "session":
                await together.wait()
            await connection.execute(text("SELECT pg_sleep(0.2)"))

    async with asyncio.timeout(3 * SOON):
        await asyncio.gather(*(hold() for _ in range(8)))
        # The pooler notices closed connections a moment later.
        while pooler.clients(database.url.rpartition("/")[2]) > IDLE_BEHIND_POOLER:  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def test_migrations_may_run_at_once_behind_a_pooler(pooler: PgBouncer) -> None:
    """C15: if several deployments migrate at once on two sessions, they wait for each other."""
    url = pooler.url()
    databases = [Database(url) for _ in range(4)]
    async with asyncio.timeout(3 * SOON):
        await asyncio.gather(*(migrate.upgrade(database) for database in databases))
        await migrate.require_current(databases[0])
    for database in databases:
        await database.close()


async def test_a_pooler_that_is_put_in_between_is_noticed(pooler: PgBouncer, postgres: Postgres) -> None:
    """C3: if the address changes from the server to a pooler and back, the process goes on."""
    url = postgres.url(template="migrated")
    end = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{url.rpartition('/')[2]}'"
    with Switch(postgres.port) as switch:
        database = Database(url.replace(f":{postgres.port}/", f":{switch.port}/"))
        for port, is_pooled in ((postgres.port, False), (pooler.port, True), (postgres.port, False)):
            switch.target = port
            postgres.sql(end)
            async with asyncio.timeout(SOON):
                assert await ask(database, "SELECT 1") == 1
                assert await driver_of(database).fetch("SELECT 1", ())
            assert driver_of(database).is_pooled is is_pooled
            # A connection to the pooler stays open if the server's session ends.
            sessions = _sessions(database)
            sessions.distrust({"generation": sessions._generation})
        await database.close()
