"""Settings that every kind of destination supports: the timeout, and TLS with a certificate."""

import asyncio
import fcntl
import ssl
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import pytest
from support.certificates import make_certificate
from support.kinds_base import HttpSink, make_event, open_url
from support.kinds_kafka_sqs import aws_environment, shared_sqs
from support.kinds_rabbitmq import rabbitmq_server
from support.servers import Switch
from support.servers_kafka_sqs import Kafka
from support.servers_redis_nats import Nats, Redis

from receiver.destinations import Destination
from receiver.destinations import kafka as kafka_module
from receiver.errors import PublishFailed

SILENT = {
    "http": "http://127.0.0.1:{port}/events",
    "amqp": "amqp://127.0.0.1:{port}/?queue=events",
    "redis": "redis://127.0.0.1:{port}/0?stream=events",
    "nats": "nats://127.0.0.1:{port}?subject=events",
    "kafka": "kafka://127.0.0.1:{port}/events",
    "sqs": "sqs://sqs.eu-west-1.amazonaws.com/123456789012/events?endpoint=http://127.0.0.1:{port}",
}


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give AWS clients credentials."""
    for name, value in aws_environment().items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("kind", SILENT)
async def test_timeout(kind: str) -> None:
    """E4: for every kind, an attempt at a server that never answers ends after the destination's timeout."""
    held: list[asyncio.StreamWriter] = []

    async def keep(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    async with await asyncio.start_server(keep, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        destination = open_url(SILENT[kind].format(port=port), timeout=0.3)
        with pytest.raises(PublishFailed) as caught:
            async with asyncio.timeout(3.5):
                await destination.publish(make_event())
        for writer in held:
            writer.transport.abort()
        await destination.close()
    assert caught.value.reason == "timeout"


async def test_timeout_of_a_file(tmp_path: Path) -> None:
    """E4: if another process holds the file's lock, an attempt fails after the destination's own timeout."""
    path = tmp_path / "events.jsonl"
    destination = open_url(f"file:{path}", timeout=0.1)
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(PublishFailed):
            async with asyncio.timeout(5):
                await destination.publish(make_event())
    await destination.close()


class Fronts:
    """A server of each kind behind TLS that requires a client certificate."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.server = make_certificate(folder / "server.pem")
        self.client = make_certificate(folder / "client.pem")
        self._stack = stack
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.client)
        self._context.load_cert_chain(self.server)
        self._context.verify_mode = ssl.CERT_REQUIRED

    def url(self, kind: str) -> str:
        """Start the server, if it is not running, and return its URL."""
        return {"amqps": self._amqps, "rediss": self._rediss, "tls": self._tls, "sqs": self._sqs}[kind]()

    def before(self, port: int) -> int:
        """Return the port of the server behind TLS."""
        return self._stack.enter_context(Switch(port, tls=self._context)).port

    def _amqps(self) -> str:
        server = rabbitmq_server()
        return server.url(f"?queue={uuid4()}", port=self.before(server.port)).replace("amqp:", "amqps:")

    def _rediss(self) -> str:
        port = self._stack.enter_context(Redis()).port
        return f"rediss://127.0.0.1:{self.before(port)}/0?stream=events"

    def _tls(self) -> str:
        files = f'cert_file: "{self.server}", key_file: "{self.server}", ca_file: "{self.client}"'
        server = self._stack.enter_context(Nats(f"tls {{ {files}, verify: true }}"))
        return server.url("subject=events&stream=EVENTS").replace("nats:", "tls:")

    def _sqs(self) -> str:
        server, queue = shared_sqs(), f"events-{uuid4()}"
        server.create_queue(queue)
        port = self.before(int(server.address.rpartition(":")[2]))
        return server.url(queue).partition("?")[0] + f"?endpoint=https://127.0.0.1:{port}"


@pytest.fixture
def fronts(tmp_path: Path) -> Iterator[Fronts]:
    """Servers behind TLS."""
    with ExitStack() as stack:
        yield Fronts(tmp_path, stack)


async def outcome(destination: Destination) -> str:
    """Publish an event and return "delivered" or the text of the failure."""
    try:
        await destination.publish(make_event())
    except PublishFailed as failure:
        return str(failure)
    finally:
        await destination.close()
    return "delivered"


@pytest.mark.parametrize("kind", ["amqps", "rediss", "tls", "sqs"])
async def test_tls_of_one_s_own(fronts: Fronts, kind: str) -> None:
    """E14: an event gets through with a private authority and a client certificate, but not with only one."""
    url, ca, certificate = fronts.url(kind), str(fronts.server), str(fronts.client)
    assert await outcome(open_url(url, tls={"ca": ca, "certificate": certificate})) == "delivered"
    assert await outcome(open_url(url, tls={"ca": ca})) != "delivered"
    assert await outcome(open_url(url, tls={"certificate": certificate})) != "delivered"


async def test_tls_over_http(tmp_path: Path) -> None:
    """E14: over HTTPS, too, an event needs both a private authority and a client certificate."""
    server, client = make_certificate(tmp_path / "server.pem"), make_certificate(tmp_path / "client.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client)
    context.load_cert_chain(server)
    context.verify_mode = ssl.CERT_REQUIRED
    ca, certificate = str(server), str(client)
    sink = await HttpSink().start(ssl=context)
    assert await outcome(open_url(sink.url, tls={"ca": ca, "certificate": certificate})) == "delivered"
    assert await outcome(open_url(sink.url, tls={"ca": ca})) != "delivered"
    assert "not trusted" in await outcome(open_url(sink.url, tls={"certificate": certificate}))
    await sink.stop()


async def test_tls_of_kafka(fronts: Fronts, monkeypatch: pytest.MonkeyPatch) -> None:
    """E14: a broker behind TLS answers clients that trust it and have a certificate, and no others.

    The brokers of the mock cluster advertise addresses without TLS, so the test ends before an event.
    """
    monkeypatch.setattr(kafka_module, "START_SECONDS", 0.5)
    with Kafka() as cluster:
        port = fronts.before(int(cluster.address.partition(",")[0].rpartition(":")[2]))
        url, ca, certificate = f"kafka://127.0.0.1:{port}/events?security=ssl", fronts.server, fronts.client
        answers = "answers, but the producer cannot start"
        assert answers in await outcome(open_url(url, tls={"ca": str(ca), "certificate": str(certificate)}))
        for tls in ({"ca": str(ca)}, {"certificate": str(certificate)}):
            assert answers not in await outcome(open_url(url, tls=tls))


@pytest.mark.parametrize("asked", ["by the scheme", "by the table"])
async def test_tls_is_not_dropped(tmp_path: Path, asked: str) -> None:
    """G8: a NATS server that offers no TLS gets no password if the URL or `tls` asks for TLS."""
    heard = bytearray()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id": "x", "max_payload": 1048576, "auth_required": true}\r\n')
        heard.extend(await reader.read(1000))
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        place = f"user:s3cr3t@127.0.0.1:{server.sockets[0].getsockname()[1]}?subject=events"
        certificate = make_certificate(tmp_path / "ca.pem")
        destination = (
            open_url(f"tls://{place}")
            if asked == "by the scheme"
            else open_url(f"nats://{place}", tls={"ca": str(certificate)})
        )
        failure = await outcome(destination)
    assert "does not offer TLS" in failure
    assert not heard


async def test_tls_is_used_if_it_is_offered(tmp_path: Path) -> None:
    """G8: if the URL says `tls:`, TLS is used even with a NATS server that also takes clients without it."""
    certificate = make_certificate(tmp_path / "server.pem")
    tls = f'tls {{ cert_file: "{certificate}", key_file: "{certificate}" }}\nallow_non_tls: true'
    with Nats(tls) as server:
        url = server.url("subject=events&stream=EVENTS").replace("nats:", "tls:")
        assert await outcome(open_url(url, tls={"ca": str(certificate)})) == "delivered"
        assert "not trusted" in await outcome(open_url(url))
