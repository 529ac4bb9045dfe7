"""A database restored from a dump: while it is frozen, a caller's repeated call is not paid for twice."""

import sqlite3
import subprocess
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import httpx
import pytest
from support.commands import ReceiverProcess, run_command
from support.jobs import IMAGE, TOKEN, Sandbox, job_receiver
from support.servers import Postgres

Restore = Callable[[], str]
"""Restores the dump, and returns the URL of the restored database."""


def dump_sqlite(url: str, folder: Path) -> Restore:
    """Copy an SQLite file while it is in use."""
    dump = folder / "dump.db"
    with (
        closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as live,
        closing(sqlite3.connect(dump)) as copy,
    ):
        live.backup(copy)

    def restore() -> str:
        restored = folder / "restored.db"
        restored.write_bytes(dump.read_bytes())
        return f"sqlite:///{restored}"

    return restore


def dump_postgresql(url: str, _folder: Path, *, server: Postgres) -> Restore:
    """Dump with pg_dump while the database is in use."""
    place = ["-h", "127.0.0.1", "-p", str(server.port), "-U", "postgres", "-d"]
    command = [str(server.bin / "pg_dump"), *place, url.rsplit("/", 1)[1]]
    dump = subprocess.run(command, check=True, capture_output=True, timeout=120).stdout

    def restore() -> str:
        fresh = server.url()
        command = [str(server.bin / "psql"), "-q", "-v", "ON_ERROR_STOP=1", *place, fresh.rsplit("/", 1)[1]]
        subprocess.run(command, input=dump, check=True, capture_output=True, timeout=120)
        return fresh

    return restore


def submit(receiver: ReceiverProcess, key: str) -> httpx.Response:
    """Submit a job once."""
    model, given = IMAGE
    headers = {"Authorization": f"Bearer {TOKEN}", "Idempotency-Key": key}
    content = {"model": model, "input": given}
    return httpx.post(f"{receiver.url}/v1/jobs", json=content, headers=headers, timeout=60)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_repeat_after_a_restore_is_not_paid_for_twice(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """F1: if the dump lacks a job, its key is refused until an operator resumes submissions."""
    with Sandbox(tmp_path, duration=0.1) as sandbox:
        receiver = job_receiver(tmp_path / "receiver", sandbox)
        dump: Callable[[str, Path], Restore] = dump_sqlite
        if kind == "postgresql":
            server: Postgres = request.getfixturevalue("postgres")
            receiver.settings["RECEIVER_DATABASE_URL"] = server.url(template="migrated")
            dump = partial(dump_postgresql, server=server)
        with receiver:
            before = submit(receiver, "before the dump").json()
            restore = dump(receiver.settings["RECEIVER_DATABASE_URL"], tmp_path)
            assert submit(receiver, "after the dump").status_code == 201
        receiver.settings["RECEIVER_DATABASE_URL"] = restore()

        def command(*arguments: str) -> str:
            result = run_command(*arguments, settings=receiver.settings, cwd=tmp_path)
            assert result.returncode == 0, result.stderr
            return result.stdout.decode()

        command("jobs", "freeze", "--restored", "--reason", "disk failure")
        with receiver:
            assert submit(receiver, "before the dump").json()["id"] == before["id"]
            refused = submit(receiver, "after the dump")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "submissions_frozen")
            assert int(refused.headers["retry-after"]) > 0
            assert refused.headers["idempotency-key"] == "after the dump"
            assert "frozen" in command("check")
            result = run_command(
                *("submit", IMAGE[0], "-i", '{"prompt": "x"}'), settings=receiver.settings, cwd=tmp_path
            )
            assert (result.returncode, b"frozen" in result.stderr) == (6, True)
            assert len(sandbox.requests()["requests"]) == 2, "the repeat was paid for again"
            command("jobs", "thaw")
            assert submit(receiver, "a new key").status_code == 201
        assert "frozen" not in command("check")
        again = run_command("jobs", "thaw", settings=receiver.settings, cwd=tmp_path)
        assert (again.returncode, b"not frozen" in again.stderr) == (5, True)
