"""The transport of httpx for small requests: connections, pool and parser are aiohttp's.

httpcore takes 3.6 times the CPU for a small POST, and 9 times with 50 at once, because its pool visits all of
its connections for each. Downloads stay on httpcore, whose guard of addresses is simpler.

aiohttp's `ClientSession` is not used. It sends a broken GET again, keeps cookies, adds headers, rewrites the
URL, and does not say whether a request has left. Here the request's bytes are written at one point, once.
"""

import asyncio
import base64
import functools
import math
import re
import select
import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Protocol, cast

import aiohttp
import httpx
from aiohttp.abc import ResolveResult
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import StreamReader
from aiohttp.tracing import Trace
from yarl import URL

from receiver import __version__

KEEP_ALIVE_SECONDS: Final = 5.0
"""Seconds after which an idle connection is closed."""
MAX_FIELD_BYTES: Final = 100 * 1024
MAX_FIELDS: Final = 1000

_START: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]+ HTTP/1\.1")
_FIELD: Final = re.compile(
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: (?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?"
)
_SWITCHING_PROTOCOLS: Final = 101
_TUNNEL_HEADERS: Final = {
    # aiohttp would add its own.
    "Accept": "*/*",
    "Accept-Encoding": "identity",
    "User-Agent": f"clipia-receiver/{__version__}",
}


class AnswerFilter(Protocol):
    """Sees the bytes of an answer before they are parsed; the request's extension `answer`."""

    def on_read(self, data: bytes) -> bytes:
        """Take bytes that have arrived, and return those to parse. Raises RemoteProtocolError."""
        ...

    def is_exact(self) -> bool:
        """Return whether the answer is complete, and no byte has followed it."""
        ...


class HttpTransport(httpx.AsyncBaseTransport):
    """Sends each request once, byte for byte as it is, on a connection of its own or an idle one.

    Extensions of a request: `timeout`, of which `connect` and `read` count; `on_send`, which is called right
    before the first byte may leave, and not at all if the request is not sent; `answer`, an `AnswerFilter`.
    The caller limits how many requests are under way, and the time of the whole exchange.
    """

    def __init__(self, *, tls: ssl.SSLContext, proxy: httpx.Proxy | None = None) -> None:
        tls.set_alpn_protocols(["http/1.1"])
        self._tls = tls
        self._proxy = proxy
        self._connector: _Connector | None = None
        self._requests: dict[str, aiohttp.ClientRequest] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request and return the answer's head. Raises httpx.TransportError."""
        # A proxy gets the request itself only without TLS.
        forwarding = self._proxy if request.url.scheme == "http" else None
        content = _serialize(request, await request.aread(), forwarding)
        connection = await self._connect(request)
        try:
            protocol = _send(connection, content, request)
            message, payload = await _reading(protocol.read())
            while message.code < 200 and message.code != _SWITCHING_PROTOCOLS:
                message, payload = await _reading(protocol.read())
        except BaseException:
            connection.close()
            raise
        body = _Body(connection, protocol, payload)
        return httpx.Response(message.code, headers=message.raw_headers, stream=body)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._connector is not None:
            await self._connector.close()

    async def _connect(self, request: httpx.Request) -> Connection:
        if self._connector is None:
            # Not earlier: it belongs to the running loop.
            self._connector = _Connector(self._tls, self._proxy)
        timeouts = request.extensions.get("timeout", {})
        # In addition to `connect` for TCP and TLS.
        more = 0.0 if self._proxy is None else timeouts.get("read")
        try:
            return await self._connector.connect(
                self._connection_request(request.url),
                traces=[],
                timeout=_limits(timeouts.get("connect"), more),
            )
        except (aiohttp.ClientError, HttpProcessingError, OSError, RuntimeError, ValueError) as error:
            _drop_frames(error)
            raise _connect_error(error) from (error.__cause__ or error)

    def _connection_request(self, url: httpx.URL) -> aiohttp.ClientRequest:
        """Return the request by which aiohttp finds or opens a connection; it is never sent."""
        origin = _origin(url)
        if origin not in self._requests:
            proxy = self._proxy
            self._requests[origin] = aiohttp.ClientRequest(
                "POST",
                URL(origin, encoded=True),
                loop=asyncio.get_running_loop(),
                proxy=None if proxy is None else URL(_origin(proxy.url), encoded=True),
                proxy_headers=None if proxy is None else _TUNNEL_HEADERS | _proxy_login(proxy),
            )
        return self._requests[origin]


class _Body(httpx.AsyncByteStream):
    """The body of an answer; its connection can be used again if it was read to its end."""

    def __init__(self, connection: Connection, protocol: "_Connection", payload: StreamReader) -> None:
        self._connection = connection
        self._protocol = protocol
        self._payload = payload

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while data := await _reading(self._payload.readany()):
                yield data
        except BaseException:
            # httpx closes an answer that was read, and not one that broke.
            self._connection.close()
            raise

    async def aclose(self) -> None:
        if self._protocol.end():
            self._connection.release()
        else:
            self._connection.close()


class _Connection(ResponseHandler):
    """One connection. It is used again only if no byte came beyond an answer."""

    _answer: AnswerFilter | None = None
    _is_expecting = False

    def set_response_params(self, **parameters: Any) -> None:
        """Let an answer come, also a proxy's to CONNECT."""
        self._is_expecting = True
        super().set_response_params(**parameters)

    def expect(self, request: httpx.Request) -> None:
        """Prepare for the answer to a request."""
        self._answer = request.extensions.get("answer")
        self.set_response_params(
            skip_payload=request.method == "HEAD",
            read_until_eof=True,
            # httpx does it.
            auto_decompress=False,
            read_timeout=request.extensions.get("timeout", {}).get("read"),
            max_line_size=MAX_FIELD_BYTES,
            max_field_size=MAX_FIELD_BYTES,
            max_headers=MAX_FIELDS,
        )
        self.start_timeout()

    def end(self) -> bool:
        """End the exchange and return whether the connection may be used again."""
        answer, self._answer, self._is_expecting = self._answer, None, False
        return answer is None or answer.is_exact()

    def data_received(self, data: bytes) -> None:
        if data and not self._is_expecting:
            # aiohttp would take it for the answer to the next request.
            self.abort()
            return
        if data and self._answer is not None:
            try:
                data = self._answer.on_read(data)
            except httpx.RemoteProtocolError as error:
                self.set_exception(HttpProcessingError(), error)
                if self.transport is not None:
                    self.transport.abort()
                return
            if not data:
                return
        super().data_received(data)

    def connection_lost(self, exc: BaseException | None) -> None:
        if exc is not None and self._payload is not None and not self._payload.is_eof():
            # aiohttp takes a reset for the end of a body without a length.
            self._payload.set_exception(exc)
        super().connection_lost(exc)
        if not self._is_expecting:
            self._forget()

    def close(self) -> None:
        self._is_expecting = False
        self._forget()
        # With TLS, the transport's `close` would wait up to 30 s for the other side.
        self.abort()

    def _forget(self) -> None:
        """Drop what is not read any more: it refers to this connection."""
        self._buffer.clear()
        self._exception = None

    def is_connected(self) -> bool:
        """Return whether the connection is open and has nothing to read; the loop learns of an end late."""
        return super().is_connected() and not _is_readable(self.transport)


class _Connector(aiohttp.TCPConnector):
    """Connections of one transport."""

    def __init__(self, tls: ssl.SSLContext, proxy: httpx.Proxy | None) -> None:
        super().__init__(
            ssl=tls,
            limit=0,
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            resolver=aiohttp.ThreadedResolver(),
        )
        self._factory = cast(
            "functools.partial[ResponseHandler]", functools.partial(_Connection, loop=self._loop)
        )
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


def _send(connection: Connection, content: bytes, request: httpx.Request) -> _Connection:
    """Write the request. Raises ConnectError if nothing was written."""
    protocol, transport = connection.protocol, connection.transport
    if not isinstance(protocol, _Connection) or transport is None or transport.is_closing():
        raise httpx.ConnectError("the connection was lost")
    protocol.expect(request)
    if on_send := request.extensions.get("on_send"):
        on_send()
    # There is no wait for the buffers: an early answer is read even if the body is not.
    transport.write(content)
    return protocol


async def _reading(result: Any) -> Any:
    """Await a part of the answer. Raises httpx.TransportError, and never one that says "not sent"."""
    try:
        return await result
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        _drop_frames(error)
        if isinstance(error, TimeoutError):
            raise httpx.ReadTimeout("") from error
        if isinstance(error, aiohttp.ClientOSError) or not isinstance(
            error, aiohttp.ClientError | HttpProcessingError
        ):
            raise httpx.ReadError("") from error
        raise httpx.RemoteProtocolError("") from error


def _drop_frames(error: BaseException) -> None:
    """Drop the tracebacks of a library's error: their frames hold it, or a connection that does."""
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__cause__ or each.__context__


def _connect_error(error: Exception) -> httpx.TransportError:
    """Return httpx's exception for an error before the request was sent."""
    if isinstance(error, TimeoutError):
        return httpx.ConnectTimeout("")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return httpx.ProxyError("")
    if isinstance(error, (aiohttp.ServerDisconnectedError, aiohttp.ClientResponseError, HttpProcessingError)):
        # Only a proxy answers before a request.
        return httpx.RemoteProtocolError("")
    return httpx.ConnectError("")


@functools.lru_cache(maxsize=16)
def _limits(connect: float | None, more: float | None) -> aiohttp.ClientTimeout:
    """Return aiohttp's limits: `connect` for TCP and TLS, the same for the name, and `more` for a proxy."""
    whole = None if connect is None or more is None else 2 * connect + more
    return aiohttp.ClientTimeout(connect=whole, sock_connect=connect, ceil_threshold=math.inf)


def _serialize(request: httpx.Request, body: bytes, proxy: httpx.Proxy | None) -> bytes:
    """Return the request's bytes. Raises LocalProtocolError."""
    url, fields = request.url, request.headers.raw
    target = url.raw_path
    if proxy is not None:
        target = url.raw_scheme + b"://" + url.netloc + target
        fields = [*fields, *((name.encode(), value.encode()) for name, value in _proxy_login(proxy).items())]
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
    lines += [b"%b: %b" % field for field in fields]
    length = int(request.headers.get("content-length", "0"))
    is_valid = _START.fullmatch(lines[0]) and all(map(_FIELD.fullmatch, lines[1:]))
    if not is_valid or length != len(body) or "transfer-encoding" in request.headers:
        # Not even a connection is opened: the bytes would be two requests, or none.
        raise httpx.LocalProtocolError("invalid request")
    return b"\r\n".join([*lines, b"", body])


def _origin(url: httpx.URL) -> str:
    """Return a URL without user, password and path."""
    return f"{url.scheme}://{url.netloc.decode('ascii')}/"


def _proxy_login(proxy: httpx.Proxy) -> dict[str, str]:
    """Return the header of the proxy's user and password, if it has them."""
    if proxy.raw_auth is None:
        return {}
    encoded = base64.b64encode(b":".join(proxy.raw_auth))
    return {"Proxy-Authorization": "Basic " + encoded.decode("ascii")}


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
