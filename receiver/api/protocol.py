"""uvicorn's HTTP/1.1 protocol with the limits that it lacks.

uvicorn on httptools sets no deadline for request headers and no limit to their size, lets through some
requests that RFC 9112 forbids, and forgets a connection whose request body is still coming when the answer
has been sent. Give the class to `uvicorn.Config(http=DeadlineHttpToolsProtocol)`.

A deadline for the body is the endpoint's. Where it answers before it has read the body, with `connection:
close` or without, the connection is closed here, once the client had time to read the answer.
"""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import ClassVar, Final, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from receiver.api.answers import error_body

_REASONS: Final[Mapping[HTTPStatus, tuple[str, str]]] = MappingProxyType(
    {
        HTTPStatus.BAD_REQUEST: ("invalid_request", "This is not a valid HTTP/1.1 request."),
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: ("headers_too_large", "The headers are too large."),
        HTTPStatus.NOT_IMPLEMENTED: ("upgrade_not_supported", "Send the body without an Upgrade header."),
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED: ("http_version_not_supported", "Use HTTP/1.1."),
    }
)


class _Refused(Exception):  # noqa: N818 - no error of ours: it stops the parser once a request is refused
    pass


class DeadlineHttpToolsProtocol(HttpToolsProtocol):
    """Closes slow connections, limits the header section, refuses what RFC 9112 forbids.

    The limits are class attributes; times are in seconds.
    """

    HEADER_TIMEOUT: ClassVar[float] = 10.0
    """From accept, or from the first byte of a later request, to the end of its headers."""
    LINGER_TIMEOUT: ClassVar[float] = 2.0
    """How long the rest of a refused request is read and dropped before the connection is closed."""
    MAX_HEADER_BYTES: ClassVar[int] = 16 * 1024
    """Request line, headers and trailers together; also one chunk's extensions."""

    _deadline: asyncio.TimerHandle | None = None
    _deaf: bool = False
    """Nothing more is parsed: the connection ends with the answer that is being sent."""
    _in_head: bool = False
    _in_body: bool = False
    _callbacks: int = 0
    """Steps of the parser so far; a read that makes none was swallowed without result."""
    _swallowed: int = 0
    _read_size: int = 0

    # asyncio.Protocol takes any transport here; uvicorn narrows it, and so must whoever inherits from that.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline of the first request: a client that sends nothing is closed, too."""
        super().connection_made(transport)
        self._answers = cast("asyncio.Transport", _AnswerTransport(self))
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and bound what makes no progress: a head, trailers, a chunk's extensions.

        What is done here is done for every request: a timer or an override for each header costs more than
        the parsing itself.
        """
        if self._deaf:
            return
        callbacks = self._callbacks
        self._read_size = len(data)
        super().data_received(data)
        if self._deaf:
            return
        made = self._callbacks - callbacks
        if not made:
            self._swallowed += len(data)
        else:
            # Where a head has begun in this read and nothing else happened, the whole read is that head's.
            self._swallowed = len(data) if made == 1 and self._in_head else 0
        if self._swallowed > self.MAX_HEADER_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._in_head or (not made and not self._in_body):
            # Line ends before a request begin no message, but they have stopped the keep-alive clock.
            self._start_deadline()

    def on_message_begin(self) -> None:
        """Note that a request has begun."""
        self._callbacks += 1
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Stop the deadline and hand the request to the application, unless RFC 9112 forbids it."""
        self._callbacks += 1
        fault = self._fault()
        if fault is not None:
            self._refuse(fault)
            raise _Refused
        self._stop_deadline()
        self._in_head = False
        self._in_body = True
        super().on_headers_complete()
        # Trailers go where nobody looks: uvicorn would add them to the headers of a running request.
        self.headers = []
        self.cycle.transport = self._answers
        if self.parser.should_upgrade() and not self._should_upgrade():
            # The parser drops what came in the same read after a request for an upgrade, so that the bytes
            # of a later read may be the middle of a request: this one has to be the last.
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Note the progress."""
        self._callbacks += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a head comes next."""
        self._callbacks += 1
        if self.headers and self._head_is_too_large():
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            raise _Refused
        self._in_body = False
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Close a connection whose request has been answered before its body came."""
        super().on_response_complete()
        # uvicorn would keep it open for ever: the next byte of the body stops the keep-alive clock for good.
        if self.cycle.response_complete and self.cycle.more_body:
            self._linger()

    def close(self) -> None:
        """Close after an answer."""
        if self.cycle.response_complete and self.cycle.more_body:
            self._linger()
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """Refuse what the parser does not take, in our own error format."""
        self._refuse(HTTPStatus.BAD_REQUEST)

    @property
    def _unanswered(self) -> RequestResponseCycle | None:
        """The newest request, while its answer is not complete."""
        cycle: RequestResponseCycle | None = getattr(self, "cycle", None)
        return None if cycle is None or cycle.response_complete else cycle

    def _start_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.HEADER_TIMEOUT, self._on_deadline)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._unanswered is not None:
            # A pipelined request waits behind one that is still being answered.
            self._start_deadline()
        else:
            self.transport.close()

    def _fault(self) -> HTTPStatus | None:
        """Return the status for a request that httptools lets through but must not be served."""
        version = self.parser.get_http_version()
        if version not in {"1.0", "1.1"}:
            return HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
        if self._swallowed + self._read_size > self.MAX_HEADER_BYTES and self._head_is_too_large():
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        names = [name for name, _ in self.headers]
        hosts = names.count(b"host")
        if hosts > 1 or (not hosts and version == "1.1"):
            return HTTPStatus.BAD_REQUEST
        codings = self._values(b"transfer-encoding") if b"transfer-encoding" in names else []
        if codings and (codings != [b"chunked"] or version == "1.0"):
            return HTTPStatus.BAD_REQUEST
        # The parser skips the body of a request for an upgrade, and would take it for the next request.
        if self.parser.should_upgrade() and (codings or self._values(b"content-length") not in ([], [b"0"])):
            return HTTPStatus.NOT_IMPLEMENTED
        return None

    def _head_is_too_large(self) -> bool:
        lines = sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        return len(self.url) + lines > self.MAX_HEADER_BYTES

    def _values(self, name: bytes) -> list[bytes]:
        return [value.lower() for each, value in self.headers if each == name]

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer and close. Only the first refusal on a connection counts."""
        if self._deaf:
            return
        cycle = self._unanswered
        if cycle is None:
            self._write_error(status)
            self._linger()
            return
        self._deaf = True
        if not cycle.more_body:
            # The fault is in a later request. This one is owed its own answer; the connection ends with it.
            cycle.keep_alive = False
        else:
            if not cycle.response_started and not self.pipeline:
                self._write_error(status)
            self.transport.close()

    def _write_error(self, status: HTTPStatus) -> None:
        code, message = _REASONS[status]
        body = error_body("invalid_request_error", code, message)
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() + head + b"\r\n" + body)

    def _linger(self) -> None:
        """Close, but read on for a while.

        Closing with unread bytes resets the connection, and the reset may overtake the answer.
        """
        self._deaf = True
        self._stop_deadline()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._deadline = self.loop.call_later(self.LINGER_TIMEOUT, self.transport.abort)


class _AnswerTransport:
    """The transport as uvicorn's request cycle sees it, but for how it closes."""

    def __init__(self, protocol: DeadlineHttpToolsProtocol) -> None:
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing
        self.close = protocol.close
