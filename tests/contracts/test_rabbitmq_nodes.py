"""Several RabbitMQ nodes in one URL, as addresses of one real server."""

import asyncio
import contextlib
from urllib.parse import quote
from uuid import uuid4

import psutil
import pytest
from support.kinds_base import make_event, open_url, until
from support.kinds_rabbitmq import Relay, drain, open_channel, rabbitmq_server
from support.servers import free_port
from support.servers_rabbitmq import PASSWORD, RabbitMq

from receiver.destinations import rabbitmq as rabbitmq_module
from receiver.errors import PublishFailed


@pytest.fixture
def server() -> RabbitMq:
    """The server of the test session."""
    return rabbitmq_server()


def url_of(server: RabbitMq, queue: str, *ports: int) -> str:
    """Return a URL with several ports of this machine."""
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return server.url(f"?queue={queue}").replace(f"127.0.0.1:{server.port}", hosts)


async def test_the_next_node_takes_over(server: RabbitMq) -> None:
    """E4: if the connected node dies, the next event goes to another one, and no event is lost."""
    queue = f"events-{uuid4()}"
    async with Relay(server.port) as first, Relay(server.port) as second:
        destination = open_url(url_of(server, queue, first.port, second.port))
        events = [make_event() for _ in range(2)]
        await destination.publish(events[0])
        assert (first.connections, second.connections) == (1, 0)
        await first.stop()
        async with asyncio.timeout(30):
            while True:
                try:
                    await destination.publish(events[1])
                except PublishFailed:
                    # The event on the broken connection is tried again, as the outbox does.
                    await asyncio.sleep(0.05)
                else:
                    break
        assert second.connections == 1
        await destination.close()
        await first.start()
    async with open_channel(server) as channel:
        stored = {str(message.message_id) for message in await drain(channel, queue)}
        await channel.queue_delete(queue)
    assert stored == {str(event.get_extension("deliveryid")) for event in events}


async def test_nodes_that_are_down_or_silent(server: RabbitMq, monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: a node that is down and one that does not answer leave time for the one that works."""
    monkeypatch.setattr(rabbitmq_module, "OPEN_SECONDS", 6.0)
    queue = f"events-{uuid4()}"
    left = asyncio.Event()

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await reader.read()
        left.set()
        writer.close()

    async with await asyncio.start_server(keep, "127.0.0.1", 0) as silent:
        port = silent.sockets[0].getsockname()[1]
        destination = open_url(url_of(server, queue, free_port(), port, server.port), timeout=5)
        await destination.publish(make_event())
        async with asyncio.timeout(5):
            await left.wait()
    await destination.close()
    async with open_channel(server) as channel:
        assert len(await drain(channel, queue)) == 1
        await channel.queue_delete(queue)


async def test_each_node_s_failure_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """G8: if no node can be used the failure names each of them, and no password."""
    ports = [free_port(), free_port()]
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    destination = open_url(f"amqp://user:{quote(PASSWORD, safe='')}@{hosts}/?queue=q")
    with pytest.raises(PublishFailed) as caught:
        await destination.check()
    await destination.close()
    assert caught.value.reason == "connection"
    for port in ports:
        assert f"amqp://127.0.0.1:{port}: " in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert not caplog.records, "the library's own words are a line more for each node"


async def test_a_node_that_will_not_do_keeps_no_connection(server: RabbitMq) -> None:
    """E16: if a node accepts the login but lacks the queue, its connection is closed before the next one."""
    async with Relay(server.port) as first, Relay(server.port) as second:
        url = url_of(server, "q", first.port, second.port).replace("queue=q", f"routing_key={uuid4()}")
        destination = open_url(url)
        with pytest.raises(PublishFailed) as caught:
            await destination.check()
        assert caught.value.reason == "not_found"
        await until(lambda: not count_connections(first.port))
        await destination.close()


def count_connections(port: int) -> int:
    """Count this process's connections to a port."""
    remote = [tuple(connection.raddr) for connection in psutil.Process().net_connections()]
    return remote.count(("127.0.0.1", port))
