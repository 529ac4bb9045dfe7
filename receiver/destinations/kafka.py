"""`kafka:`: one record per event, a CloudEvent in binary mode, with the event's subject as its key.

`kafka://host:9092,host:9092/topic`; with a login and TLS
`kafka://user:password@host:9092/topic?security=sasl_ssl&mechanism=scram-sha-512`, where `security` is `ssl`,
`sasl_plain` or `sasl_ssl`, and `mechanism` is `plain` (the default), `scram-sha-256` or `scram-sha-512`.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

# aiokafka comes without types.
from aiokafka import AIOKafkaProducer
from aiokafka.conn import create_conn
from aiokafka.errors import (
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
from cloudevents.core.bindings.kafka import KafkaMessage, to_binary_event
from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import Broker, Failure, step_timeout
from receiver.destinations.connections import Connection, SharedConnection
from receiver.destinations.tls import open_tls
from receiver.destinations.urls import BrokerUrl, split_url, usable_url
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected, SettingsError

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
MAX_IN_FLIGHT: Final = 1024

_TOPIC: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_PROTOCOLS: Final[Mapping[str | None, str]] = MappingProxyType(
    {None: "PLAINTEXT", "ssl": "SSL", "sasl_plain": "SASL_PLAINTEXT", "sasl_ssl": "SASL_SSL"}
)
_MECHANISMS: Final = frozenset({"plain", "scram-sha-256", "scram-sha-512"})
_OUT_OF_STEP: Final = "out_of_step"
_ADVICE: Final[tuple[tuple[tuple[type[KafkaError], ...], str, str], ...]] = (
    ((UnknownTopicOrPartitionError,), "no_topic", "there is no such topic: create it"),
    ((TopicAuthorizationFailedError,), "permission", "allow Write and Describe on the topic"),
    ((ClusterAuthorizationFailedError,), "permission", "allow IdempotentWrite on the cluster"),
    (
        (SaslAuthenticationFailed, UnsupportedSaslMechanismError, AuthenticationFailedError),
        "auth",
        "see the user, the password and the mechanism in the URL",
    ),
    (
        (LeaderNotAvailableError, NotLeaderForPartitionError),
        "no_leader",
        "a partition has no leader: see which brokers are down",
    ),
    (
        (OutOfOrderSequenceNumber, UnknownProducerId, InvalidProducerIdMapping, ProducerFenced),
        _OUT_OF_STEP,
        "the broker counts otherwise than the producer",
    ),
    ((KafkaConnectionError,), "connection", "is it up, and is security= in the URL what it expects?"),
)

# Every failure is told in our own words; the library's are hundreds of lines per outage, and at DEBUG the
# password.
_library_log = logging.getLogger("aiokafka")
if _library_log.level == logging.NOTSET:
    _library_log.setLevel(logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What a URL says."""

    brokers: tuple[tuple[str, int], ...]
    topic: str
    shown: str
    security: Mapping[str, Any] = field(repr=False)
    timeout: float | None
    """Seconds for a whole publish."""

    @property
    def request_timeout(self) -> float:
        """Seconds for one request."""
        return step_timeout(REQUEST_TIMEOUT, self.timeout)


class KafkaDestination(Broker):
    """Writes events to a Kafka topic through an idempotent producer that waits for all in-sync replicas."""

    concurrency = 256

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._place = place = _parse(settings)
        self._connections = SharedConnection(
            lambda: _Producer(place),
            shown=place.shown,
            max_users=settings.concurrency or MAX_IN_FLIGHT,
            timeout=settings.timeout,
        )

    async def check(self) -> None:
        """See whether the topic is there and can be written, and warn where a broker may lose it."""
        copies = await self._connections.run(_Producer.count_copies)
        if copies < 2:
            self._warn_of_losses("the topic has one replica: what is confirmed is lost with its broker")

    async def publish(self, event: CloudEvent) -> None:
        """Write the event and return when all in-sync replicas have it."""
        message = _encode(event)
        deadline = self._connections.new_deadline()
        try:
            await self._connections.run(lambda producer: producer.publish(message), deadline=deadline)
        except PublishFailed as failure:
            if failure.reason != _OUT_OF_STEP:
                raise
            # Another event's failure has left a hole in the count, and the broker took none after it.
            await self._connections.run(lambda producer: producer.publish(message), deadline=deadline)

    async def close(self) -> None:
        """Wait for what is under way, which the timeout bounds, and disconnect."""
        await self._connections.close()


class _Producer(Connection):
    """A producer and its connections. Methods raise PublishFailed, if not said."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._producer: Any = None

    @property
    def is_open(self) -> bool:
        """Return True: its connections mend themselves."""
        return True

    async def open(self) -> None:
        """Find a broker, and get an id to count under."""
        place = self._place
        self._producer = AIOKafkaProducer(
            bootstrap_servers=await _find_broker(place),
            client_id=CLIENT_ID,
            acks="all",
            enable_idempotence=True,
            request_timeout_ms=round(place.request_timeout * 1000),
            retry_backoff_ms=round(RETRY_DELAY * 1000),
            max_batch_size=BATCH,
            max_request_size=MAX_REQUEST,
            **place.security,
        )
        late = (
            "answers, but does not get ready to take records: can its brokers be reached at what they "
            "advertise (advertised.listeners)?"
        )
        with _translated(place.shown, late=late):
            async with asyncio.timeout(step_timeout(START_TIMEOUT, place.timeout)):
                await self._producer.start()

    async def publish(self, message: KafkaMessage) -> None:
        """Write a record and wait for the confirmation. Also raises PublishRejected."""
        try:
            with _translated(self._place.shown):
                await self._producer.send_and_wait(
                    self._place.topic,
                    message.value,
                    key=message.key,
                    headers=list(message.headers.items()),
                )
        except (MessageSizeTooLargeError, RecordListTooLargeError) as error:
            raise self._too_large(message) from error

    async def count_copies(self) -> int:
        """See that each partition has a leader; return the replicas of the one that has the fewest."""
        topic, cluster = self._place.topic, self._producer.client.cluster
        with _translated(self._place.shown):
            await self._producer.partitions_for(topic)
            # What was known so far may be out of date.
            if not await self._producer.client.force_metadata_update():
                raise KafkaConnectionError("no broker answers")
            await self._producer.partitions_for(topic)
            if cluster.available_partitions_for_topic(topic) != cluster.partitions_for_topic(topic):
                raise LeaderNotAvailableError
        partitions = cluster._partitions[topic]  # noqa: SLF001 - told nowhere else
        return min(len(partition.replicas) for partition in partitions.values())

    def survives(self, failure: Failure) -> bool:
        """Return False.

        A producer would try to send what has timed out for as long as the process lives, and after a refused
        batch it counts on where the broker does not.
        """
        return False

    async def explain_timeout(self) -> PublishFailed:
        """Name the usual reasons."""
        return PublishFailed(
            f"{self._place.shown} did not confirm in time: see whether its partitions have leaders and as "
            "many in-sync replicas as min.insync.replicas asks for",
            reason="timeout",
        )

    async def close(self) -> None:
        """Disconnect at once; the library's `stop` first sends all that waits, for as long as it takes."""
        producer = self._producer
        if producer is None or producer._closed:  # noqa: SLF001
            return
        producer._closed = True  # noqa: SLF001 - it warns of producers that are not
        sender = producer._sender.sender_task  # noqa: SLF001
        if sender is not None:
            sender.cancel()
        for connection in list(producer.client._conns.values()):  # noqa: SLF001
            # A broker that hangs reads nothing any more, and a polite end waits until all is read.
            if connection._writer is not None:  # noqa: SLF001
                connection._writer.transport.abort()  # noqa: SLF001
            connection.close()
        if sender is not None:
            # It waits for its requests, which have failed with their connections.
            await asyncio.wait([sender], timeout=CLOSE_TIMEOUT)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await producer.client.close()

    def _too_large(self, message: KafkaMessage) -> Failure:
        shown, size = self._place.shown, len(message.value)
        if size >= BATCH:
            return PublishRejected(
                f"{shown} takes no record of {size} bytes: see its max.message.bytes", reason="too_large"
            )
        # Others were in the batch, and nobody says which of them was too large.
        return PublishFailed(
            f"{shown} takes no batch of {BATCH} bytes: raise its max.message.bytes", reason="too_large"
        )


async def _find_broker(place: _Place) -> str:
    """Return the first of the URL's brokers that answers. The library would not say why none does."""
    attempts = [asyncio.create_task(_try(place, host, port)) for host, port in place.brokers]
    failures: list[PublishFailed] = []
    try:
        for attempt in asyncio.as_completed(attempts):
            try:
                return await attempt
            except PublishFailed as failure:
                failures.append(failure)
    finally:
        for task in attempts:
            task.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
    raise failures[0]


async def _try(place: _Place, host: str, port: int) -> str:
    """Connect, log in, disconnect, and return the broker's address."""
    shown = f"Kafka at {host}:{port}"
    options = {"client_id": CLIENT_ID, "request_timeout_ms": round(place.request_timeout * 1000)}
    with _translated(shown):
        async with asyncio.timeout(place.request_timeout):
            connection = await create_conn(host.strip("[]"), port, **options, **place.security)
    connection.close()
    return f"{host}:{port}"


@contextlib.contextmanager
def _translated(shown: str, *, late: str = "did not answer in time") -> Iterator[None]:
    """Raise what the library raises as PublishFailed that says what to do, but for sizes."""
    try:
        yield
    except (MessageSizeTooLargeError, RecordListTooLargeError):
        raise
    except KafkaError as error:
        # Kafka's errors are numbers; the texts and the classes are the library's.
        for kinds, reason, advice in _ADVICE:
            if isinstance(error, kinds):
                raise PublishFailed(f"{shown}: {cause(error)}: {advice}", reason=reason) from error
        raise PublishFailed(f"{shown}: {cause(error)}", reason="refused") from error
    except TimeoutError as error:
        raise PublishFailed(f"{shown} {late}", reason="timeout") from error
    except OSError as error:
        raise PublishFailed(f"{shown}: {cause(error)}", reason="connection") from error


def _encode(event: CloudEvent) -> KafkaMessage:
    try:
        return to_binary_event(event, key_mapper=lambda event: (event.get_subject() or "").encode() or None)
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as a record", reason="encoding") from error


def _parse(settings: DestinationSettings) -> _Place:
    with usable_url(
        settings,
        "kafka://host:9092,host:9092/topic, with ?security=ssl for TLS, and with a login "
        "kafka://user:password@host:9092/topic?security=sasl_ssl (or sasl_plain, without TLS) and "
        "&mechanism=scram-sha-512 (or scram-sha-256, plain); characters such as @ : / % in the password are "
        "written as %40 %3A %2F %25",
    ) as text:
        url = split_url(text, port=9092, options={"security", "mechanism"})
        topic = url.path.removeprefix("/")
        if not _TOPIC.fullmatch(topic):
            raise ValueError("no topic's name")
        return _Place(
            brokers=url.hosts,
            topic=topic,
            shown=f"Kafka topic {topic} at {url.shown}",
            security=MappingProxyType(_read_security(url, settings)),
            timeout=settings.timeout,
        )


def _read_security(url: BrokerUrl, settings: DestinationSettings) -> dict[str, Any]:
    """Return the library's options. Raises ValueError for what does not go together."""
    protocol = _PROTOCOLS.get(url.options.get("security"))
    mechanism = url.options.get("mechanism", "plain")
    if protocol is None:
        raise ValueError("no such security")
    security: dict[str, Any] = {"security_protocol": protocol}
    if protocol.endswith("SSL"):
        security["ssl_context"] = open_tls(settings)
    elif settings.tls is not None:
        raise SettingsError(f"destination {settings.name!r}: tls needs security=ssl or sasl_ssl in the URL")
    if protocol.startswith("SASL"):
        if not url.user or not url.password or mechanism not in _MECHANISMS:
            raise ValueError("no login")
        security["sasl_mechanism"] = mechanism.upper()
        security["sasl_plain_username"] = url.user
        security["sasl_plain_password"] = url.password
    elif url.user is not None or "mechanism" in url.options:
        raise ValueError("a login that nobody asks for")
    return security
