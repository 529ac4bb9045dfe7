"""Kafka and SQS for tests, each in a process of its own: it can be frozen, and it fails on command.

Kafka is librdkafka's mock cluster: real sockets and the real protocol, its log in memory. SQS is moto's
server. Run as a program, with the name of one of them, this file is that process and obeys lines of JSON.
"""

import ctypes
import functools
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

KAFKA_BROKERS: Final = 3
PRODUCE: Final = 0
INIT_PRODUCER_ID: Final = 22
READ_TIMEOUT: Final = 10
CREDENTIALS: Final = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test-secret"}
REGION: Final = "eu-west-1"
ACCOUNT: Final = "123456789012"


class Process:
    """A server in a process of its own that obeys commands."""

    def __init__(self, kind: str, *, package: str) -> None:
        if importlib.util.find_spec(package) is None:
            from support.servers import missing

            missing(package, "pip install --group dev")
        self.process = subprocess.Popen(
            [sys.executable, __file__, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.address: str = self._answer()

    def command(self, name: str, *arguments: Any) -> Any:
        """Run a method of the process's server and return what it returns."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def freeze(self) -> None:
        """Stop the process: its sockets stay open and do not answer."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        """Let it continue."""
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate(timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"{self.process.args!r} has ended"
        return json.loads(line)


@dataclass(frozen=True, kw_only=True)
class Record:
    """One record of a topic."""

    partition: int
    key: bytes | None
    headers: Mapping[str, bytes]
    value: bytes


class Kafka(Process):
    """A cluster of three brokers; a client starts from `address`."""

    def __init__(self) -> None:
        super().__init__("kafka", package="confluent_kafka")

    def create_topic(self, topic: str, *, partitions: int = 1, replicas: int = 3) -> None:
        """Create a topic."""
        self.command("create_topic", topic, partitions, replicas)

    def set_leader(self, topic: str, partition: int, broker: int | None) -> None:
        """Let another broker (1 to 3), or none, lead a partition."""
        self.command("set_leader", topic, partition, -1 if broker is None else broker)

    def fail_topic(self, topic: str, error: int) -> None:
        """Answer requests about a topic with an error of Kafka's protocol; 0 ends it."""
        self.command("fail_topic", topic, error)

    def fail_requests(self, api: int, *errors: int) -> None:
        """Answer the next requests of a kind with these errors, one each; 0 lets one pass."""
        self.command("fail_requests", api, *errors)

    def stop_brokers(self) -> None:
        """Cut all connections and refuse new ones; the log stays."""
        for broker in range(1, KAFKA_BROKERS + 1):
            self.command("stop_broker", broker)

    def start_brokers(self) -> None:
        """Undo `stop_brokers`."""
        for broker in range(1, KAFKA_BROKERS + 1):
            self.command("start_broker", broker)

    def count_requests(self, api: int) -> int:
        """Count the requests of a kind since the start."""
        return int(self.command("count_requests", api))

    def read(self, topic: str) -> list[Record]:
        """Read a topic from its beginning with an independent client; blocking."""
        import confluent_kafka

        consumer = confluent_kafka.Consumer(
            {"bootstrap.servers": self.address, "group.id": "test", "enable.auto.commit": False}
        )
        try:
            partitions = consumer.list_topics(topic, timeout=READ_TIMEOUT).topics[topic].partitions
            return [record for number in sorted(partitions) for record in self._read(consumer, topic, number)]
        finally:
            consumer.close()

    @staticmethod
    def _read(consumer: Any, topic: str, number: int) -> list[Record]:
        import confluent_kafka

        place = confluent_kafka.TopicPartition(topic, number, 0)
        _, end = consumer.get_watermark_offsets(place, timeout=READ_TIMEOUT)
        consumer.assign([place])
        records: list[Record] = []
        deadline = time.monotonic() + READ_TIMEOUT
        while len(records) < end:
            assert time.monotonic() < deadline, f"{len(records)} of {end} records can be read"
            for message in consumer.consume(end - len(records), timeout=0.1):
                assert message.error() is None, message.error()
                records.append(
                    Record(
                        partition=number,
                        key=message.key(),
                        headers=dict(message.headers() or []),
                        value=message.value(),
                    )
                )
        return records


class Sqs(Process):
    """An SQS server; `address` is its endpoint."""

    def __init__(self) -> None:
        super().__init__("sqs", package="moto")

    @functools.cached_property
    def client(self) -> Any:
        """An independent client; blocking."""
        import boto3

        return boto3.client(
            "sqs",
            endpoint_url=self.address,
            region_name=REGION,
            aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        )

    def create_queue(self, name: str, **attributes: str) -> str:
        """Create a queue and return its URL for the destination."""
        if name.endswith(".fifo"):
            attributes["FifoQueue"] = "true"
        self.client.create_queue(QueueName=name, Attributes=attributes)
        return self.url(name)

    def url(self, name: str) -> str:
        """Return a queue's URL for the destination."""
        return f"sqs://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{name}?endpoint={self.address}"

    def receive(self, name: str) -> list[dict[str, Any]]:
        """Take all messages from a queue, in the order of their arrival; blocking."""
        queue = f"{self.address}/{ACCOUNT}/{name}"
        messages: list[dict[str, Any]] = []
        while found := self.client.receive_message(
            QueueUrl=queue,
            MaxNumberOfMessages=10,
            MessageAttributeNames=["All"],
            MessageSystemAttributeNames=["All"],
        ).get("Messages"):
            messages += found
            self.client.delete_message_batch(
                QueueUrl=queue,
                Entries=[
                    {"Id": str(number), "ReceiptHandle": message["ReceiptHandle"]}
                    for number, message in enumerate(found)
                ],
            )
        return messages

    def stop_listening(self) -> None:
        """Refuse connections; the queues stay."""
        self.command("stop")

    def start_listening(self) -> None:
        """Listen on the same port again."""
        self.command("start")


class _MockCluster:
    """librdkafka's mock cluster through its C interface: the Python package shows too little of it."""

    def __init__(self) -> None:
        import confluent_kafka.cimpl

        self._library = library = ctypes.CDLL(confluent_kafka.cimpl.__file__)
        pointer = ctypes.c_void_p
        for name in ("conf_new", "new", "handle_mock_cluster", "mock_get_requests"):
            getattr(library, f"rd_kafka_{name}").restype = pointer
        library.rd_kafka_mock_cluster_bootstraps.restype = ctypes.c_char_p
        library.rd_kafka_mock_request_api_key.restype = ctypes.c_int16
        configuration = pointer(library.rd_kafka_conf_new())
        error = ctypes.create_string_buffer(512)
        for key, value in {"test.mock.num.brokers": str(KAFKA_BROKERS), "log_level": "0"}.items():
            answer = library.rd_kafka_conf_set(configuration, key.encode(), value.encode(), error, len(error))
            assert answer == 0, error.value
        producer = 0
        handle = pointer(library.rd_kafka_new(producer, configuration, error, len(error)))
        assert handle.value, error.value
        self._cluster = pointer(library.rd_kafka_handle_mock_cluster(handle))
        library.rd_kafka_mock_start_request_tracking(self._cluster)
        # For consumers: a group's first member need not wait for others.
        library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, ctypes.c_int32(0))
        self.address: str = library.rd_kafka_mock_cluster_bootstraps(self._cluster).decode()

    def create_topic(self, topic: str, partitions: int, replicas: int) -> None:
        error = self._library.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, replicas)
        assert error == 0, error

    def set_leader(self, topic: str, partition: int, broker: int) -> None:
        error = self._library.rd_kafka_mock_partition_set_leader(
            self._cluster, topic.encode(), ctypes.c_int32(partition), ctypes.c_int32(broker)
        )
        assert error == 0, error

    def fail_topic(self, topic: str, error: int) -> None:
        self._library.rd_kafka_mock_topic_set_error(self._cluster, topic.encode(), error)

    def fail_requests(self, api: int, *errors: int) -> None:
        self._library.rd_kafka_mock_push_request_errors_array(
            self._cluster,
            ctypes.c_int16(api),
            ctypes.c_size_t(len(errors)),
            (ctypes.c_int * len(errors))(*errors),
        )

    def stop_broker(self, broker: int) -> None:
        self._library.rd_kafka_mock_broker_set_down(self._cluster, ctypes.c_int32(broker))

    def start_broker(self, broker: int) -> None:
        self._library.rd_kafka_mock_broker_set_up(self._cluster, ctypes.c_int32(broker))

    def count_requests(self, api: int) -> int:
        count = ctypes.c_size_t()
        requests = self._library.rd_kafka_mock_get_requests(self._cluster, ctypes.byref(count))
        array = ctypes.cast(requests, ctypes.POINTER(ctypes.c_void_p))
        keys = [
            self._library.rd_kafka_mock_request_api_key(ctypes.c_void_p(array[number]))
            for number in range(count.value)
        ]
        return keys.count(api)


class _MotoServer:
    def __init__(self) -> None:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._make = ThreadedMotoServer
        self._port = 0
        self.start()

    def start(self) -> None:
        self._server = self._make(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        host, self._port = self._server.get_host_and_port()
        self.address = f"http://{host}:{self._port}"

    def stop(self) -> None:
        self._server.stop()


def main() -> None:
    """Run a server, print its address, and obey until the input ends."""
    server: _MockCluster | _MotoServer = _MockCluster() if sys.argv[1] == "kafka" else _MotoServer()
    _answer(server.address)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        _answer(getattr(server, name)(*arguments))


def _answer(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
