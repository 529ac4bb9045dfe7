"""`receiver replay`, `replays`, `deliveries`, `route`, `media verify` and `events export|import`."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, select, update
from support.commands import ReceiverProcess, command_environment, run_command
from support.events import plain, with_files
from support.payloads import failure, signed
from support.servers import Postgres, end, free_port, wait_for_port

from receiver.db import sources
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import new_id
from receiver.db.tables import deliveries, events, replays
from receiver.ingest import make_event

KILLED = 2000
"""Events of the replay during which the worker is killed."""

TWO = (
    '[[destinations]]\nname = "main"\nurl = "file:main.jsonl"\n'
    '[[destinations]]\nname = "failures"\nurl = "file:failures.jsonl"\nfilter = { status = "ERROR" }\n'
)


class Service:
    """A folder with a receiver's configuration, the commands that run in it, and its worker."""

    def __init__(self, folder: Path, config: str, **settings: str) -> None:
        folder.joinpath("receiver.toml").write_text(config, encoding="utf-8")
        self.folder = folder
        self.worker = ReceiverProcess(folder, "worker", **settings)
        self.settings = self.worker.settings
        assert run_command("migrate", settings=self.settings, cwd=folder).returncode == 0

    def try_(self, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Run a command; fail if it prints a traceback."""
        result = run_command(*arguments, settings=self.settings, cwd=self.folder, stdin=stdin)
        assert b"Traceback" not in result.stderr, result.stderr.decode()
        return result

    def run(self, *arguments: str) -> str:
        """Run a command that succeeds; return its output."""
        result = self.try_(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout.decode()

    def json(self, *arguments: str) -> Any:
        """Run a command that succeeds with --json; return its output."""
        return json.loads(self.run(*arguments, "--json"))

    def error(self, *arguments: str, status: int = 1) -> str:
        """Run a command that fails; return its message."""
        result = self.try_(*arguments)
        assert result.returncode == status, result.stdout + result.stderr
        return " ".join(result.stderr.decode().split())

    def add_history(self, *contents: bytes) -> None:
        """Store events that were delivered to `main` some time ago."""
        asyncio.run(self._add_history(contents))

    async def _add_history(self, contents: tuple[bytes, ...]) -> None:
        database = Database(self.settings["RECEIVER_DATABASE_URL"])
        rows = []
        for content in contents:
            event = make_event("clipia", content, received_at=time.time())
            state = "unrecognized" if event.state == "unrecognized" else "ready"
            rows.append(event.columns() | {"state": state})
        async with database.write() as connection:
            await connection.execute(insert(events), rows)
            await sources.add(connection, "clipia")
            seqs = (await connection.execute(select(events.c.seq))).scalars().all()
            await connection.execute(
                insert(deliveries).values(
                    destination="main", state="delivered", created_at=db_time(-60.0), attempts=1
                ),
                [{"id": new_id(), "event_seq": seq} for seq in seqs],
            )
        await database.close()

    def messages(self, name: str = "main") -> list[dict[str, Any]]:
        """Return the messages of a file destination."""
        path = self.folder / f"{name}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def query(self, statement: Any) -> list[dict[str, Any]]:
        """Return rows of its database."""

        async def run() -> list[dict[str, Any]]:
            database = Database(self.settings["RECEIVER_DATABASE_URL"])
            async with database.read() as connection:
                rows = [dict(row) for row in (await connection.execute(statement)).mappings()]
            await database.close()
            return rows

        return asyncio.run(run())

    def change(self, *statements: Any) -> None:
        """Change its database."""

        async def run() -> None:
            database = Database(self.settings["RECEIVER_DATABASE_URL"])
            async with database.write() as connection:
                for statement in statements:
                    await connection.execute(statement)
            await database.close()

        asyncio.run(run())


@pytest.fixture
def service(tmp_path: Path) -> Service:
    """A receiver on SQLite with two files for destinations, one of them filtered."""
    return Service(tmp_path, TWO)


def wait_until(find: Callable[[], Any], *, seconds: float = 60) -> Any:
    """Call a function until it returns a value."""
    deadline = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < deadline, "nothing was found in time"
        time.sleep(0.05)
    return found


def test_a_replay_from_its_dry_run_to_its_end(service: Service) -> None:
    """E12: a replay is counted, ordered and watched to its end; its caller and reason are on record."""
    service.add_history(
        *(plain(f"r-{n}") for n in range(30)), *(failure(f"e-{n}") for n in range(10)), b"odd"
    )
    counted = service.run("replay", "--all", "--dry-run")
    assert counted.splitlines() == ["40 events", "main: 40 deliveries", "failures: 10 deliveries"]
    with service.worker:
        shown = service.run("replay", "--all", "--reason", "the shop lost its disk")
    for part in ("completed, 40 of 40 events", "main: 40 delivered", "failures: 10 delivered"):
        assert part in shown
    (order,) = service.json("replays", "list")["data"]
    assert (order["reason"], order["ordered"]) == ("the shop lost its disk", 50)
    assert order["caller"].startswith("cli-")
    for name, wanted in (("main", 40), ("failures", 10)):
        messages = service.messages(name)
        assert len({message["subject"] for message in messages}) == len(messages) == wanted
        assert {message["replayid"] for message in messages} == {order["id"]}


def test_ctrl_c_ends_the_command_and_not_the_replay(service: Service) -> None:
    """E12: a terminal shows progress, and after Ctrl-C workers go on with the replay."""
    service.add_history(*(plain(f"r-{number}") for number in range(20)))
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "receiver", "replay", "--all"],
        env=command_environment(**service.settings, TERM="xterm", COLUMNS="160"),
        cwd=service.folder,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    output = read_until(ours, rb"delivered\s.*0/\?")
    process.send_signal(signal.SIGINT)
    output += read_until(ours, rb"The replay goes on")
    assert process.wait(30) != 0
    os.close(ours)
    assert b"Traceback" not in output
    (found,) = re.findall(rb"Replay ([0-9a-f-]{36}): 20 events", output)
    with service.worker:
        shown = service.run("replays", "show", found.decode(), "--wait")
    assert "completed, 20 of 20 events" in shown
    assert "main: 20 delivered" in shown
    assert len(service.messages()) == 20


def test_watching_ends_if_no_worker_carries_the_replay_out(service: Service) -> None:
    """E12: if no worker runs or none has the destination, the command says so and exits with 3."""
    service.add_history(plain("r-1"))
    printed = service.error("replay", "--all", "--key", "k", status=3)
    assert "start `receiver serve` or `receiver worker`" in printed
    (order,) = service.json("replays", "list")["data"]
    elsewhere = service.folder / "elsewhere"
    elsewhere.mkdir()
    only_main = '[[destinations]]\nname = "main"\nurl = "file:main.jsonl"\n'
    (elsewhere / "receiver.toml").write_text(only_main, encoding="utf-8")
    with ReceiverProcess(elsewhere, "worker", **service.settings):
        printed = service.error("replays", "show", order["id"], "--wait", status=3)
        assert "no running worker has the destination 'failures'" in printed
    with service.worker:
        assert "completed" in service.run("replays", "show", order["id"], "--wait", "--timeout", "60")


def test_watching_has_a_time_limit(service: Service) -> None:
    """--timeout ends the command with status 124, and the replay goes on; it needs --wait."""
    service.add_history(plain("r-1"))
    printed = service.error("replay", "--all", "--key", "k", "--timeout", "1", status=124)
    assert "--timeout are over" in printed
    assert [each["state"] for each in service.json("replays", "list")["data"]] == ["pending"]
    assert "needs --wait" in service.error("replay", "--all", "--no-wait", "--timeout", "1", status=2)
    (order,) = service.json("replays", "list")["data"]
    assert "needs --wait" in service.error("replays", "show", order["id"], "--timeout", "1", status=2)


def test_a_replay_whose_worker_is_killed_sends_each_event_once(tmp_path: Path) -> None:
    """E3, E9, E12: after two kill -9 during a replay of 2,000 events, each event arrives once more."""
    service = Service(tmp_path, TWO)
    service.worker.measured = False
    service.add_history(*(plain(f"r-{number}") for number in range(KILLED)))
    order = service.json("replay", "--all", "--key", "once", "--no-wait")
    in_flight: set[str] = set()
    for share in (0.2, 0.6):
        service.worker.start()
        wait_until(partial(has_lines, tmp_path / "main.jsonl", round(share * KILLED)))
        service.worker.kill()
        held = service.query(select(deliveries.c.id).where(deliveries.c.lease.is_not(None)))
        in_flight |= {str(row["id"]) for row in held}
        assert count_lines(tmp_path / "main.jsonl") < KILLED, "the worker was not killed in the middle"
        service.change(
            *(
                update(table).where(table.c.lease.is_not(None)).values(next_attempt_at=db_time(0.0))
                for table in (deliveries, replays)
            )
        )
    with service.worker:
        shown = service.json("replays", "show", order["id"], "--wait")
        again = service.json("replay", "--all", "--key", "once")
    assert again["id"] == order["id"]
    assert (shown["state"], shown["matched"], shown["handled"], shown["ordered"]) == (
        "completed",
        *(KILLED,) * 3,
    )
    assert shown["deliveries"] == {"main": {"delivered": KILLED}}
    messages = service.messages()
    by_event: dict[str, Counter[str]] = {}
    for message in messages:
        by_event.setdefault(message["subject"], Counter())[message["deliveryid"]] += 1
    assert by_event.keys() == {f"r-{number}" for number in range(KILLED)}
    assert {len(found) for found in by_event.values()} == {1}, "one delivery for each event"
    doubled = {id_ for found in by_event.values() for id_, count in found.items() if count > 1}
    assert doubled <= in_flight
    assert len(messages) - KILLED <= len(in_flight)
    assert {message["replayid"] for message in messages} == {order["id"]}


class Shop(ThreadingHTTPServer):
    """An HTTP destination that answers with the status that the test sets."""

    def __init__(self) -> None:
        shop = self
        self.status = 204
        self.taken: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                if shop.status == 204:
                    shop.taken.append(json.loads(content))
                self.send_response(shop.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/"


@pytest.fixture
def shop() -> Iterator[Shop]:
    """A running HTTP destination."""
    server = Shop()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join(30)
    server.server_close()


def test_dead_letters_of_a_replay_are_retried(tmp_path: Path, shop: Shop) -> None:
    """E4, E7, E15: a replay with dead letters exits with 1; after a retry they are delivered."""
    service = Service(tmp_path, f'[[destinations]]\nname = "main"\nurl = "{shop.url}"\n')
    service.add_history(*(plain(f"r-{number}") for number in range(5)))
    shop.status = 422
    with service.worker:
        failed = service.try_("replay", "--all", "--json")
        assert failed.returncode == 1
        assert json.loads(failed.stdout)["deliveries"] == {"main": {"dead": 5}}
        dead = service.json("deliveries", "list", "--state", "dead")["data"]
        assert {row["request_id"] for row in dead} == {f"r-{number}" for number in range(5)}
        assert all("answered 422" in row["error"] for row in dead)
        shop.status = 204
        assert service.run("deliveries", "retry", dead[0]["id"]) == "main: 1 restarted\n"
        wait_until(lambda: len(shop.taken) == 1)
        assert service.run("deliveries", "retry", "--all") == "main: 4 restarted\n"
        wait_until(lambda: len(shop.taken) == 5)
    assert {message["deliveryid"] for message in shop.taken} == {row["id"] for row in dead}
    assert shop.taken[0]["deliveryid"] == dead[0]["id"]


@pytest.fixture
def clipia(tmp_path: Path) -> Iterator[str]:
    """A sandbox process; its CDN serves the files."""
    port = free_port()
    with (tmp_path / "sandbox.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "receiver", "sandbox", "--port", str(port)],
            env=command_environment(),
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        )
    wait_for_port(port, process)
    yield f"http://127.0.0.1:{port}"
    end(process)


def test_damaged_files_are_found_and_replaced(tmp_path: Path, clipia: str) -> None:
    """D11, D15: `media verify` finds missing and changed files, and `replay --media` downloads only those."""
    service = Service(tmp_path, TWO, RECEIVER_MEDIA_HOSTS=clipia)
    service.worker.arguments = ("serve", "--port", "0")
    with service.worker as running:
        for number in range(4):
            content = with_files(clipia, f"r-{number}", f"/sandbox/{number}.png")
            url = f"{running.url}/clipia/webhook"
            assert httpx.post(url, content=content, headers=signed(content), trust_env=False).is_success
        wait_until(lambda: len(service.messages()) == 4)
        paths = {
            message["subject"]: Path(message["data"]["media"][0]["uri"].removeprefix("file://"))
            for message in service.messages()
        }
        paths["r-1"].unlink()
        paths["r-2"].write_bytes(b"x" * paths["r-2"].stat().st_size)
        found = service.try_("media", "verify")
        assert found.returncode == 1
        printed = found.stdout.decode()
        assert re.search(rf"missing +file://{paths['r-1']} of r-1\n", printed)
        assert re.search(rf"changed +file://{paths['r-2']} of r-2\n", printed)
        assert "2 intact, 2 damaged" in printed
        assert "2 files downloaded again" in service.run("replay", "r-1", "r-2", "--media")
        assert service.run("media", "verify") == "4 intact, 0 damaged\n"
    assert Counter(message["subject"] for message in service.messages()) == {
        "r-0": 1, "r-1": 2, "r-2": 2, "r-3": 1,
    }  # fmt: skip


def test_an_export_moves_from_sqlite_to_postgresql(postgres: Postgres, tmp_path: Path) -> None:
    """E12: after an export and an import, pending deliveries are sent once, and delivered ones not again."""
    old_folder, new_folder = tmp_path / "old", tmp_path / "new"
    old_folder.mkdir()
    new_folder.mkdir()
    old = Service(old_folder, TWO)
    new = Service(new_folder, TWO, RECEIVER_DATABASE_URL=postgres.url())
    old.add_history(*(plain(f"old-{number}") for number in range(250)), b"\xff\x00")
    old.change(
        update(deliveries)
        .where(deliveries.c.event_seq <= 20)
        .values(state="pending", attempts=0, next_attempt_at=db_time(0.0))
    )
    order = old.json("replay", "old-100", "old-101", "--to", "main", "--no-wait")
    exported = old.try_("events", "export", "-")
    assert exported.returncode == 0
    assert b"251 events, 0 jobs, 1 replay exported" in exported.stderr
    imported = new.try_("events", "import", "-", stdin=exported.stdout)
    assert imported.returncode == 0
    assert b"251 event new, 1 replay new" in imported.stderr
    with new.worker:
        shown = new.json("replays", "show", order["id"], "--wait")
        assert shown["deliveries"] == {"main": {"delivered": 2}}
        wait_until(lambda: len(new.messages()) == 22)
        pending = select(deliveries.c.id).where(deliveries.c.state == "pending")
        wait_until(lambda: not new.query(pending))
    subjects = Counter(message["subject"] for message in new.messages())
    assert subjects == dict.fromkeys([*(f"old-{number}" for number in range(20)), "old-100", "old-101"], 1)


def has_lines(path: Path, count: int) -> bool:
    """Return whether a file has this many whole lines."""
    return count_lines(path) >= count


def count_lines(path: Path) -> int:
    """Return the number of whole lines of a file."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def read_until(terminal: int, pattern: bytes, *, seconds: float = 60) -> bytes:
    """Read a terminal until it has printed the text."""
    output = b""
    deadline = time.monotonic() + seconds
    while not re.search(pattern, output):
        assert time.monotonic() < deadline, output
        output += os.read(terminal, 4096)
    return output
