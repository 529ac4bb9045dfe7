"""The transport of httpx for events: connections, pool and parser are aiohttp's.

httpcore takes 3.6 times the CPU for a small POST, and 9 times with 50 at once, because its pool visits all of
its connections for each.

aiohttp's `ClientSession` is not used. It sends a broken GET again, keeps cookies, adds headers and rewrites
the URL. Here the request's bytes are written at one point, once.
"""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from typing import Any, Final

import aiohttp
import httpx
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.streams import StreamReader
from yarl import URL

from receiver.http_connections import Connector, HttpConnection, proxy_login

_START: Final = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+ [!-~]+ HTTP/1\.1")
_FIELD: Final = re.compile(
    rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+: (?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?"
)
_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None)


class HttpTransport(httpx.AsyncBaseTransport):
    """Sends each request once, byte for byte as it is, on a connection of its own or an idle one.

    The caller limits how many requests are under way, and the time of the whole exchange. The request's
    extension `answer`, an `AnswerFilter`, must keep interim answers (1xx) back.
    """

    def __init__(self, *, tls: ssl.SSLContext, proxy: httpx.Proxy | None = None) -> None:
        tls.set_alpn_protocols(["http/1.1"])
        self._tls = tls
        self._proxy = proxy
        self._connector: Connector | None = None
        self._requests: dict[str, aiohttp.ClientRequest] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request and return the answer's head. Raises httpx.TransportError.

        After a 2xx, wait until the whole request is sent: some servers answer before they have read it.
        """
        # A proxy gets the request itself only without TLS.
        forwarding = self._proxy if request.url.scheme == "http" else None
        content = _serialize(request, await request.aread(), forwarding)
        connection = await self._connect(request)
        try:
            protocol = _send(connection, content, request)
            message, payload = await _reading(protocol.read())
            if httpx.codes.is_success(message.code):
                await protocol.flush()
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
            self._connector = Connector(self._tls, self._proxy)
        try:
            return await self._connector.connect(
                self._connection_request(request.url), traces=[], timeout=_NO_TIMEOUT
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
                # Certificates have no dot at the end.
                server_hostname=url.raw_host.decode("ascii").rstrip("."),
            )
        return self._requests[origin]


class _Body(httpx.AsyncByteStream):
    """The body of an answer; its connection can be used again if it was read to its end."""

    def __init__(self, connection: Connection, protocol: HttpConnection, payload: StreamReader) -> None:
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
        # The next request would wait behind the rest of this one.
        if not self._protocol.is_unsent() and self._protocol.end():
            self._connection.release()
        else:
            self._connection.close()


def _send(connection: Connection, content: bytes, request: httpx.Request) -> HttpConnection:
    """Write the request. Raises ConnectError if nothing was written."""
    protocol, transport = connection.protocol, connection.transport
    if not isinstance(protocol, HttpConnection) or transport is None or transport.is_closing():
        raise httpx.ConnectError("the connection was lost")
    protocol.expect(request.extensions.get("answer"))
    # There is no wait for the buffers: an early answer is read even if the body is not.
    transport.write(content)
    return protocol


async def _reading(result: Any) -> Any:
    """Await a part of the answer. Raises httpx.TransportError."""
    try:
        return await result
    except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
        _drop_frames(error)
        if isinstance(error, OSError) and not isinstance(error, aiohttp.ServerDisconnectedError):
            raise httpx.ReadError("") from error
        raise httpx.RemoteProtocolError("") from error


def _drop_frames(error: BaseException) -> None:
    """Drop the tracebacks of a library's error: their frames hold it, or a connection that does."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        each.__traceback__ = None
        each = each.__cause__ or each.__context__


def _connect_error(error: Exception) -> httpx.TransportError:
    """Return httpx's exception for an error before the request was sent."""
    if isinstance(error, (aiohttp.ServerDisconnectedError, HttpProcessingError)):
        # Only a proxy answers before a request.
        return httpx.RemoteProtocolError("")
    return httpx.ConnectError("")


def _serialize(request: httpx.Request, body: bytes, proxy: httpx.Proxy | None) -> bytes:
    """Return the request's bytes. Raises LocalProtocolError."""
    url, fields = request.url, request.headers.raw
    target = url.raw_path
    if proxy is not None:
        target = url.raw_scheme + b"://" + url.netloc + target
        fields = [*fields, *((name.encode(), value.encode()) for name, value in proxy_login(proxy).items())]
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
