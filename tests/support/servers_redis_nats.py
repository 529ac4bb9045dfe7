"""Redis and NATS servers for tests: on free loopback ports, each in a folder of its own."""

import abc
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from support.servers import end, free_port, missing, wait_for_port

SECONDS: Final = 30.0
"""Seconds for a server to start or stop."""


class Broker(abc.ABC):
    """A server process that can be stopped, killed, frozen and started again on the same port and data."""

    def __init__(self, program: str, package: str) -> None:
        found = shutil.which(program)
        if found is None:
            missing(program, f"apt-get install {package}")
        self.program = str(found)
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"receiver-{program}-"))
        self.process: subprocess.Popen[bytes] | None = None

    @abc.abstractmethod
    def arguments(self) -> Sequence[str]:
        """Return the command line without the program."""

    @abc.abstractmethod
    def is_ready(self) -> bool:
        """Return whether a server that listens also works."""

    def start(self) -> None:
        """Start the server and wait until it works."""
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.program, *self.arguments()], stdout=log, stderr=log, cwd=self.directory
            )
        wait_for_port(self.port, self.process, seconds=SECONDS)
        deadline = time.monotonic() + SECONDS
        while not self.is_ready():
            assert time.monotonic() < deadline, f"{self.program} does not work: {self.log()}"
            time.sleep(0.02)

    def ask(self, request: bytes, *, answers: int = 1) -> bytes:
        """Send bytes on a new connection and return the first answer, or b"" if there is none."""
        found = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(request)
            try:
                while found.count(b"\r\n") < answers and (piece := connection.recv(65_536)):
                    found += piece
            except TimeoutError:
                return b""
        return found

    def log(self) -> str:
        """Return the server's log."""
        return (self.directory / "log").read_text(errors="replace")

    def stop(self) -> None:
        """Stop the server in an orderly way."""
        if self.process is not None:
            end(self.process, seconds=SECONDS)

    def crash(self) -> None:
        """Kill the server."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(SECONDS)

    def freeze(self) -> None:
        """Stop every thread of the server: connections stay open without an answer."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def thaw(self) -> None:
        """Undo `freeze`."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.crash()
        shutil.rmtree(self.directory)


class Redis(Broker):
    """A Redis server that flushes every command to the disk unless told otherwise."""

    def __init__(self, *options: str, tls: Path | None = None) -> None:
        super().__init__("redis-server", "redis-server")
        self.options = options
        self.tls = tls

    def arguments(self) -> Sequence[str]:
        """Return the command line without the program; later options win."""
        ports = ["--port", str(self.port)]
        if self.tls is not None:
            ports = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            ports += ["--tls-cert-file", str(self.tls), "--tls-key-file", str(self.tls)]
        place = ["--bind", "127.0.0.1", "--dir", str(self.directory), "--save", ""]
        return [*ports, *place, "--appendonly", "yes", "--appendfsync", "always", *self.options]

    def is_ready(self) -> bool:
        """Return whether the data is loaded."""
        return self.tls is not None or not self.ask(b"PING\r\n").startswith(b"-LOADING")

    def url(self, query: str, *, login: str = "") -> str:
        """Return a URL with this query."""
        return f"redis{'s' if self.tls else ''}://{login}127.0.0.1:{self.port}/0?{query}"


class RedisSentinel(Broker):
    """One sentinel that alone decides on a failover; its primary is called `main`."""

    def __init__(self, primary: Redis, *, password: str, primary_password: str) -> None:
        super().__init__("redis-server", "redis-server")
        self.password = password
        (self.directory / "sentinel.conf").write_text(
            f"port {self.port}\nbind 127.0.0.1\ndir {self.directory}\nrequirepass {password}\n"
            f"sentinel monitor main 127.0.0.1 {primary.port} 1\nsentinel auth-pass main {primary_password}\n"
            "sentinel down-after-milliseconds main 300\nsentinel failover-timeout main 1000\n"
        )

    def arguments(self) -> Sequence[str]:
        """Return the command line without the program."""
        return [str(self.directory / "sentinel.conf"), "--sentinel"]

    def is_ready(self) -> bool:
        """Return whether it knows a replica to promote."""
        return b"slaves=1" in self.command("INFO", "sentinel")

    def fail_over(self) -> None:
        """Make the replica the primary, once the sentinel can."""
        deadline = time.monotonic() + SECONDS
        while self.command("SENTINEL", "FAILOVER", "main").count(b"+OK") < 2:
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def command(self, *words: str) -> bytes:
        """Run a command and return the answer."""
        lines = [f"AUTH {self.password}", " ".join(words)]
        return self.ask("".join(f"{line}\r\n" for line in lines).encode(), answers=len(lines))


class Nats(Broker):
    """A NATS server with JetStream; `config` is its configuration file's content."""

    def __init__(self, config: str = "", *, jetstream: bool = True) -> None:
        super().__init__("nats-server", "nats-server")
        self.config = config
        self.jetstream = jetstream

    def arguments(self) -> Sequence[str]:
        """Return the command line without the program."""
        return ["-a", "127.0.0.1", "-p", str(self.port), "-c", str(self._write_config())]

    def is_ready(self) -> bool:
        """Return whether the server sends its greeting."""
        return self.ask(b"").startswith(b"INFO")

    def reload(self, config: str) -> None:
        """Change the configuration of the running server."""
        assert self.process is not None
        self.config = config
        self._write_config()
        self.process.send_signal(signal.SIGHUP)

    def _write_config(self) -> Path:
        # Not as an option: a reload would switch off features that the file does not have.
        storage = f'jetstream {{ store_dir: "{self.directory}/data" }}' if self.jetstream else ""
        path = self.directory / "nats.conf"
        path.write_text(f"{self.config}\n{storage}\n")
        return path

    def url(self, query: str, *, login: str = "") -> str:
        """Return a URL with this query."""
        return f"nats://{login}127.0.0.1:{self.port}?{query}"
