"""Attacks on the memory of a server by clients without a secret, and a meter for their cost."""

import asyncio
import contextlib
import socket
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any, Final

import psutil

from support.payloads import body, signed
from support.servers import Postgres

MIB: Final = 2**20
KIB: Final = 1024
CALLBACK: Final = "/clipia/webhook"
ANSWER_WAIT: Final = 10.0
"""Seconds after which Clipia gives up on an answer."""
RETRY_AFTER: Final = 5.0
"""Seconds of a 503's Retry-After, and the pause of a late webhook."""


def request(content: bytes = b"", *, path: str = CALLBACK, headers: Mapping[str, str] | None = None) -> bytes:
    """Return a POST; `headers` may declare another length than that of `content`."""
    fields = {"Host": "receiver", "Content-Length": str(len(content)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def unfinished_body(size: int = 250 * KIB, *, path: str = CALLBACK) -> bytes:
    """Return a request whose last byte never comes."""
    return request(b"x" * (size - 1), path=path, headers={"Content-Length": str(size)})


def unfinished_chunks(size: int = 250 * KIB) -> bytes:
    """Return a request of unknown length that never ends."""
    chunk = b"2000\r\n" + b"x" * 8192 + b"\r\n"
    head = f"POST {CALLBACK} HTTP/1.1\r\nHost: receiver\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head.encode() + chunk * (size // 8192)


def tiny_chunks(size: int = 250 * KIB) -> bytes:
    """Return a request of unknown length in chunks of two bytes."""
    return unfinished_chunks(0) + b"2\r\nxx\r\n" * (size // 2)


def large_head() -> bytes:
    """Return a request whose headers are answered 431."""
    lines = b"".join(b"X-%05d: %s\r\n" % (number, b"y" * 40) for number in range(4000))
    return b"POST " + CALLBACK.encode() + b" HTTP/1.1\r\nHost: receiver\r\n" + lines + b"\r\n"


def unfinished_head() -> bytes:
    """Return as many small headers as the limit of the head allows, without its end."""
    lines = b"".join(b"%x:\r\n" % number for number in range(256, 2000))
    return b"POST " + CALLBACK.encode() + b" HTTP/1.1\r\nHost: receiver\r\n" + lines


def declared_too_large() -> bytes:
    """Return a request that is answered 413 because of the length that it declares."""
    return request(b"x" * 200 * KIB, headers={"Content-Length": str(10 * MIB)})


def pipelined() -> bytes:
    """Return thousands of small requests."""
    return b"GET /livez HTTP/1.1\r\nHost: r\r\n\r\n" * 8000


def signed_large(size: int = 256 * KIB) -> bytes:
    """Return a genuine webhook of the largest size, of an event of its own."""
    content = body(padding="")
    content = content.replace(b'"padding": ""', b'"padding": "' + b"x" * (size - len(content)) + b'"')
    return request(content, headers=signed(content))


SIGNED: Final = "signed bodies of 256 KiB"
ATTACKS: Final[Mapping[str, Callable[[], bytes]]] = {
    "unfinished bodies of 250 KiB": unfinished_body,
    "unfinished bodies in chunks": unfinished_chunks,
    "unfinished bodies in chunks of 2 bytes": tiny_chunks,
    "unfinished bodies without a token": partial(unfinished_body, path="/v1/jobs"),
    "heads that are too large (431)": large_head,
    "bodies that are too large (413)": declared_too_large,
    "unfinished heads": unfinished_head,
    "pipelined requests": pipelined,
    "idle connections": bytes,
    SIGNED: signed_large,
}


@dataclass
class Flood:
    """The answers to an attack."""

    connections: int = 0
    answers: Counter[bytes] = field(default_factory=Counter)
    """The number of answers by status; the empty status is a connection closed without an answer."""
    slowest: float = 0.0
    """Seconds until the latest answer, from the moment that its connection was open."""


async def flood(
    port: int, attack: str, *, connections: int, seconds: float, total: int | None = None
) -> Flood:
    """Hold many connections at once, each with a request of the attack, for some seconds.

    If a connection ends, a new one replaces it, up to `total`. A separate process does it, so that it
    takes no time from the measurements.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        work = partial(_flood_in_process, port, attack, connections=connections, seconds=seconds, total=total)
        return await asyncio.get_running_loop().run_in_executor(pool, work)


def _flood_in_process(port: int, attack: str, **options: Any) -> Flood:
    return asyncio.run(_flood(port, ATTACKS[attack], **options))


async def _flood(
    port: int, make: Callable[[], bytes], *, connections: int, seconds: float, total: int | None
) -> Flood:
    done = Flood()
    until = time.monotonic() + seconds

    async def hold() -> None:
        while time.monotonic() < until and (total is None or done.connections < total):
            done.connections += 1
            opened = time.monotonic()
            with contextlib.suppress(TimeoutError):
                status = await _exchange(port, make(), until=until)
                done.answers[status] += 1
                if status:
                    done.slowest = max(done.slowest, time.monotonic() - opened)

    await asyncio.gather(*(hold() for _ in range(connections)))
    return done


async def _exchange(port: int, raw: bytes, *, until: float) -> bytes:
    """Send a request and return the status of the first answer; raise TimeoutError at `until`."""
    loop = asyncio.get_running_loop()
    with socket.socket() as connection:
        connection.settimeout(0)
        status = b""
        async with asyncio.timeout(max(0.0, until - time.monotonic())):
            with contextlib.suppress(OSError):
                await loop.sock_connect(connection, ("127.0.0.1", port))
                sending = asyncio.create_task(_send(connection, raw))
                try:
                    received = b""
                    while data := await loop.sock_recv(connection, 4096):
                        received = received or data
                        status = received[9:12]
                except OSError:
                    pass
                finally:
                    sending.cancel()
                    await asyncio.wait([sending])
    return status


async def _send(connection: socket.socket, raw: bytes) -> None:
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_sendall(connection, raw)


@dataclass
class Genuine:
    """The small webhooks that were sent during an attack."""

    sent: int = 0
    statuses: Counter[bytes] = field(default_factory=Counter)
    slowest: float = 0.0


@asynccontextmanager
async def genuine_webhooks(
    port: int, *, a_second: float = 10, repeat: bool = False
) -> AsyncIterator[Genuine]:
    """Send genuine webhooks for the block, each on a connection of its own.

    If `repeat` is set, a webhook that is late, cut or answered 503 is sent again after a pause, like
    Clipia does, and its second status counts.
    """
    found = Genuine()

    async def send() -> None:
        content = body(str(uuid.uuid4()))
        raw = request(content, headers={**signed(content), "Connection": "close"})
        status = await exchange(raw)
        if repeat and status in {b"503", b"late", b""}:
            await asyncio.sleep(RETRY_AFTER)
            status = await exchange(raw)
        found.statuses[status] += 1

    async def exchange(raw: bytes) -> bytes:
        began = time.monotonic()
        try:
            status = await _exchange(port, raw, until=began + ANSWER_WAIT)
        except TimeoutError:
            status = b"late"
        found.slowest = max(found.slowest, time.monotonic() - began)
        return status

    async def run() -> None:
        async with asyncio.TaskGroup() as sending:
            while not over.is_set():
                found.sent += 1
                sending.create_task(send())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(over.wait(), 1 / a_second)

    over = asyncio.Event()
    task = asyncio.create_task(run())
    try:
        yield found
    finally:
        over.set()
        await task


async def slow_webhook(port: int, *, pause: float) -> tuple[bytes, float]:
    """Send a genuine webhook with a pause in its body; return the status and the seconds that it took."""
    content = body(str(uuid.uuid4()))
    raw = request(content, headers=signed(content))
    began = time.monotonic()
    async with asyncio.timeout(30):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw[:-10])
        await asyncio.sleep(pause)
        writer.write(raw[-10:])
        answer = await reader.readline()
        took = time.monotonic() - began
        writer.close()
        await writer.wait_closed()
    return answer[9:12], took


@contextmanager
def frozen_postgres(server: Postgres) -> Iterator[None]:
    """Stop all processes of PostgreSQL for the block."""
    processes = server.processes()
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


class Meter:
    """The resident memory that an attack adds to a process, in MiB."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.before = self._read()
        self.peak = 0.0

    def _read(self) -> float:
        return float(self._process.memory_info().rss) / MIB

    @property
    def now(self) -> float:
        """The memory that is added now."""
        return self._read() - self.before

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Find the peak within the block."""

        async def watch() -> None:
            while True:
                self.peak = max(self.peak, self.now)
                await asyncio.sleep(0.05)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()

    async def wait_until(self, *, below: float, seconds: float) -> float:
        """Wait at most `seconds` until less than a size is added; return the added memory."""
        until = time.monotonic() + seconds
        while self.now >= below and time.monotonic() < until:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.2)
        return self.now
