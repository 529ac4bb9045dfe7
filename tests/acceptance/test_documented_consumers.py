"""The consumers of docs/destinations.md, run as printed except for hosts, ports and names."""

import asyncio
import base64
import contextlib
import fcntl
import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

import httpx
import nats
import pytest
import redis
from cloudevents.core.v1.event import CloudEvent
from nats.js.api import ConsumerConfig
from standardwebhooks import Webhook
from support.commands import command_environment
from support.kinds_base import FileKind, make_event, open_url
from support.kinds_kafka_sqs import TOPIC, KafkaKind, SqsKind, aws_environment
from support.kinds_rabbitmq import RabbitmqKind
from support.kinds_redis_nats import NATS_STREAM, STREAM, SUBJECT, NatsKind, RedisKind
from support.servers import end, free_port, missing, wait_for_port
from support.servers_kafka_sqs import ACCOUNT, REGION

from receiver.destinations import Destination
from receiver.destinations.base import encode
from receiver.errors import PublishFailed

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "destinations.md"
SECONDS: Final = 30.0
AMQPLIB: Final = "amqplib@2.3.1"
SECRET: Final = "whsec_" + base64.b64encode(b"s" * 32).decode()
OTHER_SECRET: Final = "whsec_" + base64.b64encode(b"o" * 32).decode()
WRONG_SIGNATURE: Final = "v1," + base64.b64encode(b"w" * 32).decode()
FILE: Final = {"data/events.jsonl": "a/b/events.jsonl"}


def printed(heading: str, language: str) -> str:
    """Return the only code block of a language below a heading."""
    section = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(), re.DOTALL | re.MULTILINE
    )
    assert section is not None, heading
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section[1], re.DOTALL | re.MULTILINE)
    return str(block)


async def until(condition: Callable[[], bool], describe: Callable[[], object]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, describe()
        await asyncio.sleep(0.02)


class Consumer:
    """A documented consumer in a process of its own, and the log in its folder."""

    def __init__(
        self, folder: Path, heading: str, language: str, names: Mapping[str, str], **settings: str
    ) -> None:
        program = printed(heading, language)
        for name, actual in names.items():
            assert name in program, name
            program = program.replace(name, actual)
        self.folder = folder
        suffix = {"python": "py", "js": "mjs"}[language]
        (folder / f"consumer.{suffix}").write_text(program)
        interpreter = sys.executable if language == "python" else find("node")
        self.command = [interpreter, str(Path(__file__).with_name(f"consumer_run.{suffix}"))]
        self.command.append(str(folder / f"consumer.{suffix}"))
        self.environment = {
            name: value
            for name, value in command_environment(BILLING_WEBHOOK_SECRET=SECRET, **settings).items()
            if not name.startswith("COVERAGE_")
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=self.environment, stdout=log, stderr=log
            )

    async def killed(self) -> None:
        """Wait until it was killed because an event asked for it, and start it again."""
        process = self.process
        assert process is not None
        await until(lambda: process.poll() is not None, self.describe)
        assert process.returncode == -signal.SIGKILL, self.describe()
        self.start()

    def stop(self) -> None:
        """End it if it runs."""
        if self.process is not None:
            end(self.process)

    def waits_for_a_lock(self) -> bool:
        """Return whether it waits for a file lock."""
        assert self.process is not None
        waiting = re.findall(r"-> FLOCK +ADVISORY +\w+ +(\d+)", Path("/proc/locks").read_text())
        return str(self.process.pid) in waiting

    def noted(self, file: str) -> Counter[str]:
        """Return how often each id is in the file `offered` (looked up) or `calls` (of `handle`)."""
        path = self.folder / file
        return Counter(path.read_text().split() if path.exists() else [])

    def work(self) -> list[dict[str, Any]]:
        """Return the events whose work is committed."""
        if not self.noted("calls"):
            return []
        done = self.folder / "done"
        if done.exists():
            return [json.loads(path.read_text()) for path in done.iterdir() if path.suffix != ".new"]
        with contextlib.closing(sqlite3.connect(self.folder / "billing.db")) as database:
            return [json.loads(event) for (event,) in database.execute("SELECT event FROM work")]

    def describe(self) -> object:
        """Return the output and files that explain a failure."""
        return (self.noted("offered"), self.noted("calls"), (self.folder / "log").read_text())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class Publisher:
    """Publishes events like the pipeline, and counts how often the consumer must be offered each."""

    def __init__(self, destination: Destination, *, drops_retries: bool = False) -> None:
        self.destination = destination
        self.drops_retries = drops_retries
        self.expected: Counter[str] = Counter()

    async def publish(self, event: CloudEvent, **changes: Any) -> None:
        """Publish an event, with other attributes, until it is confirmed."""
        attributes = {**event.get_attributes(), **changes}
        self.expected[event.get_id()] += not (self.drops_retries and attributes["attempt"] > 1)
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                return await self.destination.publish(CloudEvent(attributes, event.get_data()))
            except PublishFailed:
                assert time.monotonic() < deadline
            attributes["attempt"] += 1
            await asyncio.sleep(0.1)


async def check(consumer: Consumer, publisher: Publisher, *, marks_position: bool = False) -> None:
    """Publish every event twice and as a replay, with a kill before one's commit and after another's."""
    plain = [make_event({"text": "Zürich 東京", "number": number}, subject="a b%") for number in range(3)]
    uncommitted, committed = (make_event({"die": f"{moment} the commit"}) for moment in ("before", "after"))
    events = [*plain, uncommitted, committed]
    ids = Counter(event.get_id() for event in events)
    consumer.start()
    for event in plain:
        await publisher.publish(event)
        await publisher.publish(event, attempt=2)
    await publish_and_be_killed(consumer, publisher, uncommitted)
    await until(lambda: len(consumer.work()) == len(events) - 1, consumer.describe)
    offered = total(consumer, plain)
    await publish_and_be_killed(consumer, publisher, committed)
    await until(lambda: len(consumer.work()) == len(events), consumer.describe)
    for event in events:
        await publisher.publish(event, deliveryid=str(uuid4()), replayid="replay-1")
    # Unacknowledged messages come again without a new publish ...
    publisher.expected[uncommitted.get_id()] += 1
    publisher.expected[committed.get_id()] += not marks_position
    await until(lambda: consumer.noted("offered") >= publisher.expected, consumer.describe)
    # ... and acknowledged ones do not; on a slow machine a replay may have come again.
    assert total(consumer, plain) < offered + 2 * len(plain), consumer.describe()
    assert consumer.noted("calls") == ids + Counter([uncommitted.get_id()]), consumer.describe()
    assert len(consumer.work()) == len(events)
    assert {event["id"]: comparable(event) for event in consumer.work()} == {
        event.get_id(): comparable(json.loads(encode(event))) for event in events
    }


async def publish_and_be_killed(consumer: Consumer, publisher: Publisher, event: CloudEvent) -> None:
    """Publish an event that kills the consumer, and start the consumer again."""
    publishing = asyncio.create_task(publisher.publish(event))
    await consumer.killed()
    await publishing


def total(consumer: Consumer, events: list[CloudEvent]) -> int:
    """Return how often the consumer was offered any of the events."""
    return sum(consumer.noted("offered")[event.get_id()] for event in events)


def comparable(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the input of `handle`, which is the same from every destination and at every attempt."""
    differing = {"specversion", "datacontenttype", "attempt"}
    return {name: value for name, value in event.items() if name not in differing}


def find(program: str) -> str:
    """Return the path of a Node.js program."""
    found = shutil.which(program)
    if found is None:
        missing(program, "apt-get install nodejs npm")
    return str(found)


@pytest.fixture(scope="session")
def amqplib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the only package that the examples for Node.js use."""
    folder = tmp_path_factory.mktemp("amqplib")
    options = ["--no-audit", "--no-fund", "--ignore-scripts", "--prefer-offline", "--fetch-retries=1"]
    command = [find("npm"), "install", "--prefix", str(folder), *options, AMQPLIB]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if result.returncode:
        missing(AMQPLIB, result.stderr)
    return folder / "node_modules"


@contextlib.asynccontextmanager
async def opened(destination: Destination) -> AsyncIterator[Destination]:
    """Start a destination and close it."""
    await destination.start()
    try:
        yield destination
    finally:
        await destination.close()


async def test_file(tmp_path: Path) -> None:
    """E1: the consumer of a file does each event's work once."""
    async with FileKind(tmp_path) as kind, opened(kind.open()) as destination:
        with Consumer(tmp_path, "file:", "python", FILE) as consumer:
            await check(consumer, Publisher(destination), marks_position=True)


async def test_file_that_is_rotated(tmp_path: Path) -> None:
    """E1: the consumer of a file continues at its position, also in a rotated file."""
    first, last_before, first_after, last = (make_event() for _ in range(4))
    async with FileKind(tmp_path) as kind, opened(kind.open()) as destination:
        with Consumer(tmp_path, "file:", "python", FILE) as consumer:

            async def offered(*events: CloudEvent) -> None:
                await until(lambda: len(consumer.work()) >= len(events), consumer.describe)
                assert consumer.noted("offered") == Counter(event.get_id() for event in events)

            await destination.publish(first)
            consumer.start()
            await offered(first)
            consumer.stop()
            await destination.publish(last_before)
            kind.path.rename(f"{kind.path}.1")
            await destination.publish(first_after)
            consumer.start()
            await offered(first, last_before, first_after)
            kind.path.with_name("events.jsonl.1").rename(f"{kind.path}.2")
            kind.path.rename(f"{kind.path}.1")
            await destination.publish(last)
            await offered(first, last_before, first_after, last)


async def test_file_with_lines_that_do_not_count(tmp_path: Path) -> None:
    """E1: the consumer of a file takes whole, confirmed events, and skips none that follow others."""
    first, second, third = (make_event() for _ in range(3))
    async with FileKind(tmp_path) as kind, opened(kind.open()) as destination:
        with Consumer(tmp_path, "file:", "python", FILE) as consumer:
            await destination.publish(first)
            with kind.path.open("ab") as file:
                file.write(b'\0\0\0"}\n{"id": "torn"}')
            consumer.start()
            await until(lambda: bool(consumer.noted("offered")), consumer.describe)
            await destination.publish(second)
            await until(lambda: len(consumer.noted("offered")) == 2, consumer.describe)
            with kind.path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                end_of_file = file.tell()
                file.write(b'{"id": "taken-back"}\n')
                file.flush()
                await until(consumer.waits_for_a_lock, consumer.describe)
                file.truncate(end_of_file)
            await destination.publish(third)
            ids = Counter(event.get_id() for event in (first, second, third))
            await until(lambda: consumer.noted("offered") >= ids, consumer.describe)
            assert consumer.noted("offered") == ids


@pytest.mark.parametrize("language", ["python", "js"])
async def test_http(tmp_path: Path, language: str) -> None:
    """E1: both consumers behind HTTP do each event's work once."""
    port = free_port()
    async with opened(open_url(f"http://127.0.0.1:{port}/clipia-events", secret=SECRET)) as destination:
        with Consumer(tmp_path, "http: and https:", language, {"8080": str(port)}) as consumer:
            await check(consumer, Publisher(destination))


@pytest.mark.parametrize("language", ["python", "js"])
async def test_http_with_requests_of_others(tmp_path: Path, language: str) -> None:
    """E1: both consumers behind HTTP reject unsigned requests, and survive a request that breaks off."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/clipia-events"
    body = encode(make_event())
    good = sign(body)
    with Consumer(tmp_path, "http: and https:", language, {"8080": str(port)}) as consumer:
        consumer.start()
        assert consumer.process is not None
        wait_for_port(port, consumer.process)
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(b"POST /clipia-events HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n{")
        async with httpx.AsyncClient() as client:
            for content, headers in [
                (body.replace(b"OK", b"KO"), good),
                (body, {}),
                (body, {name: value for name, value in good.items() if name != "webhook-timestamp"}),
                (body, {**good, "webhook-id": "other"}),
                (body, sign(body, seconds=-400)),
                (body, sign(body, seconds=400)),
                (body, sign(body, secret=OTHER_SECRET)),
            ]:
                response = await client.post(url, content=content, headers=headers)
                assert response.status_code == 401, headers
            assert not consumer.noted("offered")
            both = {**good, "webhook-signature": f"{WRONG_SIGNATURE} {good['webhook-signature']}"}
            assert (await client.post(url, content=body, headers=both)).status_code == 204
            assert len(consumer.work()) == 1
            assert (await client.options(url)).status_code < 500


def sign(body: bytes, *, secret: str = SECRET, seconds: float = 0) -> dict[str, str]:
    """Return the headers of a request that was signed that many seconds from now."""
    now = datetime.now(UTC) + timedelta(seconds=seconds)
    return {
        "webhook-id": "delivery",
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Webhook(secret).sign("delivery", now, body.decode()),
    }


async def test_rabbitmq(tmp_path: Path) -> None:
    """E1: the consumer of a RabbitMQ queue does each event's work once."""
    async with RabbitmqKind(tmp_path) as kind, opened(kind.open()) as destination:
        names = {"amqp://rabbitmq.internal/": kind.server.url(), "clipia-events": kind.queue}
        with Consumer(tmp_path, "amqp: and amqps:", "python", names) as consumer:
            await check(consumer, Publisher(destination))


async def test_rabbitmq_in_node(tmp_path: Path, amqplib: Path) -> None:
    """E1: the Node.js consumer of a RabbitMQ queue does each event's work once."""
    (tmp_path / "node_modules").symlink_to(amqplib)
    async with RabbitmqKind(tmp_path) as kind, opened(kind.open()) as destination:
        names = {"amqp://rabbitmq.internal": kind.server.url().rstrip("/"), "clipia-events": kind.queue}
        with Consumer(tmp_path, "amqp: and amqps:", "js", names) as consumer:
            await check(consumer, Publisher(destination))


async def test_redis(tmp_path: Path) -> None:
    """E1: the consumer of a Redis stream does each event's work once."""
    async with RedisKind(tmp_path) as kind, opened(kind.open()) as destination:
        names = {"redis.internal:6379": f"127.0.0.1:{kind.server.port}"}
        with Consumer(tmp_path, "redis: and rediss:", "python", names) as consumer:
            await check(consumer, Publisher(destination))


async def test_redis_that_trims(tmp_path: Path) -> None:
    """E1: if a message was trimmed before it was acknowledged, the consumer of a Redis stream continues."""
    async with RedisKind(tmp_path) as kind, opened(kind.open()) as destination:
        await destination.publish(make_event())
        with redis.Redis(port=kind.server.port) as client:
            client.xgroup_create(STREAM, "billing", id="0")
            assert client.xreadgroup("billing", "worker-1", {STREAM: ">"})
            client.xtrim(STREAM, maxlen=0)
        await destination.publish(make_event())
        names = {"redis.internal:6379": f"127.0.0.1:{kind.server.port}"}
        with Consumer(tmp_path, "redis: and rediss:", "python", names) as consumer:
            consumer.start()
            await until(lambda: len(consumer.work()) == 1, consumer.describe)


async def test_nats(tmp_path: Path) -> None:
    """E1: the consumer of a NATS stream does each event's work once."""
    async with NatsKind(tmp_path) as kind, opened(kind.open()) as destination:
        address = f"127.0.0.1:{kind.server.port}"
        client = await nats.connect(f"nats://{address}")
        # The consumer would make the same one, except for the time after which a message comes again.
        config = ConsumerConfig(durable_name="billing", filter_subject=SUBJECT, ack_wait=2)
        await client.jetstream().add_consumer(NATS_STREAM, config)
        await client.close()
        with Consumer(tmp_path, "nats: and tls:", "python", {"nats.internal:4222": address}) as consumer:
            await check(consumer, Publisher(destination, drops_retries=True))


async def test_kafka(tmp_path: Path) -> None:
    """E1: the consumer of a Kafka topic does each event's work once."""
    async with KafkaKind(tmp_path) as kind, opened(kind.open()) as destination:
        names = {"kafka.internal:9092": kind.kafka.address, "clipia-events": TOPIC}
        with Consumer(tmp_path, "kafka:", "python", names) as consumer:
            await check(consumer, Publisher(destination))


async def test_sqs(tmp_path: Path) -> None:
    """E1: the consumer of an SQS queue does each event's work once."""
    async with SqsKind(tmp_path) as kind, opened(kind.open()) as destination:
        queue = f"{kind.sqs.address}/{ACCOUNT}/{kind.queue}"
        await asyncio.to_thread(
            kind.sqs.client.set_queue_attributes, QueueUrl=queue, Attributes={"VisibilityTimeout": "2"}
        )
        names = {
            "https://sqs.eu-central-1.amazonaws.com/123456789012/clipia-events": queue,
            "eu-central-1": REGION,
        }
        settings = {**aws_environment(), "AWS_ENDPOINT_URL_SQS": kind.sqs.address}
        with Consumer(tmp_path, "sqs:", "python", names, **settings) as consumer:
            await check(consumer, Publisher(destination))
