"""The Kafka destination: the content of a record, and the reaction to each failure of a broker."""

import asyncio
import json
import logging
import ssl
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support.certificates import make_certificate
from support.kinds_base import make_event, open_url, until
from support.kinds_kafka_sqs import TOPIC, decode
from support.servers_kafka_sqs import INIT_PRODUCER_ID, PRODUCE, Kafka, Record

from receiver.destinations import Destination
from receiver.destinations import kafka as kafka_module
from receiver.destinations.base import encode
from receiver.destinations.kafka import BATCH_BYTES, KafkaDestination
from receiver.errors import PublishFailed, PublishRejected, SettingsError

CANARY = "s3cr3t-canary"
LARGE = {"fill": "x" * BATCH_BYTES}

CORRUPT_MESSAGE = 2
UNKNOWN_TOPIC = 3
NOT_LEADER = 6
REQUEST_TIMED_OUT = 7
MESSAGE_TOO_LARGE = 10
COORDINATOR_NOT_AVAILABLE = 15
NOT_ENOUGH_REPLICAS = 19
TOPIC_AUTHORIZATION_FAILED = 29
CLUSTER_AUTHORIZATION_FAILED = 31
OUT_OF_ORDER_SEQUENCE = 45
INVALID_PRODUCER_EPOCH = 47
SASL_AUTHENTICATION_FAILED = 58
UNKNOWN_PRODUCER_ID = 59
SHORT_DEADLINES = {"base.TIMEOUT_SECONDS": 1.5, "kafka.START_SECONDS": 1.0, "kafka.REQUEST_SECONDS": 0.5}


@pytest.fixture
async def kafka() -> AsyncIterator[Kafka]:
    """A cluster with a topic of one partition."""
    with await asyncio.to_thread(Kafka) as running:
        running.create_topic(TOPIC)
        yield running


@pytest.fixture
async def destination(kafka: Kafka) -> AsyncIterator[Destination]:
    """A started destination."""
    opened = open_url(f"kafka://{kafka.address}/{TOPIC}")
    await opened.start()
    yield opened
    await opened.close()


async def read(kafka: Kafka, topic: str = TOPIC) -> list[Record]:
    """Read a topic."""
    return await asyncio.to_thread(kafka.read, topic)


async def ids_received(kafka: Kafka) -> list[str]:
    """Return the delivery ids that have arrived, in order."""
    return [record.headers["ce_deliveryid"].decode() for record in await read(kafka)]


async def publish_all(destination: Destination, count: int, **data: object) -> list[BaseException | None]:
    """Publish at once and return each outcome."""
    events = [make_event(data) for _ in range(count)]
    return await asyncio.gather(*(destination.publish(event) for event in events), return_exceptions=True)


async def failure(destination: Destination) -> PublishFailed:
    """Publish and return the failure."""
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event())
    return caught.value


def open_transports(destination: Destination) -> list[asyncio.WriteTransport]:
    """Return the transports of the destination's connections."""
    assert isinstance(destination, KafkaDestination)
    producer = destination._connections._current
    assert producer is not None
    writers = [connection._writer for connection in producer._producer.client._conns.values()]
    return [writer.transport for writer in writers if writer is not None]


def unread_bytes(transports: list[asyncio.WriteTransport]) -> int:
    """Return the number of bytes that have not left this process."""
    return sum(transport.get_write_buffer_size() for transport in transports)


async def test_record(kafka: Kafka, destination: Destination) -> None:
    """E3: a record is a CloudEvent in binary mode with the request's id as its key."""
    event = make_event({"text": "Zürich"}, subject="request-1", replayid="replay-1")
    await destination.publish(event)
    (record,) = await read(kafka)
    assert record.key == b"request-1"
    assert record.headers["content-type"] == b"application/json"
    assert record.headers["ce_specversion"] == b"1.0"
    assert json.loads(record.value) == {"text": "Zürich"}
    assert decode(record) == json.loads(encode(event))


async def test_event_without_subject_has_no_key(kafka: Kafka, destination: Destination) -> None:
    """E3: an event without a subject goes to any partition."""
    event = make_event()
    del event.get_attributes()["subject"]
    await destination.publish(event)
    (record,) = await read(kafka)
    assert record.key is None


async def test_events_of_a_request_share_a_partition(kafka: Kafka) -> None:
    """E3: the key chooses the partition, and all partitions are used."""
    kafka.create_topic("wide", partitions=3)
    destination = open_url(f"kafka://{kafka.address}/wide")
    subjects = [f"request-{number % 20}" for number in range(60)]
    await asyncio.gather(*(destination.publish(make_event(subject=subject)) for subject in subjects))
    await destination.close()
    records = await read(kafka, "wide")
    assert len(records) == 60
    assert {record.partition for record in records} == {0, 1, 2}
    assert len({(record.key, record.partition) for record in records}) == 20


async def test_publishes_share_requests(kafka: Kafka, destination: Destination) -> None:
    """E1: publishes that wait at once share a request."""
    assert await publish_all(destination, 64) == [None] * 64
    assert kafka.count_requests(PRODUCE) <= 8


async def test_record_that_is_too_large(kafka: Kafka, destination: Destination) -> None:
    """E7: a record above the topic's limit is rejected; the others arrive."""
    kafka.fail_requests(PRODUCE, MESSAGE_TOO_LARGE, OUT_OF_ORDER_SEQUENCE)
    outcomes = await asyncio.gather(
        destination.publish(make_event(LARGE)), publish_all(destination, 20), return_exceptions=True
    )
    assert isinstance(outcomes[0], PublishRejected)
    assert outcomes[0].reason == "too_large"
    assert "max.message.bytes" in str(outcomes[0])
    assert outcomes[1] == [None] * 20
    assert len(set(await ids_received(kafka))) == len(await read(kafka)) == 20


async def test_small_record_is_not_blamed_for_its_batch(kafka: Kafka, destination: Destination) -> None:
    """E7: if the topic's limit is below a batch, it is unknown which record is too large: all may retry."""
    kafka.fail_requests(PRODUCE, MESSAGE_TOO_LARGE)
    error = await failure(destination)
    assert (error.reason, "max.message.bytes" in str(error)) == ("too_large", True)
    await destination.publish(make_event())


@pytest.mark.usefixtures("impatient")
async def test_unknown_topic(kafka: Kafka) -> None:
    """E1: without its topic no event is delivered, and the message says to create it; then it works."""
    kafka.fail_topic("later", UNKNOWN_TOPIC)
    destination = open_url(f"kafka://{kafka.address}/later")
    with capture_logs() as logs:
        await destination.start()
    assert [(entry["log_level"], entry["destination"]) for entry in logs] == [("warning", "test")]
    error = await failure(destination)
    assert (error.reason, "create it" in str(error)) == ("no_topic", True)
    with pytest.raises(PublishFailed, match="create it"):
        await destination.check()
    kafka.fail_topic("later", 0)
    await destination.publish(make_event())
    await destination.check()
    await destination.close()
    assert len(await read(kafka, "later")) == 1


@pytest.mark.usefixtures("impatient")
async def test_topic_that_vanishes(kafka: Kafka, destination: Destination) -> None:
    """E1: the check does not rely on cached metadata."""
    await destination.publish(make_event())
    kafka.fail_topic(TOPIC, UNKNOWN_TOPIC)
    with pytest.raises(PublishFailed) as caught:
        await destination.check()
    assert caught.value.reason == "no_topic"


@pytest.mark.usefixtures("impatient")
async def test_missing_permissions(kafka: Kafka, destination: Destination) -> None:
    """E1: a missing permission is named, and granting it is enough."""
    kafka.fail_requests(PRODUCE, TOPIC_AUTHORIZATION_FAILED)
    error = await failure(destination)
    assert (error.reason, "Write" in str(error)) == ("permission", True)
    kafka.fail_topic(TOPIC, TOPIC_AUTHORIZATION_FAILED)
    error = await failure(destination)
    assert (error.reason, "Describe" in str(error)) == ("permission", True)
    kafka.fail_topic(TOPIC, 0)
    kafka.fail_requests(INIT_PRODUCER_ID, CLUSTER_AUTHORIZATION_FAILED)
    error = await failure(destination)
    assert (error.reason, "IdempotentWrite" in str(error)) == ("permission", True)
    await destination.publish(make_event())


async def test_leader_change(kafka: Kafka, destination: Destination) -> None:
    """E4: while the leader changes again and again, every event arrives exactly once."""
    events = [make_event() for _ in range(60)]
    tasks = []
    for number, event in enumerate(events):
        if number % 20 == 10:
            kafka.set_leader(TOPIC, 0, number // 20 + 1)
        tasks.append(asyncio.create_task(destination.publish(event)))
        await asyncio.sleep(0)
    assert await asyncio.gather(*tasks) == [None] * 60
    assert sorted(await ids_received(kafka)) == sorted(event.get_extension("deliveryid") for event in events)
    assert kafka.count_requests(INIT_PRODUCER_ID) == 1


@pytest.mark.usefixtures("impatient")
async def test_partition_without_leader(kafka: Kafka, destination: Destination) -> None:
    """E4: without a leader publish and check fail in time; with one the same destination works."""
    await destination.publish(make_event())
    kafka.set_leader(TOPIC, 0, None)
    assert (await failure(destination)).reason == "no_leader"
    with pytest.raises(PublishFailed) as caught:
        await destination.check()
    assert caught.value.reason == "no_leader"
    kafka.set_leader(TOPIC, 0, 2)
    await destination.publish(make_event())
    await destination.check()


async def test_passing_trouble_is_waited_out(kafka: Kafka, destination: Destination) -> None:
    """E4: errors that Kafka declares retriable are retried at once, and the event arrives once."""
    kafka.fail_requests(PRODUCE, NOT_ENOUGH_REPLICAS, REQUEST_TIMED_OUT, NOT_LEADER)
    await destination.publish(make_event())
    assert len(await read(kafka)) == 1


@pytest.mark.parametrize("error", [OUT_OF_ORDER_SEQUENCE, UNKNOWN_PRODUCER_ID, INVALID_PRODUCER_EPOCH])
async def test_producer_out_of_step_is_replaced(kafka: Kafka, destination: Destination, error: int) -> None:
    """E7: if broker and producer disagree about the sequence number, a new producer sends the event again."""
    await destination.publish(make_event())
    kafka.fail_requests(PRODUCE, error)
    assert await publish_all(destination, 10) == [None] * 10
    assert len(set(await ids_received(kafka))) == len(await read(kafka)) == 11
    assert kafka.count_requests(INIT_PRODUCER_ID) == 2


async def test_producer_that_stays_out_of_step(kafka: Kafka, destination: Destination) -> None:
    """E7: the event is not sent again without end."""
    kafka.fail_requests(PRODUCE, OUT_OF_ORDER_SEQUENCE, OUT_OF_ORDER_SEQUENCE)
    assert (await failure(destination)).reason == "out_of_step"
    await destination.publish(make_event())
    assert len(await read(kafka)) == 1


async def test_failed_batch_ends_its_producer(kafka: Kafka, destination: Destination) -> None:
    """E7: a rejected batch leaves a gap in the sequence numbers, so the next event uses a new producer."""
    await destination.publish(make_event())
    kafka.fail_requests(PRODUCE, CORRUPT_MESSAGE)
    await failure(destination)
    assert kafka.count_requests(INIT_PRODUCER_ID) == 1
    await destination.publish(make_event())
    assert kafka.count_requests(INIT_PRODUCER_ID) == 2
    assert len(await read(kafka)) == 2


@pytest.mark.usefixtures("impatient")
async def test_frozen_brokers(kafka: Kafka, destination: Destination) -> None:
    """E4: if every broker hangs each publish fails in time; confirmed events are there afterwards."""
    first, last = make_event(), make_event()
    await destination.publish(first)
    kafka.freeze()
    began = time.monotonic()
    outcomes = await publish_all(destination, 30)
    outcomes += await publish_all(destination, 30)
    assert time.monotonic() - began < 4
    assert {type(outcome) for outcome in outcomes} == {PublishFailed}
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, PublishFailed)} == {"timeout"}
    kafka.thaw()
    await destination.publish(last)
    confirmed = {first.get_extension("deliveryid"), last.get_extension("deliveryid")}
    assert confirmed <= set(await ids_received(kafka))


@pytest.mark.usefixtures("impatient")
async def test_start_and_close_at_frozen_brokers(kafka: Kafka) -> None:
    """E16: starting and closing are bounded, and leave no task and no socket."""
    kafka.freeze()
    began = time.monotonic()
    destination = open_url(f"kafka://{kafka.address}/{TOPIC}")
    await destination.start()
    publish = asyncio.create_task(destination.publish(make_event({"fill": "x" * 8 * 1024 * 1024})))
    await asyncio.sleep(0)
    await destination.close()
    assert time.monotonic() - began < 4
    with pytest.raises(PublishFailed):
        await publish
    assert asyncio.all_tasks() == {asyncio.current_task()}
    kafka.thaw()


async def test_close_while_connecting(kafka: Kafka) -> None:
    """E16: if all publishes that wait for a connection are cancelled, it ends with the destination."""
    kafka.freeze()
    destination = open_url(f"kafka://{kafka.address}/{TOPIC}")
    assert isinstance(destination, KafkaDestination)
    publish = asyncio.create_task(destination.publish(make_event()))
    await until(lambda: destination._connections._opening is not None)
    publish.cancel()
    began = time.monotonic()
    await asyncio.wait([publish])
    await destination.close()
    assert time.monotonic() - began < 3
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.usefixtures("impatient")
async def test_close_cuts_a_frozen_broker_off(
    kafka: Kafka, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E16: closing does not wait until a hanging broker has read all bytes."""
    monkeypatch.setattr(kafka_module, "CLOSE_SECONDS", 20.0)
    await destination.publish(make_event())
    kafka.freeze()
    publish = asyncio.create_task(destination.publish(make_event({"fill": "x" * 16 * 1024 * 1024})))
    began = time.monotonic()
    await until(lambda: unread_bytes(open_transports(destination)) > 0)
    transports = open_transports(destination)
    publish.cancel()
    await destination.close()
    assert time.monotonic() - began < 8
    assert unread_bytes(transports) == 0
    assert asyncio.all_tasks() == {asyncio.current_task()}
    kafka.thaw()


@pytest.mark.usefixtures("impatient")
async def test_failed_events_are_not_sent_later(kafka: Kafka, destination: Destination) -> None:
    """E4: an event that failed while the brokers were down is not sent once they are up again."""
    first, last = make_event(), make_event()
    await destination.publish(first)
    kafka.stop_brokers()
    assert {type(outcome) for outcome in await publish_all(destination, 5)} == {PublishFailed}
    kafka.start_brokers()
    await destination.publish(last)
    await destination.close()
    assert await ids_received(kafka) == [
        first.get_extension("deliveryid"),
        last.get_extension("deliveryid"),
    ]


@pytest.mark.usefixtures("impatient")
async def test_cluster_that_moved(kafka: Kafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: if brokers restart at other addresses, they are found through those in the URL."""
    with await asyncio.to_thread(Kafka) as other:
        other.create_topic(TOPIC)
        address = {"now": kafka.address}
        destination = open_url(f"kafka://localhost:1/{TOPIC}")

        async def find_broker(_place: object) -> str:
            return address["now"]

        monkeypatch.setattr(kafka_module, "_find_broker", find_broker)
        await destination.publish(make_event())
        kafka.stop()
        address["now"] = other.address
        await failure(destination)
        await destination.publish(make_event())
        assert len(await read(other)) == 1
        await destination.close()


async def test_cancelled_publishes_do_not_break_the_count(kafka: Kafka, destination: Destination) -> None:
    """E16: if publishes are cancelled at any moment, the others go on through the same producer."""
    kept: list[asyncio.Task[None]] = []
    for pauses in range(40):
        tasks = [
            asyncio.create_task(destination.publish(make_event({"fill": "x" * 20_000}))) for _ in range(4)
        ]
        for _ in range(pauses % 10):
            await asyncio.sleep(0)
        tasks[pauses % 4].cancel()
        kept += [task for number, task in enumerate(tasks) if number != pauses % 4]
    assert await asyncio.gather(*kept) == [None] * 120
    assert kafka.count_requests(INIT_PRODUCER_ID) == 1
    assert len(set(await ids_received(kafka))) == len(await read(kafka)) >= 120


@pytest.mark.usefixtures("impatient")
async def test_one_attempt_to_connect_at_a_time() -> None:
    """E5: many publishes at a broker that hangs share one connection."""
    connections = 0

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.read()
        writer.close()

    async with await asyncio.start_server(hang, "127.0.0.1", 0) as server:
        destination = open_url(f"kafka://127.0.0.1:{server.sockets[0].getsockname()[1]}/{TOPIC}")
        outcomes = await publish_all(destination, 50)
        await destination.close()
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, PublishFailed)} == {"timeout"}
    assert (connections, len(outcomes)) == (1, 50)


async def test_any_broker_of_the_url_will_do(kafka: Kafka) -> None:
    """E4: brokers of the URL may be down as long as one answers."""
    destination = open_url(f"kafka://127.0.0.1:1,{kafka.address.split(',')[0]},127.0.0.1:2/{TOPIC}")
    await destination.publish(make_event())
    await destination.close()
    assert len(await read(kafka)) == 1


@pytest.mark.usefixtures("impatient")
async def test_cluster_that_is_not_ready(kafka: Kafka) -> None:
    """E4: if a cluster answers but assigns no producer id, the start ends after its timeout."""
    destination = open_url(f"kafka://{kafka.address}/{TOPIC}")
    kafka.fail_requests(INIT_PRODUCER_ID, *[COORDINATOR_NOT_AVAILABLE] * 50)
    error = await failure(destination)
    assert (error.reason, "advertised.listeners" in str(error)) == ("timeout", True)
    kafka.fail_requests(INIT_PRODUCER_ID)
    await destination.close()


async def test_server_that_is_no_broker() -> None:
    """G8: a server that is not a broker is reported as such."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        destination = open_url(f"kafka://127.0.0.1:{server.sockets[0].getsockname()[1]}/{TOPIC}")
        assert (await failure(destination)).reason == "connection"
        await destination.close()


async def test_one_replica_is_warned_of(kafka: Kafka) -> None:
    """E2: if a topic has only one replica the check warns."""
    kafka.create_topic("lonely", replicas=1)
    warnings = {}
    for topic in (TOPIC, "lonely"):
        destination = open_url(f"kafka://{kafka.address}/{topic}")
        with capture_logs() as logs:
            await destination.check()
        await destination.close()
        warnings[topic] = [entry["problem"] for entry in logs if entry["log_level"] == "warning"]
    assert warnings[TOPIC] == []
    assert "one replica" in warnings["lonely"][0]


class SaslBroker:
    """The part of a broker that a login needs; it rejects every password."""

    def __init__(self) -> None:
        self.mechanisms: list[bytes] = []
        self.logins: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer ApiVersions, SaslHandshake and SaslAuthenticate."""
        while head := await reader.read(4):
            (size,) = struct.unpack(">i", head)
            request = await reader.readexactly(size)
            api, _, number, length = struct.unpack_from(">hhih", request)
            answer = struct.pack(">i", number) + self._answer(api, request[10 + max(length, 0) :])
            writer.write(struct.pack(">i", len(answer)) + answer)
        writer.close()

    def _answer(self, api: int, body: bytes) -> bytes:
        if api == 18:
            versions = ((17, 0, 1), (18, 0, 0), (36, 0, 0))
            return struct.pack(">hi", 0, len(versions)) + b"".join(struct.pack(">hhh", *v) for v in versions)
        if api == 17:
            self.mechanisms.append(body[2:])
            names = b"".join(struct.pack(">h", len(name)) + name for name in (b"PLAIN", b"SCRAM-SHA-512"))
            return struct.pack(">hi", 0, 2) + names
        self.logins.append(body[4:])
        return struct.pack(">hh", SASL_AUTHENTICATION_FAILED, 5) + b"wrong" + struct.pack(">i", 0)


async def test_rejected_login(caplog: pytest.LogCaptureFixture) -> None:
    """G8: a rejected login is reported; the password is in no message and no log, at any level."""
    caplog.set_level(logging.DEBUG)
    broker = SaslBroker()
    async with await asyncio.start_server(broker.serve, "127.0.0.1", 0) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        destination = open_url(f"kafka://us%3Aer:{CANARY}%40@{host}/{TOPIC}?security=sasl_plain")
        assert isinstance(destination, KafkaDestination)
        with capture_logs() as logs:
            await destination.start()
            error = await failure(destination)
        assert error.reason == "auth"
        assert broker.mechanisms[-1] == b"PLAIN"
        assert broker.logins[-1] == f"us:er\0us:er\0{CANARY}@".encode()
        shown = f"{error} {error!r} {error.__cause__!r} {logs} {caplog.text} {vars(destination)}"
        assert CANARY not in shown
        await destination.close()


@pytest.mark.parametrize(("mechanism", "said"), [("scram-sha-512", b"SCRAM-SHA-512"), ("plain", b"PLAIN")])
async def test_mechanism(mechanism: str, said: bytes) -> None:
    """E14: the login uses the mechanism that the URL names."""
    broker = SaslBroker()
    async with await asyncio.start_server(broker.serve, "127.0.0.1", 0) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        destination = open_url(f"kafka://u:p@{host}/{TOPIC}?security=sasl_plain&mechanism={mechanism}")
        assert (await failure(destination)).reason == "auth"
        await destination.close()
    assert broker.mechanisms == [said]


@pytest.mark.parametrize("trusted", [True, False])
async def test_certificates_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, trusted: bool
) -> None:
    """E14: with security=sasl_ssl a server gets no login if its certificate is not trusted."""
    certificate = make_certificate(tmp_path / "server.pem")
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    broker = SaslBroker()
    async with await asyncio.start_server(broker.serve, "127.0.0.1", 0, ssl=context) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        destination = open_url(f"kafka://u:p@{host}/{TOPIC}?security=sasl_ssl")
        error = await failure(destination)
        await destination.close()
    assert (error.reason, len(broker.logins)) == (("auth", 1) if trusted else ("connection", 0))
    assert trusted or "certificate" in str(error)


@pytest.mark.parametrize(
    "url",
    [
        "kafka://host/events",
        "kafka://host:9092,other:9093/events",
        "kafka://[::1]:9092,host/Events_1.2-3",
        "kafka://host/events?security=ssl",
        f"kafka://user:{CANARY}@host/events?security=sasl_plain",
        f"kafka://user:{CANARY}@host,other:1/events?security=sasl_ssl&mechanism=scram-sha-256",
    ],
)
async def test_usable_url(url: str) -> None:
    """G8: a URL that may work is accepted, and its shown form holds no password."""
    destination = open_url(url)
    assert isinstance(destination, KafkaDestination)
    assert CANARY not in f"{vars(destination)} {destination!r}"
    await destination.close()


@pytest.mark.parametrize(
    "url",
    [
        "kafka:",
        "kafka:///events",
        "kafka://host",
        "kafka://host/",
        "kafka://host/a/b",
        "kafka://host/..",
        "kafka://host/ev%20ents",
        f"kafka://host/{'x' * 250}",
        "kafka://host,/events",
        "kafka://ho st/events",
        "kafka://host:0/events",
        "kafka://host:65536/events",
        "kafka://host..example/events",
        "kafka://[::1/events",
        f"kafka://host:{CANARY}/events",
        f"kafka://host/events#{CANARY}",
        f"kafka://user:{CANARY}@host/events",
        f"kafka://user:{CANARY}@host/events?security=ssl",
        f"kafka://user@host/events?security=sasl_ssl&password={CANARY}",
        "kafka://user@host/events?security=sasl_ssl",
        f"kafka://:{CANARY}@host/events?security=sasl_ssl",
        "kafka://host/events?security=sasl_ssl",
        "kafka://host/events?security=tls",
        "kafka://host/events?security=",
        "kafka://host/events?security=ssl&security=ssl",
        "kafka://host/events?security",
        "kafka://host/events?mechanism=plain",
        f"kafka://user:{CANARY}@host/events?security=sasl_ssl&mechanism=gssapi",
        f"kafka://host/events?acks={CANARY}",
    ],
)
def test_unusable_url(url: str) -> None:
    """G8: an invalid URL is rejected with a valid example, and is not quoted."""
    with pytest.raises(SettingsError) as caught:
        open_url(url)
    assert "'test'" in str(caught.value)
    assert "write kafka://" in str(caught.value)
    assert CANARY not in str(caught.value)


async def test_text_that_is_no_unicode_is_rejected(destination: Destination) -> None:
    """E7: an attribute that no header can hold is rejected."""
    with pytest.raises(PublishRejected) as caught:
        await destination.publish(make_event(subject="\ud800"))
    assert caught.value.reason == "encoding"
