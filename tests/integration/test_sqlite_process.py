"""The process that writes webhooks to SQLite: kills, errors, and its end."""

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop
from sqlalchemy import func, select
from support.commands import command_environment
from support.payloads import SECRET, body, signed

from receiver.core.signature import Secret
from receiver.db import sqlite_process
from receiver.db.database import Database
from receiver.db.receipts import all_receipts
from receiver.db.rows import NewEvent
from receiver.db.sqlite import Sqlite
from receiver.db.sqlite_process import START_ROWS, WriterProcess
from receiver.db.sqlite_writer import frame
from receiver.db.tables import events
from receiver.errors import DatabaseUnavailable
from receiver.ingest import Ingest, Received, SignedRequest, make_event

KILLS = 30


@pytest.fixture
def url(migrated_sqlite: Path, tmp_path: Path) -> str:
    """The URL of a fresh database."""
    path = tmp_path / "receiver.db"
    path.write_bytes(migrated_sqlite.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture
async def database(url: str) -> AsyncIterator[Database]:
    """An open database; it leaves no process behind."""
    before = children()
    opened = Database(url)
    yield opened
    await opened.close()
    assert children() == before


def children() -> set[psutil.Process]:
    """Return the child processes of this one, zombies among them."""
    return set(psutil.Process().children())


def group(start: int = 0, *, rows: int = START_ROWS) -> list[NewEvent]:
    """Return new events."""
    names = [f"r-{number}" for number in range(start, start + rows)]
    return [
        make_event(
            "clipia",
            body(name),
            received_at=time.time(),
            webhook_id=f"w-{name}",
            secret_id="0123abcd",
            signed_at=time.time(),
        )
        for name in names
    ]


def writer(database: Database) -> WriterProcess:
    """Return the writer of a database."""
    assert isinstance(database._backend, Sqlite)
    return database._backend._process


def process(database: Database) -> "subprocess.Popen[bytes]":
    """Return the process that runs now."""
    found = writer(database)._running
    assert found is not None
    return found.process


async def count(database: Database) -> tuple[int, int]:
    """Return the numbers of events and receipts."""
    async with database.read() as connection:
        found = [
            (await connection.execute(select(func.count()).select_from(table))).scalar_one()
            for table in (events, all_receipts)
        ]
    return found[0], found[1]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("not within ten seconds")


async def test_few_webhooks_need_no_process(database: Database) -> None:
    """The process is started for the first large group, and then takes small ones, too."""
    before = children()
    assert await database.insert_arrivals(group(rows=START_ROWS - 1)) == set()
    assert children() == before
    assert await database.insert_arrivals(group(100)) == set()
    assert children() - before == {psutil.Process(process(database).pid)}
    assert await database.insert_arrivals(group(200, rows=1)) == set()
    assert await count(database) == (2 * START_ROWS, 2 * START_ROWS)


async def test_known_events_are_returned(database: Database) -> None:
    """The process tells which events were stored before, as the thread does."""
    first = group()
    assert await database.insert_arrivals(first) == set()
    known = await database.insert_arrivals([*first[2:], *group(50, rows=3)])
    assert known == {event.raw_id for event in first[2:]}
    assert await count(database) == (START_ROWS + 3, START_ROWS + 3)


def test_killed_under_load(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """C5: kill -9 of the writing process, 30 times under load: each webhook is accepted and stored once."""
    monkeypatch.setattr(sqlite_process, "RESTART_PAUSE_SECONDS", 0.0)
    chance = random.Random(1)
    results: list[Received | BaseException] = []

    async def load(ingest: Ingest, client: int, stop: asyncio.Event) -> None:
        number = 0
        while not stop.is_set():
            content = body(f"r-{client}-{number}")
            request = SignedRequest("clipia", [signed(content)["X-Clipia-Signature"].encode()], content)
            results.extend(await asyncio.gather(ingest.receive(request), return_exceptions=True))
            number += 1

    async def run() -> tuple[int, int]:
        database, stop = Database(url), asyncio.Event()
        ingest = make_ingest(database)
        clients = [asyncio.create_task(load(ingest, client, stop)) for client in range(40)]
        for _ in range(KILLS):
            await until(lambda: writer(database)._running is not None)
            await asyncio.sleep(chance.uniform(0.0, 0.06))
            await kill(process(database))
        stop.set()
        await asyncio.gather(*clients)
        try:
            return await count(database)
        finally:
            await database.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(run())
    outcomes = {each.outcome if isinstance(each, Received) else repr(each) for each in results}
    assert outcomes == {"accepted"}
    assert found == (len(results), len(results))
    assert len({each.event_id for each in results if isinstance(each, Received)}) == len(results)


@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_killed_while_idle(url: str, factory: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """C6: if the process dies between two groups, the next group is stored all the same."""

    async def run() -> tuple[int, int]:
        database = Database(url)
        await database.insert_arrivals(group())
        running = process(database)
        running.kill()
        await asyncio.to_thread(running.wait)
        assert await database.insert_arrivals(group(50)) == set()
        try:
            return await count(database)
        finally:
            await database.close()

    with asyncio.Runner(loop_factory=factory) as runner:
        assert runner.run(run()) == (2 * START_ROWS, 2 * START_ROWS)


async def kill(running: "subprocess.Popen[bytes]") -> None:
    """Kill a process, and wait until it is noticed."""
    running.kill()
    await until(lambda: running.returncode is not None)


def make_ingest(database: Database) -> Ingest:
    """Return an ingest with one source."""
    return Ingest(
        database,
        secrets={"clipia": [Secret.from_text(SECRET)]},
        tolerance=300,
        clock=time.time,
        on_accepted=lambda: None,
    )


async def test_killed_between_commit_and_answer(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """C5: if the process dies after its commit, its events are new, and those of before are known."""
    first, second = group(), group(50)
    known = first[:3]
    assert await database.insert_arrivals(known) == set()
    await database.insert_arrivals(group(900))  # the process runs
    exchange = WriterProcess._exchange

    async def lose(one: WriterProcess, request: bytes) -> Any:
        await exchange(one, request)
        raise EOFError

    monkeypatch.setattr(WriterProcess, "_exchange", lose)
    repeated = [event._replace(received_at=event.received_at + 1) for event in known]
    assert await database.insert_arrivals([*repeated, *second]) == {event.raw_id for event in known}
    number = START_ROWS + 3 + START_ROWS
    assert await count(database) == (number, number)


async def test_a_cancelled_group_leaves_no_answer_behind(database: Database) -> None:
    """If a group is cancelled, the next one does not get its answer."""
    first = group()
    assert await database.insert_arrivals(first) == set()
    running = process(database)
    os.kill(running.pid, signal.SIGSTOP)
    task = asyncio.create_task(database.insert_arrivals(first))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with contextlib.suppress(ProcessLookupError):
        os.kill(running.pid, signal.SIGCONT)
    assert await database.insert_arrivals(group(50)) == set()
    assert await database.insert_arrivals(first) == {event.raw_id for event in first}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_do_not_end_it(database: Database, number: signal.Signals) -> None:
    """Ctrl-C and systemd's SIGTERM reach all processes; this one goes on until its parent closes it."""
    await database.insert_arrivals(group())
    running = process(database)
    os.kill(running.pid, number)
    assert await database.insert_arrivals(group(50)) == set()
    assert process(database) is running
    # Ctrl-C in a terminal goes to a process group.
    assert os.getpgid(running.pid) != os.getpgid(0)


def descriptors(pid: int) -> list[str]:
    """Return what the descriptors of a process lead to, except those of the database's files."""
    found = []
    for each in list(Path(f"/proc/{pid}/fd").iterdir()):
        # The listing itself had one.
        with contextlib.suppress(FileNotFoundError):
            found.append(str(each.readlink()))
    return [each for each in found if "receiver.db" not in each]


async def test_it_gets_no_files_of_its_parent(database: Database) -> None:
    """The process has its socket, and no other descriptor of its parent except standard error."""
    await database.insert_arrivals(group())
    found = descriptors(process(database).pid)
    assert len(found) == 3
    assert sum(each.startswith("socket:") for each in found) == 1


async def test_no_file_stays_open(url: str) -> None:
    """If the process has ended, its parent has no descriptor of it."""
    database = Database(url)
    await database.insert_arrivals(group(rows=1))
    await database.close()
    before = descriptors(os.getpid())
    for start in range(1, 4):
        await database.insert_arrivals(group(100 * start))
        await database.close()
    assert len(descriptors(os.getpid())) == len(before)


@pytest.mark.parametrize("fault", ["no table", "locked", "bad value"])
async def test_errors_are_those_of_the_thread(database: Database, fault: str) -> None:
    """C3: an error of the database has the same class and text as from the thread."""
    raised: list[tuple[type, str]] = []
    with contextlib.closing(sqlite3.connect(database.url.removeprefix("sqlite:///"))) as other:
        await database.insert_arrivals(group())
        if fault == "no table":
            other.execute("ALTER TABLE events RENAME TO lost")
        if fault == "locked":
            other.execute("BEGIN IMMEDIATE")
        state: Any = None if fault == "bad value" else "received"
        bad = [event._replace(state=state) for event in group(50)]
        for _ in range(2):
            with pytest.raises(Exception) as caught:  # noqa: PT011 - compared below
                await database.insert_arrivals(bad)
            raised.append((caught.type, str(caught.value)))
            await database.close()
            writer(database)._due = float("inf")
        other.rollback()
    assert raised[0] == raised[1]
    assert issubclass(raised[0][0], sqlite3.IntegrityError if fault == "bad value" else DatabaseUnavailable)


async def test_no_process_to_be_had(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the process cannot be started, or dies at its start, the thread takes the groups."""
    monkeypatch.setattr(sys, "executable", "/no/python")
    assert await database.insert_arrivals(group()) == set()
    monkeypatch.setattr(sqlite_process, "RESTART_PAUSE_SECONDS", 0.0)
    writer(database)._due = 0.0
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert await database.insert_arrivals(group(50)) == set()
    assert await database.insert_arrivals(group(100)) == set()
    assert await count(database) == (3 * START_ROWS, 3 * START_ROWS)


@pytest.mark.parametrize("kind", ["folder", "no database"])
async def test_a_process_that_cannot_open_the_file_hands_over(
    database: Database, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """It ends, the thread stores the group, and no descriptor stays open."""
    monkeypatch.setattr(sqlite_process, "RESTART_PAUSE_SECONDS", 0.0)
    path = tmp_path / "other"
    if kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(b"no database" * 1000)
    monkeypatch.setattr(writer(database), "_hello", frame((str(path), {})))
    await database.insert_arrivals(group(1000, rows=1))
    assert await count(database) == (1, 1)
    before, others = psutil.Process().num_fds(), children()
    for number in range(5):
        assert await database.insert_arrivals(group(number * START_ROWS)) == set()
    assert await count(database) == (5 * START_ROWS + 1, 5 * START_ROWS + 1)
    await until(lambda: children() == others)
    await until(lambda: psutil.Process().num_fds() <= before)


async def test_a_process_that_does_not_answer_is_killed(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4: if the process hangs, its group fails after a time, and later ones are stored without it."""
    await database.insert_arrivals(group())
    monkeypatch.setattr(sqlite_process, "ANSWER_SECONDS", 0.2)
    os.kill(process(database).pid, signal.SIGSTOP)
    with pytest.raises(DatabaseUnavailable, match="no answer in time"):
        await database.insert_arrivals(group(50))
    monkeypatch.undo()
    assert await database.insert_arrivals(group(100)) == set()


PARENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[2])
from receiver.db.database import Database
from test_sqlite_process import group, process

async def main():
    database = Database(sys.argv[1])
    for start in range(0, 10**6, 20):
        events = group(start, rows=20)
        assert await database.insert_arrivals(events) == set()
        print(process(database).pid, *(event.request_id for event in events), flush=True)

asyncio.run(main())
"""


def test_it_ends_with_its_parent(url: str) -> None:
    """T1: if the parent is killed under load, the process ends, and all events that were acked are stored."""
    command = [sys.executable, "-c", PARENT, url, str(Path(__file__).parent)]
    environment = command_environment(PYTHONPATH=str(Path(__file__).parents[1]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        first = parent.stdout.readline().split()
        child = psutil.Process(int(first[0]))
        time.sleep(random.Random(1).uniform(0.0, 0.1))
        parent.kill()
        told = [
            first,
            *(
                line.split()
                for line in parent.stdout.read().splitlines(keepends=True)
                if line.endswith(b"\n")
            ),
        ]
    child.wait(10)
    acked = {name.decode() for _, *names in told for name in names}
    with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        stored = [name for (name,) in connection.execute("SELECT request_id FROM events")]
    assert acked <= set(stored)
    assert len(set(stored)) == len(stored)
