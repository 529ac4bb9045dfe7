"""Wake-ups between processes, and the polling that works without them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import httpx
import pytest
from sqlalchemy import text
from structlog.testing import capture_logs
from support.events import driver_of
from support.payloads import SECRET, body, signed
from support.servers import PgBouncer, Postgres

from receiver.app import create_app
from receiver.core.lane_names import FAN_OUT_LANE
from receiver.db import signals
from receiver.db.database import Database
from receiver.db.signals import Signals, listen
from receiver.lanes.worker import Wakeups
from receiver.settings import Settings

SOON = 10.0


class Heard:
    """The lanes that a listener has heard."""

    def __init__(self) -> None:
        self.lanes: list[str] = []
        self._news = asyncio.Event()

    def __call__(self, lane: str) -> None:
        """Add a lane."""
        self.lanes.append(lane)
        self._news.set()

    async def until(self, *lanes: str) -> None:
        """Wait until the lanes are signalled."""
        async with asyncio.timeout(SOON):
            while not set(lanes) <= set(self.lanes):
                await self._news.wait()
                self._news.clear()


@pytest.fixture
async def one(postgres: Postgres) -> AsyncIterator[Database]:
    """The database of a process without a worker."""
    opened = Database(postgres.url(template="migrated"))
    yield opened
    await opened.close()


@pytest.fixture
async def heard(one: Database) -> AsyncIterator[Heard]:
    """A listener of a worker in another process."""
    other, heard = Database(one.url), Heard()
    task = asyncio.create_task(listen(driver_of(other), heard, reconnect=0.1, check=0.1))
    await listening(one)
    yield heard
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await other.close()


async def listening(database: Database) -> None:
    """Wait until a session listens."""
    query = text("SELECT count(*) FROM pg_stat_activity WHERE query = :last").bindparams(
        last=signals.IS_READ_ONLY
    )
    async with asyncio.timeout(SOON):
        while True:
            async with database.read() as connection:
                if (await connection.execute(query)).scalar_one():
                    return
            await asyncio.sleep(0.02)


async def test_lanes_are_signalled_across_processes(one: Database, heard: Heard) -> None:
    """A process without a worker signals the processes with one, for lanes of all names."""
    sender = Signals(driver_of(one))
    wakeups = Wakeups(sender.send)
    wakeups.wake("fanout")
    wakeups.wake("destination:größer")
    await heard.until("fanout", "destination:größer")
    await sender.close()


async def test_a_lane_of_ones_own_is_not_signalled(one: Database, heard: Heard) -> None:
    """If the lane runs in this process, no signal is sent."""
    sender = Signals(driver_of(one))
    wakeups = Wakeups(sender.send)
    waiting = asyncio.create_task(wakeups.wait("fanout", seconds=SOON))
    await asyncio.sleep(0)
    wakeups.wake("fanout")
    await asyncio.wait_for(waiting, SOON / 2)
    wakeups.wake("media")
    await heard.until("media")
    assert heard.lanes == ["media"]
    await sender.close()


async def test_one_signal_does_for_many_commits(one: Database, heard: Heard) -> None:
    """Under load a lane is signalled at intervals, and once more after the last commit."""
    sender = Signals(driver_of(one))
    for _ in range(200):
        sender.send("fanout")
        await asyncio.sleep(0)
    sender.send("last")
    await heard.until("fanout", "last")
    await sender.close()
    assert heard.lanes.count("fanout") < 20


async def test_a_lost_listener_comes_back(one: Database, heard: Heard) -> None:
    """C3: if the server closes the connection, the listener opens a new one."""
    async with one.write() as connection:
        await connection.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query = :last"),
            {"last": signals.IS_READ_ONLY},
        )
    await asyncio.sleep(0.3)
    await listening(one)
    sender = Signals(driver_of(one))
    sender.send("fanout")
    await heard.until("fanout")
    await sender.close()


async def test_a_listener_leaves_a_server_that_takes_no_writes(
    one: Database, heard: Heard, postgres: Postgres
) -> None:
    """C3: after a failover the listener leaves the old server, although its sessions stay open."""
    listener = (
        f"SELECT string_agg(pid::text, ' ') FROM pg_stat_activity WHERE query = $${signals.IS_READ_ONLY}$$"
    )
    before = postgres.sql(listener).stdout
    assert before.strip()
    postgres.sql("ALTER SYSTEM SET default_transaction_read_only = on")
    postgres.sql("SELECT pg_reload_conf()")
    try:
        async with asyncio.timeout(SOON):
            while postgres.sql(listener).stdout == before:  # noqa: ASYNC110 - the server has no event for it
                await asyncio.sleep(0.1)
    finally:
        postgres.sql("ALTER SYSTEM RESET default_transaction_read_only")
        postgres.sql("SELECT pg_reload_conf()")
    sender = Signals(driver_of(one))
    async with asyncio.timeout(SOON):
        while not heard.lanes:
            sender.send("fanout")
            await asyncio.sleep(0.2)
    await sender.close()


async def test_a_pooler_cannot_listen(pgbouncer: PgBouncer) -> None:
    """If there is a pooler, no process listens, and the log tells so once."""
    database = Database(pgbouncer.url(template="migrated"))
    with capture_logs() as logs:
        async with asyncio.timeout(SOON):
            await listen(driver_of(database), pytest.fail)
    await database.close()
    assert [each["log_level"] for each in logs] == ["info"]
    assert "pooler" in logs[0]["event"]


async def test_a_signal_that_cannot_be_sent_is_dropped() -> None:
    """C3: if the database is away, signals are dropped; later ones are sent."""
    database = Database("postgresql://nobody@127.0.0.1:1/x")
    sender = Signals(driver_of(database))
    sender.send("fanout")
    await sender.close()
    sender.send("fanout")
    await sender.close()
    await database.close()


async def test_a_web_process_signals_what_it_stores(one: Database, heard: Heard) -> None:
    """If a process without a worker accepts a webhook, it wakes the fan-out of another process."""
    settings = Settings.load(
        database_url=one.url,
        clipia_webhook_secret=SECRET,
    )
    app = create_app(settings, worker=False)
    content = body("r-1")
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://receiver") as client,
    ):
        answer = await client.post("/clipia/webhook", content=content, headers=signed(content))
        assert answer.status_code == 200
        await heard.until(FAN_OUT_LANE)
