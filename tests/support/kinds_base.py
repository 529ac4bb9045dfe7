"""Destinations for the contract suite: how to open each kind, read what arrived, break it and mend it.

A new kind of destination gets a subclass of `Kind` and an entry in `kinds.py`; the suite needs no change.
"""

import abc
import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

from cloudevents.core.v1.event import CloudEvent

from receiver.destination_settings import DestinationSettings
from receiver.destinations import Destination, open_destination
from receiver.destinations.base import encode
from receiver.destinations.memory import MemoryDestination
from receiver.errors import PublishFailed, PublishRejected

TRACE: Final = {
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "vendor=a b%,other=1",
}


def make_event(data: Mapping[str, Any] | None = None, **attributes: Any) -> CloudEvent:
    """Make a message as the delivery lane does."""
    return CloudEvent(
        attributes={
            "id": str(uuid4()),
            "source": "/clipia/webhook/clipia",
            "type": "ai.clipia.generation.completed",
            "subject": str(uuid4()),
            "time": datetime(2026, 11, 20, 12, 30, 15, 123456, tzinfo=UTC),
            "datacontenttype": "application/json",
            "deliveryid": str(uuid4()),
            "attempt": 1,
            **attributes,
        },
        data=dict(data if data is not None else {"status": "OK"}),
    )


def open_url(url: str, **settings: Any) -> Destination:
    """Open a destination by its URL, with further settings as in its table."""
    return open_destination(DestinationSettings.model_validate({"name": "test", "url": url, **settings}))


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds, for conditions that set no event."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the condition is often a server's or a thread's
            await asyncio.sleep(0.002)


async def outcome(destination: Destination, data: Mapping[str, Any] | None = None) -> str:
    """Publish an event and return "delivered" or the reason of the failure."""
    try:
        await destination.publish(make_event(data))
    except (PublishFailed, PublishRejected) as failure:
        return failure.reason
    return "delivered"


async def verdict(destination: Destination) -> str:
    """Check and return "fine" or the reason of the failure."""
    try:
        await destination.check()
    except PublishFailed as failure:
        return failure.reason
    return "fine"


class Kind(abc.ABC):
    """One kind of destination, with a real server or file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    @abc.abstractmethod
    def open(self) -> Destination:
        """Open one more destination with the same address."""

    @abc.abstractmethod
    async def received(self) -> list[dict[str, Any]]:
        """Return the events that have arrived, as the consumer sees them, in structured JSON."""

    @abc.abstractmethod
    async def break_down(self) -> None:
        """Make publishing fail."""

    @abc.abstractmethod
    async def mend(self) -> None:
        """Undo `break_down`; confirmed events must still be there."""


class FileKind(Kind):
    """A file that is replaced by a folder while it is broken."""

    @property
    def path(self) -> Path:
        """The file; the destination makes its folders."""
        return self.folder / "a" / "b" / "events.jsonl"

    def open(self) -> Destination:
        """Open the file."""
        return open_url(f"file:{self.path}")

    async def received(self) -> list[dict[str, Any]]:
        """Read the file line by line."""
        return [json.loads(line) for line in self.path.read_bytes().splitlines()]

    async def break_down(self) -> None:
        """Put a folder where the file was."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self.path.rename(self.path.with_suffix(".away"))
        self.path.mkdir()

    async def mend(self) -> None:
        """Put the file back."""
        self.path.rmdir()
        away = self.path.with_suffix(".away")
        if away.exists():
            away.rename(self.path)


@dataclass(frozen=True, kw_only=True)
class Received:
    """One HTTP request."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


Answer = Callable[[Received, asyncio.StreamWriter], Awaitable[None]]


async def answer_ok(_request: Received, writer: asyncio.StreamWriter) -> None:
    """Answer 200 and keep the connection."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")


class HttpSink:
    """A real HTTP server that records requests and answers as a test sets it."""

    def __init__(self, answer: Answer = answer_ok) -> None:
        self.answer = answer
        self.requests: list[Received] = []
        self.connections = 0
        self.most_open = 0
        self.port = 0
        self._serving: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None
        self._ssl: Any = None

    @property
    def open_connections(self) -> int:
        """The number of open connections."""
        return len(self._serving)

    @property
    def url(self) -> str:
        """The URL that events are posted to."""
        return f"{'https' if self._ssl else 'http'}://127.0.0.1:{self.port}/events"

    async def start(self, *, ssl: Any = None) -> Self:
        """Listen: on a free port the first time, on the same one afterwards."""
        self._ssl = ssl or self._ssl
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._ssl)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._server is not None:
            self._server.close()
            for task, writer in list(self._serving.items()):
                writer.transport.abort()
                task.cancel()
            if self._serving:
                await asyncio.wait(self._serving)
            self._server = None

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections += 1
        self._serving[task] = writer
        self.most_open = max(self.most_open, self.open_connections)
        try:
            while not writer.is_closing():
                await self._serve_one(reader, writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            # The client has gone, or `stop` ends the connection.
            writer.close()
        finally:
            del self._serving[task]

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.rstrip().split("\r\n")
        headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        method, target, _ = line.split(" ")
        request = Received(method=method, target=target, headers=headers, body=body)
        self.requests.append(request)
        await self.answer(request, writer)
        await writer.drain()


class HttpKind(Kind):
    """An HTTP server that is stopped while it is broken."""

    async def __aenter__(self) -> Self:
        self.sink = await HttpSink().start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.sink.stop()

    def open(self) -> Destination:
        """Open the server's URL."""
        return open_url(self.sink.url)

    async def received(self) -> list[dict[str, Any]]:
        """Read the posted bodies."""
        return [json.loads(request.body) for request in self.sink.requests if request.method == "POST"]

    async def break_down(self) -> None:
        """Stop the server."""
        await self.sink.stop()

    async def mend(self) -> None:
        """Start it on the same port."""
        await self.sink.start()


class MemoryKind(Kind):
    """The list in memory; it raises a failure while it is broken."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.opened: list[MemoryDestination] = []
        self.failure: PublishFailed | None = None

    def open(self) -> Destination:
        """Open a list of its own."""
        destination = open_url("memory:")
        assert isinstance(destination, MemoryDestination)
        destination.failure = self.failure
        self.opened.append(destination)
        return destination

    async def received(self) -> list[dict[str, Any]]:
        """Read all lists."""
        return [json.loads(encode(event)) for destination in self.opened for event in destination.events]

    async def break_down(self) -> None:
        """Let every list fail."""
        self._fail(PublishFailed("as told", reason="test"))

    async def mend(self) -> None:
        """Let every list work."""
        self._fail(None)

    def _fail(self, failure: PublishFailed | None) -> None:
        self.failure = failure
        for destination in self.opened:
            destination.failure = failure


KINDS: Final[Mapping[str, type[Kind]]] = {"file": FileKind, "http": HttpKind, "memory": MemoryKind}
