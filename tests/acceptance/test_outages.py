"""Databases that stop, freeze, fill up or could lose data, under a running receiver."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from sqlalchemy import func, select
from support.commands import ReceiverProcess, command_environment, run_command
from support.payloads import SECRET, body, signed
from support.servers import Postgres, end, free_port, require, wait_for_port

from receiver.db.database import Database
from receiver.db.rows import event_id
from receiver.db.tables import events

ANSWER = 8.0
"""Seconds within which every request has to be answered."""


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A PostgreSQL server that the test may break."""
    with Postgres() as server:
        yield server


@pytest.fixture
def receiver(own_postgres: Postgres, tmp_path: Path) -> Iterator[ReceiverProcess]:
    """A receiver without worker on a PostgreSQL that the test may break."""
    url = own_postgres.url()
    assert run_command("migrate", settings={"RECEIVER_DATABASE_URL": url}).returncode == 0
    with ReceiverProcess(
        tmp_path, "serve", "--port", "0", "--no-worker", RECEIVER_DATABASE_URL=url
    ) as running:
        yield running


def post(receiver: ReceiverProcess, request_id: str | None = None) -> httpx.Response:
    """Post one authentic webhook and check that the answer comes in time."""
    content = body(request_id)
    began = time.monotonic()
    url = f"{receiver.url}/clipia/webhook"
    # Without verify=False each call would first load the system's certificates.
    response = httpx.post(url, content=content, headers=signed(content), timeout=20, verify=False)
    assert time.monotonic() - began < ANSWER
    return response


def get(receiver: ReceiverProcess, path: str) -> int:
    """Return the status of a GET."""
    return httpx.get(f"{receiver.url}{path}", timeout=20).status_code


def wait_until_stored(receiver: ReceiverProcess, *, seconds: float = 15) -> None:
    """Wait until a webhook is accepted again."""
    deadline = time.monotonic() + seconds
    while post(receiver).status_code != 200:
        assert time.monotonic() < deadline, "it does not recover"
        time.sleep(0.1)


def count_events(url: str) -> int:
    """Return how many events are stored."""

    async def count() -> int:
        database = Database(url)
        async with database.read() as connection:
            found = (await connection.execute(select(func.count()).select_from(events))).scalar_one()
        await database.close()
        return int(found)

    return asyncio.run(count())


def test_a_stopped_database_is_answered_503_until_it_is_back(
    own_postgres: Postgres, receiver: ReceiverProcess
) -> None:
    """C3, G13: without a database there is no ack, /readyz says so, /livez does not; it recovers alone."""
    assert post(receiver).status_code == 200
    assert get(receiver, "/readyz") == 200
    own_postgres.stop()
    response = post(receiver)
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    time.sleep(1.1)  # /readyz repeats its last answer for a second
    assert (get(receiver, "/readyz"), get(receiver, "/livez")) == (503, 200)
    assert get(receiver, "/metrics") == 200
    own_postgres.start()
    wait_until_stored(receiver)
    time.sleep(1.1)
    assert get(receiver, "/readyz") == 200


def test_a_crashed_database_loses_no_ack(own_postgres: Postgres, receiver: ReceiverProcess) -> None:
    """T6: after kill -9 of PostgreSQL under load, every acked event is there."""
    acked: set[str] = set()
    stop = threading.Event()

    def load(client: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            if post(receiver, f"c{client}-{number}").status_code == 200:
                acked.add(f"c{client}-{number}")

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(load, client) for client in range(8)]
        try:
            for _ in range(3):
                time.sleep(1)
                own_postgres.crash()
                own_postgres.start()
                wait_until_stored(receiver)
        finally:
            stop.set()
        for client in clients:
            client.result()
    assert len(acked) > 100
    found = own_postgres.sql("SELECT request_id FROM events", database="test_1").stdout.split()
    assert acked <= set(found)
    assert len(found) == len(set(found))


def test_a_frozen_database_is_answered_in_time(own_postgres: Postgres, receiver: ReceiverProcess) -> None:
    """C4, T7: if every server process is frozen, each request is answered 503 within 8 s, /livez at once."""
    assert post(receiver).status_code == 200
    frozen = own_postgres.processes()
    for process in frozen:
        process.suspend()
    with ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(post, receiver) for _ in range(20)]
        began = time.monotonic()
        assert get(receiver, "/livez") == 200
        assert time.monotonic() - began < 2
        assert {answer.result().status_code for answer in answers} == {503}
    for process in frozen:
        process.resume()
    wait_until_stored(receiver)


def test_a_read_only_database_is_not_ready(own_postgres: Postgres, receiver: ReceiverProcess) -> None:
    """C3, G13: with a read-only standby requests are answered 503, and the receiver is not ready."""
    own_postgres.sql("ALTER DATABASE test_1 SET default_transaction_read_only = on")
    own_postgres.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'test_1'")
    answers = [post(receiver).status_code for _ in range(3)]
    assert answers[-1] == 503
    assert 200 not in answers
    assert get(receiver, "/readyz") == 503


def test_a_held_lock_delays_but_never_acks(receiver: ReceiverProcess) -> None:
    """C2: a duplicate waits for the uncommitted first one, and is answered 503 if that takes too long."""
    url, held = receiver.settings["RECEIVER_DATABASE_URL"], event_id("clipia", "held")

    async def hold(seconds: float) -> None:
        database = Database(url)
        async with database.write() as connection:
            await connection.exec_driver_sql(
                "INSERT INTO events (id, source, request_id, origin, state, body, body_sha256, received_at) "
                f"VALUES ('{held}', 'clipia', 'held', 'webhook', 'received', 'x', 'x', now())"
            )
            await asyncio.sleep(seconds)
            await connection.rollback()
        await database.close()

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(asyncio.run, hold(4))
        time.sleep(1)
        assert post(receiver, "held").status_code == 503
        holding.result()
    assert post(receiver, "held").json()["status"] == "accepted"


@pytest.mark.parametrize("setting", ["fsync", "synchronous_commit", "full_page_writes"])
def test_a_database_that_could_lose_commits_stops_the_start(
    postgres: Postgres, tmp_path: Path, setting: str
) -> None:
    """C7: if PostgreSQL confirms before it flushes, the start fails and names the settings."""
    url = postgres.url(template="migrated")
    if setting == "synchronous_commit":
        postgres.sql(f"ALTER DATABASE {url.rsplit('/', 1)[1]} SET synchronous_commit = off")
    else:
        postgres.sql(f"ALTER SYSTEM SET {setting} = off")
        postgres.sql("SELECT pg_reload_conf()")
        time.sleep(0.2)
    try:
        result = run_command(
            "serve", settings={"CLIPIA_WEBHOOK_SECRET": SECRET, "RECEIVER_DATABASE_URL": url}, cwd=tmp_path
        )
    finally:
        postgres.sql(f"ALTER SYSTEM RESET {setting}")
        postgres.sql("SELECT pg_reload_conf()")
        time.sleep(0.2)
    assert result.returncode == 2
    assert f"{setting} = off".encode() in result.stderr
    assert re.search(rf"(Set|SET) {setting} = on".encode(), result.stderr)


def test_an_old_schema_stops_the_start_on_postgresql(postgres: Postgres, tmp_path: Path) -> None:
    """A shared database is migrated by a command only: serve rejects an old schema and names the command."""
    settings = {"CLIPIA_WEBHOOK_SECRET": SECRET, "RECEIVER_DATABASE_URL": postgres.url()}
    result = run_command("serve", settings=settings, cwd=tmp_path)
    assert result.returncode == 2
    assert b"receiver migrate" in result.stderr
    assert run_command("migrate", settings=settings, cwd=tmp_path).returncode == 0
    assert b"up to date" in run_command("migrate", settings=settings, cwd=tmp_path).stdout
    postgres.sql(
        "UPDATE clipia_receiver_version SET version_num = '9999', serves = '9999'",
        database=settings["RECEIVER_DATABASE_URL"].rsplit("/")[-1],
    )
    result = run_command("serve", settings=settings, cwd=tmp_path)
    assert result.returncode == 2
    assert b"newer" in result.stderr


def test_migrations_may_run_in_parallel(postgres: Postgres, tmp_path: Path) -> None:
    """C15: if several deployments migrate at the same moment, they wait for each other."""
    for url in (postgres.url(), f"sqlite:///{tmp_path / 'shared.db'}"):
        with ThreadPoolExecutor(4) as pool:
            runs = [
                pool.submit(run_command, "migrate", settings={"RECEIVER_DATABASE_URL": url}, cwd=tmp_path)
                for _ in range(4)
            ]
        assert [run.result().returncode for run in runs] == [0] * 4, [run.result().stderr for run in runs]


def test_a_full_disk_is_answered_503_and_heals(tmp_path: Path) -> None:
    """C3, T12: SQLite on a full disk: 503, no acked event is lost, and acks again after space is freed."""
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a small tmpfs")
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True, timeout=60)
    try:
        url = f"sqlite:///{disk / 'receiver.db'}"
        settings = {"RECEIVER_DATABASE_URL": url}
        with ReceiverProcess(tmp_path, "serve", "--port", "0", "--no-worker", **settings) as receiver:
            filler = disk / "filler"
            filler.write_bytes(b"x" * 3_000_000)
            acked = 0
            for _ in range(2000):
                response = post(receiver)
                if response.status_code == 503:
                    break
                acked += 1
            else:
                pytest.fail("the disk never filled up")
            assert count_events(url) == acked
            filler.unlink()
            wait_until_stored(receiver)
            assert count_events(url) >= acked + 1
    finally:
        subprocess.run(["umount", disk], check=True, timeout=60)


def test_acks_follow_the_flush(tmp_path: Path) -> None:
    """C6, C7, T4: every 200 leaves the process after the write-ahead log was flushed for it."""
    require("strace")
    trace = tmp_path / "trace"
    with ReceiverProcess(tmp_path, "serve", "--port", "0", "--no-worker") as receiver:
        assert receiver.process is not None
        arguments = [
            "strace",
            "-f",
            "-y",
            "-s",
            "32",
            "-e",
            "trace=fdatasync,fsync,write,sendto,sendmsg,writev",
        ]
        with subprocess.Popen(
            [*arguments, "-o", trace, "-p", str(receiver.process.pid)], stderr=subprocess.PIPE
        ) as strace:
            assert strace.stderr is not None
            strace.stderr.readline()  # strace reports "attached"
            for _ in range(50):
                assert post(receiver).status_code == 200
            strace.terminate()
    flushed = acks = 0
    for line in trace.read_text(errors="replace").splitlines():
        if re.search(r"(fdatasync|fsync)\(\d+<[^>]*-wal>", line):
            flushed += 1
        elif "HTTP/1.1 200" in line:
            acks += 1
            assert flushed > 0, "an ack without a flush before it"
            flushed = 0
    assert acks == 50


def test_acks_of_a_group_follow_its_flush(tmp_path: Path) -> None:
    """C6, T4: between the reading of a request and its own 200 there is a flush, even if many share it."""
    require("strace")
    trace = tmp_path / "trace"
    names = [f"group-{number:03d}" for number in range(200)]
    with ReceiverProcess(tmp_path, "serve", "--port", "0", "--no-worker") as receiver:
        assert receiver.process is not None
        calls = "trace=fdatasync,fsync,read,recvfrom,recvmsg,write,sendto,sendmsg,writev"
        with (
            subprocess.Popen(
                [
                    "strace",
                    "-f",
                    "-y",
                    "-s",
                    "4096",
                    "-e",
                    calls,
                    "-o",
                    trace,
                    "-p",
                    str(receiver.process.pid),
                ],
                stderr=subprocess.PIPE,
            ) as strace,
            ThreadPoolExecutor(16) as clients,
        ):
            assert strace.stderr is not None
            strace.stderr.readline()  # strace reports "attached"
            answers = list(clients.map(lambda name: post(receiver, name), names))
            strace.terminate()
    assert [answer.status_code for answer in answers] == [200] * len(names)
    of_event = {str(event_id("clipia", name)): name for name in names}
    read: dict[str, int] = {}
    flushed: list[int] = []
    acked: set[str] = set()
    for number, line in enumerate(trace.read_text(errors="replace").splitlines()):
        if re.search(r"(fdatasync|fsync)\(\d+<[^>]*-wal>", line):
            flushed.append(number)
        elif found := re.search(r"request_id[^a-z]+(group-\d+)", line):
            read.setdefault(found[1], number)
        elif (found := re.search(r"event_id[^0-9a-f]+([0-9a-f-]{36})", line)) and found[1] in of_event:
            request_id = of_event[found[1]]
            assert any(read[request_id] < flush < number for flush in flushed), request_id
            acked.add(request_id)
    assert acked == set(names)
    assert len(flushed) < len(names), "no two requests shared a flush"


def test_a_failing_flush_is_not_acked(tmp_path: Path) -> None:
    """C8: if fsync fails, the answer is 503, never 200, and the receiver resumes after the disk does."""
    require("strace")
    with ReceiverProcess(tmp_path, "serve", "--port", "0", "--no-worker") as receiver:
        assert post(receiver).status_code == 200
        assert receiver.process is not None
        with subprocess.Popen(
            [
                "strace",
                "-f",
                "-e",
                "trace=fdatasync",
                "-e",
                "inject=fdatasync:error=EIO",
                "-p",
                str(receiver.process.pid),
            ],
            stderr=subprocess.PIPE,
        ) as strace:
            assert strace.stderr is not None
            strace.stderr.readline()
            assert {post(receiver).status_code for _ in range(5)} == {503}
            strace.terminate()
        wait_until_stored(receiver)


def test_a_stopped_log_reader_does_not_stop_webhooks(tmp_path: Path) -> None:
    """G10: if the reader of the log stops reading, webhooks are acked all the same."""
    receiver = ReceiverProcess(tmp_path, "serve", "--port", str(free_port()), "--no-worker")
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "receiver", *receiver.arguments],
        env=command_environment(**receiver.settings),
        stdout=writer,
        stderr=writer,
    )
    os.close(writer)
    try:
        wait_for_port(int(receiver.arguments[2]), process)
        receiver.url = f"http://127.0.0.1:{receiver.arguments[2]}"
        # A pipe holds 64 KiB; these records are several times larger.
        assert {post(receiver).status_code for _ in range(400)} == {200}
    finally:
        with os.fdopen(reader, "rb") as pipe, ThreadPoolExecutor(1) as pool:
            pool.submit(pipe.read)
            end(process)
