"""SIGHUP to real processes: the destinations of receiver.toml change, and no event is lost or doubled."""

import http.server
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.commands import ReceiverProcess, command_environment
from support.payloads import body, signed
from support.servers import Postgres, free_port

SECONDS = 60.0
TOKEN = "operator-0123456789abcdef"
HEADERS = {"authorization": f"Bearer {TOKEN}"}


def wait_until(condition: Callable[[], object], *, seconds: float = SECONDS) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def configure(folder: Path, *tables: str) -> None:
    """Write receiver.toml at once, as an editor does: a process never reads half of it."""
    text = "".join(f"[[destinations]]\n{table}\n" for table in tables)
    new = folder / "new.toml"
    new.write_text(text)
    new.replace(folder / "receiver.toml")


def file(name: str, more: str = "") -> str:
    """Return the table of a destination that writes a file."""
    return f'name = "{name}"\nurl = "file:{name}.jsonl"\nwhen = "received"\n{more}'


def subjects(path: Path) -> Counter[str]:
    """Count the messages of each event in a file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return Counter(json.loads(line)["subject"] for line in lines)


def records(receiver: ReceiverProcess, event: str) -> list[dict[str, Any]]:
    """Return the log records of an event."""
    return [dict(record) for record in receiver.records() if record["event"] == event]


def reload(receiver: ReceiverProcess, *, count: int = 1, event: str = "destinations read again") -> None:
    """Send SIGHUP and wait until this many processes have read the settings again."""
    before = len(records(receiver, event))
    receiver.signal(signal.SIGHUP)
    wait_until(lambda: len(records(receiver, event)) >= before + count)


def fetch(
    receiver: ReceiverProcess, path: str, content: bytes | None = None, headers: dict[str, str] | None = None
) -> str:
    """Return the text of an answer. A client of httpx for each call would take more CPU than the receiver."""
    request = urllib.request.Request(f"{receiver.url}{path}", content, headers or HEADERS)
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        assert answer.status == 200
        text: str = answer.read().decode()
        return text


def listed(receiver: ReceiverProcess) -> list[dict[str, Any]]:
    """Return the destinations that a process lists."""
    rows: list[dict[str, Any]] = json.loads(fetch(receiver, "/v1/destinations"))["data"]
    return rows


def configured(receiver: ReceiverProcess) -> list[str]:
    """Return the names of the destinations that a process knows."""
    return [row["name"] for row in listed(receiver) if row["configured"]]


def post(receiver: ReceiverProcess, *names: str) -> None:
    """Post webhooks."""
    for name in names:
        content = body(name, payload={"model": "m", "output": {}, "cost": 1})
        fetch(receiver, "/clipia/webhook", content, signed(content))


class Consumer:
    """An HTTP server that keeps each event until it is let go, and records what it has confirmed."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.begun: list[str] = []
        self.confirmed: Counter[str] = Counter()
        consumer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["content-length"])))
                consumer.begun.append(content["subject"])
                consumer.open.wait(SECONDS)
                consumer.confirmed[content["subject"]] += 1
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_arguments: object) -> None:
                """Print no line per request."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @contextmanager
    def serving(self) -> Iterator[str]:
        """Serve inside the block; yield the URL."""
        thread = threading.Thread(target=self.server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{self.server.server_port}/"
        finally:
            self.open.set()
            self.server.shutdown()
            thread.join(SECONDS)
            self.server.server_close()


def test_destinations_come_and_go_without_a_restart(tmp_path: Path) -> None:
    """E4: after SIGHUP events go to new destinations, and one that was removed ends what it has under way.

    An invalid file changes nothing and shows in the metrics; its correction is read by the next SIGHUP.
    """
    consumer = Consumer()
    consumer.server.daemon_threads = True
    with consumer.serving() as url:
        slow = f'name = "slow"\nurl = "{url}"\nwhen = "received"\ntimeout = 60\n'
        configure(tmp_path, file("kept"), slow)
        receiver = ReceiverProcess(tmp_path, RECEIVER_API_TOKENS=f"ops:{TOKEN}:read+operate")
        with receiver:
            post(receiver, "r-1")
            wait_until(lambda: consumer.begun == ["r-1"])
            configure(tmp_path, file("kept"), file("new"), 'name = "wrong"\nurl = "nonsense:x"\n')
            reload(receiver, event="settings not read again: nothing has changed")
            (failed,) = records(receiver, "settings not read again: nothing has changed")
            assert "destination 'wrong'" in failed["error"]
            metrics = fetch(receiver, "/metrics")
            assert "receiver_settings_reload_failed 1.0" in metrics
            assert configured(receiver) == ["kept", "slow"]
            post(receiver, "r-2")
            wait_until(lambda: sorted(consumer.begun) == ["r-1", "r-2"])
            assert not (tmp_path / "new.jsonl").exists()

            configure(tmp_path, file("kept"), file("new"))
            receiver.signal(signal.SIGHUP)
            # The removed one has two deliveries under way; the others do not wait for them.
            wait_until(lambda: configured(receiver) == ["kept", "new"])
            post(receiver, "r-3")
            wait_until(lambda: subjects(tmp_path / "new.jsonl") == {"r-3": 1})
            assert not records(receiver, "destinations read again")
            consumer.open.set()
            wait_until(lambda: records(receiver, "destinations read again"))
            (done,) = records(receiver, "destinations read again")
            assert done["done"] == {"added": ["new"], "changed": [], "removed": ["slow"]}
            metrics = fetch(receiver, "/metrics")
            assert "receiver_settings_reload_failed 0.0" in metrics
            assert {row["name"]: row["pending"] for row in listed(receiver)} == {"kept": 0, "new": 0}
        assert consumer.confirmed == {"r-1": 1, "r-2": 1}
        assert subjects(tmp_path / "kept.jsonl") == {"r-1": 1, "r-2": 1, "r-3": 1}


def test_several_reloads_under_load_lose_and_double_no_event(tmp_path: Path) -> None:
    """E4: while webhooks arrive, a destination changes with each of many SIGHUPs; each event comes once."""
    configure(tmp_path, file("kept"), file("changing"))
    names = [f"r-{number}" for number in range(120)]

    def has_all(path: Path) -> bool:
        return len(subjects(path)) == len(names)

    receiver = ReceiverProcess(tmp_path)
    receiver.measured = False
    with receiver:
        for number, name in enumerate(names):
            post(receiver, name)
            if number % 10 == 0:
                configure(tmp_path, file("kept"), file("changing", f"concurrency = {number + 1}"))
                receiver.signal(signal.SIGHUP)
        for path in (tmp_path / "kept.jsonl", tmp_path / "changing.jsonl"):
            wait_until(partial(has_all, path))
        changes = [record["done"]["changed"] for record in records(receiver, "destinations read again")]
        assert ["changing"] in changes
    for path in (tmp_path / "kept.jsonl", tmp_path / "changing.jsonl"):
        assert subjects(path) == dict.fromkeys(names, 1)


def test_each_process_of_a_service_reads_again(tmp_path: Path, postgres: Postgres) -> None:
    """E4: the parent of web processes passes SIGHUP on; a process that replaces a dead one has the new file.

    A worker on the same database takes it by its own SIGHUP, and a change that needs a restart is logged.
    """
    settings = {
        "RECEIVER_DATABASE_URL": postgres.url(template="migrated"),
        "RECEIVER_API_TOKENS": f"ops:{TOKEN}:read+operate",
    }
    configure(tmp_path, file("kept"))
    web = ReceiverProcess(tmp_path, "serve", "--port", "0", "--no-worker", "--workers", "2", **settings)
    worker = ReceiverProcess(tmp_path, "worker", **settings)
    with web, worker:
        configure(tmp_path, file("kept"), file("new"))
        text = (tmp_path / "receiver.toml").read_text()
        (tmp_path / "receiver.toml").write_text('log_level = "WARNING"\n' + text)
        reload(web, count=2)
        reload(worker)
        for each in (web, worker):
            assert records(each, "these settings have changed; they need a restart")[0]["settings"] == [
                "RECEIVER_LOG_LEVEL"
            ]
        post(web, "r-1")
        wait_until(lambda: subjects(tmp_path / "new.jsonl") == {"r-1": 1})

        # Not read without a signal.
        configure(tmp_path, file("later"))
        assert web.process is not None
        for child in psutil.Process(web.process.pid).children():
            if "multiprocessing.spawn" in " ".join(child.cmdline()):
                child.kill()
        wait_until(lambda: len(records(web, "web process died")) == 2)
        assert [configured(web) for _ in range(8)] == [["kept", "new"]] * 8


@pytest.mark.parametrize("arguments", [("serve", "--port", "0"), ("worker",)])
def test_a_signal_during_the_start_is_kept(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """E4: SIGHUP to a process that is still starting does not end it; it reads the file again later."""
    configure(tmp_path, file("kept"))
    receiver = ReceiverProcess(tmp_path, *arguments)
    receiver.launch()
    assert receiver.process is not None
    try:
        pid = receiver.process.pid
        # From the first lines of the command on, the kernel holds the signal.
        wait_until(lambda: _blocks(pid, signal.SIGHUP))
        receiver.signal(signal.SIGHUP)
        wait_until(lambda: records(receiver, "destinations read again"))
    finally:
        assert receiver.stop() == 0


def _blocks(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


IN_TERMINAL = """
import fcntl, os, signal, sys, termios
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "receiver", *sys.argv[1:]])
"""


@pytest.mark.parametrize("arguments", [("serve", "--port", "0"), ("worker",)])
def test_a_closed_terminal_ends_a_process(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """E4: SIGHUP in a terminal reads the file again; if the terminal is closed, the process ends."""
    configure(tmp_path, file("kept"))
    receiver = ReceiverProcess(tmp_path, *arguments)
    ours, theirs = pty.openpty()
    receiver.starts = 1
    with receiver.log.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, *arguments],
            env=command_environment(**receiver.settings),
            cwd=tmp_path,
            stdin=theirs,
            stdout=log,
            stderr=log,
        )
    os.close(theirs)
    try:
        wait_until(lambda: _blocks(process.pid, signal.SIGHUP))
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: records(receiver, "destinations read again"))
        os.close(ours)
        assert process.wait(SECONDS) == 0
    finally:
        process.kill()
        process.wait()


def test_a_killed_process_leaves_no_destination_down(tmp_path: Path, postgres: Postgres) -> None:
    """E4: the circuit that a killed worker has opened is shown, and stops no other worker."""
    port = free_port()
    settings = {
        "RECEIVER_DATABASE_URL": postgres.url(template="migrated"),
        "RECEIVER_API_TOKENS": f"ops:{TOKEN}:read+operate",
    }
    retry = "retry = { initial = 0.1, cap = 0.1 }"
    configure(tmp_path, f'name = "orders"\nurl = "http://127.0.0.1:{port}/"\nwhen = "received"\n{retry}\n')
    web = ReceiverProcess(tmp_path, "serve", "--port", "0", "--no-worker", **settings)
    worker = ReceiverProcess(tmp_path, "worker", **settings)
    web.measured = worker.measured = False

    def circuit() -> dict[str, Any] | None:
        (row,) = listed(web)
        found: dict[str, Any] | None = row["circuit"]
        return found

    with web:
        worker.start()
        post(web, "r-1")
        wait_until(circuit)
        found = circuit()
        assert found is not None
        assert "connection refused" in found["error"]
        assert worker.process is not None
        assert [each.rpartition(":")[2] for each in found["processes"]] == [str(worker.process.pid)]
        worker.kill()
        consumer = Consumer()
        consumer.server.server_close()
        consumer.server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", port), consumer.server.RequestHandlerClass
        )
        consumer.open.set()
        with consumer.serving(), worker:
            post(web, "r-2")
            wait_until(lambda: consumer.confirmed["r-2"])
