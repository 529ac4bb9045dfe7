"""RabbitMQ for the contract suite: a queue of a real server, reached through a relay that can be broken."""

import asyncio
import atexit
import contextlib
import functools
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import aio_pika
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from cloudevents.core.bindings.amqp import AMQPMessage, from_amqp_event

from receiver.destinations import Destination
from receiver.destinations.base import encode
from support.kinds_base import Kind, open_url
from support.servers_rabbitmq import RabbitMq


@functools.cache
def rabbitmq_server() -> RabbitMq:
    """Return the server of this test session, and start it if necessary."""
    server = RabbitMq().__enter__()
    atexit.register(server.__exit__, None, None, None)
    return server


class Relay:
    """Passes bytes on to a port of 127.0.0.1, or stops doing so."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.port = 0
        self.connections = 0
        self.allowance: int | None = None
        """Bytes to pass on before all connections are cut."""
        self.answers = asyncio.Event()
        """If it is cleared, the server's answers are held back."""
        self.answers.set()
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[Any]] = set()

    async def start(self) -> Self:
        """Listen, at the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Stop listening and cut all connections."""
        assert self._server is not None
        self._server.close()
        await self.cut()

    async def cut(self) -> None:
        """Cut all connections."""
        for task in self._serving:
            task.cancel()
        if self._serving:
            await asyncio.wait(self._serving)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        self.connections += 1
        with contextlib.suppress(asyncio.CancelledError, OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
            try:
                await asyncio.gather(self._pass(reader, far_writer), self._answer(far_reader, writer))
            finally:
                far_writer.transport.abort()
        writer.transport.abort()
        self._serving.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            if self.allowance is not None:
                data, self.allowance = data[: self.allowance], self.allowance - len(data)
            writer.write(data)
            await writer.drain()
            if self.allowance is not None and self.allowance <= 0:
                self.allowance = None
                break
        raise ConnectionResetError

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self.answers.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


@contextlib.asynccontextmanager
async def open_channel(server: RabbitMq) -> Any:
    """Open a channel of another client."""
    connection = await aio_pika.connect(server.url())
    async with connection, connection.channel() as channel:
        yield channel


async def drain(channel: AbstractChannel, queue: str) -> list[AbstractIncomingMessage]:
    """Take all messages out of a queue."""
    messages = []
    source = await channel.get_queue(queue, ensure=False)
    while (message := await source.get(fail=False)) is not None:
        await message.ack()
        messages.append(message)
    return messages


def to_structured(message: AbstractIncomingMessage) -> dict[str, Any]:
    """Return a message as a consumer reads it, in structured JSON."""
    event = from_amqp_event(
        AMQPMessage(
            properties={"content-type": message.content_type},
            application_properties=dict(message.headers),
            application_data=message.body,
        )
    )
    structured: dict[str, Any] = json.loads(encode(event))
    return structured


class RabbitmqKind(Kind):
    """A queue that the destination declares; its relay is cut while it is broken."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.server = rabbitmq_server()
        self.relay = Relay(self.server.port)
        self.queue = f"events-{uuid4()}"
        self._read: list[dict[str, Any]] = []

    async def __aenter__(self) -> Self:
        await self.relay.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.relay.stop()
        async with open_channel(self.server) as channel:
            await channel.queue_delete(self.queue)

    @property
    def url(self) -> str:
        """The URL that events are published to."""
        return self.server.url(f"?queue={self.queue}", port=self.relay.port)

    def open(self) -> Destination:
        """Open the queue."""
        return open_url(self.url)

    async def received(self) -> list[dict[str, Any]]:
        """Take the new messages from the queue."""
        async with open_channel(self.server) as channel:
            await channel.declare_queue(self.queue, durable=True, arguments={"x-queue-type": "quorum"})
            self._read += [to_structured(message) for message in await drain(channel, self.queue)]
        return list(self._read)

    async def break_down(self) -> None:
        """Cut all connections and refuse new ones."""
        await self.relay.stop()

    async def mend(self) -> None:
        """Listen again."""
        await self.relay.start()
