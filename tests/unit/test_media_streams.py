"""Connections that read up to a MiB at a time, on both event loops: the tests' and the worker's."""

import asyncio
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import httpcore
import pytest
import uvloop
from support.certificates import make_certificate

from receiver.media.streams import MOST_BYTES, LargeReads

MIB: Final = 1024 * 1024
BODY: Final = bytes(range(251)) * 40_000
Run = Callable[[Coroutine[Any, Any, None]], None]
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

RUNS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
TLS = pytest.mark.parametrize("secure", [False, True], ids=["plain", "tls"])


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the context of a server, and that of a client that trusts it."""
    certificate = make_certificate(folder / "server.pem")
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=certificate)
    return served, trusting


class Connected:
    """A server on the loopback, and a stream to it."""

    def __init__(self, folder: Path, serve: Serve, *, secure: bool) -> None:
        self._folder, self._serve, self._secure = folder, serve, secure

    async def __aenter__(self) -> httpcore.AsyncNetworkStream:
        """Start the server, and connect."""
        served, trusting = contexts(self._folder)

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                await self._serve(reader, writer)

        self._server = await asyncio.start_server(
            handle, "127.0.0.1", 0, ssl=served if self._secure else None
        )
        port = self._server.sockets[0].getsockname()[1]
        stream = await LargeReads().connect_tcp("127.0.0.1", port, 5.0)
        self.stream = await stream.start_tls(trusting, "127.0.0.1", 5.0) if self._secure else stream
        return self.stream

    async def __aexit__(self, *_: object) -> None:
        """Close both."""
        await self.stream.aclose()
        self._server.close()


async def read_all(stream: httpcore.AsyncNetworkStream, most: int = MOST_BYTES) -> list[bytes]:
    """Read to the end."""
    parts = []
    while part := await stream.read(most, 5.0):
        parts.append(part)
    return parts


@RUNS
@TLS
@pytest.mark.parametrize("most", [1000, 65_536, MOST_BYTES])
def test_every_byte_comes_in_order(run: Run, most: int, tmp_path: Path, *, secure: bool) -> None:
    """D10: a read returns at most as many bytes as it asks for, and none is lost or swapped."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(4) + BODY)
        await writer.drain()
        writer.close()

    async def check() -> None:
        async with Connected(tmp_path, serve, secure=secure) as stream:
            await stream.write(b"head")
            parts = await read_all(stream, most)
        assert max(map(len, parts)) <= most
        assert b"".join(parts) == b"head" + BODY

    run(check())


@RUNS
@TLS
def test_a_slow_reader_stops_the_sender(run: Run, tmp_path: Path, *, secure: bool) -> None:
    """D7: what a slow storage has not taken stays with the sender, and all of it comes later."""
    sent = 0

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        for _ in range(64):
            writer.write(bytes(MIB))
            await writer.drain()
            sent += MIB
        writer.close()

    async def check() -> None:
        async with Connected(tmp_path, serve, secure=secure) as stream:
            first = await stream.read(1000)
            before = -1
            while before < sent:
                before = sent
                await asyncio.sleep(0.2)
            assert sent < 32 * MIB  # the kernel keeps some MiB of a connection
            assert len(first) + sum(map(len, await read_all(stream))) == 64 * MIB

    run(check())


@RUNS
@TLS
def test_a_connection_without_a_farewell_ends(run: Run, tmp_path: Path, *, secure: bool) -> None:
    """D9: if a server ends a connection without the alert of TLS, all bytes before come, and then the end."""
    served, trusting = contexts(tmp_path)

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        if secure:
            connection = served.wrap_socket(connection, server_side=True)
        with connection:
            connection.sendall(BODY)
            connection.shutdown(socket.SHUT_WR)  # under TLS, this sends no alert

    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(10)
            serving = asyncio.create_task(asyncio.to_thread(serve, listener))
            stream = await LargeReads().connect_tcp("127.0.0.1", listener.getsockname()[1], 5.0)
            if secure:
                stream = await stream.start_tls(trusting, "127.0.0.1", 5.0)
            assert b"".join(await read_all(stream)) == BODY
            assert await stream.read(1, 5.0) == b""
            await stream.aclose()
            await serving

    run(check())


@RUNS
@TLS
def test_a_reset_connection_raises(run: Run, tmp_path: Path, *, secure: bool) -> None:
    """D9: a connection that the server resets is no end of the file."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async def check() -> None:
        async with Connected(tmp_path, serve, secure=secure) as stream:
            await stream.write(b"head")
            with pytest.raises(httpcore.ReadError):
                await read_all(stream)

    run(check())


@RUNS
def test_a_write_after_a_reset_raises(run: Run, tmp_path: Path) -> None:
    """D9: if a server resets the connection before the request, the error is one that httpcore knows."""

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    async def request(stream: httpcore.AsyncNetworkStream) -> None:
        await stream.write(b"head")
        await stream.read(1, 5.0)

    async def check() -> None:
        async with Connected(tmp_path, serve, secure=False) as stream:
            with pytest.raises(httpcore.ReadError):
                await stream.read(1, 5.0)
            with pytest.raises((httpcore.ReadError, httpcore.WriteError)):
                await request(stream)

    run(check())


@RUNS
@TLS
def test_a_read_has_a_timeout_and_goes_on_later(run: Run, tmp_path: Path, *, secure: bool) -> None:
    """D8: a read that times out loses no byte of the next one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(4)
        writer.write(BODY)
        writer.close()

    async def check() -> None:
        async with Connected(tmp_path, serve, secure=secure) as stream:
            with pytest.raises(httpcore.ReadTimeout):
                await stream.read(10, 0.05)
            await stream.write(b"head")
            assert b"".join(await read_all(stream)) == BODY

    run(check())


@RUNS
def test_a_server_that_does_not_shake_hands_is_left(run: Run) -> None:
    """D8: a handshake has a timeout, and the connection is closed then."""

    async def check() -> None:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                await reader.read()
            ended.set()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        stream = await LargeReads().connect_tcp("127.0.0.1", server.sockets[0].getsockname()[1], 5.0)
        with pytest.raises(httpcore.ConnectTimeout):
            await stream.start_tls(ssl.create_default_context(), "127.0.0.1", 0.1)
        await asyncio.wait_for(ended.wait(), 5)
        server.close()

    run(check())


@RUNS
def test_a_refused_connection_raises(run: Run) -> None:
    """D3: a dead address raises the error after which the next one is tried."""

    async def check() -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))  # without listening
            with pytest.raises(httpcore.ConnectError):
                await LargeReads().connect_tcp("127.0.0.1", closed.getsockname()[1], 5.0)

    run(check())
