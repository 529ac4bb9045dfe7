"""Kafka and SQS for the contract suite."""

import asyncio
import atexit
import functools
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from unittest.mock import patch
from uuid import uuid4

from receiver.destinations import Destination
from support.kinds_base import Kind, open_url
from support.servers_kafka_sqs import CREDENTIALS, Kafka, Record, Sqs

TOPIC: Final = "events"
PATIENCE: Final = 3.0
"""Seconds that a publish may take if no broker answers; otherwise it takes milliseconds."""


class KafkaKind(Kind):
    """A topic of one partition, on brokers that are down while it is broken."""

    async def __aenter__(self) -> Self:
        self.kafka = await asyncio.to_thread(Kafka)
        self.kafka.create_topic(TOPIC)
        self._patience = patch("receiver.destinations.base.TIMEOUT_SECONDS", PATIENCE)
        self._patience.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._patience.stop()
        self.kafka.stop()

    def open(self) -> Destination:
        """Open the topic."""
        return open_url(f"kafka://{self.kafka.address}/{TOPIC}")

    async def received(self) -> list[dict[str, Any]]:
        """Read the topic from its beginning."""
        return [decode(record) for record in await asyncio.to_thread(self.kafka.read, TOPIC)]

    async def break_down(self) -> None:
        """Stop the brokers."""
        self.kafka.stop_brokers()

    async def mend(self) -> None:
        """Start them."""
        self.kafka.start_brokers()


class SqsKind(Kind):
    """A queue on a server that does not listen while it is broken."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.queue = f"events-{uuid4()}"
        self._messages: list[dict[str, Any]] = []
        self._is_broken = False

    async def __aenter__(self) -> Self:
        self.sqs = await asyncio.to_thread(shared_sqs)
        self.url = await asyncio.to_thread(self.sqs.create_queue, self.queue)
        self._environment = patch.dict(os.environ, aws_environment())
        self._environment.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._environment.stop()
        if self._is_broken:
            await self.mend()

    def open(self) -> Destination:
        """Open the queue."""
        return open_url(self.url)

    async def received(self) -> list[dict[str, Any]]:
        """Take the new messages from the queue, and return all that were ever taken."""
        self._messages += await asyncio.to_thread(self.sqs.receive, self.queue)
        return [json.loads(message["Body"]) for message in self._messages]

    async def break_down(self) -> None:
        """Stop listening."""
        self.sqs.stop_listening()
        self._is_broken = True

    async def mend(self) -> None:
        """Listen again."""
        self.sqs.start_listening()
        self._is_broken = False


def decode(record: Record) -> dict[str, Any]:
    """Return a record in CloudEvents' binary mode as structured JSON."""
    event: dict[str, Any] = {
        name.removeprefix("ce_"): value.decode()
        for name, value in record.headers.items()
        if name.startswith("ce_")
    }
    event["attempt"] = int(event["attempt"])
    event["datacontenttype"] = record.headers["content-type"].decode()
    event["data"] = json.loads(record.value)
    return event


def aws_environment() -> dict[str, str]:
    """Return an environment in which AWS clients find only these credentials."""
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return {**CREDENTIALS, **nowhere, "AWS_EC2_METADATA_DISABLED": "true"}


@functools.cache
def shared_sqs() -> Sqs:
    """Return the SQS server of this test run: it takes a second to start."""
    server = Sqs()
    atexit.register(server.stop)
    return server
