"""Expected failures: each prints one sentence that says what to do, and no traceback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from pydantic import SecretStr
from starlette.types import Message
from structlog.testing import capture_logs
from support.commands import ReceiverProcess, command_environment, run_command, wait_for_lines
from support.payloads import SECRET, body, signed
from support.servers import Postgres, end

from receiver.app import create_app
from receiver.errors import SettingsError
from receiver.settings import Settings


class Trouble(NamedTuple):
    """A command that fails, and its message."""

    arguments: tuple[str, ...]
    message: str
    settings: tuple[tuple[str, str], ...] = ()
    status: int = 2


TROUBLES = {
    "a folder under a file": Trouble(
        ("migrate",),
        "cannot create the folder of the file",
        (("RECEIVER_DATABASE_URL", "sqlite:///file/x.db"),),
    ),
    "a folder under a file, served": Trouble(
        ("serve", "--port", "0"),
        "cannot create the folder of the file",
        (("RECEIVER_DATABASE_URL", "sqlite:///file/x.db"),),
    ),
    "a folder under a file, worked on": Trouble(
        ("worker",),
        "cannot create the folder of the file",
        (("RECEIVER_DATABASE_URL", "sqlite:///file/x.db"),),
    ),
    "a folder under a file, listed": Trouble(
        ("events", "list"),
        "cannot create the folder of the file",
        (("RECEIVER_DATABASE_URL", "sqlite:///file/x.db"),),
    ),
    "a folder for a database": Trouble(
        ("migrate",),
        "check the folder and its permissions",
        (("RECEIVER_DATABASE_URL", "sqlite:///folder"),),
        6,
    ),
    "another file for a database": Trouble(
        ("migrate",), "not an SQLite database", (("RECEIVER_DATABASE_URL", "sqlite:///file"),), 6
    ),
    "destinations in the environment": Trouble(
        ("serve",), "RECEIVER_DESTINATIONS", (("RECEIVER_DESTINATIONS", "file:x"),)
    ),
    "sources in the environment": Trouble(("worker",), "RECEIVER_SOURCES", (("RECEIVER_SOURCES", "x"),)),
    "a folder for settings": Trouble(("migrate",), "which is not a file", (("RECEIVER_CONFIG", "folder"),)),
    "a host without an address": Trouble(
        ("serve", "--port", "0", "--host", "no.such.host.invalid"), "there is no such address"
    ),
    "a host that is no name": Trouble(("serve", "--port", "0", "--host", "a..b"), "there is no such address"),
    "a host of another machine": Trouble(
        ("serve", "--port", "0", "--host", "203.0.113.9"), "no network interface has this address"
    ),
    "a sandbox of another machine": Trouble(
        ("sandbox", "--host", "203.0.113.9"), "no network interface has this address"
    ),
    "no export": Trouble(("events", "import", "file"), "was the export cut off?", (), 1),
    "a folder to import": Trouble(("events", "import", "folder"), "Is a directory", (), 1),
    "a demo under a file": Trouble(("demo", "--dir", "file/x"), "not a directory", (), 1),
    "a missing payload": Trouble(("send", "missing"), "cannot be read", (), 1),
    "an address where nothing listens": Trouble(
        ("send", "payload.json", "--url", "http://127.0.0.1:1/clipia/webhook"), "connection refused", (), 6
    ),
    "a database where nothing listens": Trouble(
        ("migrate",), "connection refused", (("RECEIVER_DATABASE_URL", "postgresql://u@127.0.0.1:1/x"),), 6
    ),
}


@pytest.mark.parametrize("name", sorted(TROUBLES))
def test_an_expected_failure_is_one_sentence(name: str, tmp_path: Path) -> None:
    """The command prints the reason in one line on standard error, and exits with the status of its error."""
    trouble = TROUBLES[name]
    (tmp_path / "file").write_text("a text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "payload.json").write_text("{}")
    settings = {"CLIPIA_WEBHOOK_SECRET": SECRET, **dict(trouble.settings)}
    if trouble.arguments[:2] == ("events", "import"):
        assert run_command("migrate", settings=settings, cwd=tmp_path).returncode == 0
    result = run_command(*trouble.arguments, settings=settings, cwd=tmp_path)
    printed = result.stderr.decode()
    assert result.returncode == trouble.status, printed
    assert printed.startswith("error: ")
    assert trouble.message.lower() in printed.lower()
    assert printed.count("\n") == 1


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which another program listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize("command", ["serve", "sandbox"])
def test_a_port_in_use_is_one_sentence(taken: int, command: str, tmp_path: Path) -> None:
    """The port is checked first: if it is taken, the message names it and no database is made."""
    settings = {"CLIPIA_WEBHOOK_SECRET": SECRET}
    result = run_command(command, "--port", str(taken), settings=settings, cwd=tmp_path)
    assert result.returncode == 2
    assert f"127.0.0.1, port {taken}: another program listens there already".encode() in result.stderr
    assert result.stderr.count(b"\n") == 1
    assert not (tmp_path / "data").exists()


async def test_a_failure_at_start_is_one_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure after the server was set up is a log record of its own, without a traceback."""

    @asynccontextmanager
    async def fail(*_: object) -> AsyncIterator[None]:
        raise SettingsError("in our own words")
        yield

    monkeypatch.setattr("receiver.app.running_worker", fail)
    url = SecretStr(f"sqlite:///{tmp_path / 'receiver.db'}")
    app = create_app(Settings(clipia_webhook_secret=SecretStr(SECRET), database_url=url))
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(message: Message) -> None:
        sent.append(message)

    with capture_logs() as logs, pytest.raises(SettingsError):
        await app({"type": "lifespan", "state": {}}, receive, send)
    assert [(entry["event"], entry["error"]) for entry in logs if entry["log_level"] == "error"] == [
        ("the service failed", "in our own words")
    ]
    assert sent == [{"type": "lifespan.startup.failed"}], "a traceback has the message of a library"


def test_unusable_destinations_and_storages_do_not_delay_acks(tmp_path: Path) -> None:
    """E4: unusable destinations and storages are reported, and used as soon as they are repaired."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "plain").write_text("a file where a folder should be\n")
    # Leftover files in here are removed at start; a folder cannot be removed.
    left = tmp_path / "media" / ".incoming" / "left"
    left.mkdir(parents=True)
    os.utime(left, (0, 0))
    places = {"a": "folder", "b": "plain/events.jsonl", "fine": "fine.jsonl"}
    (tmp_path / "receiver.toml").write_text(
        "".join(f'[[destinations]]\nname = "{name}"\nurl = "file:{path}"\n' for name, path in places.items())
    )
    token = "t" * 32
    with ReceiverProcess(tmp_path, RECEIVER_API_TOKENS=f"ops:{token}") as receiver:
        content = body("r-1", payload={"model": "m", "output": {}})
        callback = f"{receiver.url}/clipia/webhook"
        assert httpx.post(callback, content=content, headers=signed(content), verify=False).status_code == 200
        wait_for_lines(tmp_path / "fine.jsonl", 1)
        down = {
            r["destination"]: r["error"] for r in receiver.records() if r["event"] == "destination is down"
        }
        assert down.keys() == {"a", "b"}
        assert [r["error"] for r in receiver.records() if r["event"] == "storage not cleaned up"]
        assert "folder: Is a directory" in str(down["a"])
        assert "plain/events.jsonl: File exists" in str(down["b"])
        headers = {"authorization": f"Bearer {token}"}
        metrics = httpx.get(f"{receiver.url}/metrics", headers=headers, verify=False).text
        for name, is_open in (("a", 1.0), ("b", 1.0), ("fine", 0.0)):
            assert f'receiver_circuit_open{{destination="{name}"}} {is_open}' in metrics
        (tmp_path / "folder").rmdir()
        wait_for_lines(tmp_path / "folder", 1)


def test_output_to_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    """Output that cannot be written is a failure, even if that shows only when the command ends."""
    for arguments in (("--help",), ("migrate",)):
        with Path("/dev/full").open("wb") as full:
            result = subprocess.run(
                [sys.executable, "-m", "receiver", *arguments],
                env=command_environment(),
                cwd=tmp_path,
                stdout=full,
                stderr=subprocess.PIPE,
                timeout=60,
                check=False,
            )
        assert (result.returncode, result.stderr) == (1, b"error: OSError: the disk is full\n")


def test_a_reader_that_closes_the_pipe_is_no_failure(tmp_path: Path) -> None:
    """`receiver … | head -1` and a closed standard output end without a message."""
    assert run_command("migrate", cwd=tmp_path).returncode == 0
    command = f"{sys.executable} -m receiver"
    for line in (f"{command} --help | head -1 > /dev/null", f"{command} events list --json >&-"):
        result = subprocess.run(
            ["/bin/sh", "-c", line],
            env=command_environment(),
            cwd=tmp_path,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert result.stderr == b""


def test_ctrl_c_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    """An interrupt while a command waits for its input is exit status 130, without output."""
    assert run_command("migrate", cwd=tmp_path).returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "receiver", "events", "import", "-"],
        env=command_environment(),
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    try:
        _, printed = process.communicate(timeout=30)
    finally:
        end(process)
    assert printed == b""
    # Before the handler is set, while Python starts, the signal itself ends the process.
    assert process.returncode in (130, -signal.SIGINT)


def test_an_unexpected_error_is_named_without_its_text(tmp_path: Path) -> None:
    """An unexpected error shows its class, and with DEBUG the traceback without messages of libraries."""
    (tmp_path / "broken.py").write_text(
        "from receiver import exit_status\n\n\ndef command() -> None:\n"
        "    raise KeyError(' '.join(['secret', 'text']))\n\n\nexit_status.run(command)\n"
    )
    for level, lines in (("INFO", 1), ("DEBUG", 6)):
        result = subprocess.run(
            [sys.executable, "broken.py"],
            env=command_environment(RECEIVER_LOG_LEVEL=level, PYTHONPATH=str(Path.cwd())),
            cwd=tmp_path,
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 1
        assert result.stderr.startswith(b"error: unexpected KeyError: set RECEIVER_LOG_LEVEL=DEBUG")
        assert b"secret text" not in result.stderr
        assert result.stderr.count(b"\n") >= lines
        assert (b"in command" in result.stderr) == (level == "DEBUG")


def test_encodings_are_rejected_by_each_command(postgres: Postgres, tmp_path: Path) -> None:
    """B9: `migrate`, `check`, `serve` and `worker` reject a database that cannot store every text."""
    postgres.sql("CREATE DATABASE latin ENCODING 'LATIN1' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0")
    settings = {
        "CLIPIA_WEBHOOK_SECRET": SECRET,
        "RECEIVER_DATABASE_URL": f"postgresql://postgres@127.0.0.1:{postgres.port}/latin",
    }
    for command in ("migrate", "serve", "worker", "check"):
        result = run_command(command, settings=settings, cwd=tmp_path)
        printed = (result.stdout if command == "check" else result.stderr).decode()
        assert result.returncode == (1 if command == "check" else 2), printed
        assert "the database's encoding is LATIN1" in printed
        assert command == "check" or printed.count("\n") == 1
