"""The RabbitMQ destination: the message, the condition for a delivery, and recovery."""

import asyncio
import gc
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel
from aio_pika.exceptions import ChannelPreconditionFailed
from aiormq import Channel, Connection
from cloudevents.core.v1.event import CloudEvent
from structlog.testing import capture_logs
from support.kinds_base import make_event, open_url
from support.kinds_rabbitmq import Relay, drain, open_channel, rabbitmq_server, to_structured
from support.servers_rabbitmq import MAX_MESSAGE_SIZE, PASSWORD, USER, RabbitMq
from yarl import URL

from receiver.destinations import Destination, base
from receiver.destinations import rabbitmq as rabbitmq_module
from receiver.destinations.base import encode
from receiver.destinations.rabbitmq import MAX_IN_FLIGHT, RabbitmqDestination, _Connection
from receiver.errors import PublishFailed, PublishRejected, SettingsError

CANARY = "s3cr3t-canary"
QUORUM: Any = {"x-queue-type": "quorum"}
SHORT_DEADLINES = {"base.TIMEOUT_SECONDS": 0.6, "rabbitmq.OPEN_SECONDS": 0.5, "rabbitmq.CLOSE_SECONDS": 0.2}


@pytest.fixture
def server() -> RabbitMq:
    """A running RabbitMQ."""
    return rabbitmq_server()


@pytest.fixture(autouse=True)
async def reports() -> AsyncIterator[list[dict[str, Any]]]:
    """A test fails if it leaves an exception that no caller awaits."""
    found: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: found.append(context))
    yield found
    gc.collect(1)
    assert found == []


@pytest.fixture
async def channel(server: RabbitMq) -> AsyncIterator[AbstractChannel]:
    """Another client's channel."""
    async with open_channel(server) as opened:
        yield opened


@pytest.fixture
async def relay(server: RabbitMq) -> AsyncIterator[Relay]:
    """A relay to the server that can be cut."""
    async with Relay(server.port) as running:
        yield running


@pytest.fixture
async def queue(channel: AbstractChannel) -> AsyncIterator[str]:
    """The name of a queue of this test's own, for the destination to declare."""
    name = f"events-{uuid4()}"
    yield name
    await channel.queue_delete(name)


@pytest.fixture
async def exchange(channel: AbstractChannel) -> AsyncIterator[str]:
    """An exchange of this test's own, with no binding."""
    declared = await channel.declare_exchange(f"exchange-{uuid4()}", ExchangeType.TOPIC, durable=True)
    yield declared.name
    await channel.exchange_delete(declared.name)


@pytest.fixture
async def destination(relay: Relay, server: RabbitMq, queue: str) -> AsyncIterator[Destination]:
    """A started destination, behind the relay."""
    opened = open_url(server.url(f"?queue={queue}", port=relay.port))
    await opened.start()
    yield opened
    await opened.close()


def delivery_id(event: CloudEvent) -> str:
    """Return the expected id of a message."""
    return str(event.get_extension("deliveryid"))


async def publish_all(
    destination: Destination, events: Iterable[CloudEvent]
) -> tuple[set[str], list[BaseException]]:
    """Publish at once; return the ids of confirmed events, and the errors."""
    events = list(events)
    results = await asyncio.gather(*map(destination.publish, events), return_exceptions=True)
    confirmed = {delivery_id(event) for event, result in zip(events, results, strict=True) if result is None}
    return confirmed, [result for result in results if result is not None]


async def ids_in(channel: AbstractChannel, queue: str) -> list[str | None]:
    """Take all messages out of a queue and return their ids."""
    return [message.message_id for message in await drain(channel, queue)]


def reasons_of(errors: Iterable[BaseException]) -> set[str]:
    """Return the reasons of failures; all errors must be PublishFailed."""
    return {error.reason if isinstance(error, PublishFailed) else repr(error) for error in errors}


async def failure_of(action: Awaitable[None]) -> PublishFailed:
    """Return the failure of the action."""
    with pytest.raises(PublishFailed) as caught:
        await action
    assert PASSWORD not in str(caught.value)
    assert CANARY not in str(caught.value)
    return caught.value


async def until_published(destination: Destination, *, seconds: float = 10) -> None:
    """Publish until it works, as a lane does."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            await destination.publish(make_event())
        except PublishFailed:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        else:
            return


async def test_message(destination: Destination, channel: AbstractChannel, queue: str) -> None:
    """E1, E3: an event is one persistent message in CloudEvents' binary mode, with the delivery's id."""
    event = make_event({"text": "Zürich"}, deliveryid="delivery-1", subject="request-1", attempt=300)
    await destination.publish(event)
    (message,) = await drain(channel, queue)
    assert json.loads(message.body) == {"text": "Zürich"}
    headers = {name: value for name, value in message.headers.items() if name != "x-delivery-count"}
    assert headers == {
        "cloudEvents_specversion": "1.0",
        "cloudEvents_id": event.get_id(),
        "cloudEvents_source": "/clipia/webhook/clipia",
        "cloudEvents_type": "ai.clipia.generation.completed",
        "cloudEvents_subject": "request-1",
        "cloudEvents_time": "2026-11-20T12:30:15.123456Z",
        "cloudEvents_deliveryid": "delivery-1",
        "cloudEvents_attempt": 300,
    }
    properties = {
        "content_type": "application/json",
        "delivery_mode": 2,
        "message_id": "delivery-1",
        "correlation_id": "request-1",
        "type": "ai.clipia.generation.completed",
        "timestamp": datetime(2026, 11, 20, 12, 30, 15, tzinfo=UTC),
        "app_id": "clipia-receiver",
    }
    assert {name: getattr(message, name) for name in properties} == properties
    assert (message.exchange, message.routing_key) == ("", queue)


async def test_event_without_delivery_id(
    destination: Destination, channel: AbstractChannel, queue: str
) -> None:
    """E3: every message has an id to deduplicate by."""
    event = make_event()
    del event.get_attributes()["deliveryid"]
    await destination.publish(event)
    assert await ids_in(channel, queue) == [event.get_id()]


async def test_declared_queue_is_durable_and_replicated(
    destination: Destination, channel: AbstractChannel, queue: str
) -> None:
    """E1: a declared queue is a durable quorum queue."""
    await destination.check()
    await channel.declare_queue(queue, durable=True, arguments=QUORUM)
    with pytest.raises(ChannelPreconditionFailed):
        await channel.declare_queue(queue, durable=True)
    await channel.reopen()


async def test_declared_queue_is_bound(
    server: RabbitMq, channel: AbstractChannel, queue: str, exchange: str
) -> None:
    """E1: with an exchange and a queue the queue is bound, and messages go through the exchange."""
    spy = await channel.declare_queue(exclusive=True)
    await spy.bind(exchange, "clipia.done")
    destination = open_url(server.url(f"?exchange={exchange}&routing_key=clipia.done&queue={queue}"))
    event = make_event()
    await destination.publish(event)
    await destination.close()
    assert await ids_in(channel, queue) == await ids_in(channel, spy.name) == [delivery_id(event)]


@pytest.mark.parametrize("to", ["exchange", "queue"])
async def test_no_declaration_without_queue(
    server: RabbitMq, channel: AbstractChannel, queue: str, exchange: str, to: str
) -> None:
    """E1: an existing exchange or queue can be published to; a missing one is not created."""
    query = f"?exchange={exchange}&routing_key=key" if to == "exchange" else f"?routing_key={queue}"
    destination = open_url(server.url(query))
    for _ in range(2):
        failed = await failure_of(destination.publish(make_event()))
        assert failed.reason == ("unroutable" if to == "exchange" else "not_found")
    declared = await channel.declare_queue(queue)
    if to == "exchange":
        await declared.bind(exchange, "key")
    event = make_event()
    await destination.publish(event)
    await destination.close()
    assert await ids_in(channel, queue) == [delivery_id(event)]


@pytest.mark.parametrize(
    ("query", "word"),
    [
        ("?exchange=no-such-exchange", "no-such-exchange"),
        ("?exchange=no-such-exchange&queue={queue}", "no-such-exchange"),
        ("?routing_key=no-such-queue", "no-such-queue"),
    ],
)
async def test_missing_place(server: RabbitMq, queue: str, query: str, word: str) -> None:
    """E1: check and publish name a missing exchange or queue, and start does not fail."""
    destination = open_url(server.url(query.format(queue=queue)))
    with capture_logs() as logs:
        await destination.start()
    assert [entry["log_level"] for entry in logs] == ["warning"]
    for action in (destination.check(), destination.publish(make_event())):
        failed = await failure_of(action)
        assert failed.reason == "not_found"
        assert word in str(failed)
    await destination.close()


async def test_unroutable_messages_are_not_delivered(server: RabbitMq, exchange: str) -> None:
    """E1: RabbitMQ acknowledges a message even if no queue takes it; that does not count as delivered."""
    destination = open_url(server.url(f"?exchange={exchange}&routing_key=key"))
    await destination.check()
    confirmed, errors = await publish_all(destination, (make_event() for _ in range(100)))
    await destination.close()
    assert confirmed == set()
    assert {(type(error), getattr(error, "reason", "")) for error in errors} == {
        (PublishFailed, "unroutable")
    }


async def test_same_delivery_twice_at_once(server: RabbitMq, exchange: str) -> None:
    """E1: a returned message is not mistaken for that of another publish with the same id."""
    destination = open_url(server.url(f"?exchange={exchange}&routing_key=key"))
    for _ in range(5):
        events = [make_event(deliveryid="the-same") for _ in range(4)]
        confirmed, errors = await publish_all(destination, events)
        assert confirmed == set()
        assert sorted(getattr(error, "reason", "") for error in errors) == ["in_flight"] * 3 + ["unroutable"]
    await destination.close()


async def test_cancelled_unroutable_publish(server: RabbitMq, exchange: str) -> None:
    """E16: if a publish is cancelled, its returned message neither fails nor confirms another one."""
    destination = open_url(server.url(f"?exchange={exchange}&routing_key=key"))
    for pauses in range(12):
        tasks = [asyncio.create_task(destination.publish(make_event())) for _ in range(6)]
        for _ in range(pauses):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        for task in tasks[1::2]:
            assert (await failure_of(task)).reason == "unroutable"
    await destination.close()


async def test_publish_that_is_cancelled_as_it_returns(
    server: RabbitMq, exchange: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E16: a publish that is cancelled in the moment of its return does not end the channel for others."""
    destination = open_url(server.url(f"?exchange={exchange}&routing_key=key"))
    await destination.check()
    tasks = [asyncio.create_task(destination.publish(make_event())) for _ in range(6)]
    read_return = Channel._on_return_frame

    async def cancel_first(self: Channel, frame: Any) -> None:
        tasks[0].cancel()
        await read_return(self, frame)

    monkeypatch.setattr(Channel, "_on_return_frame", cancel_first)
    for task in tasks[1:]:
        assert (await failure_of(task)).reason == "unroutable"
    await destination.close()


async def test_deleted_queue_is_declared_again(
    destination: Destination, channel: AbstractChannel, queue: str
) -> None:
    """E4: if our queue is deleted one publish fails, and the next declares it again."""
    await destination.publish(make_event())
    await channel.queue_delete(queue)
    assert (await failure_of(destination.publish(make_event()))).reason == "unroutable"
    event = make_event()
    await destination.publish(event)
    assert await ids_in(channel, queue) == [delivery_id(event)]


async def test_exchange_deleted_in_the_middle(
    server: RabbitMq, channel: AbstractChannel, queue: str, exchange: str
) -> None:
    """E1: an error that ends the channel fails all publishes under way; none is confirmed and none hangs."""
    declared = await channel.declare_queue(queue, durable=True)
    await declared.bind(exchange, "key")
    destination = open_url(server.url(f"?exchange={exchange}&routing_key=key"))
    await destination.publish(make_event())
    (confirmed, errors), _ = await asyncio.gather(
        publish_all(destination, (make_event() for _ in range(100))), channel.exchange_delete(exchange)
    )
    more_confirmed, more_errors = await publish_all(destination, (make_event() for _ in range(20)))
    assert more_confirmed == set()
    assert reasons_of(errors) <= {"not_found", "connection"}
    assert reasons_of(more_errors) <= {"not_found", "connection"}
    await channel.declare_exchange(exchange, ExchangeType.TOPIC, durable=True)
    await declared.bind(exchange, "key")
    event = make_event()
    await destination.publish(event)
    await destination.close()
    assert confirmed | {delivery_id(event)} <= set(await ids_in(channel, queue))


async def test_other_queue_is_used_as_it_is(server: RabbitMq, channel: AbstractChannel, queue: str) -> None:
    """E2: a queue that exists with other arguments is used, with a warning about the difference."""
    await channel.declare_queue(queue, durable=False)
    destination = open_url(server.url(f"?queue={queue}"))
    with capture_logs() as logs:
        await destination.start()
    (entry,) = logs
    assert (entry["log_level"], entry["destination"]) == ("warning", "test")
    assert "inequivalent arg 'durable'" in entry["problem"]
    event = make_event()
    await destination.publish(event)
    await destination.close()
    assert await ids_in(channel, queue) == [delivery_id(event)]


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_full_queue(server: RabbitMq, channel: AbstractChannel, queue: str, kind: str) -> None:
    """E1: messages that a full queue rejects fail, the others are there, and with space again all work."""
    limits: Any = {"x-queue-type": kind, "x-max-length": 5, "x-overflow": "reject-publish"}
    await channel.declare_queue(queue, durable=True, arguments=limits)
    destination = open_url(server.url(f"?queue={queue}"))
    for _ in range(2):
        confirmed: set[str] = set()
        reasons: list[str] = []
        for _ in range(10):
            some, errors = await publish_all(destination, (make_event() for _ in range(20)))
            confirmed |= some
            reasons += [getattr(error, "reason", "") for error in errors]
        assert set(reasons) == {"nack"}
        assert sorted(confirmed) == sorted(map(str, await ids_in(channel, queue)))
    await destination.close()


async def test_each_try_adds_a_copy_to_the_queues_beside_a_full_one(
    server: RabbitMq, channel: AbstractChannel, exchange: str
) -> None:
    """E1: if one queue of an exchange is full no attempt is confirmed, though the other queues get each."""
    limits: Any = {"x-queue-type": "classic", "x-max-length": 1, "x-overflow": "reject-publish"}
    full = await channel.declare_queue(arguments=limits, exclusive=True)
    beside = await channel.declare_queue(exclusive=True)
    for each in (full, beside):
        await each.bind(exchange, "events")
    destination = open_url(server.url(f"?exchange={exchange}&routing_key=events"))
    await destination.publish(make_event())
    event = make_event()
    for _ in range(3):
        assert (await failure_of(destination.publish(event))).reason == "nack"
    await destination.close()
    assert (await ids_in(channel, beside.name)).count(delivery_id(event)) == 3


@pytest.mark.parametrize(
    "arguments", [{"x-message-ttl": 0}, {"x-max-length": 1}, {"x-max-length": 1, "x-overflow": "drop-head"}]
)
async def test_dropping_queue_confirms(
    server: RabbitMq, channel: AbstractChannel, queue: str, arguments: dict[str, Any]
) -> None:
    """E2: a queue that drops messages confirms them, so the check warns of its arguments."""
    await channel.declare_queue(queue, durable=True, arguments={"x-queue-type": "quorum"} | arguments)
    destination = open_url(server.url(f"?queue={queue}"))
    with capture_logs() as logs:
        await destination.start()
    assert [next(iter(arguments)) in entry["problem"] for entry in logs] == [True]
    for _ in range(3):
        await destination.publish(make_event())
    await destination.close()
    assert len(await ids_in(channel, queue)) <= 1


async def test_too_large_message(destination: Destination, channel: AbstractChannel, queue: str) -> None:
    """E7: a message over RabbitMQ's limit is rejected; the others are not."""
    await destination.publish(make_event())
    poison = make_event({"fill": "x" * MAX_MESSAGE_SIZE})
    good = [make_event({"fill": "x" * 1000}) for _ in range(40)]
    events = [*good[:20], poison, *good[20:]]
    results = await asyncio.gather(*map(destination.publish, events), return_exceptions=True)
    rejected = results.pop(20)
    assert isinstance(rejected, PublishRejected)
    assert rejected.reason == "too_large"
    assert {type(result) for result in results} <= {type(None), PublishFailed}
    event = make_event({"fill": "x" * (MAX_MESSAGE_SIZE - 100)})
    await destination.publish(event)
    confirmed = {delivery_id(event) for event, result in zip(good, results, strict=True) if result is None}
    assert confirmed | {delivery_id(event)} <= set(await ids_in(channel, queue))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"subject": "x" * 200_000}, "too_large"),
        ({"subject": "\ud800"}, "encoding"),
        ({"attempt": 2**70}, "encoding"),
    ],
    ids=["huge", "surrogate", "number"],
)
async def test_attributes_that_amqp_cannot_hold(
    relay: Relay, destination: Destination, attributes: dict[str, Any], reason: str
) -> None:
    """E7: an event is rejected if its attributes fit no header, and the connection stays."""
    results = await asyncio.gather(
        *map(destination.publish, (make_event(), make_event(**attributes), make_event())),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [type(None), PublishRejected, type(None)]
    assert getattr(results[1], "reason", "") == reason
    assert relay.connections == 1


async def test_long_subject_is_no_property(
    destination: Destination, channel: AbstractChannel, queue: str
) -> None:
    """E3: a value that is too long for a property is in the headers alone."""
    event = make_event(subject="é" * 200, deliveryid="d" * 256)
    await destination.publish(event)
    (message,) = await drain(channel, queue)
    assert message.correlation_id is None
    assert to_structured(message) == json.loads(encode(event))


@pytest.mark.parametrize("allowance", [1, 5_000, 50_000, 150_000])
async def test_connection_lost_in_the_middle(
    relay: Relay, destination: Destination, channel: AbstractChannel, queue: str, allowance: int
) -> None:
    """E1, E4: a cut connection fails the publishes under way, and the next one opens a new connection."""
    relay.allowance = allowance
    confirmed, errors = await publish_all(
        destination, (make_event({"fill": "x" * 1000}) for _ in range(MAX_IN_FLIGHT))
    )
    assert reasons_of(errors) == {"connection"}
    event = make_event()
    await destination.publish(event)
    assert confirmed | {delivery_id(event)} <= set(await ids_in(channel, queue))
    assert relay.connections == 2


@pytest.mark.usefixtures("impatient")
async def test_lost_confirm_is_no_delivery(
    relay: Relay, destination: Destination, channel: AbstractChannel, queue: str
) -> None:
    """E1: if a message arrives but not its confirm, the publish fails in time; the next one adds a copy."""
    await destination.publish(make_event())
    await drain(channel, queue)
    relay.answers.clear()
    event = make_event()
    began = time.monotonic()
    assert (await failure_of(destination.publish(event))).reason == "timeout"
    assert time.monotonic() - began < 2
    relay.answers.set()
    await destination.publish(event)
    assert await ids_in(channel, queue) == [delivery_id(event)] * 2
    assert relay.connections == 2


async def test_timeout_does_not_hurt_younger_publishes(
    relay: Relay, destination: Destination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1: a publish that times out does not end the connection for younger publishes."""
    await destination.publish(make_event())
    relay.answers.clear()
    monkeypatch.setattr(base, "TIMEOUT_SECONDS", 0.3)
    old = asyncio.create_task(destination.publish(make_event()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    monkeypatch.setattr(base, "TIMEOUT_SECONDS", 5.0)
    young = asyncio.create_task(destination.publish(make_event()))
    assert (await failure_of(old)).reason == "timeout"
    relay.answers.set()
    await young
    assert relay.connections == 1


@pytest.mark.usefixtures("impatient")
async def test_memory_alarm(
    server: RabbitMq,
    relay: Relay,
    destination: Destination,
    channel: AbstractChannel,
    queue: str,
) -> None:
    """E4: while RabbitMQ blocks publishers every publish fails in time; later the connection is as before."""
    await destination.publish(make_event())
    server.set_alarm(on=True)
    try:
        for _ in range(2):
            _, errors = await publish_all(destination, (make_event() for _ in range(10)))
            assert [getattr(error, "reason", "") for error in errors] == ["blocked"] * 10
        assert (await failure_of(destination.check())).reason == "blocked"
    finally:
        server.set_alarm(on=False)
    event = make_event()
    await destination.publish(event)
    assert delivery_id(event) in await ids_in(channel, queue)
    assert relay.connections == 1


@pytest.mark.usefixtures("impatient")
async def test_frozen_server(server: RabbitMq, destination: Destination, queue: str) -> None:
    """E4: while the server is stopped all calls fail or end in time; later all works again."""
    await destination.publish(make_event())
    other = open_url(server.url(f"?queue={queue}"))
    server.freeze()
    try:
        began = time.monotonic()
        events = [make_event({"fill": "x" * 100_000}) for _ in range(100)]
        for _ in range(2):
            confirmed, errors = await publish_all(destination, events)
            assert confirmed == set()
            assert reasons_of(errors) == {"timeout"}
        assert (await failure_of(destination.check())).reason == "timeout"
        with capture_logs() as logs:
            await other.start()
        assert [entry["log_level"] for entry in logs] == ["warning"]
        await other.close()
        assert time.monotonic() - began < 6
    finally:
        server.thaw()
    await until_published(destination)


async def test_heartbeats(
    server: RabbitMq, relay: Relay, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: a silent connection is closed before its publishes time out; none looks cancelled."""
    monkeypatch.setattr(rabbitmq_module, "HEARTBEAT_SECONDS", 2)
    monkeypatch.setattr(Connection, "HEARTBEAT_GRACE_MULTIPLIER", 0.3)
    destination = open_url(server.url(f"?queue={queue}", port=relay.port))
    await destination.publish(make_event())
    relay.answers.clear()
    _, errors = await publish_all(destination, (make_event() for _ in range(5)))
    assert reasons_of(errors) == {"connection"}
    relay.answers.set()
    await destination.publish(make_event())
    await destination.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
async def test_close_at_a_frozen_server(
    server: RabbitMq, queue: str, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """E16: closing ends in time even if the server does not read, and fails the publishes under way."""
    others = asyncio.all_tasks()
    monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
    port = server.tls_port if scheme == "amqps" else server.port
    destination = open_url(server.url(f"?queue={queue}", port=port).replace("amqp:", f"{scheme}:"))
    await destination.publish(make_event())
    server.freeze()
    try:
        events = [make_event({"fill": "x" * 500_000}) for _ in range(60)]
        publishing = asyncio.create_task(publish_all(destination, events))
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await destination.close()
        assert time.monotonic() - began < 2
        confirmed, errors = await publishing
        assert confirmed == set()
        assert reasons_of(errors) == {"timeout"}
        while asyncio.all_tasks() - others:
            assert time.monotonic() - began < 2
            await asyncio.sleep(0.01)
    finally:
        server.thaw()


async def test_killed_server(server: RabbitMq) -> None:
    """E1, E4: after a kill the server has all confirmed messages, and the destination goes on."""
    queue = f"events-{uuid4()}"
    destination = open_url(server.url(f"?queue={queue}"))
    confirmed: set[str] = set()
    rejected: list[BaseException] = []
    enough = asyncio.Event()

    async def publish_until_rejected() -> None:
        while not rejected:
            some, errors = await publish_all(destination, [make_event({"fill": "x" * 500})])
            confirmed.update(some)
            rejected.extend(errors)
            if len(confirmed) > 500:
                enough.set()

    async with asyncio.TaskGroup() as group:
        for _ in range(64):
            group.create_task(publish_until_rejected())
        async with asyncio.timeout(30):
            await enough.wait()
        server.remember_queues()
        server.crash()
    assert reasons_of(rejected) == {"connection"}
    assert (await failure_of(destination.publish(make_event()))).reason == "connection"
    await asyncio.to_thread(server.start)
    last = make_event()
    await destination.publish(last)
    await destination.close()
    async with open_channel(server) as channel:
        assert confirmed | {delivery_id(last)} <= set(await ids_in(channel, queue))
        await channel.queue_delete(queue)


async def test_wrong_credentials(server: RabbitMq, queue: str) -> None:
    """G8: a wrong password and a wrong virtual host have different reasons, and are never quoted."""
    wrong = server.url(f"?queue={queue}").replace(quote(PASSWORD, safe=""), f"{CANARY}-wrong")
    elsewhere = server.url(f"nowhere?queue={queue}")
    for url, reason in ((wrong, "auth"), (elsewhere, "refused")):
        destination = open_url(url)
        assert (await failure_of(destination.check())).reason == reason
        assert (await failure_of(destination.publish(make_event()))).reason == reason
        await destination.close()


async def test_missing_permissions(server: RabbitMq, queue: str, exchange: str) -> None:
    """G8: a user without permission to declare or publish gets RabbitMQ's own error."""
    server.add_user("writer", "secret", configure="^$", write="^amq[.]fanout$", read="^$")
    for query in (f"?queue={queue}", f"?exchange={exchange}"):
        destination = open_url(f"amqp://writer:secret@127.0.0.1:{server.port}/{query}")
        failed = await failure_of(destination.publish(make_event()))
        assert failed.reason == "permission"
        assert "'writer'" in str(failed)
        await destination.close()


async def test_tls(server: RabbitMq, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G8: amqps checks the server's certificate against the trusted authorities."""
    url = server.url(f"?queue={queue}", port=server.tls_port).replace("amqp:", "amqps:")
    distrustful = open_url(url)
    assert (await failure_of(distrustful.publish(make_event()))).reason == "connection"
    await distrustful.close()
    monkeypatch.setenv("SSL_CERT_FILE", str(server.certificate))
    destination = open_url(url)
    await destination.start()
    await destination.publish(make_event())
    await destination.close()


async def test_password_is_not_shown(
    server: RabbitMq, relay: Relay, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    """G8: neither logs at any level nor the destination's own texts show the password."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "aiormq")
    destination = open_url(server.url(f"?queue={queue}", port=relay.port))
    await destination.start()
    await destination.publish(make_event())
    await relay.stop()
    failed = await failure_of(destination.publish(make_event()))
    texts = [str(failed), repr(destination), repr(vars(destination))]
    await relay.start()
    await destination.close()
    assert USER in caplog.text
    for secret in (PASSWORD, quote(PASSWORD, safe=""), CANARY):
        assert secret not in caplog.text
        assert not [text for text in texts if secret in text]


@pytest.mark.parametrize(
    "url",
    [
        "amqp:",
        "amqp:///vhost?queue=q",
        f"amqp://user:{CANARY}@:5672/?queue=q",
        f"amqp://user:{CANARY}@host:0/?queue=q",
        f"amqp://user:{CANARY}@host:99999/?queue=q",
        f"amqp://user:{CANARY}/x@host/?queue=q",
        f"amqp://user:1/{CANARY}@host/?queue=q",
        f"amqp://user:{CANARY}@ho st/?queue=q",
        f"amqp://user:{CANARY}@host/",
        f"amqp://user:{CANARY}@host/?queue=",
        f"amqp://user:{CANARY}@host/?queue=a&queue=b",
        f"amqp://user:{CANARY}@host/?queue=a&routing_key=b",
        f"amqp://user:{CANARY}@host/?queue=a&rooting_key=b",
        f"amqp://user:{CANARY}@host/?queue=a#fragment",
        f"amqp://user:{CANARY}@host/?queue={'q' * 300}",
        f"amqp://user:{CANARY}@host/?queue=a&exchange={'e' * 300}",
        f"amqp://user:{CANARY}@host/?exchange=a&routing_key={'k' * 300}",
        f"amqp://user:{CANARY}@host/{'v' * 300}?queue=a",
        f"amqps://user:{CANARY}@host/?queue=a&no_verify_ssl=1",
    ],
)
def test_unusable_url_is_rejected(url: str) -> None:
    """G8: an invalid URL is rejected with a valid example, and is not quoted."""
    with pytest.raises(SettingsError) as caught:
        open_url(url)
    assert "'test'" in str(caught.value)
    assert "write amqp://" in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("amqp://host?queue=q", ("/", None, None, "host", 5672, "", "q", "q")),
        ("amqp://host/v%252Fx?queue=q", ("v%2Fx", None, None, "host", 5672, "", "q", "q")),
        ("amqp://host/%2F?routing_key=k", ("/", None, None, "host", 5672, "", "k", "")),
        (
            "AMQPS://u%40:p%2Fw%25%3A@[::1]/a%2Fb?exchange=e&routing_key=k",
            ("a/b", "u@", "p/w%:", "::1", 5671, "e", "k", ""),
        ),
        ("amqp://u:@host:1/v%20%3F?queue=q%20r", ("v ?", "u", "", "host", 1, "", "q r", "q r")),
    ],
)
async def test_parts_of_the_url(url: str, expected: tuple[Any, ...]) -> None:
    """E1: each part of the URL reaches the client, unquoted."""
    destination = open_url(url)
    assert isinstance(destination, RabbitmqDestination)
    place = destination._address
    [node] = place.nodes
    target = URL(node.url.get_secret_value())
    assert (
        _Connection(place, "test")._connection.vhost,
        target.user,
        target.password,
        target.host,
        target.port,
        place.exchange,
        place.routing_key,
        place.queue,
    ) == expected
    await destination.close()
