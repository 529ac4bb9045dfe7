"""Web processes: their start, their drain period, and their end by a signal or with their parent."""

import contextlib
import http.client
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import psutil
import pytest
from support.commands import ReceiverProcess, command_environment, run_command
from support.payloads import SECRET, body, signed
from support.servers import Postgres, free_port

SECONDS = 60.0
SERVE = ("serve", "--port", "0", "--no-worker")
COUNTS = [1, 2]


def wait_until(condition: Callable[[], object], *, seconds: float = SECONDS) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


def serve(folder: Path, postgres: Postgres, *arguments: str, count: int, **settings: str) -> ReceiverProcess:
    """Return `receiver serve` with this many processes."""
    if count > 1:
        settings |= {"RECEIVER_DATABASE_URL": postgres.url(template="migrated")}
        arguments += ("--workers", str(count))
    return ReceiverProcess(folder, *SERVE, *arguments, **settings)


def connect(receiver: ReceiverProcess) -> http.client.HTTPConnection:
    """Open a connection."""
    address = urlsplit(receiver.url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=SECONDS)
    connection.connect()
    return connection


def ask(connection: http.client.HTTPConnection, path: str) -> tuple[int, str | None]:
    """Request a page; return the status and the Connection header."""
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    return answer.status, answer.headers["Connection"]


def answers(receiver: ReceiverProcess, path: str = "/livez") -> int:
    """Return the status of a page; 0 if the connection is refused or cut."""
    try:
        connection = connect(receiver)
        try:
            return ask(connection, path)[0]
        finally:
            connection.close()
    except OSError:
        return 0


def children(receiver: ReceiverProcess) -> list[psutil.Process]:
    """Return the web processes below the parent."""
    assert receiver.process is not None
    found = psutil.Process(receiver.process.pid).children()
    alive = [each for each in found if each.status() != psutil.STATUS_ZOMBIE]
    return [each for each in alive if "multiprocessing.spawn" in " ".join(each.cmdline())]


def count_records(receiver: ReceiverProcess, event: str) -> int:
    """Return the number of log records of an event."""
    return [record["event"] for record in receiver.records()].count(event)


class Load:
    """Clients that post webhooks until `stop`, on new connections and on kept ones."""

    def __init__(self, receiver: ReceiverProcess) -> None:
        self.receiver = receiver
        self.acked = 0
        self.failed: list[str] = []
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._post, kwargs={"keep": keep}) for keep in (True, True, False, False)
        ]

    def start(self) -> None:
        """Start the clients."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop each client after its current request."""
        self._stop.set()
        for thread in self._threads:
            thread.join(SECONDS)
            assert not thread.is_alive()

    def _post(self, *, keep: bool) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            try:
                connection = connection or connect(self.receiver)
                content = body()
                connection.request("POST", "/clipia/webhook", body=content, headers=signed(content))
                answer = connection.getresponse()
                answer.read()
                assert answer.status == 200
                with self._lock:
                    self.acked += 1
                if answer.headers["Connection"] == "close" or not keep:
                    connection.close()
                    connection = None
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.failed.append(repr(error))
                return
        if connection is not None:
            connection.close()


@pytest.mark.parametrize("count", COUNTS)
def test_requests_are_served_through_the_drain_period(tmp_path: Path, postgres: Postgres, count: int) -> None:
    """E16: after SIGTERM /readyz answers 503 and every request is still served; then all processes end."""
    receiver = serve(tmp_path, postgres, count=count, RECEIVER_DRAIN="15").start()
    assert receiver.process is not None
    wait_until(lambda: count_records(receiver, "Application startup complete.") == count)
    assert answers(receiver, "/readyz") == 200
    load = Load(receiver)
    load.start()
    idle = connect(receiver)
    assert ask(idle, "/livez") == (200, None)
    busy = connect(receiver)
    busy.putrequest("POST", "/clipia/webhook")
    content = body()
    for name, value in {**signed(content), "Content-Length": str(len(content))}.items():
        busy.putheader(name, value)
    busy.endheaders()
    wait_until(lambda: load.acked > 20)
    receiver.signal(signal.SIGTERM)
    told = time.monotonic()
    receiver.signal(signal.SIGTERM)  # systemd signals each process, and the parent passes the signal on
    wait_until(lambda: answers(receiver, "/readyz") == 503)
    if count > 1:
        # All of them drain; any of them may answer.
        wait_until(lambda: count_records(receiver, "draining") == count)
    assert answers(receiver, "/livez") == 200
    busy.send(content)
    late = busy.getresponse()
    assert (late.status, late.headers["Connection"]) == (200, "close")
    assert late.read()
    before = load.acked
    wait_until(lambda: load.acked > before)
    load.stop()
    assert not is_closed(idle)
    assert time.monotonic() - told < 15, "the machine is too slow for this test"
    assert load.failed == []
    assert receiver.process.wait(SECONDS) == 0
    assert is_closed(idle)
    busy.close()
    idle.close()
    assert answers(receiver) == 0
    assert b"Traceback" not in receiver.log.read_bytes()


def is_closed(connection: http.client.HTTPConnection) -> bool:
    """Return whether the server has closed an idle connection."""
    return bool(select.select([connection.sock], [], [], 0)[0])


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM, signal.SIGINT]])
@pytest.mark.parametrize("count", COUNTS)
def test_ctrl_c_does_not_wait_for_the_drain_period(
    tmp_path: Path, postgres: Postgres, count: int, numbers: Sequence[signal.Signals]
) -> None:
    """E16: SIGINT ends the processes at once with status 0, before and in the drain period."""
    receiver = serve(tmp_path, postgres, count=count, RECEIVER_DRAIN="300").start()
    assert receiver.process is not None
    wait_until(lambda: answers(receiver) == 200)
    for number in numbers:
        receiver.signal(number)
        time.sleep(0.5)
    assert receiver.process.wait(SECONDS) == 0
    assert b"Traceback" not in receiver.log.read_bytes()


@pytest.mark.parametrize("count", COUNTS)
def test_the_exit_status_after_sigterm(tmp_path: Path, postgres: Postgres, count: int) -> None:
    """E16: after SIGTERM, `serve` with one or several processes exits with 0, like `worker`."""
    receiver = serve(tmp_path, postgres, count=count).start()
    wait_until(lambda: answers(receiver) == 200)
    assert receiver.stop() == 0
    assert ReceiverProcess(tmp_path, "worker").start().stop() == 0


def test_processes_end_with_their_parent(tmp_path: Path, postgres: Postgres) -> None:
    """E15: if the parent is killed, its processes end and free the port for a restart."""
    port = str(free_port())
    receiver = serve(tmp_path, postgres, "--port", port, count=2).start()
    wait_until(lambda: answers(receiver) == 200)
    held = connect(receiver)  # An idle connection does not keep them running.
    orphans = children(receiver)
    assert len(orphans) == 2
    receiver.kill()
    gone, alive = psutil.wait_procs(orphans, timeout=15)
    assert len(gone) == 2, alive
    held.close()
    with receiver:
        wait_until(lambda: answers(receiver) == 200)


def test_a_process_that_died_is_replaced(tmp_path: Path, postgres: Postgres) -> None:
    """E15: the parent starts another process in place of one that was killed."""
    with serve(tmp_path, postgres, count=2) as receiver:
        wait_until(lambda: answers(receiver) == 200)
        first = children(receiver)
        for child in first:
            child.kill()
        wait_until(lambda: len(set(children(receiver)) - set(first)) == 2)
        wait_until(lambda: answers(receiver) == 200)
        assert count_records(receiver, "web process died") == 2


def test_processes_may_take_long_to_import(tmp_path: Path, postgres: Postgres) -> None:
    """E15: the parent waits for a process that takes long to start, and does not kill it."""
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys, time\nif 'multiprocessing.spawn' in ' '.join(sys.orig_argv): time.sleep(7)\n"
    )
    receiver = serve(tmp_path, postgres, count=2, PYTHONPATH=str(slow))
    with receiver:
        wait_until(lambda: len(children(receiver)) == 2)
        first = children(receiver)
        # Meanwhile clients wait; none is rejected.
        assert answers(receiver, "/livez") == 200
        assert children(receiver) == first
        assert count_records(receiver, "web process died") == 0


SCRIPT = """
import socket, sys
from receiver.cli.supervisor import Supervisor

def fail(listeners):
    sys.exit(3)

if __name__ == "__main__":
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.exit(Supervisor(fail, [listener], count=2).run())
"""


def test_several_processes_that_cannot_start_end_with_a_status(tmp_path: Path) -> None:
    """E15: if no process can start, the parent exits with their status and does not start others for ever."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ended = subprocess.run(
        [sys.executable, str(script)], env=command_environment(), timeout=SECONDS, check=False
    )
    assert ended.returncode == 3


FAILING = """
import os, signal, socket, sys, time
from multiprocessing.context import SpawnProcess
from receiver.cli.supervisor import Supervisor

def serve(listeners):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(os.getpid(), flush=True)
    time.sleep(60)

start, starts = SpawnProcess.start, []

def start_or_fail(process):
    starts.append(process)
    if len(starts) == 3:
        raise {error}
    start(process)

if __name__ == "__main__":
    SpawnProcess.start = start_or_fail
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sys.exit(Supervisor(serve, [listener], count=2).run())
"""
"""Runs a supervisor whose third process cannot be started; the processes print their ids."""


class Failing:
    """A supervisor whose third process cannot be started."""

    def __init__(self, folder: Path, error: str) -> None:
        self.output = folder / "output"
        script = folder / "script.py"
        script.write_text(FAILING.format(error=error))
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(script)],
                env=command_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        wait_until(lambda: len(self.children) == 2)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        alive = psutil.wait_procs(
            [psutil.Process(number) for number in self.children if psutil.pid_exists(number)], timeout=15
        )[1]
        for each in alive:
            each.kill()

    @property
    def children(self) -> list[int]:
        """The ids of processes that have answered."""
        return [int(line) for line in self.output.read_text().splitlines() if line.isdecimal()]


def test_a_process_that_cannot_be_replaced_yet_is_replaced_later(tmp_path: Path) -> None:
    """E15: if the system cannot create a process, the parent tries again; SIGTERM still ends all."""
    with Failing(tmp_path, "BlockingIOError(11, 'no more processes')") as supervisor:
        os.kill(supervisor.children[0], signal.SIGKILL)
        wait_until(lambda: len(supervisor.children) == 3, seconds=30)
        assert supervisor.output.read_text().count("web process not replaced") == 1
        supervisor.process.send_signal(signal.SIGTERM)
        assert supervisor.process.wait(SECONDS) == 0
        assert not any(map(psutil.pid_exists, supervisor.children))


def test_a_parent_that_fails_ends_its_processes(tmp_path: Path) -> None:
    """E15: after an unexpected error the parent ends its processes and itself."""
    with Failing(tmp_path, "RuntimeError") as supervisor:
        os.kill(supervisor.children[0], signal.SIGKILL)
        assert supervisor.process.wait(30) == 1
        assert not any(map(psutil.pid_exists, supervisor.children))


def test_a_replacement_has_the_port_of_the_process_that_died(tmp_path: Path, postgres: Postgres) -> None:
    """E15: each process has a port for its metrics, and the replacement of a process takes over its port."""
    with serve(tmp_path, postgres, "--metrics-port", "0", count=2) as receiver:
        pages = [str(record["url"]) for record in receiver.records() if record["event"] == "metrics"]
        ports = [urlsplit(page).port or 0 for page in pages]
        wait_until(lambda: all(owner(receiver, port) for port in ports))
        dead, living = (owner(receiver, port) for port in ports)
        assert dead != living
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda: owner(receiver, ports[0]) not in (0, dead))
        assert owner(receiver, ports[1]) == living
        for port in ports:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
            assert ask(connection, "/metrics")[0] == 200
            connection.close()


def owner(receiver: ReceiverProcess, port: int) -> int:
    """Return the id of the web process that listens on a port; 0 if there is none."""
    for child in children(receiver):
        with contextlib.suppress(psutil.Error):
            if any(each.laddr.port == port for each in child.net_connections("tcp")):
                return child.pid
    return 0


def has_ipv6() -> bool:
    """Return whether this machine can listen on ::1."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not has_ipv6(), reason="needs IPv6 on the loopback interface")
@pytest.mark.parametrize(("host", "reached"), [("::", ["127.0.0.1", "::1"]), ("::1", ["::1"])])
@pytest.mark.parametrize("count", COUNTS)
def test_ipv6(tmp_path: Path, postgres: Postgres, count: int, host: str, reached: list[str]) -> None:
    """`--host ::` accepts IPv4 and IPv6 with one process or two; another address accepts only its own."""
    with serve(tmp_path, postgres, "--host", host, count=count) as receiver:
        port = urlsplit(receiver.url).port
        for address in ("127.0.0.1", "::1"):
            try:
                connection = http.client.HTTPConnection(address, port, timeout=SECONDS)
                assert ask(connection, "/livez")[0] == 200
                connection.close()
                served = True
            except ConnectionRefusedError:
                served = False
            assert served is (address in reached)


@pytest.mark.parametrize("count", COUNTS)
def test_a_port_in_use_is_one_sentence(tmp_path: Path, postgres: Postgres, count: int) -> None:
    """If the port is taken, one line names it before any process starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        url = postgres.url(template="migrated") if count > 1 else f"sqlite:///{tmp_path / 'receiver.db'}"
        settings = {"CLIPIA_WEBHOOK_SECRET": SECRET, "RECEIVER_DATABASE_URL": url}
        ended = run_command("serve", "--port", port, "--workers", str(count), settings=settings, cwd=tmp_path)
    assert ended.returncode == 2
    reason = "another program listens there already; stop it or choose another --port"
    assert ended.stderr.decode().splitlines() == [f"error: cannot listen on 127.0.0.1, port {port}: {reason}"]
