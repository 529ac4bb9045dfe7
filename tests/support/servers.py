"""Real servers for tests, on free loopback ports, each in its own folder."""

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
import pytest

SERVERS_REQUIRED = os.environ.get("CI") == "true" or bool(os.environ.get("RECEIVER_TEST_REQUIRE_SERVERS"))


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], *, seconds: float = 30) -> None:
    """Wait until the process listens on the port; fail at once if it has ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on {port} after {seconds} s")


def missing(what: str, how: str) -> None:
    """Skip the test if a server is missing, or fail if servers are required (CI)."""
    message = f"{what} is not installed: {how}"
    if SERVERS_REQUIRED:
        pytest.fail(message)
    pytest.skip(message)


def require(*programs: str) -> None:
    """Skip the test, or fail in CI, if a program is missing; the error names its Debian package.

    It is for programs that a process of the test starts: a skip in that process would be an exit status.
    """
    for program in programs:
        if program == "postgresql":
            Postgres.find()
        elif shutil.which(program) is None:
            missing(program, f"apt-get install {program}")


def end(process: subprocess.Popen[bytes], *, seconds: float = 15) -> int:
    """Stop a process that a test started: with SIGTERM, and with SIGKILL if it goes on."""
    if process.poll() is None:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


class Postgres:
    """A PostgreSQL cluster; `url()` makes a fresh database in it."""

    def __init__(self) -> None:
        self.bin = self.find()
        # Not below pytest's folders, because the user of the server cannot read them.
        self.directory = Path(tempfile.mkdtemp(prefix="receiver-postgres-"))
        self.data = self.directory / "data"
        self.port = free_port()
        self.databases = 0
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def find() -> Path:
        """Return the folder of the server's programs, or skip the test."""
        versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), reverse=True)
        found = str(versions[0]) if versions else shutil.which("postgres")
        if not found:
            missing("PostgreSQL", "apt-get install postgresql")
            raise AssertionError("unreachable")
        return Path(found).parent

    def _command(self, *arguments: str) -> list[str]:
        # PostgreSQL does not run as root.
        prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        return [*prefix, *arguments]

    def __enter__(self) -> Self:
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            os.chown(self.directory, user.pw_uid, user.pw_gid)
        subprocess.run(self._creation(), check=True, capture_output=True, cwd=self.directory, timeout=120)
        self.start()
        return self

    def _creation(self) -> list[str]:
        options = ["-A", "trust", "-U", "postgres", "-E", "UTF8", "--no-sync"]
        return self._command(str(self.bin / "initdb"), "-D", str(self.data), *options)

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": "200"}
        arguments = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = self._command(
            str(self.bin / "postgres"), "-D", str(self.data), "-p", str(self.port), *arguments
        )
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        wait_for_port(self.port, self.process)
        deadline = time.monotonic() + 30
        while self.sql("SELECT 1", check=False).returncode != 0:
            assert time.monotonic() < deadline, "PostgreSQL does not answer"
            time.sleep(0.05)

    @property
    def postmaster(self) -> int:
        """The process id of the postmaster."""
        return int((self.data / "postmaster.pid").read_text().splitlines()[0])

    def processes(self) -> list[psutil.Process]:
        """All server processes: the postmaster and its children."""
        server = psutil.Process(self.postmaster)
        return [server, *server.children(recursive=True)]

    def stop(self) -> None:
        """Stop the server without waiting for its clients (a fast shutdown)."""
        assert self.process is not None
        os.kill(self.postmaster, signal.SIGINT)
        self.process.wait(30)

    def crash(self) -> None:
        """Kill every server process at once."""
        assert self.process is not None
        # First stop the postmaster: otherwise it may start a process for a new connection meanwhile.
        psutil.Process(self.postmaster).suspend()
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # If a test suspends the server, runuser suspends itself too.
        self.process.send_signal(signal.SIGCONT)
        self.process.wait(30)
        (self.data / "postmaster.pid").unlink(missing_ok=True)

    def sql(
        self, statement: str, *, database: str = "postgres", check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a statement with psql."""
        return subprocess.run(
            [
                self.bin / "psql",
                "-h",
                "127.0.0.1",
                "-p",
                str(self.port),
                "-U",
                "postgres",
                "-d",
                database,
                "-Atc",
                statement,
            ],
            check=check,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def url(self, *, template: str = "template1") -> str:
        """Create a database and return its URL."""
        self.databases += 1
        name = f"test_{self.databases}"
        # file_copy waits for the disk, and wal_log writes the data twice.
        strategy = "file_copy" if self.directory.is_relative_to("/dev/shm") else "wal_log"
        self.sql(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY {strategy}")
        return f"postgresql://postgres@127.0.0.1:{self.port}/{name}"

    def drop(self, url: str) -> None:
        """Remove a database that `url()` made, even if it is in use."""
        self.sql(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.crash()
        shutil.rmtree(self.directory)


class Standby(Postgres):
    """A streaming replica of a cluster, read-only until it is promoted."""

    def __init__(self, primary: Postgres) -> None:
        super().__init__()
        self._primary = primary

    def _creation(self) -> list[str]:
        place = ["-h", "127.0.0.1", "-p", str(self._primary.port), "-U", "postgres", "-D", str(self.data)]
        options = ["--write-recovery-conf", "--checkpoint=fast", "--no-sync"]
        return self._command(str(self.bin / "pg_basebackup"), *place, *options)

    def promote(self) -> None:
        """Make it a primary."""
        assert self.sql("SELECT pg_promote()").stdout.strip() == "t"


class PgBouncer:
    """A pgbouncer with its defaults before a cluster, and a pool of two sessions for each database."""

    def __init__(self, server: Postgres, *, mode: str = "transaction", pool_size: int = 2) -> None:
        found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
        if not found:
            missing("pgbouncer", "apt-get install pgbouncer")
            raise AssertionError("unreachable")
        self._program = found
        self._server = server
        self.mode, self.pool_size = mode, pool_size
        self.directory = Path(tempfile.mkdtemp(prefix="receiver-pgbouncer-"))
        self.port = free_port()

    def __enter__(self) -> Self:
        users = self.directory / "users"
        users.write_text('"postgres" ""\n')
        configuration = self.directory / "pgbouncer.ini"
        configuration.write_text(
            f"[databases]\n* = host=127.0.0.1 port={self._server.port}\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {self.port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {users}\nadmin_users = postgres\n"
            f"logfile = {self.directory / 'log'}\n"
            f"pool_mode = {self.mode}\ndefault_pool_size = {self.pool_size}\n"
            # Each test has its own database, and all their sessions must not reach the server's limit.
            "server_idle_timeout = 5\n"
        )
        prefix = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            for path in (self.directory, users, configuration):
                os.chown(path, user.pw_uid, user.pw_gid)
            prefix = ["runuser", "-u", "postgres", "--"]
        command = [*prefix, self._program, "--quiet", str(configuration)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_port(self.port, self.process)
        return self

    def url(self, *, template: str = "template1") -> str:
        """Create a database in the cluster and return its URL through pgbouncer."""
        return self.through(self._server.url(template=template))

    def clients(self, database: str) -> int:
        """Count the open connections of clients to a database."""
        place = ["-h", "127.0.0.1", "-p", str(self.port), "-U", "postgres", "-d", "pgbouncer"]
        command = [str(self._server.bin / "psql"), *place, "-Atc", "SHOW CLIENTS"]
        rows = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=60
        ).stdout.splitlines()
        return [row.split("|")[2] for row in rows].count(database)

    def through(self, url: str) -> str:
        """Return the URL through pgbouncer of a database in the cluster."""
        return url.replace(f":{self._server.port}/", f":{self.port}/")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # runuser forwards SIGTERM, which ends pgbouncer at once.
        end(self.process)
        shutil.rmtree(self.directory)


class Switch:
    """A TCP address that leads to one port and later to another; open connections are not moved.

    With `tls` it terminates TLS.
    """

    def __init__(self, port: int, *, tls: ssl.SSLContext | None = None) -> None:
        self.target = port
        self._tls = tls
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        listener = asyncio.start_server(self._meet, "127.0.0.1", 0, ssl=self._tls)
        self._server = asyncio.run_coroutine_threadsafe(listener, self._loop).result(10)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answers, server = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._pump(reader, server), self._pump(answers, writer))

    @staticmethod
    async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
        writer.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        async def end() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
