"""`kafka:`: one record per event, a CloudEvent in binary mode, with the event's subject as its key.

`kafka://host:9092,host:9092/topic`; with a login and TLS
`kafka://user:password@host:9092/topic?security=sasl_ssl&mechanism=scram-sha-512`. `security` is `ssl`,
`sasl_plain` or `sasl_ssl`, and `mechanism` is `plain` (the default), `scram-sha-256` or `scram-sha-512`.
"""

import asyncio
import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

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
from cloudevents.core.bindings.kafka import KafkaMessage, to_binary
from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import JSON, CheckedDestination, Failure, limit_log, step_timeout
from receiver.destinations.client_internals import close_kafka_producer, count_kafka_replicas
from receiver.destinations.connections import Connection, SharedConnection
from receiver.destinations.tls import open_tls
from receiver.destinations.urls import BrokerUrl, split_url, usable_url
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected, SettingsError

START_SECONDS: Final = 10.0
"""Seconds to fetch metadata and a producer id once a broker has answered."""
REQUEST_SECONDS: Final = 4.0
"""Seconds for one request: if a broker hangs, a publish has time left to find the next leader."""
CLOSE_SECONDS: Final = 2.0
RETRY_SECONDS: Final = 0.1
BATCH_BYTES: Final = 64 * 1024
"""The limit of a batch for one partition; a larger record goes alone."""
MAX_REQUEST_BYTES: Final = 64 * 1024 * 1024
"""More than any event needs, because the limit that counts is the topic's own."""
CLIENT_ID: Final = "clipia-receiver"
MAX_IN_FLIGHT: Final = 1024

_TOPIC: Final = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}")
_PROTOCOLS: Final[Mapping[str | None, str]] = {
    None: "PLAINTEXT",
    "ssl": "SSL",
    "sasl_plain": "SASL_PLAINTEXT",
    "sasl_ssl": "SASL_SSL",
}
_MECHANISMS: Final = frozenset({"plain", "scram-sha-256", "scram-sha-512"})
_OUT_OF_SEQUENCE: Final = "out_of_step"
_ADVICE: Final[tuple[tuple[tuple[type[KafkaError], ...], str, str], ...]] = (
    ((UnknownTopicOrPartitionError,), "no_topic", "the topic does not exist: create it"),
    ((TopicAuthorizationFailedError,), "permission", "allow Write and Describe on the topic"),
    ((ClusterAuthorizationFailedError,), "permission", "allow IdempotentWrite on the cluster"),
    (
        (SaslAuthenticationFailed, UnsupportedSaslMechanismError, AuthenticationFailedError),
        "auth",
        "check the user, the password and the mechanism in the URL",
    ),
    (
        (LeaderNotAvailableError, NotLeaderForPartitionError),
        "no_leader",
        "a partition has no leader: check which brokers are down",
    ),
    (
        (OutOfOrderSequenceNumber, UnknownProducerId, InvalidProducerIdMapping, ProducerFenced),
        _OUT_OF_SEQUENCE,
        "the broker and the producer disagree about the next sequence number",
    ),
    ((KafkaConnectionError,), "connection", "is it up, and is security= in the URL what it expects?"),
)

# The receiver logs every failure itself. The library logs hundreds of lines per outage, and at DEBUG the
# password.
limit_log("aiokafka", logging.CRITICAL)


@dataclass(frozen=True, kw_only=True)
class _Address:
    """The brokers, the topic and the login of a URL."""

    brokers: tuple[tuple[str, int], ...]
    topic: str
    shown: str
    security: Mapping[str, Any] = field(repr=False)
    timeout: float | None
    """Seconds for a whole publish."""

    @property
    def request_timeout(self) -> float:
        """Seconds for one request."""
        return step_timeout(REQUEST_SECONDS, self.timeout)


class KafkaDestination(CheckedDestination):
    """Writes events to a Kafka topic through an idempotent producer that waits for all in-sync replicas."""

    concurrency = 256

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._address = address = _parse(settings)
        self._connections = SharedConnection(
            lambda: _Producer(address),
            shown=address.shown,
            max_users=settings.concurrency or MAX_IN_FLIGHT,
            timeout=settings.timeout,
        )

    async def check(self) -> None:
        """Check that the topic exists and has leaders, and warn if confirmed events may be lost."""
        replicas = await self._connections.run(_Producer.count_replicas)
        if replicas < 2:
            self._warn_of_losses("the topic has one replica: confirmed events are lost with its broker")

    async def publish(self, event: CloudEvent) -> None:
        """Write the event and return when all in-sync replicas have it."""
        message = _encode(event)
        deadline = self._connections.new_deadline()
        try:
            await self._connections.run(lambda producer: producer.publish(message), deadline=deadline)
        except PublishFailed as failure:
            if failure.reason != _OUT_OF_SEQUENCE:
                raise
            # Another event has failed and left a gap in the sequence numbers; the broker rejects all after
            # it.
            await self._connections.run(lambda producer: producer.publish(message), deadline=deadline)

    async def close(self) -> None:
        """Let the publishes under way end, which the timeout bounds, and disconnect."""
        await self._connections.close()


class _Producer(Connection):
    """A producer and its connections. Methods raise PublishFailed."""

    def __init__(self, address: _Address) -> None:
        self._address = address
        self._producer: Any = None

    @property
    def is_open(self) -> bool:
        """Return True: its connections reopen by themselves."""
        return True

    async def open(self) -> None:
        """Find a broker, and get a producer id."""
        address = self._address
        self._producer = AIOKafkaProducer(
            bootstrap_servers=await _find_broker(address),
            client_id=CLIENT_ID,
            acks="all",
            enable_idempotence=True,
            request_timeout_ms=round(address.request_timeout * 1000),
            retry_backoff_ms=round(RETRY_SECONDS * 1000),
            max_batch_size=BATCH_BYTES,
            max_request_size=MAX_REQUEST_BYTES,
            **address.security,
        )
        late = (
            "answers, but the producer cannot start: can its brokers be reached under the addresses that "
            "they advertise (advertised.listeners)?"
        )
        with _translated(address.shown, late=late):
            async with asyncio.timeout(step_timeout(START_SECONDS, address.timeout)):
                await self._producer.start()

    async def publish(self, message: KafkaMessage) -> None:
        """Write a record and wait for the confirmation. Also raises PublishRejected."""
        try:
            with _translated(self._address.shown):
                await self._producer.send_and_wait(
                    self._address.topic, message.value, key=message.key, headers=list(message.headers.items())
                )
        except (MessageSizeTooLargeError, RecordListTooLargeError) as error:
            raise self._too_large(message) from error

    async def count_replicas(self) -> int:
        """Check that each partition has a leader; return the replicas of the one that has the fewest."""
        topic, cluster = self._address.topic, self._producer.client.cluster
        with _translated(self._address.shown):
            await self._producer.partitions_for(topic)
            # The metadata at hand may be out of date.
            if not await self._producer.client.force_metadata_update():
                raise KafkaConnectionError("no broker answers")
            await self._producer.partitions_for(topic)
            if cluster.available_partitions_for_topic(topic) != cluster.partitions_for_topic(topic):
                raise LeaderNotAvailableError
        return count_kafka_replicas(cluster, topic)

    def survives(self, failure: Failure) -> bool:
        """Return False.

        A producer would keep sending the records that have timed out, for as long as the process lives.
        After a rejected batch its sequence numbers differ from the broker's.
        """
        return False

    async def explain_timeout(self) -> PublishFailed:
        """Name the usual reasons."""
        return PublishFailed(
            f"{self._address.shown} did not confirm in time: check that its partitions have leaders and as "
            "many in-sync replicas as min.insync.replicas asks for",
            reason="timeout",
        )

    async def close(self) -> None:
        """Disconnect at once, and drop the records that wait."""
        if self._producer is not None:
            await close_kafka_producer(self._producer, seconds=CLOSE_SECONDS)

    def _too_large(self, message: KafkaMessage) -> Failure:
        shown, size = self._address.shown, len(message.value)
        if size >= BATCH_BYTES:
            return PublishRejected(
                f"{shown} takes no record of {size} bytes: raise its max.message.bytes", reason="too_large"
            )
        # The batch had several records, and the broker does not say which of them was too large.
        return PublishFailed(
            f"{shown} takes no batch of {BATCH_BYTES} bytes: raise its max.message.bytes", reason="too_large"
        )


async def _find_broker(address: _Address) -> str:
    """Return the first of the URL's brokers that answers; if none does, the library would not say why."""
    # All at once: one after another, a broker that hangs would take the time of the others.
    attempts = [asyncio.create_task(_connect_once(address, host, port)) for host, port in address.brokers]
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


async def _connect_once(address: _Address, host: str, port: int) -> str:
    """Connect, log in, disconnect, and return the broker's address."""
    shown = f"Kafka at {host}:{port}"
    options = {"client_id": CLIENT_ID, "request_timeout_ms": round(address.request_timeout * 1000)}
    with _translated(shown):
        async with asyncio.timeout(address.request_timeout):
            connection = await create_conn(host.strip("[]"), port, **options, **address.security)
    connection.close()
    return f"{host}:{port}"


@contextlib.contextmanager
def _translated(shown: str, *, late: str = "did not answer in time") -> Iterator[None]:
    """Raise errors of the library as PublishFailed, with the way to repair them; not those about sizes."""
    try:
        yield
    except (MessageSizeTooLargeError, RecordListTooLargeError):
        raise
    except KafkaError as error:
        # Kafka sends error numbers. Their names are the library's classes, so the text holds no secret.
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
        return to_binary(event, JSON, key_mapper=lambda event: (event.get_subject() or "").encode() or None)
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as a record", reason="encoding") from error


def _parse(settings: DestinationSettings) -> _Address:
    with usable_url(
        settings,
        "kafka://host:9092,host:9092/topic, with ?security=ssl for TLS, and with a login "
        "kafka://user:password@host:9092/topic?security=sasl_ssl (or sasl_plain, without TLS) and "
        "&mechanism=scram-sha-512 (or scram-sha-256, plain); in a password write @ : / % as %40 %3A %2F %25",
    ) as text:
        url = split_url(text, port=9092, options={"security", "mechanism"})
        topic = url.path.removeprefix("/")
        if not _TOPIC.fullmatch(topic):
            raise ValueError("not the name of a topic")
        return _Address(
            brokers=url.hosts,
            topic=topic,
            shown=f"Kafka topic {topic} at {url.shown}",
            security=_read_security(url, settings),
            timeout=settings.timeout,
        )


def _read_security(url: BrokerUrl, settings: DestinationSettings) -> dict[str, Any]:
    """Return the library's options. Raises ValueError if the URL's parameters contradict each other."""
    protocol = _PROTOCOLS.get(url.options.get("security"))
    mechanism = url.options.get("mechanism", "plain")
    if protocol is None:
        raise ValueError("an unknown security")
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
        raise ValueError("a login without sasl_plain or sasl_ssl")
    return security
