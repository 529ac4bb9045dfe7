"""The NATS destination: the content of a message, the meaning of each error, and recovery."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import nats
import psutil
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType
from structlog.testing import capture_logs
from support.certificates import make_certificate
from support.kinds_base import make_event, open_url, outcome, verdict
from support.kinds_redis_nats import read_messages, read_nats
from support.servers import free_port
from support.servers_redis_nats import Nats

from receiver.destinations import Destination
from receiver.destinations import nats as nats_module
from receiver.destinations.jetstream import loss_warning
from receiver.destinations.nats import NatsDestination
from receiver.errors import PublishFailed, PublishRejected, SettingsError

CANARY = "s3cr3t-canary"
numbers = count()
SHORT_DEADLINES = {"base.TIMEOUT_SECONDS": 1.0, "nats.OPEN_SECONDS": 0.9, "nats.API_SECONDS": 0.3}


@pytest.fixture(scope="module")
def shared() -> Iterator[Nats]:
    """One server for the tests that do not stop or change it."""
    with Nats("max_payload: 400000") as server:
        yield server


@pytest.fixture
def server() -> Iterator[Nats]:
    """A server of the test's own."""
    with Nats() as running:
        yield running


@pytest.fixture
def name() -> str:
    """A name for a stream and its subject that no other test uses."""
    return f"events-{next(numbers)}"


@pytest.fixture
async def admin(shared: Nats) -> AsyncIterator[Client]:
    """An independent client of the shared server."""
    client = await nats.connect(f"nats://127.0.0.1:{shared.port}")
    yield client
    await client.close()


@pytest.fixture
async def destination(shared: Nats, name: str) -> AsyncIterator[Destination]:
    """A destination on the shared server that makes its stream."""
    opened = open_url(shared.url(f"subject={name}&stream={name}"))
    yield opened
    await opened.close()


async def until_outcome(destination: Destination, expected: str) -> None:
    """Publish events until one has this outcome: a server may hang up before its error has arrived."""
    deadline = time.monotonic() + 10
    while (found := await outcome(destination)) != expected:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.01)


def waiting(destination: Destination) -> int:
    """Count the messages that are sent and not acknowledged."""
    assert isinstance(destination, NatsDestination)
    return 0 if destination._connections._current is None else len(destination._connections._current._answers)


async def until_waiting(destination: Destination, number: int) -> None:
    """Wait until as many messages are sent and not acknowledged."""
    deadline = time.monotonic() + 10
    while waiting(destination) != number:
        assert time.monotonic() < deadline, waiting(destination)
        await asyncio.sleep(0.005)


def count_connections(server: Nats) -> int:
    """Count this process's connections to the server."""
    remote = [tuple(connection.raddr) for connection in psutil.Process().net_connections()]
    return remote.count(("127.0.0.1", server.port))


async def test_message(shared: Nats, destination: Destination, name: str) -> None:
    """E1: a message is a CloudEvent in binary mode: headers for the attributes, the data as its body."""
    await destination.publish(
        make_event(
            {"text": "Zürich 東京"},
            id="event-1",
            subject="request 1 é",
            deliveryid="delivery-1",
            attempt=7,
        )
    )
    [(headers, body)] = await read_messages(shared, name)
    assert headers == {
        "ce-specversion": "1.0",
        "ce-id": "event-1",
        "ce-source": "/clipia/webhook/clipia",
        "ce-type": "ai.clipia.generation.completed",
        "ce-subject": "request%201%20%C3%A9",
        "ce-time": "2026-11-20T12:30:15.123456Z",
        "ce-datacontenttype": "application/json",
        "ce-deliveryid": "delivery-1",
        "ce-attempt": "7",
        "Nats-Msg-Id": "delivery-1",
        "Nats-Expected-Stream": name,
    }
    assert json.loads(body) == {"text": "Zürich 東京"}


async def test_repeated_delivery_is_stored_once(shared: Nats, destination: Destination, name: str) -> None:
    """E3: a second attempt at a delivery counts as delivered and adds no message; a replay gets through."""
    first = make_event(id="event-1", deliveryid="delivery-1", attempt=1)
    again = make_event(id="event-1", deliveryid="delivery-1", attempt=2)
    replay = make_event(id="event-1", deliveryid="delivery-2", attempt=1)
    for event in (first, again, replay):
        await destination.publish(event)
    stored = [(event["deliveryid"], event["attempt"]) for event in await read_nats(shared, name)]
    assert stored == [("delivery-1", 1), ("delivery-2", 1)]


async def test_a_purge_forgets_no_message_id(admin: Client, destination: Destination, name: str) -> None:
    """E2: after a purge, an attempt within the dedup window is acknowledged as a duplicate and not stored."""
    event = make_event()
    await destination.publish(event)
    await admin.jsm().purge_stream(name)
    await destination.publish(event)
    assert (await admin.jsm().stream_info(name)).state.messages == 0


async def test_missing_stream_is_made(admin: Client, shared: Nats, name: str) -> None:
    """E1: if the named stream is missing it is made with file storage, even if several make it at once."""
    destinations = [open_url(shared.url(f"subject={name}&stream={name}")) for _ in range(4)]
    # The server shows a stream to the other clients a moment before it listens.
    await asyncio.gather(*(until_outcome(each, "delivered") for each in destinations))
    for each in destinations:
        await each.close()
    info = await admin.jsm().stream_info(name)
    assert (info.config.storage, info.config.subjects, info.state.messages) == (StorageType.FILE, [name], 4)


async def test_stream_that_is_there_stays_as_it_is(
    admin: Client, destination: Destination, name: str
) -> None:
    """E1: a stream of the operator is used and not changed."""
    made = await admin.jsm().add_stream(name=name, subjects=[name, f"{name}.*"], max_age=3600)
    assert await outcome(destination) == "delivered"
    assert (await admin.jsm().stream_info(name)).config == made.config


async def test_stream_of_somebody_else(admin: Client, shared: Nats, name: str) -> None:
    """E1: without a stream in the URL any stream may take the event, but one must."""
    destination = open_url(shared.url(f"subject={name}.done"))
    assert await outcome(destination) == "no_stream"
    with pytest.raises(PublishFailed, match=f"no stream takes the subject {name}.done: make one") as caught:
        await destination.check()
    assert caught.value.reason == "no_stream"
    await admin.jsm().add_stream(name=name, subjects=[f"{name}.*"])
    assert await verdict(destination) == "fine"
    assert await outcome(destination) == "delivered"
    await destination.close()
    assert len(await read_nats(shared, name)) == 1


async def test_deleted_stream_is_made_again(admin: Client, destination: Destination, name: str) -> None:
    """E1: if the stream is deleted one publish fails and the next one makes it again."""
    assert await outcome(destination) == "delivered"
    await admin.jsm().delete_stream(name)
    assert [await outcome(destination) for _ in range(2)] == ["no_stream", "delivered"]
    assert (await admin.jsm().stream_info(name)).state.messages == 1


async def test_subject_of_another_stream(admin: Client, shared: Nats, name: str) -> None:
    """E1: an event is never stored in another stream than the URL's, whether that exists or not."""
    other = f"{name}-other"
    await admin.jsm().add_stream(name=other, subjects=[name])
    destination = open_url(shared.url(f"subject={name}&stream={name}"))
    assert (await outcome(destination), await verdict(destination)) == ("wrong_stream", "wrong_stream")
    await admin.jsm().add_stream(name=name, subjects=[f"{name}.elsewhere"])
    assert (await outcome(destination), await verdict(destination)) == ("wrong_stream", "wrong_stream")
    assert (await admin.jsm().stream_info(other)).state.messages == 0
    await destination.close()


@pytest.mark.parametrize("query", ["subject=events", "subject=events&stream=EVENTS"])
async def test_server_without_jetstream(query: str) -> None:
    """E1: a server without JetStream confirms no event, and the check reports it."""
    with Nats(jetstream=False) as server:
        destination = open_url(server.url(query))
        assert await outcome(destination) in {"no_stream", "no_jetstream"}
        assert await verdict(destination) == "no_jetstream"
        await destination.close()


async def test_full_stream(admin: Client, destination: Destination, name: str) -> None:
    """E1: a full stream that rejects new messages is a failure until it has space again."""
    manager = admin.jsm()
    await manager.add_stream(name=name, subjects=[name], max_msgs=2, discard=DiscardPolicy.NEW)
    outcomes = await asyncio.gather(*(outcome(destination) for _ in range(4)))
    assert sorted(outcomes) == ["delivered", "delivered", "full", "full"]
    await manager.purge_stream(name)
    assert await outcome(destination) == "delivered"


async def test_stream_that_limits_sizes(admin: Client, destination: Destination, name: str) -> None:
    """E7: a message that the stream rejects for its size is rejected alone."""
    await admin.jsm().add_stream(name=name, subjects=[name], max_msg_size=5_000)
    outcomes = await asyncio.gather(
        *(outcome(destination, {"fill": "x" * size}) for size in (10, 10_000, 20))
    )
    assert outcomes == ["delivered", "too_large", "delivered"]
    with pytest.raises(PublishRejected, match="too large"):
        await destination.publish(make_event({"fill": "x" * 10_000}))


async def test_server_that_limits_sizes(shared: Nats, destination: Destination, name: str) -> None:
    """E7: the limit counts the headers, too; a message above it does not end the connection of the others."""
    await destination.publish(make_event({"first": True}))
    assert isinstance(destination, NatsDestination)
    connection = destination._connections._current
    limit = 400_000
    outcomes = await asyncio.gather(
        *(outcome(destination, {"fill": "x" * (limit - less)}) for less in (2_000, 800, 500, 300, 100, 0))
    )
    assert set(outcomes) == {"delivered", "too_large"}
    assert outcomes == sorted(outcomes)
    assert destination._connections._current is connection
    assert len(await read_nats(shared, name)) == 1 + outcomes.count("delivered")


@pytest.mark.parametrize("short", [0, 1])
async def test_size_is_counted_to_the_byte(
    shared: Nats, destination: Destination, name: str, short: int
) -> None:
    """E7: a message of exactly the limit is sent; one byte more is rejected."""
    await destination.publish(make_event(deliveryid="d", id="e", subject="s"))
    [(headers, _)] = await read_messages(shared, name)
    wire = "NATS/1.0\r\n" + "".join(f"{key}: {value}\r\n" for key, value in headers.items()) + "\r\n"
    fill = 400_000 - len(wire) - len('{"f":""}') + 1 - short
    event = make_event({"f": "x" * fill}, deliveryid="f", id="e", subject="s")
    if short:
        await destination.publish(event)
    else:
        with pytest.raises(PublishRejected):
            await destination.publish(event)


@pytest.mark.usefixtures("no_stray_failures")
async def test_server_that_lowers_its_limit() -> None:
    """E7: if the limit is lowered while connected, it costs one connection; then it is known."""
    with Nats("max_payload: 400000") as server:
        destination = open_url(server.url("subject=events&stream=EVENTS"))
        data = {"fill": "x" * 100_000}
        assert await outcome(destination, data) == "delivered"
        server.reload("max_payload: 50000")
        deadline = time.monotonic() + 10
        while "Reloaded server configuration" not in server.log():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        assert [await outcome(destination, data) for _ in range(2)] == ["connection", "too_large"]
        assert await outcome(destination) == "delivered"
        await destination.close()


@pytest.mark.usefixtures("impatient")
async def test_stream_without_acknowledgements(admin: Client, destination: Destination, name: str) -> None:
    """E1: a stream without acknowledgements delivers no event, and the check says why."""
    await admin.jsm().add_stream(name=name, subjects=[name], no_ack=True)
    assert (await outcome(destination), await verdict(destination)) == ("timeout", "no_ack")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"thanks",
        b"[]",
        b"{}",
        b'"stream"',
        b'{"stream": "", "seq": 1}',
        b'{"stream": "x", "seq": 0}',
        b'{"stream": "x", "seq": "1"}',
        b'{"error": 1}',
        b'{"error": {}}',
    ],
)
async def test_answer_of_somebody_else(admin: Client, shared: Nats, name: str, answer: bytes) -> None:
    """E1: only a stream's acknowledgement confirms, even if another client answers on the subject."""

    async def respond(message: Msg) -> None:
        await message.respond(answer)

    await admin.subscribe(name, cb=respond)
    await admin.flush()
    destination = open_url(shared.url(f"subject={name}"))
    assert await outcome(destination) == "protocol"
    await destination.close()


@pytest.mark.usefixtures("impatient")
async def test_listener_is_no_stream(admin: Client, shared: Nats, name: str) -> None:
    """E1: an event that a subscriber received but no stream has stored is not delivered."""
    heard = await admin.subscribe(name)
    await admin.flush()
    destination = open_url(shared.url(f"subject={name}"))
    assert await outcome(destination) == "timeout"
    assert (await heard.next_msg(timeout=5)).subject == name
    await destination.close()


async def test_publishes_are_in_flight_together(server: Nats) -> None:
    """E6: many events are sent before the first is acknowledged."""
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    await destination.check()
    server.freeze()
    publishes = [asyncio.create_task(outcome(destination)) for _ in range(100)]
    await until_waiting(destination, 100)
    server.thaw()
    assert await asyncio.gather(*publishes) == ["delivered"] * 100
    await destination.close()
    assert len(await read_nats(server, "EVENTS")) == 100


async def test_publishes_in_flight_are_bounded(server: Nats, monkeypatch: pytest.MonkeyPatch) -> None:
    """E6: the number of events in flight is limited, however many publishes run; all arrive."""
    monkeypatch.setattr(nats_module, "MAX_IN_FLIGHT", 5)
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    await destination.check()
    server.freeze()
    publishes = [asyncio.create_task(outcome(destination)) for _ in range(40)]
    await until_waiting(destination, 5)
    server.thaw()
    most = 0
    while not all(publish.done() for publish in publishes):
        most = max(most, waiting(destination))
        await asyncio.sleep(0)
    assert most == 5
    assert [publish.result() for publish in publishes] == ["delivered"] * 40
    await destination.close()


@pytest.mark.usefixtures("no_stray_failures")
async def test_restart_while_idle(server: Nats) -> None:
    """E4: after a restart of the server, the first publish works, on a new connection."""
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    for _ in range(3):
        assert await outcome(destination) == "delivered"
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
    await destination.close()
    assert len(await read_nats(server, "EVENTS")) == 3


@pytest.mark.usefixtures("no_stray_failures")
async def test_confirmed_events_survive_crashes(server: Nats) -> None:
    """E1: every confirmed event is there after the server was killed and restarted."""
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    confirmed: set[str] = set()
    stop = asyncio.Event()

    async def publish_on() -> None:
        while not stop.is_set():
            event = make_event()
            try:
                await destination.publish(event)
            except PublishFailed:
                await asyncio.sleep(0.01)
            else:
                confirmed.add(event.get_extension("deliveryid"))

    publishers = [asyncio.create_task(publish_on()) for _ in range(16)]
    for _ in range(4):
        size = len(confirmed)
        deadline = time.monotonic() + 15
        while len(confirmed) < size + 100:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await asyncio.to_thread(server.crash)
        await asyncio.to_thread(server.start)
    stop.set()
    await asyncio.gather(*publishers)
    await destination.close()
    arrived = [event["deliveryid"] for event in await read_nats(server, "EVENTS")]
    assert confirmed <= set(arrived)
    assert len(arrived) == len(set(arrived))


@pytest.mark.usefixtures("no_stray_failures")
async def test_lost_connection_ends_the_wait(server: Nats) -> None:
    """E4: if the server dies, all publishes that wait fail at once, each with its own error."""
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    await destination.check()
    server.freeze()
    publishes = [asyncio.create_task(destination.publish(make_event())) for _ in range(20)]
    await until_waiting(destination, 20)
    started = time.monotonic()
    await asyncio.to_thread(server.crash)
    failures = await asyncio.gather(*publishes, return_exceptions=True)
    assert time.monotonic() - started < 3
    assert [getattr(failure, "reason", None) for failure in failures] == ["connection"] * 20
    assert len({id(failure) for failure in failures}) == 20
    await destination.close()


@pytest.mark.usefixtures("impatient", "no_stray_failures")
@pytest.mark.parametrize("size", [10, 1_000_000], ids=["small", "larger than all buffers"])
async def test_frozen_server(server: Nats, size: int) -> None:
    """E4: if a server hangs every publish fails in time; once it answers, the same destination works."""
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    assert await outcome(destination) == "delivered"
    server.freeze()
    started = time.monotonic()
    outcomes = await asyncio.gather(*(outcome(destination, {"fill": "x" * size}) for _ in range(24)))
    assert outcomes == ["timeout"] * 24
    assert await outcome(destination) == "timeout"
    assert await verdict(destination) == "timeout"
    assert time.monotonic() - started < 5
    server.thaw()
    assert await outcome(destination) == "delivered"
    await destination.close()


@pytest.mark.usefixtures("impatient", "no_stray_failures")
@pytest.mark.parametrize("size", [10, 1_000_000], ids=["small", "larger than all buffers"])
async def test_start_and_close_at_a_frozen_server(server: Nats, size: int) -> None:
    """E16: neither start nor close waits for a server that hangs; they leave no task and no socket."""
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    await destination.publish(make_event())
    server.freeze()
    started = time.monotonic()
    other = open_url(server.url("subject=events&stream=EVENTS"))
    with capture_logs() as logs:
        await other.start()
    assert [entry["log_level"] for entry in logs] == ["warning"]
    publishes = [asyncio.create_task(outcome(destination, {"fill": "x" * size})) for _ in range(24)]
    await until_waiting(destination, 24)
    await destination.close()
    await other.close()
    assert await asyncio.gather(*publishes) == ["timeout"] * 24
    assert time.monotonic() - started < 5
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert count_connections(server) == 0
    server.thaw()


@pytest.mark.usefixtures("no_stray_failures")
async def test_close_while_connecting(server: Nats) -> None:
    """E16: if all publishes that wait for a connection are cancelled, it ends with the destination."""
    server.freeze()
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    publish = asyncio.create_task(destination.publish(make_event()))
    deadline = time.monotonic() + 10
    while not count_connections(server):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
    publish.cancel()
    began = time.monotonic()
    await asyncio.wait([publish])
    await destination.close()
    assert time.monotonic() - began < 3
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert count_connections(server) == 0
    server.thaw()


@pytest.mark.usefixtures("no_stray_failures")
async def test_failed_event_is_not_sent_later(server: Nats) -> None:
    """E1: events that failed while disconnected do not arrive later."""
    destination = open_url(server.url("subject=events&stream=EVENTS"))
    await destination.publish(make_event({"number": 0}))
    await asyncio.to_thread(server.crash)
    failed = [await outcome(destination, {"number": number}) for number in range(1, 4)]
    assert failed == ["connection"] * 3
    await asyncio.to_thread(server.start)
    await destination.publish(make_event({"number": 4}))
    await destination.close()
    assert [event["data"]["number"] for event in await read_nats(server, "EVENTS")] == [0, 4]


PERMISSIONS = """
    accounts: { A: { jetstream: enabled, users: [
        { user: admin, password: admin }
        { user: writer, password: "p@ss:w/rd%", permissions: { publish: %s, subscribe: %s } }
    ] } }
    no_auth_user: admin
"""


@pytest.mark.parametrize(
    ("publish", "subscribe", "outcomes"),
    [
        ('["events"]', '["_INBOX.>"]', ("delivered", "fine")),
        ('["$JS.API.>"]', '["_INBOX.>"]', ("permission", "fine")),
        ('[">"]', '["other"]', ("permission", "permission")),
    ],
    ids=["may only publish", "may not publish", "may not hear answers"],
)
@pytest.mark.usefixtures("impatient", "no_stray_failures")
@pytest.mark.parametrize("stream", ["", "&stream=EVENTS"])
async def test_permissions(publish: str, subscribe: str, outcomes: tuple[str, str], stream: str) -> None:
    """E1: a user with the permission can publish; without it the failure says so, and the log says more."""
    with Nats(PERMISSIONS.replace("%s", publish, 1).replace("%s", subscribe, 1)) as server:
        client = await nats.connect(f"nats://admin:admin@127.0.0.1:{server.port}")
        await client.jsm().add_stream(name="EVENTS", subjects=["events"])
        destination = open_url(server.url(f"subject=events{stream}", login="writer:p%40ss%3Aw%2Frd%25@"))
        with capture_logs() as logs:
            assert await outcome(destination) == outcomes[0]
            assert await verdict(destination) == outcomes[1]
        assert "permissions violation" in str(logs)
        stored = (await client.jsm().stream_info("EVENTS")).state.messages
        assert stored == (1 if outcomes[0] == "delivered" else 0) or subscribe == '["other"]'
        await destination.close()
        await client.close()


@pytest.mark.usefixtures("no_stray_failures")
@pytest.mark.parametrize(
    ("config", "right", "wrong"),
    [
        (f"authorization {{ user: u, password: {CANARY} }}", f"u:{CANARY}@", f"u:{CANARY}2@"),
        (f"authorization {{ token: {CANARY} }}", f"{CANARY}@", f"{CANARY}2@"),
        (f"authorization {{ token: {CANARY} }}", f"{CANARY}@", ""),
    ],
    ids=["password", "token", "nothing"],
)
async def test_login(config: str, right: str, wrong: str) -> None:
    """E1: publish and check report wrong credentials, and no message, log or repr shows them."""
    with Nats(config) as server:
        destination = open_url(server.url("subject=events&stream=EVENTS", login=wrong))
        with capture_logs() as logs:
            await until_outcome(destination, "auth")
            with pytest.raises(PublishFailed) as caught:
                await destination.check()
        assert CANARY not in f"{caught.value} {vars(destination)!r} {logs}"
        await destination.close()
        admitted = open_url(server.url("subject=events&stream=EVENTS", login=right))
        assert await outcome(admitted) == "delivered"
        await admitted.close()


@pytest.mark.usefixtures("impatient", "no_stray_failures")
async def test_expelled_user(capfd: pytest.CaptureFixture[str]) -> None:
    """E4: a connection that the server ends with an error is replaced; that is logged, not printed."""
    allowed, denied = (f"authorization {{ user: u, password: {word} }}" for word in ("p", "q"))
    with Nats(allowed) as server:
        destination = open_url(server.url("subject=events&stream=EVENTS", login="u:p@"))
        assert await outcome(destination) == "delivered"
        for config, expected in ((denied, "auth"), (allowed, "delivered")):
            server.reload(config)
            await until_outcome(destination, expected)
        await destination.close()
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("no_stray_failures")
async def test_other_server_of_a_cluster(server: Nats) -> None:
    """E4: if the URL names several servers, one that is up is found."""
    destination = open_url(
        f"nats://127.0.0.1:{free_port()},127.0.0.1:{server.port}?subject=events&stream=EVENTS"
    )
    for _ in range(3):
        assert await outcome(destination) == "delivered"
        await asyncio.to_thread(server.crash)
        await asyncio.to_thread(server.start)
    await destination.close()


@pytest.mark.usefixtures("no_stray_failures")
async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E1: if the server requires TLS its certificate is checked; an untrusted one gets no event."""
    path = make_certificate(tmp_path / "server.pem")
    with Nats(f"tls {{ cert_file: '{path}', key_file: '{path}' }}") as server:
        destination = open_url(server.url("subject=events&stream=EVENTS"))
        with monkeypatch.context() as patch:
            # The client waits for a connection that it has replaced by one with TLS.
            patch.setattr(nats_module, "OPEN_SECONDS", 2.0)
            with pytest.raises(PublishFailed, match="CERTIFICATE_VERIFY_FAILED"):
                await destination.publish(make_event())
        monkeypatch.setenv("SSL_CERT_FILE", str(path))
        assert await outcome(destination) == "delivered"
        await destination.close()


@pytest.mark.parametrize(
    ("line", "hangs_up"),
    [
        (b"", False),
        (b"SSH-2.0-OpenSSH_9.2\r\n", False),
        (b"INFO {\r\n", False),
        (b"INFO " + b"x" * 100_000, False),
        (b'INFO {"headers": true}\r\n', False),
        (b'INFO {"headers": true}\r\n', True),
    ],
    ids=["silence", "SSH", "half a greeting", "long greeting", "greeting", "greeting and goodbye"],
)
@pytest.mark.usefixtures("impatient", "no_stray_failures")
async def test_other_kind_of_server(line: bytes, *, hangs_up: bool) -> None:
    """E4: a server that does not speak NATS is a failure, not a crash."""
    writers: list[asyncio.StreamWriter] = []

    def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(line)
        if hangs_up:
            writer.write_eof()

    server = await asyncio.start_server(greet, "127.0.0.1", 0)
    destination = open_url(f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}?subject=events")
    assert await outcome(destination) in {"timeout", "connection"}
    await destination.close()
    server.close()
    for writer in writers:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"storage": StorageType.MEMORY}, "file storage"),
        ({"storage": StorageType.FILE}, "sync_interval"),
        ({"retention": RetentionPolicy.INTEREST}, "acknowledges each event and keeps none"),
        ({"max_msgs_per_subject": 1}, "keeps the last 1 events only"),
        ({"max_msgs_per_subject": 1, "discard": DiscardPolicy.NEW}, "keeps the last 1 events only"),
        ({"max_msgs": 1}, "keeps the last 1 events only (max_msgs), even if they are unread; the stream has"),
        ({"max_bytes": 1000}, "the last 1000 bytes only (max_bytes)"),
        ({"max_age": 60}, "keeps events for 60 s only (max_age), even if they are unread"),
        ({"max_age": 60, "discard": DiscardPolicy.NEW}, "events for 60 s only (max_age)"),
        (
            {"max_msgs": 2, "max_msgs_per_subject": 1, "storage": StorageType.MEMORY},
            "file storage; the stream keeps the last 2 events only (max_msgs), the last 1 events only (max_m",
        ),
    ],
)
async def test_check_warns_of_losses(
    admin: Client, destination: Destination, name: str, settings: dict[str, Any], problem: str
) -> None:
    """E2: the check warns if a stream's acknowledgements are not durable, and stores no message."""
    await admin.jsm().add_stream(name=name, subjects=[name], **settings)
    with capture_logs() as logs:
        await destination.check()
    (warning,) = (entry for entry in logs if entry["log_level"] == "warning")
    assert problem in warning["problem"]
    assert (await admin.jsm().stream_info(name)).state.messages == 0


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"max_msgs": 1, "discard": DiscardPolicy.OLD}, True),
        ({"max_msgs": 1, "discard": DiscardPolicy.NEW}, False),
        ({"max_bytes": 1000, "discard": DiscardPolicy.OLD}, True),
        ({"max_bytes": 1000, "discard": DiscardPolicy.NEW}, False),
        ({"max_msgs_per_subject": 1, "discard": DiscardPolicy.OLD}, True),
        ({"max_msgs_per_subject": 1, "discard": DiscardPolicy.NEW}, True),
        (
            {"max_msgs_per_subject": 1, "discard": DiscardPolicy.NEW, "discard_new_per_subject": True},
            False,
        ),
    ],
)
async def test_limits_are_warned_of_exactly_if_they_drop(
    admin: Client, destination: Destination, name: str, settings: dict[str, Any], *, kept: bool
) -> None:
    """E2: the check warns of a limit that drops acknowledged messages, not of one that rejects new ones."""
    await admin.jsm().add_stream(name=name, subjects=[name], **settings)
    with capture_logs() as logs:
        await destination.check()
    assert ["even if they are unread" in entry["problem"] for entry in logs] == [kept]
    outcomes = [await outcome(destination) for _ in range(4)]
    stored = (await admin.jsm().stream_info(name)).state.messages
    assert (outcomes.count("delivered") > stored) == kept
    assert ("full" in outcomes) != kept


async def test_retention_by_days_is_told_and_not_warned_of(
    admin: Client, destination: Destination, name: str
) -> None:
    """E2: a stream that deletes events after days is only worth information, because most streams do."""
    await admin.jsm().add_stream(name=name, subjects=[name], max_age=7 * 86_400)
    with capture_logs() as logs:
        await destination.check()
    assert [entry.get("seconds") for entry in logs if entry["log_level"] == "info"] == [7 * 86_400]
    assert [
        "even if they are unread" in entry["problem"] for entry in logs if entry["log_level"] == "warning"
    ] == [False]


async def test_a_consumer_is_found_among_hundreds(admin: Client, destination: Destination, name: str) -> None:
    """E2: the server lists consumers by pages; a consumer on the last page counts, too."""
    streams = admin.jsm()
    await streams.add_stream(name=name, subjects=[name, f"{name}.*"], retention=RetentionPolicy.INTEREST)
    filters = [f"{name}.other"] * 260 + [name]
    await asyncio.gather(
        *(
            streams.add_consumer(name, durable_name=f"c{number:03}", filter_subject=subject)
            for number, subject in enumerate(filters)
        )
    )
    with capture_logs() as logs:
        await destination.check()
    assert ["keeps none" in entry["problem"] for entry in logs] == [False]


@pytest.mark.parametrize(
    ("patterns", "is_kept"),
    [
        (["{}"], True),
        (["{}.*"], False),
        (["{}.other"], False),
        (["{}.other", "{}"], True),
        ([">"], True),
    ],
)
async def test_interest_is_that_of_a_consumer_of_the_subject(
    admin: Client, destination: Destination, name: str, patterns: list[str], *, is_kept: bool
) -> None:
    """E2: the check warns of the retention `interest` exactly if no consumer takes the subject."""
    streams = admin.jsm()
    await streams.add_stream(name=name, subjects=[name, f"{name}.*"], retention=RetentionPolicy.INTEREST)
    for number, pattern in enumerate(patterns):
        await streams.add_consumer(name, durable_name=f"c{number}", filter_subject=pattern.format(name))
    with capture_logs() as logs:
        await destination.check()
    assert ["keeps none" in entry["problem"] for entry in logs] == [not is_kept]
    await destination.publish(make_event())
    assert (await streams.stream_info(name)).state.messages == is_kept


def test_replicated_stream_is_not_warned_of() -> None:
    """E2: a stream in files with several replicas needs no warning."""
    config = nats.js.api.StreamConfig(storage=StorageType.FILE, num_replicas=3)
    state = nats.js.api.StreamState(messages=0, bytes=0, first_seq=0, last_seq=0, consumer_count=0)
    assert loss_warning(nats.js.api.StreamInfo(config=config, state=state), "subject") is None


async def test_ids_that_are_no_text(destination: Destination) -> None:
    """E7: an event is rejected if its ids cannot be written."""
    with pytest.raises(PublishRejected) as caught:
        await destination.publish(make_event(deliveryid="\ud800"))
    assert caught.value.reason == "encoding"
    assert await outcome(destination) == "delivered"


@pytest.mark.parametrize(
    "url",
    [
        "nats:",
        "nats://",
        "nats://host",
        "nats://host?subject=",
        "nats://host?stream=A",
        "nats://host?subject=a&stream=",
        "nats://host?subject=a&subject=b",
        "nats://host?subject=a.*",
        "nats://host?subject=>",
        "nats://host?subject=a..b",
        "nats://host?subject=.a",
        "nats://host?subject=a.",
        "nats://host?subject=a%20b",
        "nats://host?subject=a%0D%0Ab",
        "nats://host?subject=a%00b",
        "nats://host?subject=$JS.API.INFO",
        "nats://host?subject=a&stream=a.b",
        "nats://host?subject=a&stream=a/b",
        "nats://host?subject=a&stream=a%20b",
        f"nats://host?subject=a&{CANARY}=1",
        f"nats://host?subject=a#{CANARY}",
        f"nats://host/{CANARY}?subject=a",
        f"nats://:{CANARY}@host?subject=a",
        f"nats://u:{CANARY}@?subject=a",
        f"nats://u:{CANARY}@:4222?subject=a",
        f"nats://u:{CANARY}@host:0?subject=a",
        f"nats://u:{CANARY}@host:65536?subject=a",
        f"nats://u:{CANARY}@host:port?subject=a",
        f"nats://u:{CANARY}@host,?subject=a",
        f"nats://u:{CANARY}@ho st?subject=a",
        f"nats://u:{CANARY}@[host?subject=a",
        f"nats://@{CANARY}?subject=a",
    ],
)
def test_unusable_url(url: str) -> None:
    """G8: an invalid URL is rejected with a valid example, and is not quoted."""
    with pytest.raises(SettingsError) as caught:
        open_url(url)
    assert "'test'" in str(caught.value)
    assert "write nats://" in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nats://host?subject=a", (("nats://host:4222",), None, None, None, "a", None)),
        ("nats://host/?subject=a.b&stream=S_1", (("nats://host:4222",), None, None, None, "a.b", "S_1")),
        (
            "NATS://u%40:p%3A@a:1,b:2,c?subject=a",
            (("nats://a:1", "nats://b:2", "nats://c:4222"), "u@", "p:", None, "a", None),
        ),
        ("nats://t%2Fk@[::1]:3?subject=a", (("nats://[::1]:3",), None, None, "t/k", "a", None)),
        ("nats://u:@host?subject=a", (("nats://host:4222",), "u", "", None, "a", None)),
    ],
)
async def test_parts_of_the_url(url: str, expected: tuple[Any, ...]) -> None:
    """E1: each part of the URL reaches the client, unquoted."""
    destination = open_url(url)
    assert isinstance(destination, NatsDestination)
    address = destination._address
    assert (
        address.servers,
        address.login.user,
        address.login.password,
        address.login.token,
        address.subject,
        address.stream,
    ) == expected
    await destination.close()
