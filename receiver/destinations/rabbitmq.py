"""`amqp:` and `amqps:`: RabbitMQ, with mandatory, persistent messages and publisher confirms.

`amqps://user:password@host:port/vhost?exchange=…&routing_key=…&queue=…`: a `queue` is declared (durable,
quorum) and, with an `exchange`, bound to it; without a `queue` nothing is declared. Without an `exchange` the
routing key is the name of a queue. Several nodes of a cluster are separated by commas: `host:port,host:port`.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import uuid4

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
from cloudevents.core.bindings.amqp import CE_PREFIX_UNDERSCORE, CONTENT_TYPE_PROPERTY, to_binary_event
from cloudevents.core.v1.event import CloudEvent
from pamqp.header import ContentHeader
from yarl import URL

from receiver.destination_settings import DestinationSettings
from receiver.destinations.amqp_url import Node, Place, read_url
from receiver.destinations.base import Broker, Failure, quoted, step_timeout
from receiver.destinations.connections import Connection, SharedConnection
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected

OPEN_TIMEOUT: Final = 10.0
"""Seconds to connect, log in and declare."""
CLOSE_TIMEOUT: Final = 3.0
"""Seconds for a polite end; then the socket is cut."""
MAX_IN_FLIGHT: Final = 128
HEARTBEAT: Final = 10
"""Seconds; a connection on which nothing arrives is given up after about three of them."""
MAX_SHORT: Final = 255
"""Bytes of a message property that is a short string."""
FRAME_OVERHEAD: Final = 8
PERSISTENT: Final = 2

_TOO_LARGE: Final = re.compile(r"message size [0-9]+ is larger than .*max size ([0-9]+)")
_ADVICE: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    (ProbableAuthenticationError, "auth", "{error}: correct the user or the password"),
    # The library's own words for a refused virtual host say nothing.
    (InvalidFrameError, "refused", "see that the virtual host exists and that the user may open it"),
    (ChannelNotFoundEntity, "not_found", "{error}: make it, or have a queue declared with queue= in the URL"),
    (ChannelAccessRefused, "permission", "{error}: grant it, or leave out queue= where the queue is there"),
)

# Every failure is told in our own words; the library's have a line more for each node that is down.
_library_log = logging.getLogger("aiormq")
if _library_log.level == logging.NOTSET:
    _library_log.setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class _Message:
    """An event in the binary mode of CloudEvents' AMQP binding; `head` is what goes before the body."""

    body: bytes
    properties: spec.Basic.Properties
    head: bytes


class RabbitmqDestination(Broker):
    """Publishes events to an exchange or a queue, many at once on one channel."""

    concurrency = 2 * MAX_IN_FLIGHT

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._place = place = read_url(settings)
        self._connections = SharedConnection(
            lambda: _Connection(place, settings.name),
            shown=place.shown,
            max_users=settings.concurrency or MAX_IN_FLIGHT,
            timeout=settings.timeout,
        )
        self._running: set[asyncio.Task[Failure | None]] = set()

    async def check(self) -> None:
        """Declare the queue, or see that the exchange or the queue is there."""
        await self._run(self._check)

    async def publish(self, event: CloudEvent) -> None:
        """Publish the event and return when it is confirmed and was not returned."""
        message = _encode(event)
        await self._run(lambda connection: connection.publish(message))

    async def close(self) -> None:
        """Wait for what is under way, which the timeout bounds, and disconnect."""
        await self._connections.close()

    async def _check(self, connection: "_Connection") -> None:
        difference = await connection.prepare()
        if difference:
            self._warn_of_losses(
                f"the queue is not what would be declared, see that it is durable: {difference}"
            )

    async def _run(self, work: Callable[["_Connection"], Awaitable[None]]) -> None:
        # In a task of its own, which nobody cancels: the library takes the return of a message whose publish
        # was cancelled for another's, or ends the channel over it.
        running = asyncio.create_task(self._try(work))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        failure = await asyncio.shield(running)
        if failure is not None:
            raise failure

    async def _try(self, work: Callable[["_Connection"], Awaitable[None]]) -> Failure | None:
        """Return a failure instead of raising it: nobody may be left to take it."""
        try:
            await self._connections.run(work)
        except (PublishFailed, PublishRejected) as failure:
            return failure
        return None


class _Socket(TransportFactory):
    """Keeps hold of the connection's socket: closing it politely takes for ever where nobody reads."""

    def __init__(self, factory: TransportFactory) -> None:
        self._factory = factory
        self._writer: asyncio.StreamWriter | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect."""
        reader, self._writer = await self._factory.create(url, **kwargs)
        return reader, self._writer

    def cut(self) -> None:
        """Close the socket whatever was to be sent."""
        if self._writer is not None:
            self._writer.transport.abort()


class _Connection(Connection):
    """A connection and its channel in confirm mode. Methods raise PublishFailed."""

    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self._name = name
        self._ids: set[str] = set()
        self._channel: AbstractChannel
        self._choose(place.nodes[0])

    def _choose(self, node: Node) -> None:
        url = URL(node.url.get_secret_value()).update_query(heartbeat=str(HEARTBEAT))
        self._socket = _Socket(TLSTransportFactory() if url.scheme == "amqps" else TCPTransportFactory())
        self._connection = aiormq.Connection(
            url,
            context=self._place.tls,
            transport_factory=self._socket,
            client_properties={"connection_name": f"clipia-receiver {self._name}"},
        )
        # The library decodes a %2F in the name once more.
        self._connection.vhost = self._place.vhost

    @property
    def is_open(self) -> bool:
        """Whether publishing may work."""
        return self._connection.is_opened and not self._channel.is_closed

    async def open(self) -> None:
        """Connect to the first node that lets us, log in, and prepare the place."""
        nodes, failures = self._place.nodes, list[PublishFailed]()
        seconds = step_timeout(OPEN_TIMEOUT, self._place.timeout) / len(nodes)
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
        """Declare the queue and its binding, or see that the exchange or queue is there.

        Returns how the queue differs from what we would declare.
        """
        place = self._place
        difference = None
        with _translated(place.shown):
            await self._connection.ready()
            if place.queue:
                try:
                    async with self._spare_channel() as channel:
                        await channel.queue_declare(
                            place.queue, durable=True, arguments={"x-queue-type": "quorum"}
                        )
                except ChannelPreconditionFailed as error:
                    difference = quoted(error)
            async with self._spare_channel() as channel:
                if place.queue and place.exchange:
                    await channel.queue_bind(place.queue, place.exchange, place.routing_key)
                elif place.exchange:
                    await channel.exchange_declare(place.exchange, passive=True)
                else:
                    await channel.queue_declare(place.routing_key, passive=True)
        return difference

    async def publish(self, message: _Message) -> None:
        """Publish and wait for the confirm. Also raises PublishRejected."""
        frame_max = self._connection.connection_tune.frame_max
        if frame_max and len(message.head) > frame_max - FRAME_OVERHEAD:
            raise PublishRejected("the event's attributes are too large for AMQP", reason="too_large")
        message_id = str(message.properties.message_id)
        if message_id in self._ids:
            # The library finds the publish that a returned message belongs to by its id alone.
            raise PublishFailed("the delivery is being published already", reason="in_flight")
        self._ids.add(message_id)
        try:
            with _translated(self._place.shown):
                await self._connection.ready()
                answer = await self._send(message)
        finally:
            self._ids.discard(message_id)
        if not isinstance(answer, spec.Basic.Ack):
            raise PublishFailed(
                "RabbitMQ did not take the message (basic.nack): see whether the queue is full", reason="nack"
            )

    def survives(self, failure: Failure) -> bool:
        """Return False also where our queue or its binding was deleted: opening declares them again."""
        return failure.reason != "timeout" and not (failure.reason == "unroutable" and self._place.queue)

    async def explain_timeout(self) -> PublishFailed | None:
        """Say so where RabbitMQ has announced that it takes no messages for now."""
        try:
            async with asyncio.timeout(0):
                await self._connection.ready()
        except TimeoutError:
            return PublishFailed(
                f"{self._place.shown} takes no messages for now: see to its memory or disk alarm",
                reason="blocked",
            )
        return None

    async def close(self) -> None:
        """Disconnect, by force where that takes long."""
        closing = asyncio.create_task(self._connection.close(ConnectionClosed(0, "closed")))
        await asyncio.wait([closing], timeout=CLOSE_TIMEOUT)
        self._socket.cut()
        await asyncio.wait([closing], timeout=CLOSE_TIMEOUT)

    async def _send(self, message: _Message) -> object:
        """Return RabbitMQ's answer, None for its refusal."""
        place = self._place
        try:
            return await self._channel.basic_publish(
                message.body,
                exchange=place.exchange,
                routing_key=place.routing_key,
                properties=message.properties,
                mandatory=True,
            )
        except PublishError:
            raise PublishFailed(
                f"no queue takes messages of exchange {place.exchange!r} with routing key "
                f"{place.routing_key!r}: bind one, or have one declared with queue= in the URL",
                reason="unroutable",
            ) from None
        except DeliveryError:
            return None
        except ChannelPreconditionFailed as error:
            # It has ended the channel and all that was under way there, but one message is to blame.
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
        """Open a channel for what may fail, which ends a channel and all that is under way there."""
        channel = await self._connection.channel(publisher_confirms=False)
        yield channel
        await channel.close()


@contextlib.contextmanager
def _translated(shown: str) -> Iterator[None]:
    """Raise what the library raises as PublishFailed that says what to do."""
    try:
        yield
    except (PublishFailed, PublishRejected):
        raise
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody has cancelled us: it is what the library leaves to those who wait for a lost connection.
        raise PublishFailed(f"{shown}: the connection was lost", reason="connection") from None
    except TimeoutError as error:
        raise PublishFailed(f"{shown} did not answer in time", reason="timeout") from error
    except Exception as error:
        for kind, reason, advice in _ADVICE:
            if isinstance(error, kind):
                raise PublishFailed(
                    f"{shown}: {advice.format(error=quoted(error))}", reason=reason
                ) from error
        # The library passes on whatever has ended its reader.
        raise PublishFailed(f"{shown}: {cause(error)}", reason="connection") from error


def _encode(event: CloudEvent) -> _Message:
    """Return the event as a message. Raises PublishRejected for what AMQP or JSON cannot hold."""
    try:
        message = to_binary_event(event)
        headers = dict(message.application_properties)
        for name, value in event.get_attributes().items():
            if isinstance(value, datetime):
                # The binding's milliseconds would lose the rest, and are no time to AMQP 0-9-1.
                headers[CE_PREFIX_UNDERSCORE + name] = value.isoformat().replace("+00:00", "Z")
        body = message.application_data
        properties = spec.Basic.Properties(
            content_type=message.properties.get(CONTENT_TYPE_PROPERTY),
            headers=headers,
            delivery_mode=PERSISTENT,
            message_id=_short(event.get_extension("deliveryid") or event.get_id()) or uuid4().hex,
            correlation_id=_short(event.get_subject()),
            message_type=_short(event.get_type()),
            timestamp=event.get_time(),
            app_id="clipia-receiver",
        )
        head = ContentHeader(body_size=len(body), properties=properties).marshal()
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as a message", reason="encoding") from error
    return _Message(body=body, properties=properties, head=head)


def _short(value: Any) -> str | None:
    """Return the value as a short string, None where it is none."""
    text = str(value or "")
    return text if 0 < len(text.encode()) <= MAX_SHORT else None
