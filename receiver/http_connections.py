"""Connections to HTTP servers and proxies: aiohttp's, with its pool and parser."""

import asyncio
import base64
import functools
import select
import socket
import ssl
from collections.abc import Sequence
from typing import Any, Final, Protocol, cast

import aiohttp
import httpx
from aiohttp.abc import ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.tracing import Trace
from yarl import URL

from receiver import __version__

KEEP_ALIVE_SECONDS: Final = 5.0
"""Seconds after which an idle connection is closed."""
FLUSH_POLL_SECONDS: Final = 0.01
"""Seconds between two looks at buffers; asyncio reports no event for those below TLS."""

_SWITCHING_PROTOCOLS: Final = 101
_LIMITS: Final[dict[str, Any]] = {
    "max_line_size": 100 * 1024,
    "max_field_size": 100 * 1024,
    "max_headers": 1000,
}
"""For a head; an answer's filter limits its size."""


class AnswerFilter(Protocol):
    """Sees the bytes of an answer before they are parsed; the request's extension `answer`."""

    is_cut: bool
    """Set if we close the connection before the whole request is sent."""

    def on_read(self, data: bytes) -> bytes:
        """Take bytes that have arrived, and return those to parse. Raises RemoteProtocolError."""
        ...

    def is_exact(self) -> bool:
        """Return whether the answer is complete, and no byte has followed it."""
        ...


class HttpConnection(ResponseHandler):
    """One connection. It is used again only if no byte came beyond an answer."""

    lower: tuple[asyncio.Transport, ...] = ()
    """The transports below TLS."""
    _answer: AnswerFilter | None = None
    _is_expecting = False

    def expect(self, answer: AnswerFilter | None) -> None:
        """Prepare for the answer to a request."""
        self._answer, self._is_expecting = answer, True
        # httpx decompresses.
        self.set_response_params(read_until_eof=True, auto_decompress=False, **_LIMITS)

    async def open_tunnel(self, head: bytes) -> None:
        """Ask a proxy for a tunnel. Raises aiohttp's exceptions and httpx.TransportError."""
        transport = self.transport
        if transport is None:
            raise httpx.ConnectError("the connection was lost")
        self._is_expecting = True
        self.set_response_params(read_until_eof=True, **_LIMITS)
        transport.write(head)
        message, payload = await self.read()
        while message.code < 200 and message.code != _SWITCHING_PROTOCOLS:
            message, payload = await self.read()
        if not httpx.codes.is_success(message.code):
            raise httpx.ProxyError("no tunnel")
        if payload.total_bytes or self._buffer or self._tail:
            raise httpx.RemoteProtocolError("bytes in front of TLS")

    def is_unsent(self) -> bool:
        """Return whether a part of the request is not with the kernel yet.

        With TLS, the transport does not count the bytes that the one below it has taken over.
        """
        if self.transport is None:
            return False
        return any(each.get_write_buffer_size() for each in (self.transport, *self.lower))

    async def flush(self) -> None:
        """Wait until the whole request is with the kernel, or the connection is lost."""
        while self.is_unsent():  # noqa: ASYNC110 - no event says so
            await asyncio.sleep(FLUSH_POLL_SECONDS)

    def end(self) -> bool:
        """End the exchange and return whether the connection may be used again."""
        answer, self._answer, self._is_expecting = self._answer, None, False
        return answer is None or answer.is_exact()

    def data_received(self, data: bytes) -> None:
        """Parse bytes, after the answer's filter."""
        if data and not self._is_expecting:
            # aiohttp would take it for the answer to the next request.
            self.abort()
            return
        if data and self._answer is not None:
            try:
                data = self._answer.on_read(data)
            except httpx.RemoteProtocolError as error:
                self.set_exception(HttpProcessingError(), error)
                self._record_cut()
                if self.transport is not None:
                    self.transport.abort()
                return
            if not data:
                return
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End the answer, with an error unless this is its end."""
        if exc is not None and self._payload is not None and not self._payload.is_eof():
            # aiohttp takes a reset for the end of a body without a length.
            self._payload.set_exception(exc)
        super().connection_lost(exc)
        if not self._is_expecting:
            self._forget()

    def close(self) -> None:
        """Close the connection at once."""
        self._record_cut()
        if self._payload is not None and not self._payload.is_eof():
            # `abort` forgets the body, and its reader would wait for ever.
            self._payload.set_exception(aiohttp.ClientConnectionError())
        self._is_expecting = False
        self._forget()
        # With TLS, the transport's `close` would wait up to 30 s for the other side.
        self.abort()

    def _record_cut(self) -> None:
        if self._answer is not None and self.is_unsent():
            self._answer.is_cut = True

    def _forget(self) -> None:
        """Drop what is not read any more: it refers to this connection."""
        self._buffer.clear()
        self._exception = self._answer = None
        self.lower = ()

    def is_connected(self) -> bool:
        """Return whether the connection is open and has nothing to read; the loop learns of an end late."""
        return super().is_connected() and not _is_readable(self.transport)


class Connector(aiohttp.TCPConnector):
    """Connections of one transport."""

    def __init__(self, tls: ssl.SSLContext, proxy: httpx.Proxy | None) -> None:
        super().__init__(
            ssl=tls,
            limit=0,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            resolver=aiohttp.ThreadedResolver(),
        )
        self._factory = cast(
            "functools.partial[ResponseHandler]", functools.partial(HttpConnection, loop=self._loop)
        )
        self._login = {} if proxy is None else proxy_login(proxy)
        self._tls_of_proxy = _open_proxy_tls() if proxy is not None and proxy.url.scheme == "https" else None

    def _get_ssl_context(self, req: aiohttp.ClientRequest) -> ssl.SSLContext | None:
        # A request to the proxy itself has no proxy. The client's certificate is not for it.
        if self._tls_of_proxy is not None and req.proxy is None:
            return self._tls_of_proxy
        return super()._get_ssl_context(req)

    async def _resolve_host(
        self, host: str, port: int, traces: Sequence[Trace] | None = None
    ) -> list[ResolveResult]:
        # aiohttp would cache names, skip addresses of the system's other kind, and reject 127.1.
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [
            ResolveResult(
                hostname=host, host=str(address[0]), port=port, family=kind, proto=protocol, flags=0
            )
            for kind, _, protocol, _, address in infos
        ]

    async def _wrap_create_connection(
        self, *args: Any, **options: Any
    ) -> tuple[asyncio.Transport, ResponseHandler]:
        if options["ssl"] is None:
            return await super()._wrap_create_connection(*args, **options)
        # TLS begins afterwards, so that the transport below it is known.
        plain = options | {"ssl": None, "server_hostname": None}
        transport, _ = await super()._wrap_create_connection(*args, **plain)
        above, protocol = await self._start_tls_connection(
            transport, options["req"], options["timeout"], options["client_error"]
        )
        return cast("asyncio.Transport", above), protocol

    async def _create_proxy_connection(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> tuple[asyncio.BaseTransport, ResponseHandler]:
        if not req.is_ssl():
            return await super()._create_proxy_connection(req, traces, timeout)
        # aiohttp takes no answer but 200, and no head above 8 KiB.
        request = self._update_proxy_auth_header_and_build_proxy_req(req)
        transport, protocol = await self._create_direct_connection(
            request, [], timeout, client_error=aiohttp.ClientProxyConnectionError
        )
        try:
            await cast("HttpConnection", protocol).open_tunnel(_tunnel_head(req.url, self._login))
            return await self._start_tls_connection(transport, req, timeout)
        except BaseException:
            transport.abort()
            raise

    async def _start_tls_connection(
        self,
        underlying_transport: asyncio.Transport,
        req: aiohttp.ClientRequest,
        timeout: aiohttp.ClientTimeout,
        client_error: type[Exception] = aiohttp.ClientConnectorError,
    ) -> tuple[asyncio.BaseTransport, ResponseHandler]:
        below = cast("HttpConnection", underlying_transport.get_protocol()).lower
        try:
            transport, protocol = await super()._start_tls_connection(
                underlying_transport, req, timeout, client_error
            )
        except aiohttp.ClientOSError as error:
            if isinstance(error.__cause__, ConnectionResetError) and error.__cause__.errno is None:
                # asyncio names an end in the handshake like this.
                end = ssl.SSLEOFError()
                end.reason = "UNEXPECTED_EOF_WHILE_READING"
                raise error from end
            raise
        cast("HttpConnection", protocol).lower = (underlying_transport, *below)
        return transport, protocol


def proxy_login(proxy: httpx.Proxy) -> dict[str, str]:
    """Return the header of the proxy's user and password, if it has them."""
    if proxy.raw_auth is None:
        return {}
    encoded = base64.b64encode(b":".join(proxy.raw_auth))
    return {"Proxy-Authorization": "Basic " + encoded.decode("ascii")}


def _tunnel_head(url: URL, login: dict[str, str]) -> bytes:
    """Return the request for a tunnel to the host of a URL."""
    host = url.raw_host or ""
    target = f"[{host}]:{url.port}" if ":" in host else f"{host}:{url.port}"
    fields = {"Host": target, "User-Agent": f"clipia-receiver/{__version__}", **login}
    lines = [f"CONNECT {target} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii")


def _open_proxy_tls() -> ssl.SSLContext:
    context = httpx.create_ssl_context()
    context.load_default_certs()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _is_readable(transport: asyncio.BaseTransport | None) -> bool:
    """Return whether bytes or the end of an idle connection wait to be read."""
    handle = None if transport is None else transport.get_extra_info("socket")
    if handle is None:
        return True
    poll = select.poll()
    poll.register(handle.fileno(), select.POLLIN)
    return bool(poll.poll(0))
