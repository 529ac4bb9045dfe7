"""The kinds `redis` and `nats` for the contract suite, and functions that read these brokers."""

import asyncio
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import unquote

import nats
import redis
from nats.js.errors import NotFoundError

from receiver.destinations import Destination
from support.kinds_base import Kind, open_url
from support.servers_redis_nats import Broker, Nats, Redis

STREAM: Final = "clipia-events"
NATS_STREAM: Final = "CLIPIA"
SUBJECT: Final = "clipia.events"


def read_redis(server: Redis, stream: str = STREAM) -> list[dict[str, Any]]:
    """Return the events of a stream, oldest first; the fields for deduplication must match."""
    with redis.Redis(port=server.port) as client:
        entries: Any = client.xrange(stream)
    events = []
    for _, fields in entries:
        event = json.loads(fields[b"event"])
        assert set(fields) == {b"event", b"id", b"deliveryid"}
        assert fields[b"id"].decode() == event["id"]
        assert fields[b"deliveryid"].decode() == event["deliveryid"]
        events.append(event)
    return events


def structured(headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """Return a CloudEvent in binary mode as the structured one."""
    event: dict[str, Any] = {
        name.removeprefix("ce-"): unquote(value, errors="strict")
        for name, value in headers.items()
        if name.startswith("ce-")
    }
    return {**event, "attempt": int(event["attempt"]), "data": json.loads(body)}


async def read_messages(server: Nats, stream: str = NATS_STREAM) -> list[tuple[dict[str, str], bytes]]:
    """Return headers and bodies of a stream's messages, oldest first."""
    client = await nats.connect(f"nats://127.0.0.1:{server.port}", allow_reconnect=False)
    try:
        manager = client.jsm()
        try:
            state = (await manager.stream_info(stream)).state
        except NotFoundError:
            return []
        found = [
            await manager.get_msg(stream, number)
            for number in range(max(state.first_seq, 1), state.last_seq + 1)
        ]
        return [(dict(message.headers or {}), message.data or b"") for message in found]
    finally:
        await client.close()


async def read_nats(server: Nats, stream: str = NATS_STREAM) -> list[dict[str, Any]]:
    """Return the events of a stream, oldest first."""
    return [structured(headers, body) for headers, body in await read_messages(server, stream)]


class _BrokerKind(Kind):
    """A broker of the test's own that is killed while it is broken."""

    broker: Broker

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.broker.__enter__)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.broker.__exit__, kind, error, trace)

    async def break_down(self) -> None:
        """Kill the server."""
        await asyncio.to_thread(self.broker.crash)

    async def mend(self) -> None:
        """Start it again on the same port and data."""
        await asyncio.to_thread(self.broker.start)


class RedisKind(_BrokerKind):
    """A Redis server that flushes to the disk before it replies."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.broker = self.server = Redis()

    def open(self) -> Destination:
        """Open the stream."""
        return open_url(self.server.url(f"stream={STREAM}"))

    async def received(self) -> list[dict[str, Any]]:
        """Read the stream."""
        return await asyncio.to_thread(read_redis, self.server)


class NatsKind(_BrokerKind):
    """A NATS server; the destination makes its stream."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.broker = self.server = Nats()

    def open(self) -> Destination:
        """Open the subject and its stream."""
        return open_url(self.server.url(f"subject={SUBJECT}&stream={NATS_STREAM}"))

    async def received(self) -> list[dict[str, Any]]:
        """Read the stream."""
        return await read_nats(self.server)
