"""`receiver prune`, run to its end, interrupted and killed; and `receiver events erase`."""

import asyncio
import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import select, text, update
from structlog.testing import capture_logs
from support.commands import ReceiverProcess, command_environment, run_command
from support.events import until
from support.history import count_rows, fill, fill_jobs, whole
from support.payloads import SECRET
from typer.testing import CliRunner

from receiver import retention
from receiver.cli import app
from receiver.cli.prune import _watch
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.operation_tables import retention_runs
from receiver.db.tables import media
from receiver.errors import DatabaseUnavailable, ReceiverError
from receiver.retention import LIMITS, Pruned

MANY = 4000
"""Events of a run that is stopped in the middle; it takes eight batches."""

T = TypeVar("T")


class Receiver:
    """A receiver's database, with helpers that change it."""

    def __init__(self, database_url: str, folder: Path) -> None:
        self._url = database_url
        self._folder = folder
        self._settings = {"RECEIVER_DATABASE_URL": database_url}

    def use(self, work: Callable[[Database], Awaitable[T]]) -> T:
        """Run a function on the database."""

        async def run() -> T:
            database = Database(self._url)
            try:
                return await work(database)
            finally:
                await database.close()

        return asyncio.run(run())

    def start(self) -> "subprocess.Popen[bytes]":
        """Start a run, and return in the middle of its second or a later batch."""
        process = subprocess.Popen(
            [sys.executable, "-m", "receiver", "prune", "--older-than", "90d"],
            env=command_environment(**self._settings),
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.use(until_in_the_middle)
        return process


async def until_in_the_middle(database: Database) -> None:
    """Wait until a run has committed a batch and has begun the transaction of the next one."""

    async def has_begun() -> bool:
        return (await count_rows(database))["events"] < MANY

    async def deletes() -> bool:
        if database.is_sqlite:
            return is_locked(database.url.removeprefix("sqlite:///"))
        async with database.read() as connection:
            active = "SELECT 1 FROM pg_stat_activity WHERE query LIKE 'DELETE%' AND state <> 'idle'"
            return (await connection.execute(text(active))).first() is not None

    await until(has_begun)
    await until(deletes, seconds=5)


def is_locked(path: str) -> bool:
    """Return whether a transaction writes to an SQLite database."""
    connection = sqlite3.connect(path, timeout=0, isolation_level=None)
    with closing(connection), suppress(sqlite3.OperationalError):
        connection.execute("BEGIN IMMEDIATE")
        return False
    return True


async def add_files(database: Database, folder: Path) -> None:
    """Write the file of every event to a storage."""
    async with database.write() as connection:
        for id_ in (await connection.execute(select(media.c.id))).scalars().all():
            file = folder / str(id_) / "0.png"
            file.parent.mkdir(parents=True)
            file.write_bytes(b"a picture")
            stored = {"storage_key": f"{id_}/0.png", "uri": file.as_uri()}
            await connection.execute(update(media).where(media.c.id == id_).values(**stored))


@pytest.fixture
def receiver(database_url: str, tmp_path: Path) -> Receiver:
    """A receiver."""
    return Receiver(database_url, tmp_path)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_prune_prints_the_numbers_of_rows(
    receiver: Receiver, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """C16: the numbers are printed as text or JSON; an age that is too short is an error in one line."""
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database_url)
    receiver.use(partial(fill, count=3))
    receiver.use(fill_jobs)

    def prune(*arguments: str) -> str:
        return CliRunner().invoke(app, ["prune", *arguments], catch_exceptions=False).stdout

    with pytest.raises(ReceiverError, match="at least 30 days"):
        prune("--older-than", "4w")
    day = (datetime.now(UTC) - timedelta(weeks=14)).strftime("%Y-%m-%d")
    printed = prune("--older-than", "14w", "--dry-run")
    assert re.fullmatch(
        rf"3 events received before {day} ..:..:..Z to delete, 0 of that age kept\n"
        r"0 files and the inputs of 3 jobs to delete\n",
        printed,
    )
    assert receiver.use(count_rows) == whole(3)
    receiver.use(partial(add_files, folder=tmp_path / "media"))
    monkeypatch.setenv("RECEIVER_STORAGE_URL", f"file:{tmp_path / 'media'}")
    found = json.loads(prune("--older-than", "90d", "--media", "--json"))
    before = datetime.fromisoformat(found.pop("before"))
    assert found == {
        "events": 3,
        "kept": 0,
        "files": 3,
        "files_elsewhere": 0,
        "jobs": 3,
        "rejections": 0,
        "actions": 0,
    }
    assert not list(tmp_path.rglob("*.png"))
    assert timedelta(0) < datetime.now(UTC) - timedelta(days=90) - before < timedelta(minutes=1)
    assert receiver.use(count_rows) == whole(0)


@pytest.mark.parametrize(
    "arguments", [[], *(["--older-than", age] for age in ("90", "-90d", "90h", "100000d"))]
)
def test_an_age_is_required_and_has_a_unit(arguments: list[str]) -> None:
    """C16: the age is in days or weeks, and has no default."""
    result = CliRunner().invoke(app, ["prune", *arguments])
    assert result.exit_code == 2
    assert ("such as 90d or 12w" if arguments else "Missing option") in result.output


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_ctrl_c_stops_after_the_batch(receiver: Receiver) -> None:
    """C13: Ctrl-C finishes the current batch and prints the number of deleted events."""
    receiver.use(partial(fill, count=MANY))
    process = receiver.start()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, b"")
    counts = receiver.use(count_rows)
    assert counts == whole(counts["events"])
    assert 0 < counts["events"] < MANY
    assert b"%d events until then" % (MANY - counts["events"]) in err


def test_a_worker_that_is_killed_in_a_nightly_run_leaves_it_to_the_next(
    receiver: Receiver, database_url: str, tmp_path: Path
) -> None:
    """C13: kill -9 in the middle of a scheduled run: another worker goes on; one batch may not be counted."""
    receiver.use(partial(fill, count=MANY))
    settings = {"RECEIVER_DATABASE_URL": database_url, "RECEIVER_RETENTION_DAYS": "90"}
    with ReceiverProcess(tmp_path, "worker", **settings) as killed:
        receiver.use(until_in_the_middle)
        killed.kill()
    counts = receiver.use(count_rows)
    assert counts == whole(counts["events"])
    assert 0 < counts["events"] < MANY

    async def end_lease(database: Database) -> None:
        async with database.write() as connection:
            await connection.execute(update(retention_runs).values(next_attempt_at=db_time(0.0)))

    async def has_ended(database: Database) -> bool:
        async with database.read() as connection:
            return await connection.scalar(select(retention_runs.c.state)) == "completed"

    receiver.use(end_lease)
    with ReceiverProcess(tmp_path, "worker", **settings):
        receiver.use(lambda database: until(partial(has_ended, database)))
    done = run_command("retention", "list", "--json", settings=settings | {"CLIPIA_WEBHOOK_SECRET": SECRET})
    (run,) = json.loads(done.stdout)["data"]
    assert (run["by"], run["state"]) == ("schedule", "completed")
    assert MANY - LIMITS.events <= run["events"] <= MANY
    assert receiver.use(count_rows) == whole(0)


async def test_ctrl_c_waits_for_the_current_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """C13: the current batch is finished and counted, and no other batch begins."""
    begun = Pruned(before=datetime.now(UTC))
    under_way = asyncio.Event()

    async def batches() -> AsyncIterator[Pruned]:
        yield replace(begun, events=5)
        under_way.set()
        await asyncio.sleep(0.1)
        yield replace(begun, events=7)
        yield replace(begun, events=9)

    watching = asyncio.create_task(_watch(begun, batches()))
    await under_way.wait()
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    assert "7 events until then" in capsys.readouterr().err


async def test_a_run_that_fails_prints_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    """C13: if the database fails in the middle, the number of events that were deleted is still printed."""

    async def batches() -> AsyncIterator[Pruned]:
        yield Pruned(before=datetime.now(UTC), events=5)
        raise DatabaseUnavailable("gone", reason="database")

    with pytest.raises(DatabaseUnavailable):
        await _watch(Pruned(before=datetime.now(UTC)), batches())
    assert "5 events until then" in capsys.readouterr().err


def test_kill_9_leaves_whole_events(receiver: Receiver) -> None:
    """C13: a killed run leaves whole events, and the next run goes on with them."""
    receiver.use(partial(fill, count=MANY))
    process = receiver.start()
    process.kill()
    process.communicate(timeout=30)
    counts = receiver.use(count_rows)
    assert 0 < counts["events"] < MANY, "the run was not killed in the middle"
    assert counts == whole(counts["events"])

    async def go_on(database: Database) -> int:
        begun = await retention.begin(database, older_than=retention.MIN_AGE)
        return [done.events async for done in retention.prune(database, begun)][-1]

    assert receiver.use(go_on) == counts["events"]
    assert receiver.use(count_rows) == whole(0)


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_events_erase(
    receiver: Receiver, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """G9: an event is erased by its request_id, printed as text or JSON; an unknown one is an error."""
    monkeypatch.setattr("receiver.cli.database.configure_logging", lambda **_: None)
    monkeypatch.setenv("RECEIVER_DATABASE_URL", database_url)
    monkeypatch.setenv("RECEIVER_STORAGE_URL", f"file:{tmp_path / 'media'}")
    receiver.use(partial(fill, count=2))
    receiver.use(partial(add_files, folder=tmp_path / "media"))

    def erase(*arguments: str) -> str:
        with capture_logs():
            return CliRunner().invoke(app, ["events", "erase", *arguments], catch_exceptions=False).stdout

    assert re.fullmatch(r"Event [0-9a-f-]{36} is erased, 1 file deleted\.\n", erase("r-1"))
    assert json.loads(erase("r-2", "--json"))["files"] == 1
    assert not list(tmp_path.rglob("*.png"))
    with pytest.raises(ReceiverError, match="there is no event with the id or request_id 'r-3'"):
        erase("r-3")
    rows = json.loads(CliRunner().invoke(app, ["events", "list", "--state", "erased", "--json"]).stdout)[
        "data"
    ]
    assert [row["request_id"] for row in rows] == ["r-2", "r-1"]
    assert "erased" in CliRunner().invoke(app, ["events", "show", "r-1"]).stdout
    with pytest.raises(ReceiverError, match="is erased: it goes to no destination"):
        CliRunner().invoke(app, ["route", "r-1"], catch_exceptions=False)
