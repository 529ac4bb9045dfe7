"""`amqp:` and `amqps:`: RabbitMQ, with mandatory, persistent messages and publisher confirms.

`amqps://user:password@host:port/vhost?exchange=…&routing_key=…&queue=…`: a `queue` is declared (durable,
quorum) and, with an `exchange`, bound to it; without a `queue` no declaration is made. Without an `exchange`
the routing key is the name of a queue. Several nodes of a cluster are separated by commas:
`host:port,host:port`.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, Final, TypeVar

import aiormq
from aiormq import TransportFactory, spec
from aiormq.abc import AbstractChannel
from aiormq.connection import TCPTransportFactory, TLSTransportFactory
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionClosed,
    DeliveryError,
    InvalidFrameError,
    ProbableAuthenticationError,
    PublishError,
)
from cloudevents.core.v1.event import CloudEvent
from yarl import URL

from receiver.destination_settings import DestinationSettings
from receiver.destinations.amqp_message import Message, encode_message
from receiver.destinations.amqp_url import Address, Node, read_url
from receiver.destinations.base import CheckedDestination, Failure, limit_log, quoted, step_timeout
from receiver.destinations.connections import Connection, SharedConnection
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected

OPEN_SECONDS: Final = 10.0
"""Seconds to connect, log in and declare."""
CLOSE_SECONDS: Final = 3.0
"""Seconds for a clean end; then the socket is cut."""
MAX_IN_FLIGHT: Final = 128
HEARTBEAT_SECONDS: Final = 10
"""A connection counts as lost if no byte arrives for about three heartbeats."""
FRAME_OVERHEAD_BYTES: Final = 8

_TOO_LARGE: Final = re.compile(r"message size [0-9]+ is larger than .*max size ([0-9]+)")
_ADVICE: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    (ProbableAuthenticationError, "auth", "{error}: correct the user or the password"),
    # The library's own text about a virtual host that is missing or not allowed does not explain it.
    (InvalidFrameError, "refused", "check that the virtual host exists and that the user may open it"),
    (
        ChannelNotFoundEntity,
        "not_found",
        "{error}: create it, or let the receiver declare a queue with queue= in the URL",
    ),
    (ChannelAccessRefused, "permission", "{error}: grant it, or leave out queue= if the queue exists"),
)

ResultT = TypeVar("ResultT")

# The receiver logs every failure itself; the library adds a line for each node that is down.
limit_log("aiormq", logging.CRITICAL)


class RabbitmqDestination(CheckedDestination):
    """Publishes events to an exchange or a queue, many at once on one channel."""

    concurrency = 4 * MAX_IN_FLIGHT

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._address = address = read_url(settings)
        self._connections = SharedConnection(
            lambda: _Connection(address, settings.name),
            shown=address.shown,
            max_users=settings.concurrency or MAX_IN_FLIGHT,
            timeout=settings.timeout,
        )
        self._running: set[asyncio.Task[Any]] = set()

    async def check(self) -> None:
        """Declare the queue, or check that the exchange or the queue exists."""
        await self._run(self._check)

    async def publish(self, event: CloudEvent) -> None:
        """Publish the event and return when it is confirmed and was not returned."""
        message = encode_message(event)
        await self._run(lambda connection: connection.publish(message))

    async def publish_first(self, events: Sequence[CloudEvent]) -> Sequence[Failure | None]:
        """Publish up to `MAX_IN_FLIGHT` events; see `GroupDestination`."""
        events = events[:MAX_IN_FLIGHT]
        messages, rejected = list[Message](), dict[int, Failure]()
        for number, event in enumerate(events):
            try:
                messages.append(encode_message(event))
            except PublishRejected as rejection:
                rejected[number] = rejection

        async def publish(connection: _Connection, failures: list[Failure | None]) -> None:
            async def send(number: int) -> None:
                try:
                    await connection.publish(messages[number])
                except (PublishFailed, PublishRejected) as failure:
                    failures[number] = failure
                else:
                    failures[number] = None

            await asyncio.gather(*map(send, range(len(messages))))

        failures = iter(await self._finish(self._connections.run_all(len(messages), publish)))
        return [rejected.get(number) or next(failures) for number in range(len(events))]

    async def close(self) -> None:
        """Let the publishes under way end, which the timeout bounds, and disconnect."""
        await self._connections.close()

    async def _check(self, connection: "_Connection") -> None:
        difference = await connection.prepare()
        if difference:
            self._warn_of_losses(
                f"the queue differs from the declaration, check that it is durable: {difference}"
            )

    async def _run(self, work: Callable[["_Connection"], Awaitable[None]]) -> None:
        failure = await self._finish(self._attempt(work))
        if failure is not None:
            raise failure

    async def _finish(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        # In a task of its own, which is never cancelled: if a publish is cancelled and its message returned,
        # the library takes that for the return of another message, or ends the channel.
        running = asyncio.create_task(work)
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        return await asyncio.shield(running)

    async def _attempt(self, work: Callable[["_Connection"], Awaitable[None]]) -> Failure | None:
        """Do the work and return its failure; asyncio would report a raised one that no caller awaits."""
        try:
            await self._connections.run(work)
        except (PublishFailed, PublishRejected) as failure:
            return failure
        return None


class _Socket(TransportFactory):
    """Keeps the connection's socket, to cut it: a clean end takes for ever if the broker does not read."""

    def __init__(self, factory: TransportFactory) -> None:
        self._factory = factory
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, self._writer = await self._factory.create(url, **kwargs)
        return reader, self._writer

    def cut(self) -> None:
        """Close the socket and drop unsent bytes."""
        if self._writer is not None:
            self._writer.transport.abort()


class _Connection(Connection):
    """A connection and its channel in confirm mode. Methods raise PublishFailed."""

    def __init__(self, address: Address, name: str) -> None:
        self._address = address
        self._name = name
        self._ids: set[str] = set()
        self._channel: AbstractChannel
        self._choose(address.nodes[0])

    def _choose(self, node: Node) -> None:
        url = URL(node.url.get_secret_value()).update_query(heartbeat=str(HEARTBEAT_SECONDS))
        self._socket = _Socket(TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory())
        self._connection = aiormq.Connection(
            url,
            context=self._address.tls,
            transport_factory=self._socket,
            client_properties={"connection_name": f"clipia-receiver {self._name}"},
        )
        # The library would decode a %2F in the name a second time.
        self._connection.vhost = self._address.vhost

    @property
    def is_open(self) -> bool:
        return self._connection.is_opened and not self._channel.is_closed

    async def open(self) -> None:
        """Connect to the first node that accepts the login, and declare the queue."""
        nodes, failures = self._address.nodes, list[PublishFailed]()
        # The nodes share the time, so a node that hangs leaves some for the next one.
        seconds = step_timeout(OPEN_SECONDS, self._address.timeout) / len(nodes)
        for node in nodes:
            if failures:
                self._socket.cut()
                await self.close()
                self._choose(node)
            try:
                await self._open(node, seconds)
            except PublishFailed as failure:
                failures.append(failure)
            else:
                return
        raise PublishFailed("; ".join(map(str, failures)), reason=failures[0].reason)

    async def _open(self, node: Node, seconds: float) -> None:
        with _translated(node.shown):
            async with asyncio.timeout(seconds):
                await self._connection.connect()
                await self.prepare()
                self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)

    async def prepare(self) -> str | None:
        """Declare the queue and its binding, or check that the exchange or queue exists.

        Returns how an existing queue differs from the declaration; None if it does not.
        """
        address = self._address
        difference = None
        with _translated(address.shown):
            await self._connection.ready()
            if address.queue:
                try:
                    async with self._spare_channel() as channel:
                        await channel.queue_declare(
                            address.queue, durable=True, arguments={"x-queue-type": "quorum"}
                        )
                except ChannelPreconditionFailed as error:
                    difference = quoted(error)
            async with self._spare_channel() as channel:
                if address.queue and address.exchange:
                    await channel.queue_bind(address.queue, address.exchange, address.routing_key)
                elif address.exchange:
                    await channel.exchange_declare(address.exchange, passive=True)
                else:
                    await channel.queue_declare(address.routing_key, passive=True)
        return difference

    async def publish(self, message: Message) -> None:
        """Publish and wait for the confirm. Also raises PublishRejected."""
        frame_max = self._connection.connection_tune.frame_max
        if frame_max and len(message.head) > frame_max - FRAME_OVERHEAD_BYTES:
            raise PublishRejected("the event's attributes are too large for AMQP", reason="too_large")
        message_id = str(message.properties.message_id)
        if message_id in self._ids:
            # The library finds the publish of a returned message by the message's id alone.
            raise PublishFailed("the delivery is being published already", reason="in_flight")
        self._ids.add(message_id)
        try:
            with _translated(self._address.shown):
                await self._connection.ready()
                answer = await self._send(message)
        finally:
            self._ids.discard(message_id)
        if not isinstance(answer, spec.Basic.Ack):
            raise PublishFailed(
                "RabbitMQ rejected the message (basic.nack): check whether the queue is full", reason="nack"
            )

    def survives(self, failure: Failure) -> bool:
        """Return False also if our queue or its binding was deleted: opening declares them again."""
        return failure.reason != "timeout" and not (failure.reason == "unroutable" and self._address.queue)

    async def explain_timeout(self) -> PublishFailed | None:
        """Explain the timeout if RabbitMQ has announced that it takes no messages for now."""
        try:
            async with asyncio.timeout(0):
                await self._connection.ready()
        except TimeoutError:
            return PublishFailed(
                f"{self._address.shown} takes no messages for now: clear its memory or disk alarm",
                reason="blocked",
            )
        return None

    async def close(self) -> None:
        """Disconnect, by force if it takes long."""
        closing = asyncio.create_task(self._connection.close(ConnectionClosed(0, "closed")))
        await asyncio.wait([closing], timeout=CLOSE_SECONDS)
        self._socket.cut()
        await asyncio.wait([closing], timeout=CLOSE_SECONDS)

    async def _send(self, message: Message) -> object:
        """Return RabbitMQ's answer, or None if it rejects the message."""
        address = self._address
        try:
            return await self._channel.basic_publish(
                message.body,
                exchange=address.exchange,
                routing_key=address.routing_key,
                properties=message.properties,
                mandatory=True,
                # Waiting until the socket takes the message would let one message at a time into the channel.
                wait=False,  # type: ignore[call-arg]  # its abstract class does not name it
            )
        except PublishError:
            raise PublishFailed(
                f"no queue takes messages of exchange {address.exchange!r} with routing key "
                f"{address.routing_key!r}: bind one, or let the receiver declare one with queue= in the URL",
                reason="unroutable",
            ) from None
        except DeliveryError:
            return None
        except ChannelPreconditionFailed as error:
            # Only one message is too large, but all publishes under way fail with the channel.
            limit = _TOO_LARGE.search(str(error))
            if limit and len(message.body) > int(limit[1]):
                raise PublishRejected(
                    f"{len(message.body)} bytes are more than RabbitMQ's max_message_size of {limit[1]}",
                    reason="too_large",
                ) from None
            raise PublishFailed(
                f"another message ended the channel: {quoted(error)}", reason="connection"
            ) from None

    @contextlib.asynccontextmanager
    async def _spare_channel(self) -> AsyncIterator[AbstractChannel]:
        """Open a channel for a request that may fail: a failure ends the channel and all publishes on it."""
        channel = await self._connection.channel(publisher_confirms=False)
        yield channel
        await channel.close()


@contextlib.contextmanager
def _translated(shown: str) -> Iterator[None]:
    """Raise errors of the library as PublishFailed, with the way to repair them."""
    try:
        yield
    except (PublishFailed, PublishRejected):
        raise
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # The task was not cancelled: the library cancels the futures that wait for a lost connection.
        raise PublishFailed(f"{shown}: the connection was lost", reason="connection") from None
    except TimeoutError as error:
        raise PublishFailed(f"{shown} did not answer in time", reason="timeout") from error
    except Exception as error:
        for kind, reason, advice in _ADVICE:
            if isinstance(error, kind):
                raise PublishFailed(
                    f"{shown}: {advice.format(error=quoted(error))}", reason=reason
                ) from error
        # The library raises any error that has ended its reader.
        raise PublishFailed(f"{shown}: {cause(error)}", reason="connection") from error
