"""Starts the services of `compose.yaml` as processes, by what the file says: there is no Docker in tests.

Commands, environments, health checks and the order of starts are the file's. Containers have addresses of
their own and processes do not, so names and ports of services are replaced by free ports of the loopback, and
the folders of volumes by folders of the test.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped]  # its types are a package of their own, which is not pinned

from support.commands import command_environment, unmeasured
from support.servers import Postgres, end, free_port
from support.servers_rabbitmq import RabbitMq

ROOT: Final = Path(__file__).parents[2]
HEALTHY_SECONDS: Final = 90.0
RECEIVER_PORT: Final = 8000
"""The port of `receiver serve` without `--port`."""

_VARIABLE: Final = re.compile(r"\$(?:\$|\{(\w+)(?:(:?[-?])([^}]*))?\}|(\w+))")


class MissingVariable(Exception):
    """`${NAME:?message}` without a value: Compose starts nothing."""


def interpolate(value: Any, variables: Mapping[str, str]) -> Any:
    """Replace the variables in all texts of a document, as Compose does."""
    if isinstance(value, dict):
        return {key: interpolate(each, variables) for key, each in value.items()}
    if isinstance(value, list):
        return [interpolate(each, variables) for each in value]
    return (
        _VARIABLE.sub(lambda found: _replaced(found, variables), value) if isinstance(value, str) else value
    )


def _replaced(found: "re.Match[str]", variables: Mapping[str, str]) -> str:
    if found[0] == "$$":
        return "$"
    name, rule, word = found[1] or found[4], found[2] or "", found[3] or ""
    value = variables.get(name)
    is_set = bool(value) if rule.startswith(":") else value is not None
    if rule.endswith("?") and not is_set:
        raise MissingVariable(f"{name}: {word}")
    return word if rule.endswith("-") and not is_set else value or ""


def read_variables(text: str) -> dict[str, str]:
    """Return the variables of a file such as `.env`."""
    lines = [line.strip() for line in text.splitlines()]
    pairs = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}


def load(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the document with its variables replaced."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
    replaced: dict[str, Any] = interpolate(document, variables)
    return replaced


class Service:
    """A service of the receiver."""

    def __init__(self, name: str, row: Mapping[str, Any], folder: Path, stack: "Stack") -> None:
        self.name, self.row, self._stack = name, row, stack
        self.folder = folder / name
        self.folder.mkdir()
        temporary = self.folder / "tmp"
        temporary.mkdir()
        self.command = [str(part) for part in row["command"]]
        self.ports = self._choose_ports()
        environment = {name: str(value) for name, value in row["environment"].items()}
        local = {name: stack.localize(value) for name, value in environment.items()}
        self.environment = unmeasured(command_environment(**local, **stack.extra, TMPDIR=str(temporary)))
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def _choose_ports(self) -> dict[int, int]:
        """Choose a free port for each one in the command, and put it there."""
        chosen = dict[int, int]()
        for at, part in enumerate(self.command[:-1]):
            if part in {"--port", "--metrics-port"}:
                port = chosen[int(self.command[at + 1])] = free_port()
                self.command[at + 1] = str(port)
        if self.command[0] == "serve" and "--port" not in self.command:
            port = chosen[RECEIVER_PORT] = free_port()
            self.command += ["--port", str(port)]
        return chosen

    @property
    def url(self) -> str:
        """The address of the published port: `host:port:port of the container`."""
        (published,) = self.row["ports"]
        return f"http://127.0.0.1:{self.ports[int(published.rpartition(':')[2])]}"

    def start(self) -> None:
        """Start the process."""
        self.starts += 1
        with (self.folder / f"{self.starts}.log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "receiver", *self.command],
                env=self.environment,
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the receiver in this service, as `docker compose exec` does."""
        return subprocess.run(
            [sys.executable, "-m", "receiver", *arguments],
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def is_healthy(self) -> bool:
        """Run the health check of the file."""
        assert self.process is not None
        assert self.process.poll() is None, self.log()
        kind, program, *arguments = self.row["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "receiver")
        return self.run(*arguments).returncode == 0

    def wait_until_completed(self) -> None:
        """Wait for the end of a process that does its work and ends."""
        assert self.process is not None
        assert self.process.wait(HEALTHY_SECONDS) == 0, self.log()

    def stop(self) -> None:
        """Send SIGTERM, and SIGKILL after the grace period, which must not be needed."""
        if self.process is not None and self.process.poll() is None:
            assert end(self.process, seconds=int(self.row["stop_grace_period"].removesuffix("s"))) == 0, (
                self.log()
            )

    def log(self) -> str:
        """Return the log of the present process."""
        return (self.folder / f"{self.starts}.log").read_text(errors="replace")


class Stack:
    """All services of the file."""

    def __init__(
        self,
        folder: Path,
        variables: Mapping[str, str],
        *,
        postgres: Postgres,
        rabbit: RabbitMq,
        extra: Mapping[str, str],
    ) -> None:
        """`extra` are variables of the receiver that the file does not have, such as a sandbox's address."""
        self.document = load(variables)
        self.rows: dict[str, dict[str, Any]] = self.document["services"]
        self.folder, self.extra = folder, extra
        self._postgres, self._rabbit = postgres, rabbit
        self.started: list[str] = []
        folder.joinpath("var").mkdir()
        text = (ROOT / "receiver.toml.example").read_text(encoding="utf-8")
        folder.joinpath("receiver.toml").write_text(self.localize(text))
        self.services = {
            name: Service(name, row, folder, self) for name, row in self.rows.items() if "build" in row
        }

    def localize(self, text: str) -> str:
        """Replace addresses and folders of containers."""
        places = {
            "postgres:5432": f"127.0.0.1:{self._postgres.port}",
            "rabbitmq:5672": f"127.0.0.1:{self._rabbit.port}",
            "/etc/receiver/receiver.toml": str(self.folder / "receiver.toml"),
            "/var/lib/receiver": str(self.folder / "var"),
        }
        for place, local in places.items():
            text = text.replace(place, local)
        return text

    def prepare_servers(self) -> None:
        """Do what the images of PostgreSQL and RabbitMQ do with their variables at the first start."""
        names = self.rows["postgres"]["environment"]
        user, password, database = (names[f"POSTGRES_{part}"] for part in ("USER", "PASSWORD", "DB"))
        self._postgres.sql(f"CREATE ROLE {user} LOGIN PASSWORD '{password}'")
        self._postgres.sql(f"CREATE DATABASE {database} OWNER {user}")
        access = self._postgres.data / "pg_hba.conf"
        access.write_text(f"host all {user} 127.0.0.1/32 scram-sha-256\n{access.read_text()}")
        self._postgres.sql("SELECT pg_reload_conf()")
        names = self.rows["rabbitmq"]["environment"]
        user, password = (names[f"RABBITMQ_DEFAULT_{part}"] for part in ("USER", "PASS"))
        self._rabbit.evaluate(
            f'rabbit_auth_backend_internal:change_password(<<"{user}">>, <<"{password}">>, <<"test">>)'
        )

    @contextmanager
    def running(self) -> Iterator["Stack"]:
        """Start all services in the order of the file inside the block."""
        self.prepare_servers()
        try:
            for name in self.order():
                self._await_dependencies(name)
                if name in self.services:
                    self.services[name].start()
                self.started.append(name)
            self.wait_until_healthy(*(name for name in self.services if self._has_check(name)))
            yield self
        finally:
            with ThreadPoolExecutor() as pool:
                list(pool.map(Service.stop, self.services.values()))

    def order(self) -> Sequence[str]:
        """Return the names of the services, each behind those that it depends on."""
        found: list[str] = []

        def add(name: str) -> None:
            for other in self.rows[name].get("depends_on", {}):
                add(other)
            if name not in found:
                found.append(name)

        for name in self.rows:
            add(name)
        return found

    def _await_dependencies(self, name: str) -> None:
        for other, how in self.rows[name].get("depends_on", {}).items():
            if how["condition"] == "service_completed_successfully":
                self.services[other].wait_until_completed()
            else:
                assert how["condition"] == "service_healthy"
                self.wait_until_healthy(other)

    def _has_check(self, name: str) -> bool:
        return "test" in self.rows[name]["healthcheck"]

    def wait_until_healthy(self, *names: str) -> None:
        """Wait until the health checks of services pass."""
        deadline = time.monotonic() + HEALTHY_SECONDS
        for name in names:
            while not self._is_healthy(name):
                assert time.monotonic() < deadline, f"{name} is not healthy"
                time.sleep(0.1)

    def _is_healthy(self, name: str) -> bool:
        if name in self.services:
            return self.services[name].is_healthy()
        _, *command = self.rows[name]["healthcheck"]["test"]
        if name == "postgres":
            program, environment = self._postgres.bin / command[0], {"PGPORT": str(self._postgres.port)}
        else:
            program, environment = Path("/usr/lib/rabbitmq/bin") / command[0], self._rabbit._environment()
        assert shutil.which(program), shlex.join(command)
        done = subprocess.run(
            [program, *command[1:]],
            env={"PATH": os.environ["PATH"], **environment},
            capture_output=True,
            timeout=60,
            check=False,
        )
        return done.returncode == 0

    def replace(self, name: str) -> None:
        """Replace a container and wait until it is healthy: `docker compose up -d --no-deps --wait NAME`."""
        self.services[name].stop()
        self.services[name].start()
        self.wait_until_healthy(name)
