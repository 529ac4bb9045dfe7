"""Five incidents in the README's production layout, with servers that a test may stop."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx

from support.commands import ReceiverProcess, run_command
from support.consumers import Answer, Consumer, wait_until
from support.jobs import IMAGE, LIVE_KEY, TOKEN, Sandbox
from support.payloads import SECRET, signed
from support.production import layout
from support.servers import Postgres
from support.servers_rabbitmq import RabbitMq

MODEL, INPUT = IMAGE[0], json.dumps(IMAGE[1])
RETIRED = "whsec_retired-0123456789abcdef"
POISON = "poison"
DISK_BYTES = 8 * 1024 * 1024

DELIVERED, WAITING, UNKNOWN = 0, 10, 4
"""Exit statuses of `receiver why`."""
UNAVAILABLE = 6
"""The exit status of a command if the database does not answer."""

CONFIGURATION = """
[[destinations]]
name = "rabbit"
url = "{rabbit}"
retry = {{ initial = 0.2, cap = 1.0 }}

[[destinations]]
name = "orders"
url = "{consumer}/orders"
retry = {{ initial = 0.2, cap = 1.0 }}

[[destinations]]
name = "oncall"
url = "{consumer}/oncall"
alerts = "only"
retry = {{ initial = 0.2, cap = 1.0 }}
"""


class IncidentConsumer(Consumer):
    """Rejects the event `poison`, and takes alerts at `/oncall`."""

    def __init__(self) -> None:
        super().__init__()
        self.alerts: list[dict[str, Any]] = []

    def take(self, path: str, message: dict[str, Any]) -> Answer:
        """Take a message or an alert."""
        if path == "/oncall":
            self.alerts.append(message)
            return Answer(200)
        answer = super().take(path, message)
        is_rejected = message.get("subject") == POISON and path == "/orders"
        return Answer(422, b'{"error": "cost: not a number"}') if is_rejected else answer


def problems(status: str) -> str:
    """Return the part of the screen with the problems."""
    return status.partition("Problems")[2].partition("lane")[0]


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Make a folder; if this is root, on a file system of its own, which a test can fill."""
    folder.mkdir()
    if os.geteuid() != 0:
        yield
        return
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder], check=True, timeout=60
    )
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True, timeout=60)


class Service:
    """The processes of the layout, and an operator on another machine."""

    def __init__(self, folder: Path, postgres: Postgres, rabbit: RabbitMq, sandbox: Sandbox) -> None:
        self.folder, self.postgres, self.rabbit, self.sandbox = folder, postgres, rabbit, sandbox
        self.desk = folder / "desk"
        self.media = folder / "media"
        self.consumer = IncidentConsumer()

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Run everything inside the block."""
        self.desk.mkdir()
        configuration = self.folder / "receiver.toml"
        url = self.rabbit.url("?queue=incidents")
        configuration.write_text(CONFIGURATION.format(rabbit=url, consumer=self.consumer.url))
        database = self.postgres.url()
        settings = {
            "RECEIVER_CONFIG": str(configuration),
            "RECEIVER_DATABASE_URL": database,
            "RECEIVER_STORAGE_URL": f"file:{self.media}",
            "RECEIVER_MEDIA_HOSTS": self.sandbox.url,
            "RECEIVER_API_TOKENS": f"oncall:{TOKEN}",
            "CLIPIA_KEY": LIVE_KEY,
            "CLIPIA_BASE_URL": self.sandbox.url,
            "CLIPIA_RETIRED_WEBHOOK_SECRET": RETIRED,
        }
        assert run_command("migrate", settings=settings | {"CLIPIA_WEBHOOK_SECRET": SECRET}).returncode == 0
        with ExitStack() as stack:
            stack.enter_context(self.consumer)
            processes = []
            for number, arguments in enumerate(layout()):
                home = self.folder / str(number)
                home.mkdir()
                processes.append(stack.enter_context(ReceiverProcess(home, *arguments, **settings)))
            self.public, self.internal, self.worker = processes
            yield self

    def run(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        """Run a command on a machine that has the URL and a token alone."""
        settings = {"RECEIVER_URL": self.internal.url, "RECEIVER_TOKEN": TOKEN}
        return run_command(*arguments, settings=settings, cwd=self.desk)

    def command(self, *arguments: str, expect: int | None = 0) -> str:
        """Return the result of a command that ends with a status, or else its error."""
        ran = self.run(*arguments)
        assert expect is None or ran.returncode == expect, (ran.returncode, ran.stdout, ran.stderr)
        assert list(self.desk.iterdir()) == []
        return (ran.stdout or ran.stderr).decode()

    def submit(self) -> str:
        """Submit a job and return its id."""
        return str(json.loads(self.command("submit", MODEL, "--input", INPUT, "--json"))["id"])

    def callback(self, content: bytes, *, path: str = "", **how: Any) -> int:
        """Post a webhook and return the status of the answer."""
        url = f"{self.public.url}/clipia/webhook{path}"
        return httpx.post(url, content=content, headers=signed(content, **how), timeout=30).status_code

    def wait_for_alert(self, kind: str, told: str) -> dict[str, Any]:
        """Return the data of the message about an alert that the destination of alerts got."""

        def find() -> dict[str, Any] | None:
            return next(
                (
                    each["data"]
                    for each in reversed(self.consumer.alerts)
                    if each["type"].endswith(f".{told}") and each["data"]["alert"] == kind
                ),
                None,
            )

        return wait_until(find, f"{kind} {told}: {self.consumer.alerts}")

    def wait_until_delivered(self, key: str) -> None:
        """Wait until `why` says that an event is delivered everywhere."""
        wait_until(lambda: ": " in self._why(key), f"delivery of {key}")

    def _why(self, key: str) -> str:
        ran = self.run("why", key)
        return ran.stdout.decode() if ran.returncode == DELIVERED else ""

    def metrics(self, process: ReceiverProcess) -> str:
        """Return the metrics of a process with a listener."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        return httpx.get(f"{process.url}/metrics", headers=headers, timeout=30).text


def lose_webhook(service: Service) -> str:
    """Submit a job whose webhook goes to a path that the receiver does not have."""
    accepted = httpx.post(
        f"{service.sandbox.url}/v1/models/{MODEL}",
        headers={"X-Api-Key": LIVE_KEY},
        json={"input": IMAGE[1], "webhook_url": f"{service.public.url}/clipia/webhooks"},
        timeout=30,
    )
    return str(accepted.json()["request_id"])


def fill_disk(service: Service) -> Path:
    """Fill the disk of the files; without a disk of its own there is nothing to fill."""
    filler = service.media / "filler"
    if os.geteuid() == 0:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            for _ in range(2 * DISK_BYTES // 65_536):
                file.write(bytes(65_536))
    return filler


@contextmanager
def running_service(folder: Path) -> Iterator[Service]:
    """Run the layout with servers of its own, which a test stops."""
    with (
        small_disk(folder / "media"),
        Postgres() as postgres,
        RabbitMq() as rabbit,
        Sandbox(folder, duration=0) as sandbox,
        Service(folder, postgres, rabbit, sandbox).running() as running,
    ):
        yield running
