"""The transport for small requests against raw servers: bytes, connections, and what counts as not sent."""

import asyncio
import contextlib
import gc
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import httpx
import pytest
import uvloop
from support.certificates import make_certificate
from support.servers import free_port

from receiver.http_connections import KEEP_ALIVE_SECONDS
from receiver.http_transport import HttpTransport

SECONDS = 10
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nset-cookie: session=1\r\n\r\nok"
BODY = b'{"text": "Z\xc3\xbcrich"}'
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

Answer: TypeAlias = Callable[[asyncio.StreamWriter], Awaitable[None]]
Run: TypeAlias = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=list(LOOPS.values()), ids=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a test on each event loop, in bounded time."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield lambda test: runner.run(asyncio.wait_for(test, SECONDS))


def say(content: bytes, *, then: str = "") -> Answer:
    """Answer with these bytes; then close the connection or reset it."""

    async def answer(writer: asyncio.StreamWriter) -> None:
        writer.write(content)
        await writer.drain()
        if then == "reset":
            # The other side reads the bytes first: a reset would drop them.
            await asyncio.sleep(0.1)
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if then:
            writer.close()

    return answer


async def stay_silent(_writer: asyncio.StreamWriter) -> None:
    """Answer nothing."""


class Peer:
    """A server that keeps each request as it came, and answers as a test says."""

    def __init__(self, answer: Answer, *, tls: ssl.SSLContext | None = None) -> None:
        self.answer = answer
        self._tls = tls
        self.requests: list[bytes] = []
        self.connections = 0
        self.ended = 0
        self.port = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await asyncio.wait_for(until(lambda: self.ended == self.connections), 5)

    @property
    def origin(self) -> str:
        """Its URL without a path."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
                self.requests.append(head + await reader.readexactly(int(length[1]) if length else 0))
                await self.answer(writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.ended += 1


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; `run` limits the time."""
    while not condition():  # noqa: ASYNC110 - the state of a connection has no event
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def opened(**options: Any) -> Any:
    """Open a transport, and close it after the block."""
    transport = HttpTransport(tls=httpx.create_ssl_context(), **options)
    try:
        yield transport
    finally:
        await transport.aclose()


async def send(
    transport: HttpTransport, url: str, *, method: str = "POST", body: bytes | None = BODY, **options: Any
) -> tuple[int, bytes]:
    """Send a request and return status and body of the answer."""
    request = httpx.Request(method, url, content=body, **options)
    response = await transport.handle_async_request(request)
    try:
        return response.status_code, await response.aread()
    finally:
        await response.aclose()


def test_a_request_goes_out_byte_for_byte(run: Run) -> None:
    """D5: target and headers stay as they are: none is added, joined, rewritten or remembered."""
    target = "/a/%2e%2e/b%2fc%2F;x?X-Amz-Signature=a%2Bb%3D&x=%7E%27'&y=+"
    headers = [("x-a", "1"), ("X-A", "2"), ("X-B", "a  b"), ("x-a", "1")]

    async def test() -> None:
        async with Peer(say(OK)) as peer, opened() as transport:
            for _ in range(2):
                assert await send(transport, peer.origin + target, headers=headers) == (200, b"ok")
            lines = [
                f"POST {target} HTTP/1.1",
                f"Host: 127.0.0.1:{peer.port}",
                *(f"{name}: {value}" for name, value in headers),
                f"Content-Length: {len(BODY)}",
            ]
            expected = "\r\n".join([*lines, "", ""]).encode() + BODY
            assert peer.requests == [expected, expected]
            assert peer.connections == 1

    run(test())


CUTS = {
    "nothing": b"",
    "half a status line": b"HTTP/1.1 2",
    "half a head": b"HTTP/1.1 200 OK\r\ncontent-len",
    "a part of a body": b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf",
    "a part of a chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nhalf",
    "junk": b"220 ready\r\n",
}


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("content", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("is_reused", [False, True], ids=["new", "reused"])
def test_a_request_is_not_sent_again(
    run: Run, content: bytes, then: str, method: str, *, is_reused: bool
) -> None:
    """E5: if the other side reads a request and cuts the answer, it is not sent again."""
    body = BODY if method == "POST" else None

    async def test() -> None:
        async with Peer(say(OK)) as peer, opened() as transport:
            if is_reused:
                await send(transport, peer.origin, method=method, body=body)
            peer.answer = say(content, then=then)
            with pytest.raises((httpx.ReadError, httpx.RemoteProtocolError)):
                await send(transport, peer.origin, method=method, body=body)
            assert (len(peer.requests), peer.connections) == (1 + is_reused, 1)
            peer.answer = say(OK)
            assert await send(transport, peer.origin, method=method, body=body) == (200, b"ok")

    run(test())


@pytest.mark.parametrize(("then", "is_whole"), [("close", True), ("reset", False)])
def test_a_reset_is_no_end_of_a_body(run: Run, then: str, *, is_whole: bool) -> None:
    """D9: a body without a length ends if the connection is closed, and is an error if it is reset."""

    async def test() -> None:
        async with Peer(say(b"HTTP/1.1 200 OK\r\n\r\nhalf", then=then)) as peer, opened() as transport:
            if is_whole:
                assert await send(transport, peer.origin) == (200, b"half")
            else:
                with pytest.raises(httpx.ReadError):
                    await send(transport, peer.origin)

    run(test())


def test_a_refused_connection_has_a_cause(run: Run) -> None:
    """E4: the failure's cause is the system's error."""

    async def test() -> None:
        async with opened() as transport:
            with pytest.raises(httpx.ConnectError) as caught:
                await send(transport, f"http://localhost:{free_port()}")
        assert isinstance(caught.value.__cause__, OSError)
        assert type(caught.value.__cause__).__module__ == "builtins", (
            "not the library's: its text has the host"
        )

    run(test())


INVALID: dict[str, dict[str, Any]] = {
    "two headers in one": {"headers": {"X": "a\r\nY: b"}},
    "a line end in a header": {"headers": {"X": "a\n"}},
    "a NUL in a header": {"headers": {"X": "a\0b"}},
    "white space around a value": {"headers": {"X": " a"}},
    "two headers in a name": {"headers": {"X: a\r\nY": "b"}},
    "a space in a name": {"headers": {"X Y": "b"}},
    "another length": {"headers": {"Content-Length": "1"}},
    "no length": {"headers": {"Transfer-Encoding": "chunked"}},
    "a method of two words": {"method": "GET / HTTP/1.1\r\nX:"},
}


@pytest.mark.parametrize("options", INVALID.values(), ids=INVALID)
def test_an_invalid_request_is_not_sent(run: Run, options: dict[str, Any]) -> None:
    """G8: a request that would be two, or none, opens no connection."""

    async def test() -> None:
        async with Peer(say(OK)) as peer, opened() as transport:
            with pytest.raises(httpx.LocalProtocolError):
                await send(transport, peer.origin, **options)
            assert peer.connections == 0

    run(test())


@pytest.mark.parametrize("kind", ["closed", "spoke"])
def test_a_connection_that_ended_is_not_used_again(run: Run, kind: str) -> None:
    """E5: a connection that the server closed, or on which it spoke, is left even before the loop knows."""
    listener = socket.create_server(("127.0.0.1", 0))
    # So that the thread ends if no second connection comes.
    listener.settimeout(SECONDS)
    ended = threading.Event()

    def serve() -> None:
        first, _ = listener.accept()
        first.recv(65_536)
        first.sendall(OK)
        time.sleep(0.2)
        first.sendall(OK) if kind == "spoke" else first.close()
        ended.set()
        with contextlib.suppress(TimeoutError), first:
            second, _ = listener.accept()
            second.recv(65_536)
            second.sendall(OK.replace(b"200", b"201"))
            second.close()

    async def test() -> None:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with opened() as transport:
            assert (await send(transport, url))[0] == 200
            # The event loop is blocked, so that it reads nothing in between.
            ended.wait(SECONDS)
            time.sleep(0.05)  # noqa: ASYNC251
            assert (await send(transport, url))[0] == 201

    thread = threading.Thread(target=serve)
    thread.start()
    run(test())
    thread.join(SECONDS)
    listener.close()


@pytest.mark.parametrize(
    "surplus", [OK, OK[:20], b"\r\n", b"x"], ids=["an answer", "half", "a line end", "x"]
)
def test_bytes_that_no_request_asked_for_end_the_connection(run: Run, surplus: bytes) -> None:
    """E1: bytes on an idle connection are no answer to the next request."""

    async def test() -> None:
        async with Peer(say(OK)) as peer, opened() as transport:

            async def answer(writer: asyncio.StreamWriter) -> None:
                writer.write(OK)
                await asyncio.sleep(0.05)
                writer.write(surplus)

            peer.answer = answer
            await send(transport, peer.origin)
            # Well before it would be closed for idling.
            await asyncio.wait_for(until(lambda: peer.ended == 1), KEEP_ALIVE_SECONDS / 2)
            peer.answer = say(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n")
            assert await send(transport, peer.origin) == (503, b"")

    run(test())


@pytest.mark.parametrize(
    "content", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"], ids=["head", "body"]
)
def test_a_cancelled_request_ends_its_connection(run: Run, content: bytes) -> None:
    """E16: if a request is cancelled at its head or its body, its connection is closed."""

    async def test() -> None:
        async with Peer(say(content)) as peer, opened() as transport:
            for number in range(1, 4):
                sending = asyncio.create_task(send(transport, peer.origin))
                await until(lambda expected=number: len(peer.requests) == expected)  # type: ignore[misc]  # mypy infers no type for a default
                await asyncio.sleep(0.02)
                sending.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await sending
                await until(lambda expected=number: peer.ended == expected)  # type: ignore[misc]  # mypy infers no type for a default
            peer.answer = say(OK)
            assert await send(transport, peer.origin) == (200, b"ok")

    run(test())


def test_an_early_answer_counts_and_a_large_body_arrives(run: Run) -> None:
    """E4: a large body is sent whole, and an answer is read even if the server does not read the body."""
    body = b"x" * 8 * 1024 * 1024

    async def test() -> None:
        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 No\r\ncontent-length: 0\r\n\r\n")
            await ended.wait()
            writer.close()

        ended = asyncio.Event()
        async with Peer(say(OK)) as peer, opened() as transport:
            assert await send(transport, peer.origin, body=body) == (200, b"ok")
            assert peer.requests[0].endswith(b"\r\n\r\n" + body)
            server = await asyncio.start_server(refuse, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            assert await send(transport, url, body=body) == (413, b"")
            ended.set()
            server.close()
            await asyncio.sleep(0.05)

    run(test())


def test_a_long_header_is_read(run: Run) -> None:
    """E4: an answer with a header of 60 KB, such as a policy of a proxy, is an answer."""
    content = b"HTTP/1.1 200 OK\r\nx: " + b"x" * 60_000 + b"\r\nx-end:  a \r\ncontent-length: 0\r\n\r\n"

    async def test() -> None:
        async with Peer(say(content)) as peer, opened() as transport:
            response = await transport.handle_async_request(httpx.Request("GET", peer.origin))
            await response.aclose()
            assert (response.status_code, response.headers["x-end"]) == (200, "a")

    run(test())


def test_a_connection_with_tls_is_used_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E5: the tickets of TLS 1.3 are no surplus, and a close does not wait for the other side."""
    certificate = make_certificate(tmp_path / "server.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate)

    async def test() -> None:
        ended = asyncio.Event()
        async with Peer(say(OK), tls=tls) as peer, opened() as transport:
            for _ in range(5):
                assert await send(transport, peer.origin) == (200, b"ok")
            assert peer.connections == 1

            async def stop_reading(writer: asyncio.StreamWriter) -> None:
                writer.write(CUTS["a part of a body"])
                writer.transport.pause_reading()  # type: ignore[attr-defined]  # the type is of any transport
                await ended.wait()
                writer.transport.abort()

            peer.answer = stop_reading
            response = await transport.handle_async_request(httpx.Request("POST", peer.origin))
            body: Any = response.stream
            await response.aclose()
            await asyncio.wait_for(body._protocol.closed or asyncio.sleep(0), 2)
            ended.set()

    run(test())


@pytest.mark.parametrize(("host", "address"), [("[::1]", "::1"), ("127.1", "127.0.0.1")])
def test_a_literal_address_is_reached(run: Run, host: str, address: str) -> None:
    """E4: addresses of IPv6 and short ones of IPv4 are connected to, and named in Host as they are."""

    async def test() -> None:
        heads: list[bytes] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heads.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(OK)
            await reader.read()
            writer.close()

        try:
            server = await asyncio.start_server(serve, address, 0)
        except OSError:
            pytest.skip("no IPv6")
        port = server.sockets[0].getsockname()[1]
        async with opened() as transport:
            assert await send(transport, f"http://{host}:{port}/") == (200, b"ok")
        assert f"\r\nHost: {host}:{port}\r\n".encode() in heads[0]
        server.close()
        await asyncio.sleep(0.05)

    run(test())


FAILURES: dict[str, Answer] = {
    "cut": say(b"", then="close"),
    "junk": say(b"220 ready\r\n"),
    "two answers": say(OK + OK),
    "cut body": say(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf", then="close"),
}


@pytest.mark.parametrize("name", [*FAILURES, "refused"])
def test_failures_leave_no_garbage(run: Run, name: str) -> None:
    """Failures make no reference cycles: our processes rarely collect those."""

    async def test() -> None:
        async with Peer(FAILURES.get(name, stay_silent)) as peer, opened() as transport:
            url = f"http://127.0.0.1:{free_port()}" if name == "refused" else peer.origin

            async def fail(times: int) -> None:
                for _ in range(times):
                    with contextlib.suppress(httpx.TransportError):
                        await send(transport, url)

            await fail(5)
            await asyncio.sleep(0.05)
            gc.collect()
            gc.disable()
            try:
                await fail(50)
                await asyncio.sleep(0.05)
                left = [each for each in map(_described, _collected()) if each.startswith(OURS)]
            finally:
                gc.enable()
            assert len(left) < 50, left

    run(test())


OURS = ("receiver.", "aiohttp.", "httpx.", "builtins.frame", "builtins.traceback")


def _described(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__name__}"


def _collected() -> list[object]:
    """Collect garbage and return it."""
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_close_ends_the_reader_of_a_body(run: Run) -> None:
    """E16: a transport that is closed during a body fails the reader, which would wait for ever."""

    async def test() -> None:
        async with Peer(say(CUTS["a part of a body"])) as peer, opened() as transport:
            response = await transport.handle_async_request(httpx.Request("POST", peer.origin))
            reading = asyncio.create_task(response.aread())
            await asyncio.sleep(0.05)
            await transport.aclose()
            with pytest.raises(httpx.TransportError):
                await asyncio.wait_for(reading, 2)

    run(test())


def test_close_ends_idle_connections(run: Run) -> None:
    """E16: after the close no connection is open."""

    async def test() -> None:
        async with Peer(say(OK)) as peer:
            async with opened() as transport:
                await send(transport, peer.origin)
                assert (peer.connections, peer.ended) == (1, 0)
            await until(lambda: peer.ended == 1)

    run(test())
