"""Every kind of destination, for the contract suite and the benchmark."""

from collections.abc import Mapping
from typing import Final

from destination_kinds import KINDS, Kind
from kind_kafka_sqs import KafkaKind, SqsKind
from kind_rabbitmq import RabbitmqKind
from kind_redis_nats import NatsKind, RedisKind

ALL_KINDS: Final[Mapping[str, type[Kind]]] = {
    **KINDS,
    "rabbitmq": RabbitmqKind,
    "redis": RedisKind,
    "nats": NatsKind,
    "kafka": KafkaKind,
    "sqs": SqsKind,
}
