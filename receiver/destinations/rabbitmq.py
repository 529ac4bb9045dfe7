"""`amqp:` and `amqps:`: RabbitMQ, with mandatory, persistent messages and publisher confirms.

`amqps://user:password@host:port/vhost?exchange=…&routing_key=…&queue=…`: a `queue` is declared (durable,
quorum) and, with an `exchange`, bound to it; without a `queue` nothing is declared. Without an `exchange` the
routing key is the name of a queue.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import uuid4

import structlog
from aiormq import Connection, TransportFactory, spec
from aiormq.abc import AbstractChannel
from aiormq.connection import TCPTransportFactory, TLSTransportFactory
from aiormq.exceptions import (
    AuthenticationError,
    ChannelAccessRefused,
    ChannelInvalidStateError,
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
from pydantic import SecretStr
from yarl import URL

from receiver.destinations.base import closed
from receiver.errors import PublishFailed, PublishRejected, SettingsError
from receiver.settings import DestinationSettings

TIMEOUT: Final = 15.0
"""Seconds for a whole publish, from waiting for a free place to the confirm."""
OPEN_TIMEOUT: Final = 10.0
"""Seconds to connect, log in and declare."""
CLOSE_TIMEOUT: Final = 3.0
"""Seconds for a polite end; then the socket is cut."""
MAX_IN_FLIGHT: Final = 128
HEARTBEAT: Final = 10
"""Seconds; a connection on which nothing arrives is given up after about three of them."""
MAX_PORT: Final = 65_535
MAX_SHORT: Final = 255
"""Bytes of a message property that is a short string."""
FRAME_OVERHEAD: Final = 8
PERSISTENT: Final = 2

_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_TOO_LARGE: Final = re.compile(r"message size [0-9]+ is larger than .*max size ([0-9]+)")
_ADVICE: Final[tuple[tuple[type[Exception], str, str], ...]] = (
    (ProbableAuthenticationError, "credentials", "{error}: correct the user or the password"),
    (AuthenticationError, "credentials", "{error}: allow the mechanism PLAIN"),
    # The library's own words for a refused virtual host say nothing.
    (InvalidFrameError, "refused", "see that the virtual host exists and that the user may open it"),
    (ChannelNotFoundEntity, "not_found", "{error}: make it, or have a queue declared with queue= in the URL"),
    (ChannelInvalidStateError, "connection", "the channel was closed"),
    (ChannelAccessRefused, "permission", "{error}: grant it, or leave out queue= where the queue is there"),
)
_Failure = PublishFailed | PublishRejected

log = structlog.get_logger()


class RabbitmqDestination:
    """Publishes events to an exchange or a queue, many at once on one channel."""

    concurrency = MAX_IN_FLIGHT

    def __init__(self, settings: DestinationSettings) -> None:
        url, self._place = _parse(settings)
        self._url = SecretStr(str(url))
        self._origin = f"{url.scheme}://{url.host_port_subcomponent}"
        self._name = settings.name
        self._places = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._link: _Link | None = None
        self._opening: asyncio.Task[_Link | PublishFailed] | None = None
        self._running: set[asyncio.Task[_Failure | None]] = set()
        self._leaving: dict[_Link, asyncio.Task[None]] = {}
        self._closed = False

    async def start(self) -> None:
        """Connect and declare; where that fails for now, say so and go on."""
        try:
            await self.check()
        except PublishFailed as error:
            log.warning("destination is not ready", destination=self._name, error=str(error))

    async def check(self) -> None:
        """Declare the queue, or see that the exchange or the queue is there."""
        await self._run(self._prepare)

    async def publish(self, event: CloudEvent) -> None:
        """Publish the event and return when it is confirmed and was not returned."""
        message = _Message(event)
        await self._run(lambda link: link.publish(message))

    async def close(self) -> None:
        """Give what is under way a moment to end, and disconnect."""
        self._closed = True
        if self._running:
            await asyncio.wait(self._running, timeout=CLOSE_TIMEOUT)
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._link is not None:
            self._let_go(self._link)
        while self._running or self._leaving:
            await asyncio.wait([*self._running, *self._leaving.values()])

    async def _prepare(self, link: "_Link") -> None:
        difference = await link.prepare()
        if difference:
            log.warning(
                "the queue differs from what would be declared and is used as it is: see that it is durable",
                destination=self._name,
                difference=difference,
            )

    async def _run(self, work: Callable[["_Link"], Awaitable[None]]) -> None:
        if self._closed:
            raise closed()
        # In a task of its own, which nobody cancels: the library takes the return of a message whose publish
        # was cancelled for another's, or ends the channel over it.
        running = asyncio.create_task(self._try(work))
        self._running.add(running)
        running.add_done_callback(self._running.discard)
        failure = await asyncio.shield(running)
        if failure is not None:
            raise failure

    async def _try(self, work: Callable[["_Link"], Awaitable[None]]) -> _Failure | None:
        """Return a failure instead of raising it: nobody may be left to take it."""
        link: _Link | None = None
        try:
            with _translated(self._origin):
                async with asyncio.timeout(TIMEOUT), self._places:
                    link = await self._get_link()
                    link.users += 1
                    await link.wait_until_unblocked()
                    await work(link)
        except PublishRejected as error:
            return error
        except PublishFailed as error:
            return error if link is None else await self._judge(error, link)
        finally:
            if link is not None:
                link.users -= 1
                if not link.is_open:
                    self._retire(link)
                if link is not self._link and not link.users:
                    self._let_go(link)
        return None

    async def _judge(self, error: PublishFailed, link: "_Link") -> PublishFailed:
        """Decide whether the connection is still good for the next publish."""
        if error.reason == "timeout":
            if await link.is_blocked():
                return PublishFailed(
                    f"{self._origin} takes no messages for now: see to its memory or disk alarm",
                    reason="blocked",
                )
            self._retire(link)
        if error.reason == "unroutable" and self._place.queue:
            # Somebody has deleted our queue or its binding. A new connection declares them again.
            self._retire(link)
        return error

    async def _get_link(self) -> "_Link":
        """Return the open connection or make one; all who wait for it share its failure."""
        if self._link is not None:
            if self._link.is_open:
                return self._link
            self._retire(self._link)
        if self._closed:
            raise closed()
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        outcome = await asyncio.shield(self._opening)
        if isinstance(outcome, PublishFailed):
            raise PublishFailed(str(outcome), reason=outcome.reason)
        return outcome

    async def _open(self) -> "_Link | PublishFailed":
        link = _Link(URL(self._url.get_secret_value()), self._place, name=self._name)
        try:
            with _translated(self._origin):
                async with asyncio.timeout(OPEN_TIMEOUT):
                    await link.open()
        except PublishFailed as error:
            self._let_go(link)
            return error
        except asyncio.CancelledError:
            self._let_go(link)
            raise
        finally:
            self._opening = None
        self._link = link
        return link

    def _retire(self, link: "_Link") -> None:
        """Begin nothing more on a connection; it ends with the last publish that is under way there."""
        if self._link is link:
            self._link = None
            if not link.users:
                self._let_go(link)

    def _let_go(self, link: "_Link") -> None:
        if self._link is link:
            self._link = None
        if link not in self._leaving:
            leaving = self._leaving[link] = asyncio.create_task(link.close())
            leaving.add_done_callback(lambda _: self._leaving.pop(link))


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where messages go, and the queue that is ours to declare."""

    exchange: str
    routing_key: str
    queue: str


class _Message:
    """An event in the binary mode of CloudEvents' AMQP binding."""

    def __init__(self, event: CloudEvent) -> None:
        """Encode the event. Raises PublishRejected for what AMQP or JSON cannot hold."""
        try:
            self.body, self.properties = _encode(event)
            self.head = ContentHeader(body_size=len(self.body), properties=self.properties).marshal()
        except (TypeError, ValueError, RecursionError) as error:
            raise PublishRejected("the event cannot be written as a message", reason="encoding") from error

    @property
    def id(self) -> str:
        """The delivery's id, where it fits."""
        return str(self.properties.message_id)


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


class _Link:
    """A connection and its channel in confirm mode. Methods raise what the library raises, if not said."""

    def __init__(self, url: URL, place: _Place, *, name: str) -> None:
        secure = url.scheme == "amqps"
        self._socket = _Socket(TLSTransportFactory() if secure else TCPTransportFactory())
        options: dict[str, Any] = {"ssl_shutdown_timeout": CLOSE_TIMEOUT} if secure else {}
        self._connection = Connection(
            url,
            transport_factory=self._socket,
            client_properties={"connection_name": f"clipia-receiver {name}"},
            **options,
        )
        self._channel: AbstractChannel | None = None
        self._place = place
        self._ids: set[str] = set()
        self.users = 0

    @property
    def is_open(self) -> bool:
        """Whether publishing may work."""
        return self._connection.is_opened and self._channel is not None and not self._channel.is_closed

    async def open(self) -> None:
        """Connect, log in, and prepare the place."""
        await self._connection.connect()
        await self.prepare()
        self._channel = await self._connection.channel(publisher_confirms=True, on_return_raises=True)

    async def prepare(self) -> str | None:
        """Declare the queue and its binding, or see that the exchange or queue is there.

        Returns how the queue differs from what we would declare.
        """
        place = self._place
        difference = None
        if place.queue:
            try:
                async with self._spare_channel() as channel:
                    await channel.queue_declare(
                        place.queue, durable=True, arguments={"x-queue-type": "quorum"}
                    )
            except ChannelPreconditionFailed as error:
                difference = str(error)
        async with self._spare_channel() as channel:
            if place.queue and place.exchange:
                await channel.queue_bind(place.queue, place.exchange, place.routing_key)
            elif place.exchange:
                await channel.exchange_declare(place.exchange, passive=True)
            else:
                await channel.queue_declare(place.routing_key, passive=True)
        return difference

    async def publish(self, message: _Message) -> None:
        """Publish and wait for the confirm. Also raises PublishFailed and PublishRejected."""
        if self._channel is None:
            raise ConnectionClosed(0, "not open")
        frame_max = self._connection.connection_tune.frame_max
        if frame_max and len(message.head) > frame_max - FRAME_OVERHEAD:
            raise PublishRejected("the event's attributes are too large for AMQP", reason="too_large")
        if message.id in self._ids:
            # The library finds the publish that a returned message belongs to by its id alone.
            raise PublishFailed("the delivery is being published already", reason="in_flight")
        self._ids.add(message.id)
        try:
            answer = await self._channel.basic_publish(
                message.body,
                exchange=self._place.exchange,
                routing_key=self._place.routing_key,
                properties=message.properties,
                mandatory=True,
            )
        except PublishError:
            raise self._unroutable() from None
        except DeliveryError:
            answer = None
        except ChannelPreconditionFailed as error:
            # It has ended the channel and all that was under way there, but one message is to blame.
            limit = _TOO_LARGE.search(str(error))
            if limit and len(message.body) > int(limit[1]):
                raise PublishRejected(str(error), reason="too_large") from None
            raise PublishFailed(f"another message ended the channel: {error}", reason="connection") from None
        finally:
            self._ids.discard(message.id)
        if not isinstance(answer, spec.Basic.Ack):
            raise PublishFailed(
                "RabbitMQ did not take the message (basic.nack): see whether the queue is full", reason="nack"
            )

    async def wait_until_unblocked(self) -> None:
        """Return when RabbitMQ takes messages."""
        await self._connection.ready()

    async def is_blocked(self) -> bool:
        """Return whether RabbitMQ has said that it takes no messages for now."""
        try:
            async with asyncio.timeout(0):
                await self._connection.ready()
        except TimeoutError:
            return True
        return False

    async def close(self) -> None:
        """Disconnect, by force where that takes long; publishes that are under way fail."""
        closing = asyncio.create_task(self._connection.close(ConnectionClosed(0, "closed")))
        await asyncio.wait([closing], timeout=CLOSE_TIMEOUT)
        self._socket.cut()
        await asyncio.wait([closing], timeout=CLOSE_TIMEOUT)

    @contextlib.asynccontextmanager
    async def _spare_channel(self) -> AsyncIterator[AbstractChannel]:
        """Open a channel for what may fail, which ends a channel and all that is under way there."""
        channel = await self._connection.channel(publisher_confirms=False)
        yield channel
        await channel.close()

    def _unroutable(self) -> PublishFailed:
        place = self._place
        return PublishFailed(
            f"no queue takes messages of exchange {place.exchange!r} with routing key {place.routing_key!r}: "
            "bind one, or have one declared with queue= in the URL",
            reason="unroutable",
        )


@contextlib.contextmanager
def _translated(origin: str) -> Iterator[None]:
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
        raise PublishFailed(f"{origin}: the connection was lost", reason="connection") from None
    except TimeoutError as error:
        raise PublishFailed(f"{origin} did not answer in time", reason="timeout") from error
    except Exception as error:
        for kind, reason, advice in _ADVICE:
            if isinstance(error, kind):
                raise PublishFailed(f"{origin}: {advice.format(error=error)}", reason=reason) from error
        # The library passes on whatever has ended its reader.
        raise PublishFailed(f"{origin}: {type(error).__name__}: {error}", reason="connection") from error


def _encode(event: CloudEvent) -> tuple[bytes, spec.Basic.Properties]:
    message = to_binary_event(event)
    headers = dict(message.application_properties)
    for name, value in event.get_attributes().items():
        if isinstance(value, datetime):
            # The binding's number of milliseconds would lose the rest, and is no time to AMQP 0-9-1.
            headers[CE_PREFIX_UNDERSCORE + name] = value.isoformat().replace("+00:00", "Z")
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
    return message.application_data, properties


def _short(value: Any) -> str | None:
    """Return the value as a short string, None where it is none."""
    text = str(value or "")
    return text if 0 < len(text.encode()) <= MAX_SHORT else None


def _parse(settings: DestinationSettings) -> tuple[URL, _Place]:
    try:
        url = URL(settings.url.get_secret_value())
        place = _parse_place(url)
        spec.Connection.Open(virtual_host=url.path[1:]).marshal()
    except (TypeError, ValueError):
        # The error would quote the URL.
        raise _unusable(settings) from None
    host_and_port = _HOST.fullmatch(url.host or "") and url.port != 0
    # An @ after the host is a password that was not escaped.
    if not host_and_port or url.fragment or "@" in url.raw_path:
        raise _unusable(settings)
    return url.with_query(heartbeat=str(HEARTBEAT)), place


def _parse_place(url: URL) -> _Place:
    """Return what the query says. Raises ValueError or TypeError for what AMQP or we do not know."""
    query = dict(url.query)
    if len(query) != len(url.query):
        raise ValueError("a parameter is given twice")
    place = _Place(**{"exchange": "", "queue": "", "routing_key": ""} | query)
    if not place.exchange:
        if not place.queue and not place.routing_key:
            raise ValueError("nothing says where to")
        if place.queue and place.routing_key not in {"", place.queue}:
            raise ValueError("the queue is not the one that messages go to")
        place = _Place(exchange="", routing_key=place.routing_key or place.queue, queue=place.queue)
    # The library checks names as it encodes them.
    spec.Queue.Declare(queue=place.queue if place.exchange else place.routing_key).marshal()
    spec.Basic.Publish(exchange=place.exchange, routing_key=place.routing_key).marshal()
    return place


def _unusable(settings: DestinationSettings) -> SettingsError:
    return SettingsError(
        f"destination {settings.name!r}: write amqp://user:password@host/vhost?queue=name or "
        "…?exchange=name&routing_key=key, with both for a queue to declare and bind"
    )
