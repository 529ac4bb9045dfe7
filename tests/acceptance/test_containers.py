"""Needs of a container: a health check, signals to PID 1, and a root without a writable folder."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from support.commands import ReceiverProcess, command_environment, run_command, unmeasured
from support.payloads import SECRET
from support.servers import Postgres, end

from receiver.heartbeat import STALE_SECONDS

ROOT = Path(__file__).parents[2]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, so that the health check finds no other receiver."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def check_health() -> tuple[int, str]:
    """Return the exit status of `receiver healthcheck`, and its lines about this test's processes."""
    done = run_command("healthcheck")
    return done.returncode, done.stdout.decode()


def wait_for_health(status: int) -> str:
    """Wait until the health check has the status; return its output."""
    deadline = time.monotonic() + 60
    while (found := check_health())[0] != status:
        assert time.monotonic() < deadline, found
        time.sleep(0.1)
    return found[1]


def heartbeat_file(temporary: Path, command: str) -> Path:
    """Return the heartbeat file of the one process that runs a command."""
    [found] = temporary.glob(f"clipia-receiver-*/{command}-*.json")
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_web_process_is_healthy_on_whatever_address_it_listens(
    tmp_path: Path, temporary: Path, host: str
) -> None:
    """The health check finds the address and the port on its own, and fails if the process hangs."""
    receiver = ReceiverProcess(tmp_path, "serve", "--port", "0", "--host", host)
    with receiver:
        port = receiver.url.rpartition(":")[2]
        printed = wait_for_health(0)
        assert printed.startswith("serve: http://")
        assert f":{port}/livez answers HTTP/1.1 200 OK\n" in printed
        receiver.signal(signal.SIGSTOP)
        assert "does not answer" in wait_for_health(1)
        receiver.signal(signal.SIGCONT)
        wait_for_health(0)
    assert not list(temporary.glob("clipia-receiver-*/*"))


def test_a_process_that_was_killed_is_not_healthy(tmp_path: Path, temporary: Path) -> None:
    """The heartbeat file of a killed process does not make it healthy, and it is removed."""
    receiver = ReceiverProcess(tmp_path).start()
    wait_for_health(0)
    receiver.kill()
    assert heartbeat_file(temporary, "serve").is_file()
    status, printed = check_health()
    assert (status, printed[:40]) == (1, "no `receiver serve` or `receiver worker`")
    assert not list(temporary.glob("clipia-receiver-*/*"))


def test_a_worker_is_healthy_by_its_heartbeat(tmp_path: Path, temporary: Path) -> None:
    """A worker that hangs does not update its file any more, and is unhealthy after a while."""
    with ReceiverProcess(tmp_path, "worker") as worker:
        assert wait_for_health(0).startswith("worker: last heartbeat ")
        file = heartbeat_file(temporary, "worker")
        long_ago = time.time() - STALE_SECONDS - 1
        os.utime(file, (long_ago, long_ago))
        assert check_health()[0] == 1
        # The worker goes on and is healthy again.
        wait_for_health(0)
        worker.signal(signal.SIGSTOP)
        os.utime(file, (long_ago, long_ago))
        assert check_health()[0] == 1


def test_several_web_processes_are_one_for_the_health_check(
    tmp_path: Path, temporary: Path, postgres: Postgres
) -> None:
    """The processes share one port, to which the health check sends one request."""
    settings = {"RECEIVER_DATABASE_URL": postgres.url(template="migrated")}
    with ReceiverProcess(tmp_path, "serve", "--port", "0", "--workers", "2", **settings):
        printed = wait_for_health(0)
        assert printed.count("\n") == 1
        assert heartbeat_file(temporary, "serve").is_file()


def test_the_health_check_imports_next_to_nothing(temporary: Path) -> None:
    """The health check runs every few seconds, and importing all commands would take a second of CPU."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "receiver", "healthcheck"],
        env={**command_environment(), "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.startswith("no `receiver serve`")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "receiver.heartbeat" in imported
    assert not imported & {"sqlalchemy", "typer", "uvicorn", "receiver.cli", "asyncio"}


@contextmanager
def as_first_process(arguments: list[str], environment: dict[str, str]) -> Iterator[psutil.Process]:
    """Run a command as PID 1 of a new namespace, like a container; yield its process."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if os.geteuid() != 0:
        unshare += ["--user", "--map-root-user"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True, timeout=30, check=False).returncode
    ):
        pytest.skip("needs the right to make PID namespaces (unshare of util-linux, as root)")
    outer = subprocess.Popen([*unshare, *arguments], env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 10
        while not (children := psutil.Process(outer.pid).children()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield children[0]
    finally:
        end(outer)
        assert outer.stderr is not None
        outer.stderr.close()


def test_migrate_as_the_first_process_ends_at_sigterm(postgres: Postgres) -> None:
    """`migrate` ends at SIGTERM even as PID 1, for which the kernel has no default action."""
    url = postgres.url()
    hold = (
        f"SELECT pg_advisory_xact_lock({0x_C11F_1A}), pg_sleep(60)"  # like another migration that takes long
    )
    psql = [str(postgres.bin / "psql"), "-h", "127.0.0.1", "-p", str(postgres.port), "-U", "postgres"]
    holder = subprocess.Popen([*psql, url.rpartition("/")[2], "-c", hold], stdout=subprocess.DEVNULL)
    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    command = [sys.executable, "-m", "receiver", "migrate"]
    try:
        with as_first_process(command, command_environment(RECEIVER_DATABASE_URL=url)) as process:
            deadline = time.monotonic() + 60
            while postgres.sql(waits).stdout.strip() != "1":
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.terminate()
            process.wait(10)
    finally:
        end(holder)


def in_a_read_only_root() -> None:
    """Keep the process from writing any file, like a read-only root without a volume."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize(
    ("command", "status", "message"),
    [
        ("demo", 1, "error: no folder for the demo: No usable temporary directory found in "),
        ("demo --dir /proc/demo", 1, "error: no folder for the demo: No such file or directory; name one "),
    ],
)
def test_without_a_writable_folder_the_error_is_one_sentence(
    tmp_path: Path, postgres: Postgres, command: str, status: int, message: str
) -> None:
    """With a read-only root and no temporary folder, the command says which folder to mount or to name."""
    environment = command_environment(
        CLIPIA_WEBHOOK_SECRET=SECRET,
        RECEIVER_DATABASE_URL=postgres.url(template="migrated"),
        RECEIVER_STORAGE_URL=f"file:{tmp_path}",
    )
    # coverage would print an error because it cannot write.
    environment = unmeasured(environment)
    done = subprocess.run(
        [sys.executable, "-m", "receiver", *command.split()],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=in_a_read_only_root,
    )
    assert done.returncode == status
    (printed,) = done.stderr.splitlines()
    assert printed.startswith(message)


def test_the_image_runs_as_a_number_and_checks_its_health() -> None:
    """The image has a numeric user, as `runAsNonRoot` needs, and a health check without a fixed port."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (user,) = re.findall(r"^USER (.+)", text, re.MULTILINE)
    assert user.isdigit()
    assert int(user) > 0
    assert 'CMD ["receiver", "healthcheck"]' in text
