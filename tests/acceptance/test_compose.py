"""`compose.yaml` with `.env.example` and `receiver.toml.example`, started as it says, without Docker."""

import asyncio
import re
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import aio_pika
import httpx
import pytest
from support.compose import ROOT, MissingVariable, Stack, load, read_variables
from support.jobs import IMAGE, LIVE_KEY, Sandbox
from support.payloads import SECRET, body, signed
from support.servers import Postgres, end, free_port, missing, wait_for_port
from support.servers_rabbitmq import RabbitMq

TOKEN = "token-of-compose-0123456789"
SECONDS = 60.0
QUEUE = "clipia-events"
PASSWORD = "0123456789abcdef"

T = TypeVar("T")


def filled_in(**values: str) -> dict[str, str]:
    """Return the variables of `.env.example` with what a user fills in."""
    given = {
        "CLIPIA_WEBHOOK_SECRET": SECRET,
        "POSTGRES_PASSWORD": PASSWORD,
        "RABBITMQ_PASSWORD": PASSWORD[::-1],
        "RECEIVER_API_TOKENS": f"shop:{TOKEN}",
    } | values
    variables = read_variables((ROOT / ".env.example").read_text(encoding="utf-8"))
    assert given.keys() <= variables.keys()
    return variables | given


def until(find: Callable[[], T | None]) -> T:
    """Return the first result of `find`."""
    deadline = time.monotonic() + SECONDS
    while not (found := find()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)
    return found


def test_what_is_not_filled_in_is_named() -> None:
    """Each secret of `.env.example` is empty, and Compose starts nothing without it."""
    whole = filled_in()
    load(whole)
    for name in ("CLIPIA_WEBHOOK_SECRET", "POSTGRES_PASSWORD", "RABBITMQ_PASSWORD", "RECEIVER_API_TOKENS"):
        assert read_variables((ROOT / ".env.example").read_text())[name] == ""
        with pytest.raises(MissingVariable, match=name):
            load(whole | {name: ""})


def test_containers_have_no_more_rights_than_they_need() -> None:
    """The receiver's root is read-only, it has no capability, and the internal API is for this machine."""
    services = load(filled_in())["services"]
    for name, row in services.items():
        assert "no-new-privileges:true" in row["security_opt"], name
        assert row["stop_grace_period"] == "60s", name
        assert all(port.startswith("127.0.0.1:") for port in row.get("ports", [])), name
        if "build" in row:
            assert (row["read_only"], row["cap_drop"]) == (True, ["ALL"]), name
        else:
            assert re.fullmatch(r"[a-z]+:\d+", row["image"]), name


@pytest.fixture(scope="module")
def proxy_port() -> int:
    """The port of the proxy in front, which is the public address."""
    return free_port()


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """Clipia."""
    with Sandbox(tmp_path_factory.mktemp("sandbox"), duration=0) as running:
        yield running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, sandbox: Sandbox, proxy_port: int) -> Iterator[Stack]:
    """All services of the file."""
    variables = filled_in(CLIPIA_KEY=LIVE_KEY, RECEIVER_PUBLIC_URL=f"http://127.0.0.1:{proxy_port}")
    with Postgres() as postgres, RabbitMq() as rabbit:
        extra = {"CLIPIA_BASE_URL": sandbox.url, "RECEIVER_MEDIA_HOSTS": sandbox.url}
        made = Stack(
            tmp_path_factory.mktemp("compose"), variables, postgres=postgres, rabbit=rabbit, extra=extra
        )
        with made.running():
            yield made


@pytest.fixture(scope="module")
def public(stack: Stack, proxy_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The public address: nginx as in docs/deployment.md, in front of both web services."""
    with nginx(tmp_path_factory.mktemp("nginx"), stack, proxy_port):
        yield f"http://127.0.0.1:{proxy_port}"


@contextmanager
def nginx(folder: Path, stack: Stack, port: int) -> Iterator[None]:
    """Run nginx with the configuration of docs/deployment.md."""
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin") or ""
    if not program:
        missing("nginx", "apt-get install nginx")
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    block = page.partition("```nginx\n")[2].partition("```")[0]
    for name in ("web-a", "web-b"):
        (published,) = stack.rows[name]["ports"]
        address = published.rpartition(":")[0]
        # Without it nginx leaves out the replaced container for ten seconds more.
        assert f"server {address} max_fails=0;" in block, address
        block = block.replace(address, str(urlsplit(stack.services[name].url).netloc))
    block = block.replace("listen 443 ssl;", f"listen 127.0.0.1:{port};")
    assert f"127.0.0.1:{port}" in block
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    file = folder / "nginx.conf"
    file.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {folder}/body; {paths} {block} }}\n"
    )
    process = subprocess.Popen(
        [program, "-p", str(folder), "-c", str(file), "-e", str(folder / "error.log")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port, process)
        yield
    finally:
        end(process)


def post(client: httpx.Client, public: str, name: str) -> int:
    """Send a webhook, and return the status of the answer."""
    content = body(name)
    try:
        return client.post(f"{public}/clipia/webhook", content=content, headers=signed(content)).status_code
    except httpx.HTTPError:
        return 0


def api(stack: Stack) -> httpx.Client:
    """Return a client of the internal API."""
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return httpx.Client(base_url=stack.services["internal"].url, headers=headers, timeout=30, trust_env=False)


class Consumer:
    """Takes the messages from the queue."""

    def __init__(self, stack: Stack) -> None:
        password = stack.rows["rabbitmq"]["environment"]["RABBITMQ_DEFAULT_PASS"]
        self._url = stack.localize(f"amqp://receiver:{password}@rabbitmq:5672/")
        self._taken: Counter[str] = Counter()

    def taken(self) -> Counter[str]:
        """Return the number of messages until now by `request_id`."""
        asyncio.run(self._take())
        return self._taken

    async def _take(self) -> None:
        connection = await aio_pika.connect(self._url)
        async with connection, connection.channel() as channel:
            queue = await channel.declare_queue(QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
            while message := await queue.get(no_ack=True, fail=False):
                self._taken[message.correlation_id or ""] += 1


@pytest.fixture(scope="module")
def consumer(stack: Stack) -> Consumer:
    """A consumer of the queue in `receiver.toml.example`."""
    return Consumer(stack)


def test_a_webhook_becomes_a_message(stack: Stack, public: str, consumer: Consumer) -> None:
    """Through the proxy, the database and the worker into the queue of `receiver.toml.example`."""
    with httpx.Client(trust_env=False) as client:
        assert post(client, public, "r-1") == 200
    until(lambda: consumer.taken()["r-1"])
    order = [stack.started.index(name) for name in ("postgres", "migrate", "web-a")]
    assert order == sorted(order)


@pytest.mark.usefixtures("public")
def test_a_job_is_delivered_and_replayed(stack: Stack, consumer: Consumer) -> None:
    """The job goes in by the internal API, its webhook comes by the proxy, and a replay sends it again."""
    model, given = IMAGE
    with api(stack) as client:
        headers = {"Idempotency-Key": "k-1"}
        answer = client.post("/v1/jobs", json={"model": model, "input": given}, headers=headers)
        assert answer.is_success, answer.text
        path = f"/v1/jobs/{answer.json()['id']}"
        until(lambda: client.get(path).json()["state"] == "completed")
        request_id = client.get(path).json()["request_id"]
    until(lambda: consumer.taken()[request_id])
    worker = stack.services["worker"]
    done = worker.run("replay", request_id, "--to", "queue", "--reason", "a test", "--wait")
    assert done.returncode == 0, done.stderr
    until(lambda: consumer.taken()[request_id] == 2)
    assert [path for path in (stack.folder / "var" / "media").rglob("*") if path.is_file()]


def test_each_container_is_replaced_without_a_failed_webhook(
    stack: Stack, public: str, consumer: Consumer
) -> None:
    """One after the other under load: each webhook is answered 200, and its message arrives."""
    statuses = Counter[int]()
    names = list[str]()
    is_over = threading.Event()

    def send(sender: int) -> None:
        with httpx.Client(trust_env=False, timeout=30) as client:
            number = 0
            while not is_over.is_set():
                name = f"load-{sender}-{number}"
                statuses[post(client, public, name)] += 1
                names.append(name)
                number += 1
                time.sleep(0.05)

    senders = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(4)]
    for each in senders:
        each.start()
    try:
        for name in ("web-a", "web-b", "internal", "worker"):
            stack.replace(name)
    finally:
        is_over.set()
        for each in senders:
            each.join(SECONDS)
    assert statuses.keys() == {200}, statuses
    assert len(names) > 100
    until(lambda: consumer.taken().keys() >= set(names))
