"""The shipped HTTP protocol on uvloop: connections that are lost while the application still serves them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ClassVar

import pytest
import uvicorn
import uvloop
from uvicorn.server import ServerState

from receiver.api.memory_budget import MIB, MemoryBudget
from receiver.api.protocol import DeadlineHttpToolsProtocol

SECONDS = 15.0
GET = b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"


class Served:
    """An account that cannot be shed."""

    held = 0
    is_unfinished = False

    def shed(self) -> None:
        """Fail: the account is not unfinished."""
        raise AssertionError


class Server:
    """The protocol on a port, and an application with requests that the test ends."""

    def __init__(self) -> None:
        self.state = ServerState()
        self.begun: list[str] = []
        self.told: list[str] = []
        """The messages that the application received after the body."""
        self.release = asyncio.Event()
        self.writers: list[asyncio.StreamWriter] = []

        class Tight(DeadlineHttpToolsProtocol):
            budget: ClassVar[MemoryBudget] = MemoryBudget(MIB)

        self.budget = Tight.budget
        config = uvicorn.Config(self._app, interface="asgi3", ws="none", lifespan="off", log_config=None)
        self.make = lambda: Tight(config, self.state, {})

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"]
        self.begun.append(path)
        if path == "/started":
            await self._start(send)
        while (message := await receive())["type"] == "http.request" and message["more_body"]:
            pass
        if path != "/":
            await self.release.wait()
        if path == "/started":
            raise ValueError
        if path == "/asks":
            self.told.append((await receive())["type"])
        await self._start(send)
        await send({"type": "http.response.body", "body": b"ok"})
        if path == "/answered":
            raise ValueError

    async def _start(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})

    async def connect(self, sent: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection and send bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers.append(writer)
        writer.write(sent)
        return reader, writer

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Listen inside the block."""
        server = await asyncio.get_running_loop().create_server(self.make, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            self.release.set()
            server.close()
            for transport in [writer.transport for writer in self.writers]:
                transport.abort()
            for connection in list(self.state.connections):
                connection.transport.abort()
            await asyncio.sleep(0.05)


def run(test: Callable[[Server], Coroutine[Any, Any, None]]) -> None:
    """Run a test with a server on uvloop; a write to a closed transport raises."""

    async def main() -> None:
        async with asyncio.timeout(SECONDS):
            server = Server()
            async with server.listening():
                await test(server)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; `run` limits the time."""
    while not condition():  # noqa: ASYNC110 - the state of a protocol has no event
        await asyncio.sleep(0.005)


async def read_status(reader: asyncio.StreamReader) -> bytes:
    """Return the status of an answer; an empty one if there is none."""
    return (await reader.readline())[9:12]


@pytest.mark.parametrize("room", [3000, 9000], ids=["the connection", "the body"])
def test_a_lost_connection_is_not_shed_for_another(room: int) -> None:
    """A10: the memory of a lost connection does not block others: the largest live one is shed."""

    async def test(server: Server) -> None:
        _, lost = await server.connect(POST % (b"/asks", 900_000) + b"a" * 600_000)
        await until(lambda: server.budget.used > 600_000)
        [task] = server.state.tasks
        lost.close()
        await until(lambda: not server.state.connections)
        unfinished, _ = await server.connect(POST % (b"/", 200_000) + b"a" * 100_000)
        await until(lambda: server.budget.used > 710_000)
        server.budget.add(Served(), MIB - server.budget.used - room)
        genuine, _ = await server.connect(POST % (b"/", 2000) + b"a" * 2000)
        assert await read_status(genuine) == b"200"
        assert await read_status(unfinished) == b"503"
        server.release.set()
        await asyncio.wait([task])
        assert task.exception() is None

    run(test)


@pytest.mark.parametrize("sent", [GET % b"/asks", GET % b"/asks" + GET % b"/"], ids=["one", "pipelined"])
def test_each_request_of_a_lost_connection_is_told(sent: bytes) -> None:
    """A10: with pipelining the served request is the older one, and it writes no more."""

    async def test(server: Server) -> None:
        _, writer = await server.connect(sent)
        await until(lambda: server.begun == ["/asks"])
        [task] = server.state.tasks
        writer.close()
        await until(lambda: not server.state.connections)
        server.release.set()
        await asyncio.wait([task])
        assert task.exception() is None
        assert server.told == ["http.disconnect"]
        assert server.begun == ["/asks"]
        assert server.budget.used == 0

    run(test)


@pytest.mark.parametrize("path", [b"/started", b"/answered", b"/late"])
@pytest.mark.parametrize("is_lost", [False, True], ids=["open", "lost"])
def test_an_application_that_fails_late_ends_its_connection(path: bytes, *, is_lost: bool) -> None:
    """A10: after an answer has begun, and on a lost connection, an error closes without an exception."""

    async def test(server: Server) -> None:
        reader, writer = await server.connect(GET % path + GET % b"/late" * is_lost)
        await until(lambda: len(server.begun) == 1)
        [task] = server.state.tasks
        if is_lost:
            writer.close()
            await until(lambda: not server.state.connections)
        server.release.set()
        await asyncio.wait([task])
        assert task.exception() is None
        if not is_lost:
            assert await read_status(reader) == b"200"
            writer.close()
        await until(lambda: not server.state.connections and server.budget.used == 0)

    run(test)


def test_pipelined_requests_do_not_use_up_the_budget() -> None:
    """A10: requests that wait behind others use at most half of the budget, so that a webhook is accepted."""

    async def test(server: Server) -> None:
        attackers = [await server.connect(GET % b"/late" * 17) for _ in range(20)]
        await until(lambda: len(server.begun) == len(attackers))
        assert server.budget.used < MIB * 3 // 4
        genuine, _ = await server.connect(POST % (b"/", 2000) + b"a" * 2000)
        assert await read_status(genuine) == b"200"

    run(test)
