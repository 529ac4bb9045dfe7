"""Runs commands and receivers as processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Self

import orjson

from support.payloads import SECRET
from support.servers import end

_INHERITED = ("PATH", "HOME", "LANG", "TMPDIR", "COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG")


def command_environment(**settings: str) -> dict[str, str]:
    """Return the environment of a command: the given settings, and few variables of this process."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ} | settings


def unmeasured(environment: dict[str, str]) -> dict[str, str]:
    """Return the environment of a process whose coverage is not measured, which would halve its speed."""
    return {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}


def run_command(
    *arguments: str,
    settings: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[bytes]:
    """Run one `receiver …` command to its end."""
    if arguments[0] == "serve" and "--port" not in arguments:
        # Another program may have the default port.
        arguments = (*arguments, "--port", "0")
    return subprocess.run(
        [sys.executable, "-m", "receiver", *arguments],
        env=command_environment(**(settings or {})),
        input=stdin,
        cwd=cwd,
        capture_output=True,
        timeout=120,
        check=False,
    )


@contextmanager
def always(action: Callable[[], object]) -> Iterator[None]:
    """Call `action` at the end of the block, even if the block fails.

    A thread pool waits for its threads. If a failing test did not stop them, it would hang.
    """
    try:
        yield
    finally:
        action()


def wait_for_lines(path: Path, count: int, *, seconds: float = 30) -> list[dict[str, object]]:
    """Wait until a file of JSON lines has `count` lines; return them."""
    deadline = time.monotonic() + seconds
    while True:
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return [orjson.loads(line) for line in lines]
        assert time.monotonic() < deadline, f"{len(lines)} of {count} lines"
        time.sleep(0.05)


@contextmanager
def shown_login(
    *arguments: str, cwd: Path, **settings: str
) -> Iterator[tuple[str, str, subprocess.Popen[bytes]]]:
    """Start a command; yield the address and the token of the dashboard that it prints, and its process."""
    environment = command_environment(**settings)
    program = [sys.executable, "-m", "receiver", *arguments]
    with subprocess.Popen(program, env=environment, cwd=cwd, stdout=subprocess.PIPE) as process:
        watchdog = Timer(90, process.kill)
        watchdog.start()
        try:
            assert process.stdout is not None
            found: dict[str, str] = {}
            while found.keys() < {"dashboard", "token"}:
                line = process.stdout.readline().decode()
                assert line, f"it ended: {process.wait(timeout=10)}"
                name, _, value = line.strip().partition(": ")
                if name in {"dashboard", "token"}:
                    found[name] = value.strip()
            yield found["dashboard"], found["token"], process
        finally:
            watchdog.cancel()
            end(process)


class ReceiverProcess:
    """`receiver serve` or `receiver worker` in a folder; it can be killed and started again."""

    def __init__(self, folder: Path, *arguments: str, **settings: str) -> None:
        # Coverage doubles the time to start and halves the speed, and a process that is killed reports none.
        self.measured = True
        self.folder = folder
        self.arguments: Sequence[str] = arguments or ("serve", "--port", "0")
        self.settings = {
            "CLIPIA_WEBHOOK_SECRET": SECRET,
            "RECEIVER_DATABASE_URL": f"sqlite:///{folder / 'receiver.db'}",
            "RECEIVER_STORAGE_URL": f"file:{folder / 'media'}",
            "RECEIVER_DRAIN": "0",
        } | settings
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.starts = 0

    @property
    def log(self) -> Path:
        """The log of the current run."""
        return self.folder / f"{self.arguments[0]}-{self.starts}.log"

    def launch(self) -> Self:
        """Start it without waiting until it listens: a test may kill it before."""
        self.starts += 1
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "receiver", *self.arguments],
                env=self._environment(),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        return self

    def start(self, *, seconds: float = 60) -> Self:
        """Start it and wait until it listens (`serve`) or works (`worker`)."""
        self.launch()
        assert self.process is not None
        wanted = "listening" if self.arguments[0] == "serve" else "worker started"
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for record in self.records():
                if record["event"] == wanted:
                    self.url = str(record.get("url", ""))
                    return self
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"it is not running; its log:\n{self.log.read_text()}")

    def _environment(self) -> dict[str, str]:
        environment = command_environment(**self.settings)
        return environment if self.measured else unmeasured(environment)

    def records(self) -> list[dict[str, object]]:
        """Return the log's records so far; fail if a line is not a record."""
        *lines, _unfinished = self.log.read_bytes().split(b"\n")
        return [orjson.loads(line) for line in lines]

    def kill(self) -> None:
        """Kill it with SIGKILL, which the process notices no more than a power cut."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> int:
        """End it with SIGTERM and return its exit status."""
        assert self.process is not None
        return end(self.process, seconds=45)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
