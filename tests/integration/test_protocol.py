"""The shipped HTTP protocol against raw sockets: deadlines, limits and the grammar of RFC 9112."""

import asyncio
import contextlib
import gc
import logging
import re
import socket
import ssl
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal, Self

import psutil
import pytest
import uvicorn
from support.certificates import make_certificate

from receiver.api.memory_budget import CONNECTION_BYTES, MemoryBudget
from receiver.api.protocol import DeadlineHttpToolsProtocol

SECONDS = 15.0
"""The longest wait of these tests, in seconds; every deadline in them is much shorter."""
MIB = 1024 * 1024
HOST = b"Host: x\r\n"
GET = b"GET /after HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class Impatient(DeadlineHttpToolsProtocol):
    """The shipped class with short deadlines."""

    HEADER_TIMEOUT = 0.4
    LINGER_TIMEOUT = 0.4


class App:
    """Answers after the whole body and records each request; some paths misbehave."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        self.header_names: list[bytes] = []
        self.release = threading.Event()

    def reset(self) -> None:
        """Delete the recorded requests; let slow answers wait again."""
        self.requests.clear()
        self.release.clear()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        path = scope["path"]
        if path == "/early":
            await self._answer(send, 413, [])
            return
        if path == "/early-close":
            await self._answer(send, 413, [(b"connection", b"close")])
            return
        if path == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.requests.append((scope["method"], path, body))
        self.header_names = [name for name, _ in scope["headers"]]
        if path == "/slow":
            await asyncio.to_thread(self.release.wait, SECONDS)
        await self._answer(send, 200, [])

    async def _answer(self, send: Any, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [(b"content-length", b"2"), *headers],
            }
        )
        await send({"type": "http.response.body", "body": b"ok"})


class Server:
    """A real uvicorn in a thread."""

    def __init__(
        self,
        protocol: type[asyncio.Protocol],
        *,
        loop: Literal["asyncio", "uvloop"] = "uvloop",
        certificate: Path | None = None,
    ) -> None:
        self.app = App()
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        config = uvicorn.Config(
            self.app,
            http=protocol,
            ws="none",
            loop=loop,
            lifespan="off",
            log_level="critical",
            timeout_keep_alive=3600,  # so that it does not close a connection
            ssl_certfile=certificate,
        )
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.listener]})

    def __enter__(self) -> Self:
        self.thread.start()
        wait_until(lambda: self.uvicorn.started)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.app.release.set()
        self.uvicorn.should_exit = True
        self.thread.join(SECONDS)
        assert not self.thread.is_alive(), "the server does not stop"
        self.listener.close()

    def connect(self) -> socket.socket:
        """Open a connection with reads that fail after a timeout."""
        connection = socket.create_connection(self.listener.getsockname(), timeout=SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    @property
    def connections(self) -> int:
        """Return the number of the server's connections."""
        return len(self.uvicorn.server_state.connections)

    def exchange(self, raw: bytes) -> list[int]:
        """Send bytes, read to the end of the connection, return the statuses."""
        with self.connect() as connection:
            connection.sendall(raw)
            return statuses(read_to_end(connection))


def wait_until(condition: Any) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the other side closes; a reset counts as the end, a timeout as a failure."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def read_answer(connection: socket.socket) -> bytes:
    """Read one answer of the test application."""
    received = b""
    while not received.endswith(b"\r\n\r\nok"):
        data = connection.recv(1)
        assert data, f"the connection ended after {received!r}"
        received += data
    return received


def statuses(received: bytes) -> list[int]:
    """Find the status lines."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def is_cut(connection: socket.socket, drip: bytes) -> bool:
    """Drip bytes until the other side closes the connection; return False if it never does."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        try:
            connection.sendall(drip)
        except (BrokenPipeError, ConnectionResetError):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module", params=["uvloop", "asyncio"])
def shipped_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Run a server with the shipped limits."""
    with Server(DeadlineHttpToolsProtocol, loop=request.param) as running:
        yield running


@pytest.fixture(scope="module")
def impatient_server() -> Iterator[Server]:
    """Run a server with short deadlines."""
    with Server(Impatient) as running:
        yield running


@pytest.fixture
def shipped(shipped_server: Server) -> Server:
    """Delete the requests of earlier tests."""
    shipped_server.app.reset()
    return shipped_server


@pytest.fixture
def impatient(impatient_server: Server) -> Server:
    """Delete the requests of earlier tests."""
    impatient_server.app.reset()
    return impatient_server


def post(headers: bytes, body: bytes = b"hi", *, version: bytes = b"1.1") -> bytes:
    """Return the bytes of a case's request."""
    return b"POST / HTTP/" + version + b"\r\n" + headers + b"\r\n" + body


REFUSED: dict[str, tuple[int, bytes]] = {
    "Content-Length and Transfer-Encoding": (
        400,
        post(HOST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    ),
    "Transfer-Encoding and Content-Length": (
        400,
        post(HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", b"0\r\n\r\n"),
    ),
    "two equal lengths": (400, post(HOST + b"Content-Length: 2\r\nContent-Length: 2\r\n")),
    "two lengths": (400, post(HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n")),
    "list of lengths": (400, post(HOST + b"Content-Length: 2, 2\r\n")),
    "negative length": (400, post(HOST + b"Content-Length: -2\r\n")),
    "signed length": (400, post(HOST + b"Content-Length: +2\r\n")),
    "hexadecimal length": (400, post(HOST + b"Content-Length: 0x2\r\n")),
    "length with underscore": (400, post(HOST + b"Content-Length: 0_2\r\n")),
    "length beyond 64 bits": (400, post(HOST + b"Content-Length: 99999999999999999999\r\n")),
    "empty length": (400, post(HOST + b"Content-Length:\r\n")),
    "obs-fold": (400, post(HOST + b"X-A: a\r\n b\r\nContent-Length: 2\r\n")),
    "bare LF everywhere": (400, b"POST / HTTP/1.1\nHost: x\nContent-Length: 2\n\nhi"),
    "bare LF after a header": (400, post(b"Host: x\nContent-Length: 2\r\n")),
    "bare CR after a header": (400, post(b"Host: x\rContent-Length: 2\r\n")),
    "NUL in a value": (400, post(HOST + b"X-A: a\0b\r\nContent-Length: 2\r\n")),
    "header without colon": (400, post(HOST + b"XA\r\nContent-Length: 2\r\n")),
    "space before colon": (400, post(HOST + b"Transfer-Encoding : chunked\r\n", b"0\r\n\r\n")),
    "space before the first header": (400, post(b" X: 1\r\n" + HOST + b"Content-Length: 2\r\n")),
    "no Host": (400, post(b"Content-Length: 2\r\n")),
    "two Hosts": (400, post(HOST + b"Host: y\r\nContent-Length: 2\r\n")),
    "two Hosts in HTTP/1.0": (400, post(HOST + b"Host: y\r\nContent-Length: 2\r\n", version=b"1.0")),
    "gzip, chunked": (400, post(HOST + b"Transfer-Encoding: gzip, chunked\r\n", b"0\r\n\r\n")),
    "gzip": (400, post(HOST + b"Transfer-Encoding: gzip\r\n", b"0\r\n\r\n")),
    "chunked twice": (400, post(HOST + b"Transfer-Encoding: chunked, chunked\r\n", b"0\r\n\r\n")),
    "two codings": (
        400,
        post(HOST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    ),
    "gzip and chunked on two lines": (
        400,
        post(HOST + b"Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    ),
    "chunked with a control": (400, post(HOST + b"Transfer-Encoding: \x0bchunked\r\n", b"0\r\n\r\n")),
    "empty coding": (400, post(HOST + b"Transfer-Encoding:\r\nContent-Length: 2\r\n")),
    "chunked in HTTP/1.0": (
        400,
        post(HOST + b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", version=b"1.0"),
    ),
    "chunk size is no number": (400, CHUNKED + b"ZZ\r\nhi\r\n0\r\n\r\n"),
    "negative chunk": (400, CHUNKED + b"-2\r\nhi\r\n0\r\n\r\n"),
    "hexadecimal prefix on a chunk": (400, CHUNKED + b"0x2\r\nhi\r\n0\r\n\r\n"),
    "chunk beyond 64 bits": (400, CHUNKED + b"fffffffffffffffff\r\nhi\r\n0\r\n\r\n"),
    "chunk longer than its size": (400, CHUNKED + b"2\r\nhiX0\r\n\r\n"),
    "chunk with bare LF": (400, CHUNKED + b"2\nhi\n0\n\n"),
    "chunk size with a space": (400, CHUNKED + b"2 \r\nhi\r\n0\r\n\r\n"),
    "HTTP/2.0": (505, post(HOST + b"Content-Length: 2\r\n", version=b"2.0")),
    "HTTP/0.9": (505, b"GET /\r\n\r\n"),
    "HTTP/1.2": (400, post(HOST + b"Content-Length: 2\r\n", version=b"1.2")),
    "preface of HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "CONNECT": (400, b"CONNECT x:443 HTTP/1.1\r\n" + HOST + b"\r\n"),
    "method in small letters": (400, b"get / HTTP/1.1\r\n" + HOST + b"\r\n"),
    "tab in the target": (400, b"GET /a\tb HTTP/1.1\r\n" + HOST + b"\r\n"),
    "raw UTF-8 in the target": (400, b"GET /\xc3\xa9 HTTP/1.1\r\n" + HOST + b"\r\n"),
}

ACCEPTED: dict[str, tuple[bytes, bytes]] = {
    "length": (post(HOST + b"Content-Length: 2\r\n"), b"hi"),
    "no body": (post(HOST, b""), b""),
    "chunks": (CHUNKED + b"1\r\nh\r\n1\r\ni\r\n0\r\n\r\n", b"hi"),
    "spelling of chunked": (post(HOST + b"transfer-encoding:  CHUNKED\r\n", b"2\r\nhi\r\n0\r\n\r\n"), b"hi"),
    "chunk extension": (CHUNKED + b"2;a=b\r\nhi\r\n0\r\n\r\n", b"hi"),
    "a request as body": (post(HOST + b"Content-Length: %d\r\n" % len(GET), GET), GET),
    "line ends before the request": (b"\r\n\r\n" + post(HOST + b"Content-Length: 2\r\n"), b"hi"),
    "absolute target": (b"POST http://x/ HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\nhi", b"hi"),
    "offer of an upgrade": (
        post(
            HOST
            + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: %d\r\n" % len(GET),
            GET,
        ),
        GET,
    ),
    "offer of an upgrade, chunked": (
        post(
            HOST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nTransfer-Encoding: chunked \r\n",
            b"2\r\nhi\r\n0\r\n\r\n",
        ),
        b"hi",
    ),
    "white space behind values": (post(b"Host: x \r\nContent-Length: 2\t\r\n"), b"hi"),
    "trailers": (CHUNKED + b"2\r\nhi\r\n0\r\nX-Trailer: 1\r\n\r\n", b"hi"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_broken_request_is_rejected(shipped: Server, case: str) -> None:
    """B4: a request that RFC 9112 forbids gets one error, and no part of it reaches the application."""
    status, raw = REFUSED[case]
    assert shipped.exchange(raw + GET) == [status]
    assert shipped.app.requests == []


@pytest.mark.parametrize("case", ACCEPTED)
def test_valid_request_is_framed_exactly(shipped: Server, case: str) -> None:
    """B4: a valid request arrives as one, with its exact body, and so does the next one."""
    raw, body = ACCEPTED[case]
    last = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    assert shipped.exchange(raw + last) == [200, 200]
    assert shipped.app.requests == [("POST", "/", body), ("GET", "/after", b"")]


@pytest.mark.parametrize("size", [1, 7])
def test_framing_does_not_depend_on_segments(shipped: Server, size: int) -> None:
    """B4: bytes that arrive a few at a time give the same requests as one segment."""
    raw = CHUNKED + b"2;a=b\r\nhi\r\n0\r\nX-Trailer: 1\r\n\r\n" + GET
    with shipped.connect() as connection:
        for start in range(0, len(raw), size):
            connection.sendall(raw[start : start + size])
        read_answer(connection)
        read_answer(connection)
    assert shipped.app.requests == [("POST", "/", b"hi"), ("GET", "/after", b"")]


def test_large_body_in_many_segments(shipped: Server) -> None:
    """A10: the limit of the headers does not limit a body."""
    body = b"a" * (256 * 1024)
    with shipped.connect() as connection:
        connection.sendall(post(HOST + b"Content-Length: %d\r\n" % len(body), b""))
        for start in range(0, len(body), 1000):
            connection.sendall(body[start : start + 1000])
        read_answer(connection)
    assert shipped.app.requests == [("POST", "/", body)]


def test_limits_are_per_request(shipped: Server) -> None:
    """A10: after many requests in pieces a connection has the same limit as a new one."""
    with shipped.connect() as connection:
        for _ in range(40):
            for piece in (b"GET / HTTP/1.1\r\nHost: x\r\nX: a", b"a" * 1000, b"\r\n\r\n"):
                connection.sendall(piece)
                time.sleep(0.001)
            read_answer(connection)
    assert len(shipped.app.requests) == 40


def test_trailers_do_not_become_headers(shipped: Server) -> None:
    """B4: a trailer cannot pose as a header of the request, such as a second signature."""
    raw = CHUNKED + b"2\r\nhi\r\n0\r\nX-Clipia-Signature: t=1\r\n\r\n"
    with shipped.connect() as connection:
        connection.sendall(raw)
        read_answer(connection)
    assert shipped.app.header_names == [b"host", b"transfer-encoding"]


def test_error_does_not_pose_as_another_answer(shipped: Server) -> None:
    """B4: a valid request is answered even if garbage follows immediately; then the connection ends."""
    assert shipped.exchange(GET + b"GARBAGE\r\n\r\n" + GET) == [200]
    assert shipped.app.requests == [("GET", "/after", b"")]


def watch_warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that collects uvicorn's warnings, with the limit of the log reset."""
    warnings: list[str] = []
    monkeypatch.setattr(logging.getLogger("uvicorn.error"), "warning", warnings.append)
    monkeypatch.setattr(DeadlineHttpToolsProtocol, "_invalid_logged_at", float("-inf"))
    return warnings


def test_a_flood_of_garbage_is_logged_once_a_second(shipped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4: each connection without HTTP is rejected; the log has one line per second."""
    warnings = watch_warnings(monkeypatch)
    began = time.monotonic()
    for _ in range(20):
        assert shipped.exchange(b"GARBAGE\r\n\r\n") == [400]
    assert 1 <= len(warnings) <= 1 + time.monotonic() - began


def test_garbage_behind_a_slow_request_is_read_once(shipped: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """B4: after an error no more bytes are parsed or logged, even while an answer is pending."""
    warnings = watch_warnings(monkeypatch)
    with shipped.connect() as connection:
        connection.sendall(GET.replace(b"/after", b"/slow") + b"GARBAGE\r\n\r\n")
        wait_until(lambda: warnings)
        for _ in range(5):
            connection.sendall(b"GARBAGE\r\n\r\n")
            time.sleep(0.02)
        shipped.app.release.set()
        read_answer(connection)
        assert read_to_end(connection) == b""
    assert warnings == ["Invalid HTTP request received."]


def test_broken_body_behind_another_request_is_cut(shipped: Server) -> None:
    """B4: a broken body gets no error that would pose as the answer of an earlier request."""
    with shipped.connect() as connection:
        connection.sendall(GET + CHUNKED + b"ZZ\r\n")
        assert read_to_end(connection) == b""


def test_broken_body_under_a_running_answer_is_cut(shipped: Server) -> None:
    """B4: if a body breaks after its answer has begun, the connection ends without a second status line."""
    with shipped.connect() as connection:
        connection.sendall(CHUNKED.replace(b"POST /", b"POST /stream"))
        assert statuses(connection.recv(65536)) == [200]
        connection.sendall(b"ZZ\r\n")
        assert read_to_end(connection) == b""


def section(size: int) -> bytes:
    """Make a request whose header section is counted as `size` bytes."""
    counted = len(b"/") + len(HOST) + len(b"X-Fill: \r\n")
    return b"GET / HTTP/1.1\r\n" + HOST + b"X-Fill: " + b"a" * (size - counted) + b"\r\n\r\n"


def test_header_section_is_limited_exactly(shipped: Server) -> None:
    """A10: 16 KiB of headers are served and one byte more is rejected, also in the second request."""
    limit = 16 * 1024
    with shipped.connect() as connection:
        for _ in range(2):
            connection.sendall(section(limit))
            read_answer(connection)
        connection.sendall(section(limit + 1))
        assert statuses(read_to_end(connection)) == [431]
    assert len(shipped.app.requests) == 2


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\r\n" + HOST + b"X: " + b"a" * MIB + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X" * MIB + b": a\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 10_000 + b"\r\n",
        b"GET /" + b"a" * MIB + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        CHUNKED + b"0\r\n" + b"X: a\r\n" * 10_000 + b"\r\n",
    ],
    ids=["value", "name", "many", "target", "trailers"],
)
def test_header_flood_is_rejected(shipped: Server, raw: bytes) -> None:
    """A10: for headers over the limit in any form the answer is 431, and the application is not called."""
    assert shipped.exchange(raw) == [431]
    assert shipped.app.requests == []


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\n" + HOST + b"X: ",
        b"GET / HTTP/1.1\r\n" + HOST + b"X",
        b"GET /",
        CHUNKED + b"2;",
        CHUNKED + b"0\r\nX: ",
    ],
    ids=["value", "name", "target", "chunk extension", "trailer"],
)
def test_endless_line_is_not_collected(shipped: Server, start: bytes) -> None:
    """A10: an endless line is rejected long before it costs memory."""
    before = psutil.Process().memory_info().rss
    with ExitStack() as stack:
        flood = [stack.enter_context(shipped.connect()) for _ in range(32)]
        refused = 0
        for connection in flood:
            # Segments are smaller than one read, so that no line is checked as a whole.
            connection.sendall(start)
            try:
                for _ in range(256):
                    connection.sendall(b"a" * 8192)
            except (BrokenPipeError, ConnectionResetError):
                refused += 1
            else:
                refused += statuses(read_to_end(connection)) == [431]
        assert refused == len(flood)
        assert psutil.Process().memory_info().rss - before < 20 * MIB
    assert shipped.app.requests == []


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"POST / HTTP/1.1\r\nHo"])
def test_silent_client_is_closed(impatient: Server, sent: bytes) -> None:
    """B1: a connection with incomplete headers is closed, no matter how much of them was sent."""
    with impatient.connect() as connection:
        connection.sendall(sent)
        assert read_to_end(connection) == b""
    wait_until(lambda: impatient.connections == 0)


@pytest.mark.parametrize("drip", [b"a", b"X: a\r\n", b"\r\n"])
def test_dripping_headers_do_not_move_the_deadline(impatient: Server, drip: bytes) -> None:
    """B1: the deadline counts from accept, not from the last byte."""
    with impatient.connect() as connection:
        if drip != b"\r\n":
            connection.sendall(b"GET / HTTP/1.1\r\n")
        assert is_cut(connection, drip)
    assert impatient.app.requests == []


@pytest.mark.parametrize("sent", [b"G", b"\r\n", GET[:-2]])
def test_second_half_request_is_closed(impatient: Server, sent: bytes) -> None:
    """B1: the deadline starts again at the first byte after an answered request."""
    with impatient.connect() as connection:
        connection.sendall(GET)
        read_answer(connection)
        connection.sendall(sent)
        assert read_to_end(connection) == b""
    assert len(impatient.app.requests) == 1


def test_idle_connection_is_left_to_the_keep_alive_timeout(impatient: Server) -> None:
    """B1: a connection may idle between requests for longer than the header deadline."""
    with impatient.connect() as connection:
        for request in (GET, CHUNKED + b"0\r\n\r\n", GET):
            connection.sendall(request[:-2])
            time.sleep(0.05)
            connection.sendall(request[-2:])
            read_answer(connection)
            time.sleep(Impatient.HEADER_TIMEOUT * 1.5)
    assert len(impatient.app.requests) == 3


def test_slow_body_and_slow_answer_are_not_cut(impatient: Server) -> None:
    """B1: the deadline is for headers; a slow body and a slow application are allowed."""
    with impatient.connect() as connection:
        connection.sendall(b"POST /slow HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n")
        for part in (b"h", b"i"):
            time.sleep(Impatient.HEADER_TIMEOUT * 1.5)
            connection.sendall(part)
        time.sleep(Impatient.HEADER_TIMEOUT * 1.5)
        impatient.app.release.set()
        read_answer(connection)
    assert impatient.app.requests == [("POST", "/slow", b"hi")]


def test_half_request_behind_a_slow_one_waits_for_its_answer(impatient: Server) -> None:
    """B1: after a pipelined half request the request before it is answered, and the connection is closed."""
    with impatient.connect() as connection:
        connection.sendall(GET.replace(b"/after", b"/slow") + b"GET / HT")
        time.sleep(Impatient.HEADER_TIMEOUT * 2.5)
        impatient.app.release.set()
        read_answer(connection)
        assert read_to_end(connection) == b""
    assert impatient.app.requests == [("GET", "/slow", b"")]


def test_genuine_requests_beside_attackers(impatient: Server) -> None:
    """B1, T13: genuine requests are all answered beside 200 half-open connections, which are closed."""
    with ExitStack() as stack:
        attackers = [stack.enter_context(impatient.connect()) for _ in range(200)]
        for number, attacker in enumerate(attackers):
            attacker.sendall([b"", b"POST / HTTP/1.1\r\nX: ", GET + GET[:-1]][number % 3])
        genuine = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n").replace(b"after", b"genuine")
        assert [impatient.exchange(genuine) for _ in range(60)] == [[200]] * 60
        for attacker in attackers:
            read_to_end(attacker)
    wait_until(lambda: impatient.connections == 0)
    assert [path for _, path, _ in impatient.app.requests].count("/genuine") == 60


def test_stop_does_not_wait_for_half_open_connections() -> None:
    """B1: at the stop of the server connections without a request are closed immediately."""

    class Patient(DeadlineHttpToolsProtocol):
        HEADER_TIMEOUT: ClassVar[float] = 3600
        LINGER_TIMEOUT: ClassVar[float] = 3600

    with ExitStack() as stack, Server(Patient) as server:
        for sent in (b"", b"GET / HT", GET + b"GET / HT", b"GARBAGE\r\n\r\n"):
            stack.enter_context(server.connect()).sendall(sent)
        wait_until(lambda: server.connections == 4 and server.app.requests)


@pytest.mark.parametrize(
    ("start", "status"),
    [
        (b"POST /early HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % (8 * MIB), 413),
        (b"POST /early-close HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % (8 * MIB), 413),
        (b"GARBAGE\r\n\r\n", 400),
    ],
)
def test_error_reaches_a_client_that_is_still_sending(shipped: Server, start: bytes, status: int) -> None:
    """B3: a client that is still sending can read the whole error; no reset discards it."""
    with shipped.connect() as connection:
        connection.sendall(start)
        assert statuses(connection.recv(65536)) == [status]
        connection.sendall(b"a" * (8 * MIB))
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("path", [b"/early", b"/early-close"])
@pytest.mark.parametrize("headers", [b"Content-Length: 1000000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_endless_body_after_the_answer_is_cut(impatient: Server, path: bytes, headers: bytes) -> None:
    """B2: a body that goes on after the answer does not keep the connection open."""
    with impatient.connect() as connection:
        connection.sendall(b"POST " + path + b" HTTP/1.1\r\n" + HOST + headers + b"\r\n")
        assert statuses(read_answer(connection)) == [413]
        assert is_cut(connection, b"1\r\na\r\n")
    wait_until(lambda: impatient.connections == 0)


def test_silent_body_after_the_answer_is_cut(impatient: Server) -> None:
    """B2: a body that never comes after the answer does not keep the connection open, either."""
    with impatient.connect() as connection:
        connection.sendall(b"POST /early HTTP/1.1\r\n" + HOST + b"Content-Length: 5\r\n\r\n")
        read_answer(connection)
        wait_until(lambda: impatient.connections == 0)


def test_error_explains_itself(shipped: Server) -> None:
    """B4: an error is a complete answer in our error format that announces the close."""
    with shipped.connect() as connection:
        connection.sendall(b"GARBAGE\r\n\r\n")
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    assert b"connection: close" in head
    assert b"server: uvicorn" in head
    assert b"content-length: %d" % len(body) in head
    assert body == (
        b'{"error":{"type":"invalid_request_error","code":"invalid_request",'
        b'"message":"This is not a valid HTTP/1.1 request."}}'
    )


def test_early_answer_over_tls(tmp_path: Path) -> None:
    """B3: the whole error can be read over TLS, too, which cannot close one direction alone."""
    client = ssl.create_default_context()
    client.check_hostname = False
    client.verify_mode = ssl.CERT_NONE
    certificate = make_certificate(tmp_path / "server.pem")
    with (
        Server(DeadlineHttpToolsProtocol, certificate=certificate) as server,
        server.connect() as plain,
        client.wrap_socket(plain) as connection,
    ):
        connection.sendall(b"POST /early HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n" % (8 * MIB))
        assert statuses(read_answer(connection)) == [413]
        connection.sendall(b"a" * (4 * MIB))
        wait_until(lambda: server.connections == 0)


# -- the memory of requests and connections

BODY = b"POST / HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n"


class Tight(DeadlineHttpToolsProtocol):
    """The shipped class with a small budget; it lists its connections and requests in memory."""

    LINGER_TIMEOUT: ClassVar[float] = 0.4
    alive: ClassVar[weakref.WeakSet[Any]]

    def connection_made(self, transport: Any) -> None:
        """List the connection."""
        self.alive.add(self)
        super().connection_made(transport)

    def on_headers_complete(self) -> None:
        """List the request."""
        super().on_headers_complete()
        self.alive.add(self.cycle)


def make_tight() -> type[Tight]:
    """Return the class with its own budget."""

    class Own(Tight):
        budget: ClassVar[MemoryBudget] = MemoryBudget(MIB)
        alive: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    return Own


def test_small_requests_get_through_beside_large_unfinished_ones() -> None:
    """A10: endless bodies use no more than the budget, are answered 503, and delay no other request."""
    tight = make_tight()
    with ExitStack() as stack, Server(tight) as server:
        attackers = [stack.enter_context(server.connect()) for _ in range(30)]
        for attacker in attackers:
            attacker.sendall(BODY % 200_000 + b"a" * 100_000)
        genuine = (BODY % 2000).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"a" * 2000
        assert [server.exchange(genuine) for _ in range(20)] == [[200]] * 20
        assert tight.budget.used <= MIB
        refused = 0
        for attacker in attackers:
            attacker.settimeout(0.05)
            with contextlib.suppress(TimeoutError):
                answer = attacker.recv(65536)
                assert statuses(answer) == [503]
                assert b"retry-after: 5\r\n" in answer
                assert b'"code":"service_unavailable"' in answer
                refused += 1
        assert refused >= 20
        for attacker in attackers:
            attacker.close()
        wait_until(lambda: server.connections == 0)
        wait_until(lambda: tight.budget.used == 0)
    assert [len(body) for _, _, body in server.app.requests] == [2000] * 20


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nX-A: " + b"a" * 4000], ids=["idle", "begun", "half a head"]
)
def test_connections_without_a_request_are_bounded(sent: bytes) -> None:
    """A10: idle connections count, and the oldest of them are closed for a new one."""
    tight = make_tight()
    with ExitStack() as stack, Server(tight) as server:
        for _ in range(200):
            stack.enter_context(server.connect()).sendall(sent)
        assert server.exchange(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")) == [200]
        wait_until(lambda: server.connections <= MIB / CONNECTION_BYTES)
        assert tight.budget.used <= MIB


def test_chunks_count_for_more_than_their_content() -> None:
    """A10: a body in tiny chunks, which is many small objects, is rejected as a large one."""
    with Server(make_tight()) as server, server.connect() as connection:
        connection.sendall(CHUNKED + b"1\r\na\r\n" * 4000)
        assert statuses(read_to_end(connection)) == [503]


def test_pipelined_requests_are_bounded(shipped: Server) -> None:
    """A10: of thousands of requests in one read only some are accepted, and the last answer is an error."""
    most = DeadlineHttpToolsProtocol.MAX_PIPELINED + 1
    with shipped.connect() as connection:
        connection.sendall(GET * 3000)
        received = read_to_end(connection)
    assert statuses(received) == [200] * most
    assert len(shipped.app.requests) == most
    *others, last = received.split(b"HTTP/1.1 200")[1:]
    assert b"connection: close" in last
    assert not any(b"connection: close" in each for each in others)


def test_the_number_of_headers_is_limited(shipped: Server) -> None:
    """A10: 100 headers are served and one more is rejected, also if they come one by one."""
    lines = [b"X-%d: a\r\n" % number for number in range(99)]
    last = b"Connection: close\r\n\r\n"
    head = b"GET / HTTP/1.1\r\n" + HOST
    assert shipped.exchange(head + b"".join(lines[:98]) + last) == [200]
    assert shipped.exchange(head + b"".join(lines) + last) == [431]
    with shipped.connect() as connection:
        for piece in (head, *lines, b"X: a\r\n", b"X: a\r\n"):
            connection.sendall(piece)
        assert statuses(read_to_end(connection)) == [431]


LEFT_BEHIND: dict[str, bytes] = {
    "answered": GET,
    "pipelined": GET * 20,
    "a body": BODY % 5 + b"hello",
    "half a body": BODY % 500_000 + b"a" * 300_000,
    "413": b"POST /early HTTP/1.1\r\n" + HOST + b"Content-Length: 9000000\r\n\r\n" + b"a" * 200_000,
    "413 with close": b"POST /early-close HTTP/1.1\r\n" + HOST + b"Content-Length: 9000000\r\n\r\n",
    "431": b"GET / HTTP/1.1\r\n" + HOST + b"X: a\r\n" * 10_000 + b"\r\n",
    "400": b"GARBAGE\r\n\r\n",
    "half a head": GET[:-4],
    "503": BODY % 2_000_000 + b"a" * 1_500_000,
    "upgrade": b"GET / HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("case", LEFT_BEHIND)
def test_a_connection_leaves_no_cycle_behind(case: str, *, reset: bool) -> None:
    """A10: the memory of each request is freed without the garbage collector."""
    tight = make_tight()
    gc.collect()
    gc.disable()
    try:
        with Server(tight) as server:
            for _ in range(3):
                with server.connect() as connection:
                    with contextlib.suppress(OSError):
                        connection.sendall(LEFT_BEHIND[case])
                    connection.settimeout(0.3)
                    with contextlib.suppress(OSError):
                        connection.recv(65536)
                    if reset:
                        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            wait_until(lambda: server.connections == 0)
            wait_until(lambda: not tight.alive)
            wait_until(lambda: tight.budget.used == 0)
    finally:
        gc.enable()


def test_a_connection_that_is_kept_alive_keeps_no_request() -> None:
    """A10: between requests only the connection counts."""
    tight = make_tight()
    with Server(tight) as server, server.connect() as connection:
        for _ in range(3):
            connection.sendall(BODY % 50_000 + b"a" * 50_000)
            read_answer(connection)
            wait_until(lambda: tight.budget.used == CONNECTION_BYTES)
            wait_until(lambda: len(tight.alive) == 1)
    assert len(server.app.requests) == 3


def test_a_head_that_has_begun_outlives_the_request_before(shipped: Server) -> None:
    """A10: freeing an answered request does not change the next one, which has arrived in part."""
    with shipped.connect() as connection:
        connection.sendall(GET + b"POST /next HTTP/1.1\r\nHost: x\r\nContent-")
        read_answer(connection)
        time.sleep(0.1)
        connection.sendall(b"Length: 2\r\n\r\nhi")
        read_answer(connection)
    assert shipped.app.requests == [("GET", "/after", b""), ("POST", "/next", b"hi")]
