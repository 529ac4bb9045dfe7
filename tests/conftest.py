"""Fixtures for every test: a scrubbed environment, loopback only, and databases made by the migrations."""

import asyncio
import gc
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import settings as hypothesis_settings
from structlog.dev import ConsoleRenderer, plain_traceback
from support.servers import PgBouncer, Postgres

from receiver import masking
from receiver.db import migrate
from receiver.db.database import Database

pytest_plugins = [
    "support.browser_fixtures",
    "support.clipia_fixtures",
    "support.command_line",
    "support.destination_fixtures",
]

DATABASES = os.environ.get("RECEIVER_TEST_DATABASES", "sqlite,postgresql,pgbouncer").split(",")
"""The kinds of database that the tests of `database_url` run on."""

hypothesis_settings.register_profile("default", deadline=None, print_blob=True)
hypothesis_settings.load_profile("default")

# By default structlog prints each traceback with all variables, which takes a second for SQLAlchemy's.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        ConsoleRenderer(exception_formatter=plain_traceback),
    ]
)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell ignores SIGINT for background commands, and all processes of the tests would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def scrubbed_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of the machine reaches a test, and no test writes into the checkout."""
    for name in os.environ:
        if name.startswith(("RECEIVER_", "CLIPIA_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    # The secrets of one test must not mask the words of another.
    monkeypatch.setattr(masking, "_pieces", set())
    monkeypatch.setattr(masking, "_short", set())


@pytest.fixture(autouse=True)
def logging_restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test that configures logging changes nothing for later tests.

    Otherwise their records would go to the standard error of that test, which pytest has closed. The loggers
    of modules, which are cached, would keep that for ever.
    """
    configure, before = structlog.configure, structlog.get_config()
    handlers, level = logging.root.handlers, logging.root.level
    monkeypatch.setattr(
        structlog, "configure", lambda **options: configure(**options | {"cache_logger_on_first_use": False})
    )
    yield
    configure(**before)
    logging.root.handlers = handlers
    logging.root.setLevel(level)


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test fails if it opens a connection to another machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in {socket.AF_INET, socket.AF_INET6} and address[0] not in {"127.0.0.1", "::1"}:
            pytest.fail(f"a test connects to {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of this test session."""
    with Postgres() as server:
        server.sql("CREATE DATABASE migrated")
        _migrate(f"postgresql://postgres@127.0.0.1:{server.port}/migrated")
        yield server


@pytest.fixture(scope="session")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    """A pooler in front of the session's server, which lends a session to each transaction."""
    with PgBouncer(postgres) as pooler:
        yield pooler


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file with the current schema, to be copied."""
    path = tmp_path_factory.mktemp("sqlite") / "receiver.db"
    _migrate(f"sqlite:///{path}")
    return path


def _migrate(url: str) -> None:
    async def upgrade() -> None:
        database = Database(url)
        await migrate.upgrade(database)
        await database.close()

    # The migrations run in a thread: if the first test is asynchronous, this thread has a running event
    # loop.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, upgrade()).result()


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a fresh database with the current schema; the test runs once on each kind."""
    if request.param == "sqlite":
        template: Path = request.getfixturevalue("migrated_sqlite")
        path = tmp_path / "receiver.db"
        path.write_bytes(template.read_bytes())
        yield f"sqlite:///{path}"
        return
    postgres: Postgres = request.getfixturevalue("postgres")
    direct = postgres.url(template="migrated")
    if request.param == "postgresql":
        yield direct
    else:
        pgbouncer: PgBouncer = request.getfixturevalue("pgbouncer")
        yield pgbouncer.through(direct)
    # A thousand databases would fill the disk, and removing them at the end would take minutes.
    postgres.drop(direct)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """An open database with the current schema."""
    opened = Database(database_url)
    yield opened
    await opened.close()


@pytest.fixture
async def no_stray_failures() -> AsyncIterator[None]:
    """Fail the test if the event loop reports an exception that no caller handled."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: found.append(context))
    yield
    await asyncio.sleep(0)
    gc.collect()
    assert found == []
