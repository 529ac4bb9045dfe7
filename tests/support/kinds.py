"""Every kind of destination, for the contract suite and the benchmark."""

from collections.abc import Mapping
from typing import Final

from support.kinds_base import KINDS, Kind
from support.kinds_kafka_sqs import KafkaKind, SqsKind
from support.kinds_rabbitmq import RabbitmqKind
from support.kinds_redis_nats import NatsKind, RedisKind

ALL_KINDS: Final[Mapping[str, type[Kind]]] = {
    **KINDS,
    "rabbitmq": RabbitmqKind,
    "redis": RedisKind,
    "nats": NatsKind,
    "kafka": KafkaKind,
    "sqs": SqsKind,
}
