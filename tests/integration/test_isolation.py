"""Each transaction is READ COMMITTED, even if the role or the database has another default on PostgreSQL."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
from sqlalchemy import func, select, text
from support.clipia import MODEL, PROMPT, Sandbox, World
from support.events import driver_of
from support.payloads import SECRET, body, signed
from support.servers import Postgres

from receiver.core.signature import Secret
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.tables import events, jobs
from receiver.errors import ReceiverError, RequestError
from receiver.ingest import Ingest, SignedRequest
from receiver.submitter import Job

LEVELS = ("read uncommitted", "repeatable read", "serializable")


@pytest.fixture(params=LEVELS)
def odd_url(request: pytest.FixtureRequest, postgres: Postgres) -> str:
    """Return the URL of a database with another isolation level for the sessions of our role."""
    url = postgres.url(template="migrated")
    name = url.rpartition("/")[2]
    postgres.sql(
        f"ALTER ROLE postgres IN DATABASE {name} SET default_transaction_isolation = '{request.param}'"
    )
    return url


@pytest.fixture
async def databases(odd_url: str) -> AsyncIterator[list[Database]]:
    """Return four connections to it, one for each process."""
    opened = [Database(odd_url) for _ in range(4)]
    yield opened
    for database in opened:
        await database.close()


async def test_transactions_are_read_committed(databases: list[Database]) -> None:
    """Each way to the database sets the level, and none changes the session for other clients of a pooler."""
    database = databases[0]
    for transaction in (database.write, database.read):
        async with transaction() as connection:
            level = (await connection.execute(text("SHOW transaction_isolation"))).scalar_one()
            assert level == "read committed"
    rows = await driver_of(database).fetch("SELECT current_setting('transaction_isolation') AS level", ())
    assert [row["level"] for row in rows] == ["read committed"]


async def test_webhooks_are_stored_in_spite_of_the_default(databases: list[Database]) -> None:
    """C1: if four processes get the same webhooks at once, each is accepted once, and none is rejected."""
    secrets = {"clipia": [Secret.from_text(SECRET)]}
    ingests = [
        Ingest(database, secrets=secrets, tolerance=300, clock=time.time, on_accepted=lambda: None)
        for database in databases
    ]

    async def deliver(ingest: Ingest, content: bytes) -> str:
        signature = signed(content)["X-Clipia-Signature"].encode()
        try:
            return (await ingest.receive(SignedRequest("clipia", [signature], content))).outcome
        except ReceiverError as error:
            return type(error).__name__

    for round_ in range(15):
        contents = [body(f"r-{round_}-{number}") for number in range(20)]
        told = await asyncio.gather(*(deliver(ingest, content) for content in contents for ingest in ingests))
        assert sorted(set(told)) == ["accepted", "duplicate"]
        assert told.count("accepted") == 20
    async with databases[0].read() as connection:
        for table, rows in ((events, 300), (all_receipts, 1200)):
            assert (await connection.execute(select(func.count()).select_from(table))).scalar_one() == rows


# The sandbox of the module runs on the module's event loop.
@pytest.mark.asyncio(loop_scope="module")
async def test_a_budget_is_kept_in_spite_of_the_default(odd_url: str, sandbox: Sandbox) -> None:
    """F12: a job locks the caller's other jobs before it counts them, so that a budget is not overspent."""
    async with World(odd_url, sandbox.url) as world:
        submitters = [world.submitter(budgets={"shop": 12}) for _ in range(2)]
        made = await asyncio.gather(
            *(submitters[n % 2].submit(MODEL, PROMPT, caller="shop") for n in range(10)),
            return_exceptions=True,
        )
        assert [type(each) for each in made if not isinstance(each, RequestError)] == [Job]
        assert len(await world.rows(jobs)) == 1
