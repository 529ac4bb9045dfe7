"""Connections of downloads that read up to a MiB at a time.

httpcore's own stream reads 64 KiB, and under TLS 16 KiB: a GiB takes 65,000 turns of the event loop, and four
times as long as the network and the decryption.
"""

import asyncio
import ssl
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar, cast

import httpcore

P = ParamSpec("P")
T = TypeVar("T")

MOST_BYTES: Final = 1024 * 1024
"""The most bytes that a read returns."""
# Most files are small images: a large buffer comes only after a small one was full.
_FIRST_BYTES = 64 * 1024


class LargeReads(httpcore.AsyncNetworkBackend):
    """Opens the connections of httpcore."""

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *_args: Any, **_options: Any
    ) -> httpcore.AsyncNetworkStream:
        """Connect to an address or to a name. Bound addresses and socket options are not supported."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(timeout):
                transport, protocol = await loop.create_connection(_Inbox, host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        return _TcpStream(transport, protocol)


class _Inbox(asyncio.BufferedProtocol):
    """Keeps what came until it is taken. If the buffer is full, the transport stops reading."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(_FIRST_BYTES))
        self._start = self._end = 0
        self._changed = asyncio.Event()
        self._is_closed = False
        self._failure: Exception | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        if self._end == len(self._buffer):
            self._transport.pause_reading()
        self._changed.set()

    def eof_received(self) -> bool:
        self._is_closed = True
        self._changed.set()
        return True  # keep the transport, which the stream closes

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        self._failure = exc
        self._changed.set()

    async def take(self, most: int) -> bytes:
        """Wait for bytes and return at most `most` of them; none at the end. Raises OSError."""
        while self._start == self._end:
            if self._failure is not None:
                raise self._failure
            if self._is_closed:
                return b""
            self._changed.clear()
            await self._changed.wait()
        taken = bytes(self._buffer[self._start : min(self._end, self._start + most)])
        self._start += len(taken)
        if self._start == self._end:
            self._empty()
        return taken

    def _empty(self) -> None:
        was_full = self._end == len(self._buffer)
        self._start = self._end = 0
        if was_full:
            if len(self._buffer) < MOST_BYTES:
                self._buffer = memoryview(bytearray(MOST_BYTES))
            self._transport.resume_reading()


class _TcpStream(httpcore.AsyncNetworkStream):
    """A connection without TLS."""

    def __init__(self, transport: asyncio.Transport, inbox: _Inbox) -> None:
        self._transport = transport
        self._inbox = inbox

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            async with asyncio.timeout(timeout):
                return await self._inbox.take(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Hand over the bytes without waiting: a request is small."""
        if buffer:
            try:
                self._transport.write(buffer)
            except RuntimeError as error:  # uvloop's, if the connection is lost
                raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        self._transport.abort()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        return await _open_tls(self, ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        return self._transport.get_extra_info("peername") if info == "server_addr" else None


async def _open_tls(
    below: httpcore.AsyncNetworkStream, context: ssl.SSLContext, name: str | None, timeout: float | None
) -> httpcore.AsyncNetworkStream:
    stream = _TlsStream(below, context, name)
    try:
        async with asyncio.timeout(timeout):
            await stream.shake_hands()
    except TimeoutError as error:
        await below.aclose()
        raise httpcore.ConnectTimeout(str(error)) from error
    except (OSError, httpcore.NetworkError) as error:
        await below.aclose()
        raise httpcore.ConnectError(str(error)) from error
    except BaseException:
        await below.aclose()
        raise
    return stream


class _TlsStream(httpcore.AsyncNetworkStream):
    """TLS over another stream."""

    def __init__(self, below: httpcore.AsyncNetworkStream, context: ssl.SSLContext, name: str | None) -> None:
        self._below = below
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        # As bytes: Python would encode a name by IDNA 2003.
        server_hostname: Any = None if name is None else name.encode("ascii")
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._buffer = memoryview(bytearray(_FIRST_BYTES))

    async def shake_hands(self) -> None:
        await self._run(self._tls.do_handshake)

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        """Return all records that have come: OpenSSL decrypts one at a time, of 16 KiB at most."""
        try:
            async with asyncio.timeout(timeout):
                count = await self._run(self._read, max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error
        taken = bytes(self._buffer[:count])
        if count == len(self._buffer) < MOST_BYTES:
            self._buffer = memoryview(bytearray(MOST_BYTES))
        return taken

    def _read(self, most: int) -> int:
        room = self._buffer[:most]
        count = 0
        try:
            while count < len(room):
                rest = room[count:]
                # With a buffer, `read` returns a number.
                size = cast("int", self._tls.read(len(rest), cast("bytearray", rest)))
                if not size:
                    break
                count += size
        except ssl.SSLWantReadError:
            if not count:
                raise
        except ssl.SSLEOFError:
            pass  # many servers end a connection without the closing alert of TLS
        return count

    async def _run(self, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        while True:
            try:
                result = step(*args, **kwargs)
            except ssl.SSLWantReadError:
                await self._flush()
                if data := await self._below.read(MOST_BYTES):
                    self._incoming.write(data)
                else:
                    self._incoming.write_eof()
            else:
                await self._flush()
                return result

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._below.write(self._outgoing.read())

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        try:
            await self._run(self._tls.write, buffer)
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        await self._below.aclose()

    def get_extra_info(self, info: str) -> Any:
        return self._tls if info == "ssl_object" else self._below.get_extra_info(info)
