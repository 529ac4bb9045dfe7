"""`kafka:`: one record per event, a CloudEvent in binary mode, with the event's subject as its key.

`kafka://host:9092,host:9092/topic`; with a login and TLS
`kafka://user:password@host:9092/topic?security=sasl_ssl&mechanism=scram-sha-512`, where `security` is `ssl`,
`sasl_plain` or `sasl_ssl`, and `mechanism` is `plain` (the default), `scram-sha-256` or `scram-sha-512`.
"""

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import structlog
from aiokafka import AIOKafkaProducer  # type: ignore[import-untyped]
from aiokafka.conn import create_conn  # type: ignore[import-untyped]
from aiokafka.errors import (  # type: ignore[import-untyped]
    AuthenticationFailedError,
    ClusterAuthorizationFailedError,
    InvalidProducerIdMapping,
    KafkaConnectionError,
    KafkaError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    NotLeaderForPartitionError,
    OutOfOrderSequenceNumber,
    ProducerFenced,
    RecordListTooLargeError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    UnknownProducerId,
    UnknownTopicOrPartitionError,
    UnsupportedSaslMechanismError,
)
from aiokafka.producer.sender import Sender  # type: ignore[import-untyped]
from cloudevents.core.bindings.kafka import KafkaMessage, to_binary_event
from cloudevents.core.v1.event import CloudEvent

from receiver.destinations.base import closed
from receiver.errors import PublishFailed, PublishRejected, SettingsError
from receiver.settings import DestinationSettings

TIMEOUT: Final = 15.0
"""Seconds for a whole publish: a connection, the topic's leader and the confirmation of its replicas."""
START_TIMEOUT: Final = 10.0
"""Seconds to get ready once a broker has answered."""
REQUEST_TIMEOUT: Final = 4.0
"""Seconds for one request, so that a publish outlives a broker that hangs and finds the next leader."""
CLOSE_TIMEOUT: Final = 2.0
RETRY_DELAY: Final = 0.1
BATCH: Final = 64 * 1024
"""Bytes of one partition that go together; a larger record goes alone."""
MAX_REQUEST: Final = 64 * 1024 * 1024
"""Bytes; above what any event needs, because the topic's own limit is the one that counts."""
CLIENT_ID: Final = "clipia-receiver"
DEFAULT_PORT: Final = 9092
MAX_PORT: Final = 65_535

_HOST: Final = re.compile(
    r"((?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?"
)
_TOPIC: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_PROTOCOLS: Final[Mapping[str | None, str]] = MappingProxyType(
    {None: "PLAINTEXT", "ssl": "SSL", "sasl_plain": "SASL_PLAINTEXT", "sasl_ssl": "SASL_SSL"}
)
_MECHANISMS: Final[Mapping[str | None, str]] = MappingProxyType(
    {None: "PLAIN", "plain": "PLAIN", "scram-sha-256": "SCRAM-SHA-256", "scram-sha-512": "SCRAM-SHA-512"}
)
_OUT_OF_STEP: Final = (OutOfOrderSequenceNumber, UnknownProducerId, InvalidProducerIdMapping, ProducerFenced)
_TOO_LARGE: Final = (MessageSizeTooLargeError, RecordListTooLargeError)
_BAD_LOGIN: Final = (SaslAuthenticationFailed, UnsupportedSaslMechanismError, AuthenticationFailedError)
_ADVICE: Final[tuple[tuple[type[KafkaError] | tuple[type[KafkaError], ...], str, str], ...]] = (
    (UnknownTopicOrPartitionError, "no_topic", "there is no such topic: create it"),
    (
        TopicAuthorizationFailedError,
        "permission",
        "this user may not write: allow Write and Describe on the topic",
    ),
    (
        ClusterAuthorizationFailedError,
        "permission",
        "this user may not write: allow IdempotentWrite on the cluster",
    ),
    (_BAD_LOGIN, "auth", "see the user, the password and the mechanism in the URL"),
    (
        (LeaderNotAvailableError, NotLeaderForPartitionError),
        "no_leader",
        "a partition has no leader: see which brokers are down",
    ),
    (KafkaConnectionError, "connection", "is it up, and is security= in the URL what it expects?"),
)

log = structlog.get_logger()

# Every failure is told in our own words; the library's are hundreds of lines per outage, and at DEBUG the
# password.
_library_log = logging.getLogger("aiokafka")
if _library_log.level == logging.NOTSET:
    _library_log.setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What a URL says."""

    brokers: tuple[str, ...]
    topic: str
    security: Mapping[str, Any] = field(repr=False)

    @property
    def shown(self) -> str:
        """The topic and where it is, for messages."""
        return f"Kafka topic {self.topic} at {','.join(self.brokers)}"


class KafkaDestination:
    """Writes events to a Kafka topic through an idempotent producer that waits for all in-sync replicas.

    A producer is replaced at its first failure. It would try to send what has timed out for as long as the
    process lives, and after a refused batch it counts on where the broker does not.
    """

    concurrency = 128

    def __init__(self, settings: DestinationSettings) -> None:
        self._name = settings.name
        self._place = _parse(settings)
        self._producer: _Producer | None = None
        self._connecting: asyncio.Task[_Producer | PublishFailed] | None = None
        self._dropping: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    async def start(self) -> None:
        """Check, and only warn: the brokers may come later."""
        try:
            await self.check()
        except PublishFailed as error:
            log.warning("destination is not ready", destination=self._name, error=str(error))

    async def check(self) -> None:
        """See whether the topic is there and can be written, and warn where a broker may lose it."""
        topic = self._place.topic
        async with self._operation() as limit:
            producer = await self._connect()
            with self._use(producer, limit):
                await producer.partitions_for(topic)
                # What was known so far may be out of date.
                if not await producer.client.force_metadata_update():
                    raise KafkaConnectionError("no broker answers")
                await producer.partitions_for(topic)
                cluster = producer.client.cluster
                if cluster.available_partitions_for_topic(topic) != cluster.partitions_for_topic(topic):
                    raise LeaderNotAvailableError
                copies = producer.count_copies(topic)
        if copies < 2:  # noqa: PLR2004
            problem = "the topic has one replica: what is confirmed is lost with its broker"
            log.warning("the destination may lose events", destination=self._name, problem=problem)

    async def publish(self, event: CloudEvent) -> None:
        """Write the event and return when all in-sync replicas have it."""
        message = _encode(event)
        async with self._operation() as limit:
            try:
                try:
                    await self._send(message, limit)
                except _OUT_OF_STEP:
                    # Another event's failure has left a hole in the count, and the broker took none after it.
                    await self._send(message, limit)
            except _TOO_LARGE as error:
                raise self._too_large(message) from error

    async def close(self) -> None:
        """Wait for what is under way, which the timeout bounds, and disconnect."""
        self._closed = True
        await self._idle.wait()
        if self._connecting is not None:
            self._connecting.cancel()
            await asyncio.wait([self._connecting])
        if self._producer is not None:
            self._drop(self._producer)
        if self._dropping:
            await asyncio.wait(self._dropping)

    @contextlib.asynccontextmanager
    async def _operation(self) -> AsyncIterator[asyncio.Timeout]:
        """Bound what is done inside, and raise the library's failures as PublishFailed."""
        if self._closed:
            raise closed()
        self._under_way += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(TIMEOUT) as limit:
                yield limit
        except TimeoutError as error:
            raise PublishFailed(
                f"{self._place.shown} did not confirm within {TIMEOUT:g} s: see whether its partitions have "
                "leaders and as many in-sync replicas as min.insync.replicas asks for",
                reason="timeout",
            ) from error
        except KafkaError as error:
            raise self._failed(error) from error
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def _send(self, message: KafkaMessage, limit: asyncio.Timeout) -> None:
        producer = await self._connect()
        with self._use(producer, limit):
            await producer.send_and_wait(
                self._place.topic,
                message.value,
                key=message.key,
                headers=list(message.headers.items()),
            )

    @contextlib.contextmanager
    def _use(self, producer: "_Producer", limit: asyncio.Timeout) -> Iterator[None]:
        """Begin nothing more on a producer that fails inside; it ends with its last user."""
        producer.users += 1
        try:
            yield
        except KafkaError:
            producer.broken = True
            raise
        except asyncio.CancelledError:
            # A publish that was only cancelled has left its record in a batch, and that is no failure.
            producer.broken |= limit.expired()
            raise
        finally:
            producer.users -= 1
            if producer.broken and not producer.users:
                self._drop(producer)

    async def _connect(self) -> "_Producer":
        """Return the producer or make one; all who wait for it share its failure."""
        if self._producer is not None and not self._producer.broken:
            return self._producer
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._start_producer())
        outcome = await asyncio.shield(self._connecting)
        if isinstance(outcome, PublishFailed):
            raise PublishFailed(str(outcome), reason=outcome.reason)
        return outcome

    async def _start_producer(self) -> "_Producer | PublishFailed":
        try:
            producer = _Producer(await self._find_broker(), self._place.security)
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    await producer.start()
            except BaseException:
                self._drop(producer)
                raise
        except TimeoutError:
            return PublishFailed(
                f"{self._place.shown}: a broker answers, but the cluster does not get ready to take records: "
                "can its brokers be reached at what they advertise (advertised.listeners)?",
                reason="timeout",
            )
        except KafkaError as error:
            return self._failed(error)
        except PublishFailed as error:
            return error
        finally:
            self._connecting = None
        self._producer = producer
        return producer

    async def _find_broker(self) -> str:
        """Return the first of the URL's brokers that answers. The library would not say why none does."""
        attempts = [asyncio.create_task(self._try(broker)) for broker in self._place.brokers]
        failures: list[PublishFailed] = []
        try:
            for attempt in asyncio.as_completed(attempts):
                broker, failure = await attempt
                if failure is None:
                    return broker
                failures.append(failure)
        finally:
            for task in attempts:
                task.cancel()
            await asyncio.wait(attempts)
        raise failures[0]

    async def _try(self, broker: str) -> tuple[str, PublishFailed | None]:
        host, _, port = broker.rpartition(":")
        options = {"client_id": CLIENT_ID, "request_timeout_ms": round(REQUEST_TIMEOUT * 1000)}
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                connection = await create_conn(host.strip("[]"), int(port), **options, **self._place.security)
        except TimeoutError:
            text = f"Kafka at {broker} did not answer within {REQUEST_TIMEOUT:g} s"
            return broker, PublishFailed(text, reason="timeout")
        except KafkaError as error:
            return broker, self._failed(error, shown=f"Kafka at {broker}")
        except OSError as error:
            return broker, PublishFailed(f"Kafka at {broker}: {error}", reason="connection")
        connection.close()
        return broker, None

    def _drop(self, producer: "_Producer") -> None:
        task = asyncio.create_task(producer.drop())
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)

    def _failed(self, error: KafkaError, *, shown: str | None = None) -> PublishFailed:
        shown = shown or self._place.shown
        text = str(error) or type(error).__name__
        for kind, reason, advice in _ADVICE:
            if isinstance(error, kind):
                return PublishFailed(f"{shown}: {text}: {advice}", reason=reason)
        return PublishFailed(f"{shown}: {text}", reason="refused")

    def _too_large(self, message: KafkaMessage) -> PublishFailed | PublishRejected:
        shown, size = self._place.shown, len(message.value)
        if size >= BATCH:
            return PublishRejected(
                f"{shown} takes no record of {size} bytes: see its max.message.bytes", reason="too_large"
            )
        # Others were in the batch, and nobody says which of them was too large.
        return PublishFailed(
            f"{shown} takes no batch of {BATCH} bytes: raise its max.message.bytes", reason="too_large"
        )


class _Sender(Sender):  # type: ignore[misc]  # the library has no types
    """Knows its requests under way: the library's own waits for each until it has succeeded."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.requests: set[asyncio.Task[Any]] = set()

    async def _send_produce_req(self, *args: Any) -> None:
        task: Any = asyncio.current_task()
        self.requests.add(task)
        task.add_done_callback(self.requests.discard)
        await super()._send_produce_req(*args)


class _Producer(AIOKafkaProducer):  # type: ignore[misc]  # the library has no types
    """A producer that can be left with records that were not confirmed."""

    def __init__(self, broker: str, security: Mapping[str, Any]) -> None:
        timeout, delay = round(REQUEST_TIMEOUT * 1000), round(RETRY_DELAY * 1000)
        super().__init__(
            bootstrap_servers=broker,
            client_id=CLIENT_ID,
            acks="all",
            enable_idempotence=True,
            request_timeout_ms=timeout,
            retry_backoff_ms=delay,
            max_batch_size=BATCH,
            max_request_size=MAX_REQUEST,
            **security,
        )
        self._sender = _Sender(
            self.client,
            acks=-1,
            txn_manager=self._txn_manager,
            message_accumulator=self._message_accumulator,
            retry_backoff_ms=delay,
            request_timeout_ms=timeout,
        )
        self._closed: bool
        self.users = 0
        self.broken = False

    def count_copies(self, topic: str) -> int:
        """Return the number of replicas of the partition that has the fewest."""
        partitions = self.client.cluster._partitions[topic]  # noqa: SLF001 - told nowhere else
        return min(len(partition.replicas) for partition in partitions.values())

    async def drop(self) -> None:
        """Disconnect at once; the library's `stop` first sends all that waits, for as long as it takes."""
        if self._closed:
            return
        self._closed = True
        tasks = set(self._sender.requests)
        if self._sender.sender_task is not None:
            tasks.add(self._sender.sender_task)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for connection in self.client._conns.values():  # noqa: SLF001
            # A broker that hangs reads nothing any more, and a polite end waits until all is read.
            if connection._writer is not None:  # noqa: SLF001
                connection._writer.transport.abort()  # noqa: SLF001
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self.client.close()


def _encode(event: CloudEvent) -> KafkaMessage:
    try:
        return to_binary_event(event, key_mapper=lambda event: (event.get_subject() or "").encode() or None)
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as a record", reason="encoding") from error


def _parse(settings: DestinationSettings) -> _Place:
    wrong = SettingsError(
        f"destination {settings.name!r}: write kafka://host:9092,host:9092/topic, with "
        "?security=ssl for TLS, and with a login kafka://user:password@host:9092/topic?security=sasl_ssl "
        "(or sasl_plain, without TLS) and &mechanism=scram-sha-512 (or scram-sha-256, plain); "
        "characters such as @ : / % in the password are written as %40 %3A %2F %25"
    )
    try:
        parts = urlsplit(settings.url.get_secret_value())
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        # The error would quote the URL.
        raise wrong from None
    query = dict(pairs)
    login, at, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    brokers = [_parse_broker(host) for host in hosts.split(",")]
    topic = parts.path.removeprefix("/")
    protocol = _PROTOCOLS.get(query.get("security"))
    mechanism = _MECHANISMS.get(query.get("mechanism"))
    needs_login = protocol is not None and protocol.startswith("SASL")
    if (
        not all(brokers)
        or not _TOPIC.fullmatch(topic)
        or parts.fragment
        or len(query) != len(pairs)
        or not query.keys() <= {"security", "mechanism"}
        or protocol is None
        or mechanism is None
        or bool(at) is not needs_login
        or (needs_login and not (user and password))
        or ("mechanism" in query and not needs_login)
    ):
        raise wrong
    security: dict[str, Any] = {"security_protocol": protocol}
    if protocol.endswith("SSL"):
        security["ssl_context"] = ssl.create_default_context()
    if needs_login:
        security |= {
            "sasl_mechanism": mechanism,
            "sasl_plain_username": unquote(user),
            "sasl_plain_password": unquote(password),
        }
    return _Place(
        brokers=tuple(filter(None, brokers)),
        topic=topic,
        security=MappingProxyType(security),
    )


def _parse_broker(text: str) -> str | None:
    found = _HOST.fullmatch(text)
    if found is None:
        return None
    port = DEFAULT_PORT if found[2] is None else int(found[2])
    return f"{found[1]}:{port}" if 0 < port <= MAX_PORT else None
