"""A real RabbitMQ server for tests, on free loopback ports, in a folder of its own."""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote
from uuid import uuid4

from support.certificates import make_certificate
from support.servers import end, free_port, missing, wait_for_port

SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")
USER = "receiver"
PASSWORD = "s3cr3t-canary/@:%"
MAX_MESSAGE_SIZE = 1024 * 1024


class RabbitMq:
    """A RabbitMQ node with one user, `/` for its virtual host, and an epmd of its own."""

    def __init__(self) -> None:
        if not SERVER.exists() or not shutil.which("erl_call"):
            missing("RabbitMQ", "apt-get install rabbitmq-server")
        self.directory = Path(tempfile.mkdtemp(prefix="receiver-rabbitmq-"))
        self.port, self.tls_port, self.distribution_port, self.epmd_port = (free_port() for _ in range(4))
        self.node = f"receiver-{self.port}@localhost"
        self.cookie = uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None
        self.epmd: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        cookie = self.directory / ".erlang.cookie"
        cookie.write_text(self.cookie)
        cookie.chmod(0o600)
        self.certificate = make_certificate(self.directory / "certificate.pem")
        (self.directory / "enabled_plugins").write_text("[].\n")
        settings = {
            "listeners.tcp.1": f"127.0.0.1:{self.port}",
            "listeners.ssl.1": f"127.0.0.1:{self.tls_port}",
            "ssl_options.certfile": self.certificate,
            "ssl_options.keyfile": self.certificate,
            "default_user": USER,
            "default_pass": PASSWORD,
            "max_message_size": MAX_MESSAGE_SIZE,
        }
        (self.directory / "rabbitmq.conf").write_text(
            "".join(f"{name} = {value}\n" for name, value in settings.items())
        )
        command = ["epmd", "-port", str(self.epmd_port), "-address", "127.0.0.1"]
        self.epmd = subprocess.Popen(command, env=self._environment(), stderr=subprocess.DEVNULL)
        try:
            wait_for_port(self.epmd_port, self.epmd)
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory),
            "LC_ALL": "C.UTF-8",
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self.epmd_port),
            # For every Erlang process that the start script runs.
            "ERL_AFLAGS": "-kernel inet_dist_use_interface {127,0,0,1} -start_epmd false",
            # Lets the script become the server instead of waiting for it.
            "RUNNING_UNDER_SYSTEMD": "true",
            "RABBITMQ_NODENAME": self.node,
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(self.directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(self.directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.directory / "log"),
            "RABBITMQ_PID_FILE": str(self.directory / "pid"),
        }

    def start(self) -> None:
        """Start the server and wait until it answers."""
        with (self.directory / "output").open("ab") as output:
            self.process = subprocess.Popen(
                [SERVER], env=self._environment(), stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        wait_for_port(self.tls_port, self.process, seconds=60)
        deadline = time.monotonic() + 30
        while "{ok, true}" not in self.evaluate("rabbit:is_running()"):
            assert time.monotonic() < deadline, "RabbitMQ does not answer"
            time.sleep(0.05)

    def evaluate(self, expression: str) -> str:
        """Evaluate an Erlang expression in the server and return its value."""
        command = ["erl_call", "-c", self.cookie, "-n", self.node, "-e"]
        return subprocess.run(
            command,
            input=f"{expression}.\n",
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        ).stdout

    def stop(self) -> None:
        """Stop the server in an orderly way."""
        assert self.process is not None
        end(self.process, seconds=60)

    def remember_queues(self) -> None:
        """Let the server flush its list of quorum queues to the disk.

        It does so by itself only after some seconds. If it is killed before, it forgets a new queue with all
        confirmed messages.
        """
        self.evaluate("[dets:sync(Table) || Table <- dets:all()]")

    def crash(self) -> None:
        """Kill the server."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def freeze(self) -> None:
        """Stop the server's execution; its sockets stay."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it continue."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def set_alarm(self, *, on: bool) -> None:
        """Raise or clear the memory alarm, which blocks publishers."""
        alarm = f"{{resource_limit, memory, '{self.node}'}}"
        self.evaluate(
            f"rabbit_alarm:set_alarm({{{alarm}, []}})" if on else f"rabbit_alarm:clear_alarm({alarm})"
        )

    def add_user(self, user: str, password: str, *, configure: str, write: str, read: str) -> None:
        """Make a user with permissions on `/`, given as patterns of names."""
        values = ", ".join(f'<<"{value}">>' for value in (user, "/", configure, write, read, "test"))
        self.evaluate(f'rabbit_auth_backend_internal:add_user(<<"{user}">>, <<"{password}">>, <<"test">>)')
        self.evaluate(f"rabbit_auth_backend_internal:set_permissions({values})")

    def url(self, query: str = "", *, port: int | None = None) -> str:
        """Return the URL of the server, or of a relay before it."""
        return f"amqp://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port or self.port}/{query}"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.crash()
        if self.epmd is not None:
            end(self.epmd)
        shutil.rmtree(self.directory)
