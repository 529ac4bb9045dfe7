"""Five incidents in the README's production layout, found and fixed by commands from another machine."""

import contextlib
import http.server
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import orjson
import pytest
from support.commands import ReceiverProcess, run_command
from support.jobs import IMAGE, LIVE_KEY, TOKEN, Sandbox
from support.payloads import SECRET, body, signed
from support.production import layout
from support.servers import Postgres
from support.servers_rabbitmq import RabbitMq

SECONDS = 150.0
"""The most time for anything to come, the end of an alert among it."""
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


class Consumer:
    """Takes messages over HTTP; it rejects the event `poison`."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.alerts: list[dict[str, Any]] = []
        consumer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
                rejected = message.get("subject") == POISON and self.path == "/orders"
                (consumer.alerts if self.path == "/oncall" else consumer.messages).append(message)
                answer = b'{"error": "cost: not a number"}' if rejected else b"{}"
                self.send_response(422 if rejected else 200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its base
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def wait_until(found: Callable[[], Any], wanted: str) -> Any:
    """Return the first true result of `found`."""
    deadline = time.monotonic() + SECONDS
    while not (result := found()):
        assert time.monotonic() < deadline, wanted
        time.sleep(0.1)
    return result


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
        self.consumer = Consumer()

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

        found: dict[str, Any] = wait_until(find, f"{kind} {told}: {self.consumer.alerts}")
        return found

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


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """The layout, with servers of its own, which the test stops."""
    with (
        small_disk(tmp_path / "media"),
        Postgres() as postgres,
        RabbitMq() as rabbit,
        Sandbox(tmp_path, duration=0) as sandbox,
        Service(tmp_path, postgres, rabbit, sandbox).running() as running,
    ):
        yield running


def test_five_incidents(service: Service) -> None:
    """Each incident has an alert or a problem in `status`; another command gives its cause, or mends it.

    All happen at once, because an alert is told when its condition has held for a while, and so is its end.
    """
    service.rabbit.stop()
    waiting = service.submit()
    wait_until(lambda: len(service.consumer.messages) > 0, "the healthy destination")
    assert service.callback(body(POISON)) == 200
    lost = lose_webhook(service)
    unsigned = [body(f"rotated-{number}") for number in range(3)]
    assert [service.callback(each, secret=RETIRED) for each in unsigned] == [401] * 3
    filler = fill_disk(service)
    unstored = service.submit()

    find_dead_broker(service, waiting)
    find_wrong_secret(service)
    find_lost_webhook(service, lost)
    find_poison_event(service)
    find_full_disk(service, unstored)

    service.rabbit.start()
    filler.unlink(missing_ok=True)
    service.command("events", "fetch", lost)
    service.public.stop()
    service.public.settings["CLIPIA_WEBHOOK_SECRET"] = f"{SECRET},{RETIRED}"
    service.public.start()
    assert [service.callback(each, secret=RETIRED) for each in unsigned] == [200] * 3
    for key in (waiting, unstored, lost, "rotated-0", "rotated-1", "rotated-2"):
        service.wait_until_delivered(key)
    for kind in ("destination_down", "secret_mismatch", "dead_letters", "disk_nearly_full"):
        service.wait_for_alert(kind, "resolved")
    stop_database(service)


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


def find_dead_broker(service: Service, job: str) -> None:
    """`status` names the destination that is down, and `why` gives its error."""
    assert service.wait_for_alert("destination_down", "raised")["subject"] == "rabbit"
    assert "rabbit is down since" in problems(service.command("status"))
    verdict = service.command("why", job, expect=WAITING)
    assert "rabbit has failed since" in verdict
    assert "connection refused" in verdict
    assert "connection refused" in service.command("destinations", "test", "rabbit", expect=None)


def find_wrong_secret(service: Service) -> None:
    """The alert names the command that names the secret with which Clipia signs."""
    alert = service.wait_for_alert("secret_mismatch", "raised")
    listed = service.command(*alert["command"].split()[1:])
    assert "It was signed with the retired secret" in " ".join(listed.split())


def find_lost_webhook(service: Service, request_id: str) -> None:
    """`rejections list` has the wrong path, and `why` names the command that gets the result."""
    assert "rejected requests" in problems(service.command("status"))
    assert "wrong_url" in service.command("rejections", "list", "--cause", "wrong_url")
    assert f"receiver events fetch {request_id}" in service.command("why", request_id, expect=UNKNOWN)


def find_poison_event(service: Service) -> None:
    """The consumer's answer is shown with the message; the delivery is discarded with a reason on record."""
    alert = service.wait_for_alert("dead_letters", "raised")
    assert alert["subject"] == "orders"
    (delivery,) = alert["examples"]
    assert "orders: 1 dead: answered 422" in service.command("deliveries", "failures")
    assert "cost: not a number" in service.command("deliveries", "show", delivery)
    message = service.command("deliveries", "show", delivery, "--message")
    assert json.loads(message)["subject"] == POISON
    service.command("deliveries", "discard", delivery, "--reason", "orders rejects it for good: ticket 1")
    assert "ticket 1" in service.command("audit", "list")


def find_full_disk(service: Service, job: str) -> None:
    """`status` names the disk, and `why` says that the file waits for it."""
    if os.geteuid() != 0:
        return
    service.wait_for_alert("disk_nearly_full", "raised")
    assert "the disk of" in problems(service.command("status"))
    assert "No space left" in service.command("why", job, expect=WAITING)


def stop_database(service: Service) -> None:
    """While the database is away nothing is acked, and commands say why; then work goes on by itself."""
    content = body("while-down")
    service.postgres.stop()
    try:
        assert "database" in service.command("status", expect=UNAVAILABLE)
        assert service.callback(content) == 503
        assert "receiver_database_up 0" in service.metrics(service.internal)
    finally:
        service.postgres.start()
    wait_until(lambda: service.callback(content) == 200, "an ack")
    service.wait_until_delivered("while-down")
