"""The shipped HTTP protocol, byte by byte: offers of an upgrade, and white space around header values."""

import asyncio
import itertools
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from receiver.api.protocol import DeadlineHttpToolsProtocol

SECONDS = 10.0
POST = b"POST /plain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
GET = b"GET /get HTTP/1.1\r\nHost: x\r\n\r\n"
JAVA = (
    b"Connection: Upgrade, HTTP2-Settings\r\nContent-Length: %d\r\nHost: x\r\n"
    b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nUpgrade: h2c\r\nUser-Agent: Java\r\n"
)
SMUGGLED = b"POST /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
OFFER = b"Host: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n"
OFFERS = {
    "length": (b"POST /length HTTP/1.1\r\n" + JAVA % 4 + b"\r\nbody", "/length", b"body"),
    "request as body": (
        b"POST /inner HTTP/1.1\r\n" + JAVA % len(SMUGGLED) + b"\r\n" + SMUGGLED,
        "/inner",
        SMUGGLED,
    ),
    "chunks": (
        b"POST /chunks HTTP/1.1\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\n"
        b"4\r\n\r\n\r\n\r\n%x\r\n%b\r\n0\r\nX-Trailer: 1 \r\n\r\n" % (len(SMUGGLED), SMUGGLED),
        "/chunks",
        b"\r\n\r\n" + SMUGGLED,
    ),
    "no body": (b"GET /socket HTTP/1.1\r\n" + OFFER.replace(b"h2c", b"websocket") + b"\r\n", "/socket", b""),
    "white space": (
        b"POST /white HTTP/1.1\r\n"
        + OFFER.replace(b"\r\n", b" \t\r\n")
        + b"Transfer-Encoding:\tchunked \t\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
        "/white",
        b"hi",
    ),
}
PLAIN = {"post": (POST, "/plain", b"hi"), "get": (GET, "/get", b"")}


class Wire(asyncio.Transport):
    """A connection to the protocol with reads as the test cuts them."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, bytes]] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.answers: list[int] = []
        self.closed = False
        config = uvicorn.Config(self._app, interface="asgi3", ws="none", lifespan="off", log_config=None)
        self.protocol = DeadlineHttpToolsProtocol(config, ServerState(), {})
        self.protocol.connection_made(self)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        self.requests.append((scope["path"], body))
        self.headers = list(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    async def feed(self, *reads: bytes, answers: int) -> None:
        """Feed the reads and wait for the answers, or for the end of the connection."""
        for read in reads:
            if read and not self.closed:
                self.protocol.data_received(read)
        async with asyncio.timeout(SECONDS):
            while len(self.answers) < answers and not self.closed:  # noqa: ASYNC110 - the tasks need to be run
                await asyncio.sleep(0)
        # An extra request would be served within the next steps of the loop.
        for _ in range(10):
            await asyncio.sleep(0)
        self.protocol.connection_lost(None)
        self.protocol._stop_deadline()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Note the status line of an answer."""
        if bytes(data).startswith(b"HTTP/1.1 "):
            self.answers.append(int(data[9:12]))

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Return no address of a peer."""
        return default

    def close(self) -> None:
        """Record the close."""
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        """Return whether the connection is closed."""
        return self.closed

    def can_write_eof(self) -> bool:
        """Return False, as for TLS."""
        return False

    def pause_reading(self) -> None:
        """Do nothing: the test's bytes have arrived already."""

    def resume_reading(self) -> None:
        """Do nothing."""


async def exchange(reads: list[bytes], *, answers: int) -> tuple[list[int], list[tuple[str, bytes]]]:
    """Send reads on a new connection; return the statuses and the requests that were served."""
    wire = Wire()
    await wire.feed(*reads, answers=answers)
    return wire.answers, wire.requests


@pytest.mark.parametrize("offer", OFFERS)
async def test_an_offer_is_ignored_wherever_the_reads_are_cut(offer: str) -> None:
    """B4: a request that offers an upgrade is served with its body, and so are the requests around it."""
    raw, path, body = OFFERS[offer]
    stream = POST + raw + GET
    expected = ([200] * 3, [("/plain", b"hi"), (path, body), ("/get", b"")])
    assert await exchange([stream], answers=3) == expected
    for size in (1, 2, 3, 7):
        reads = [stream[at : at + size] for at in range(0, len(stream), size)]
        assert await exchange(reads, answers=3) == expected
    for at in range(1, len(stream)):
        assert await exchange([stream[:at], stream[at:]], answers=3) == expected, stream[:at]


@pytest.mark.parametrize(
    "order", [*itertools.permutations(["length", "chunks", "no body", "post"])], ids="-".join
)
async def test_offers_are_pipelined_in_any_order(order: tuple[str, ...]) -> None:
    """B4: offers and plain requests on one connection are each served once, in their order."""
    known = OFFERS | PLAIN
    stream = b"".join(known[name][0] for name in order * 2)
    expected = ([200] * 8, [known[name][1:] for name in order * 2])
    assert await exchange([stream], answers=8) == expected
    assert await exchange([stream[at : at + 5] for at in range(0, len(stream), 5)], answers=8) == expected


@pytest.mark.parametrize(
    ("version", "headers", "served"),
    [
        (b"1.1", b"Connection: Upgrade, close\r\nUpgrade: h2c\r\nContent-Length: 2\r\n", 1),
        (b"1.0", b"Connection: Upgrade\r\nUpgrade: h2c\r\nContent-Length: 2\r\n", 1),
        (b"1.1", b"Connection: Upgrade\r\nUpgrade: h2c, websocket, TLS/1.3\r\nContent-Length: 2\r\n", 2),
        (b"1.1", b"Connection: Upgrade\r\nUpgrade: h2c\r\nUpgrade: x\r\nContent-Length: 2\r\n", 2),
        (b"1.1", b"Connection: Upgrade\r\nConnection: x\r\nUpgrade:\r\nContent-Length: 2\r\n", 2),
        (b"1.1", b"Connection: Upgrade\r\nContent-Length: 2\r\n", 2),
        (b"1.1", b"Upgrade: h2c\r\nContent-Length: 2\r\n", 2),
    ],
)
async def test_kinds_of_offers(version: bytes, headers: bytes, served: int) -> None:
    """B4: an offer has no effect in any form; `close` and HTTP/1.0 still end the connection."""
    raw = b"POST /offer HTTP/" + version + b"\r\nHost: x\r\n" + headers + b"\r\nhi" + GET
    answers, requests = await exchange([raw], answers=served)
    assert answers == [200] * served
    assert requests == [("/offer", b"hi"), ("/get", b"")][:served]


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 2\r\nContent-Length: 2\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked \r\nContent-Length: 5\r\n",
        b"Transfer-Encoding: chunked\t\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding: gzip\t\r\n",
        b"Host: y\r\n",
    ],
)
@pytest.mark.parametrize("offer", [b"", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"X: white \r\n"])
async def test_an_offer_excuses_no_fault(headers: bytes, offer: bytes) -> None:
    """B4: a request that RFC 9112 forbids is rejected, with or without an offer; the rest is not served."""
    raw = b"POST / HTTP/1.1\r\nHost: x\r\n" + offer + headers + b"\r\n0\r\n\r\n" + SMUGGLED
    for reads in ([raw], [raw[at : at + 1] for at in range(len(raw))]):
        assert await exchange(reads, answers=1) == ([400], [])


@pytest.mark.parametrize("target", [b"x:443", b"/x"])
async def test_connect_is_rejected(target: bytes) -> None:
    """B4: CONNECT asks for a tunnel, which is no offer: it is rejected, and the rest is not served."""
    raw = (
        b"CONNECT "
        + target
        + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(SMUGGLED)
        + SMUGGLED
    )
    assert await exchange([raw], answers=1) == ([400], [])


WHITE_SPACE = [b" ", b"\t", b"  ", b" \t", b"\t ", b" \t \t "]


@pytest.mark.parametrize("white", WHITE_SPACE)
async def test_white_space_around_a_value_is_no_part_of_it(white: bytes) -> None:
    """B4: header values are trimmed, also those that frame the body, for every cut of the reads."""
    framing = (
        (b"Content-Length:" + white + b"2" + white + b"\r\n", b"hi", (b"content-length", b"2")),
        (
            b"Transfer-Encoding:" + white + b"chunked" + white + b"\r\n",
            b"2\r\nhi\r\n0\r\n\r\n",
            (b"transfer-encoding", b"chunked"),
        ),
    )
    for header, body, parsed in framing:
        stream = (
            b"POST /white HTTP/1.1\r\nHost:"
            + white
            + b"x"
            + white
            + b"\r\nIdempotency-Key: k y"
            + white
            + b"\r\n"
            b"Empty:" + white + b"\r\n" + header + b"\r\n" + body
        )
        for at in range(1, len(stream) + 1):
            wire = Wire()
            await wire.feed(stream[:at], stream[at:], answers=1)
            assert wire.requests == [("/white", b"hi")]
            assert wire.headers == [(b"host", b"x"), (b"idempotency-key", b"k y"), (b"empty", b""), parsed]


async def test_expectation_with_white_space() -> None:
    """B4: a client that waits for `100 Continue` gets it, even if a space follows its header's value."""
    raw = b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue \r\nContent-Length: 2\r\n\r\n"
    wire = Wire()
    wire.protocol.data_received(raw)
    await asyncio.sleep(0.01)
    await wire.feed(b"hi", answers=2)
    assert wire.answers == [100, 200]
    assert wire.requests == [("/", b"hi")]
