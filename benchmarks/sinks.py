"""Destinations of the drain benchmark: each counts the different events that have arrived.

python benchmarks/sinks.py --port 8001       an HTTP server that reads a body and answers 204
"""

import argparse
import asyncio
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson
import psutil
import uvloop

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import aiormq
import redis
from support.servers import end, free_port, wait_for_port
from support.servers_rabbitmq import RabbitMq
from support.servers_redis_nats import Redis

NAMES = ("file", "redis", "rabbitmq", "http")
PAGE = 10_000

_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class Sink:
    """A destination: its URL, its server's processes, and the events in it."""

    def __init__(
        self,
        url: str,
        ids: Callable[[], set[str]],
        processes: Callable[[], list[psutil.Process]] = list,
    ) -> None:
        """`ids` returns the events that have arrived; `processes` lists its server's processes."""
        self.url = url
        self.ids = ids
        self.processes = processes


class Sinks:
    """Opens destinations; brokers are started once and shared by all runs."""

    def __init__(self) -> None:
        self._redis: Redis | None = None
        self._rabbitmq: RabbitMq | None = None
        self._number = 0

    @contextmanager
    def open(self, name: str, folder: Path) -> Iterator[Sink]:
        """Open an empty destination for the block."""
        self._number += 1
        if name == "http":
            with _http() as sink:
                yield sink
        else:
            opened: Callable[[str, Path], Sink] = getattr(self, f"_open_{name}")
            yield opened(f"drain-{self._number}", folder)

    def close(self) -> None:
        """Stop the brokers."""
        for server in (self._redis, self._rabbitmq):
            if server is not None:
                server.__exit__(None, None, None)

    def _open_file(self, name: str, folder: Path) -> Sink:
        path = folder / f"{name}.jsonl"

        def ids() -> set[str]:
            with path.open("rb") as lines:
                return {orjson.loads(line)["id"] for line in lines}

        return Sink(f"file:{path}", ids)

    def _open_redis(self, name: str, _folder: Path) -> Sink:
        server = self._redis = self._redis or Redis().__enter__()
        assert server.process is not None
        with redis.Redis(port=server.port) as client:
            client.flushall()

        def ids() -> set[str]:
            found, start = set[str](), "-"
            with redis.Redis(port=server.port) as client:
                while page := client.xrange(name, start, count=PAGE):
                    found |= {fields[b"id"].decode() for _, fields in page}
                    start = f"({page[-1][0].decode()}"
            return found

        return Sink(server.url(f"stream={name}"), ids, lambda: _running(server.process))

    def _open_rabbitmq(self, name: str, _folder: Path) -> Sink:
        server = self._rabbitmq = self._rabbitmq or RabbitMq().__enter__()
        return Sink(
            server.url(f"?queue={name}"),
            lambda: asyncio.run(_consume(server.url(), name)),
            lambda: _running(server.process),
        )


def _running(process: subprocess.Popen[bytes] | None) -> list[psutil.Process]:
    assert process is not None
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


async def _consume(url: str, queue: str) -> set[str]:
    """Take all messages out of a queue and delete it; return the ids of their events."""
    connection = await aiormq.connect(url)
    channel = await connection.channel()
    declared = await channel.queue_declare(queue, durable=True, arguments={"x-queue-type": "quorum"})
    left, ids, done = declared.message_count or 0, set[str](), asyncio.Event()

    async def take(message: Any) -> None:
        nonlocal left
        ids.add(message.header.properties.headers["cloudEvents_id"])
        left -= 1
        if not left:
            done.set()

    if left:
        consumer = await channel.basic_consume(queue, take, no_ack=True)
        async with asyncio.timeout(300):
            await done.wait()
        await channel.basic_cancel(str(consumer.consumer_tag))
    await channel.queue_delete(queue)
    await connection.close()
    return ids


@contextmanager
def _http() -> Iterator[Sink]:
    port = free_port()
    process = subprocess.Popen([sys.executable, __file__, "--port", str(port)])
    wait_for_port(port, process)

    def ids() -> set[str]:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ids") as answer:
            return set(orjson.loads(answer.read()))

    try:
        yield Sink(f"http://127.0.0.1:{port}/events", ids, lambda: _running(process))
    finally:
        end(process)


class _Peer(asyncio.Protocol):
    """One connection of the HTTP server; requests have a length, as the receiver's have."""

    def __init__(self, bodies: list[bytes]) -> None:
        self._bodies = bodies
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: Any = transport

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while (begin := self._rest.find(b"\r\n\r\n") + 4) > 3:
            head = self._rest[:begin]
            length = _LENGTH.search(head)
            end_ = begin + (int(length[1]) if length else 0)
            if len(self._rest) < end_:
                return
            body, self._rest = self._rest[begin:end_], self._rest[end_:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET"):
            ids = orjson.dumps([orjson.loads(each)["id"] for each in self._bodies])
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(ids), ids))
            return
        if body:
            self._bodies.append(body)
        self._transport.write(b"HTTP/1.1 204 No Content\r\n\r\n")


async def _serve(port: int) -> None:
    bodies: list[bytes] = []
    server = await asyncio.get_running_loop().create_server(lambda: _Peer(bodies), "127.0.0.1", port)
    await server.serve_forever()


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(_serve(parser.parse_args().port))


if __name__ == "__main__":
    main()
