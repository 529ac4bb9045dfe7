"""`receiver mcp` without a client: its lines, its end, and its errors at the start."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from support.commands import command_environment, run_command
from support.payloads import SECRET

TOKEN = "reader-0123456789abcdef"

PARAMETERS = {
    "protocolVersion": "2025-06-18",
    "capabilities": {},
    "clientInfo": {"name": "test", "version": "1"},
}
INITIALIZED = {"jsonrpc": "2.0", "method": "notifications/initialized"}


class Raw:
    """A process of `receiver mcp`: lines in, lines out."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    def write(self, *messages: bytes) -> None:
        """Write lines."""
        assert self.process.stdin is not None
        for message in messages:
            self.process.stdin.write(message + b"\n")
        self.process.stdin.flush()

    def call(self, id_: int, method: str, **parameters: Any) -> None:
        """Write a request."""
        self.write(orjson.dumps({"jsonrpc": "2.0", "id": id_, "method": method, "params": parameters}))

    def read(self) -> dict[str, Any]:
        """Read one line, which has to be a message of the protocol."""
        assert self.process.stdout is not None
        found: dict[str, Any] = orjson.loads(self.process.stdout.readline())
        assert found["jsonrpc"] == "2.0"
        return found

    def initialize(self) -> None:
        """Begin as a client does."""
        self.call(1, "initialize", **PARAMETERS)
        while "result" not in (found := self.read()):
            assert "error" in found
        assert (found["id"], found["result"]["serverInfo"]["name"]) == (1, "clipia-receiver")
        self.write(orjson.dumps(INITIALIZED))


@contextmanager
def started(folder: Path, template: Path) -> Iterator[Raw]:
    """Start the command on a database of its own, with a Clipia that does not answer."""
    (folder / "receiver.db").write_bytes(template.read_bytes())
    settings = {
        "CLIPIA_WEBHOOK_SECRET": SECRET,
        "CLIPIA_KEY": "clipia_live_x",
        "CLIPIA_BASE_URL": "http://127.0.0.1:9",
        "RECEIVER_DATABASE_URL": f"sqlite:///{folder / 'receiver.db'}",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "receiver", "mcp"],
        env=command_environment(**settings),
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        try:
            yield Raw(process)
        finally:
            process.kill()


@pytest.mark.parametrize("number", [None, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_input_and_by_signals(
    tmp_path: Path, migrated_sqlite: Path, number: signal.Signals | None
) -> None:
    """It ends with status 0 at the end of input, SIGTERM and SIGINT, also while a tool waits."""
    given = {"model": "nano-banana-2", "input": {"prompt": "a cat"}, "idempotency_key": "k"}
    with started(tmp_path, migrated_sqlite) as raw:
        raw.initialize()
        raw.call(2, "tools/call", name="generate_image", arguments=given)
        made = raw.read()["result"]["structuredContent"]
        assert made["state"] == "pending"
        arguments = {"id": made["id"], "timeout_seconds": 300}
        raw.call(3, "tools/call", name="wait_generation", arguments=arguments)
        raw.call(4, "ping")
        assert raw.read()["id"] == 4
        assert raw.process.stdin is not None
        if number is None:
            raw.process.stdin.close()
        else:
            raw.process.send_signal(number)
        assert raw.process.wait(30) == 0
        assert raw.process.stdout is not None
        # At the end of input, the open call gets an error.
        rest = [orjson.loads(line) for line in raw.process.stdout]
        assert all(each["jsonrpc"] == "2.0" for each in rest)
        assert raw.process.stderr is not None
        assert b"Traceback" not in raw.process.stderr.read()


def test_the_command_survives_ill_lines(tmp_path: Path, migrated_sqlite: Path) -> None:
    """B9: a line that is no message does not end the command, however long it is."""
    with started(tmp_path, migrated_sqlite) as raw:
        raw.write(b"hello", b"\xff\xfe", b"[" * 100_000, b"9" * 5_000_000, b"{}", b"")
        raw.initialize()


def test_without_the_extra_the_command_names_it(tmp_path: Path) -> None:
    """Without its package the command ends with status 2, and the error says how to install it."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mcp'] = None\n")
    environment = {"CLIPIA_WEBHOOK_SECRET": SECRET, "PYTHONPATH": str(tmp_path)}
    run = run_command("mcp", settings=environment, cwd=tmp_path, stdin=b"")
    assert (run.returncode, run.stdout) == (2, b"")
    assert b"pip install 'clipia-receiver[mcp]'" in run.stderr


def test_an_unreachable_receiver_is_an_error_at_the_start(tmp_path: Path) -> None:
    """The program that starts the command learns at once that the URL or the token is wrong."""
    settings = {"RECEIVER_URL": "http://127.0.0.1:9", "RECEIVER_TOKEN": TOKEN}
    run = run_command("mcp", settings=settings, cwd=tmp_path, stdin=b"")
    assert (run.returncode, run.stdout) == (6, b"")
    assert b"no answer from the receiver" in run.stderr


def test_the_command_makes_no_receiver(tmp_path: Path) -> None:
    """An agent's program starts it in any folder: there it must not seem to be an empty receiver."""
    run = run_command("mcp", settings={"CLIPIA_WEBHOOK_SECRET": SECRET}, cwd=tmp_path, stdin=b"")
    assert run.returncode != 0
    assert run.stdout == b""
    assert b"receiver migrate" in run.stderr
