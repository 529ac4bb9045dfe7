"""uvicorn's HTTP/1.1 protocol with the limits that it lacks.

uvicorn on httptools sets no deadline for request headers and no limit to their size, lets through some
requests that RFC 9112 forbids, leaves white space at the end of header values, skips the body of a request
that offers an upgrade, and forgets a connection whose request body is still coming when the answer has been
sent. Give the class to `uvicorn.Config(http=DeadlineHttpToolsProtocol)`.

A deadline for the body is the endpoint's. Where it answers before it has read the body, with `connection:
close` or without, the connection is closed here, once the client had time to read the answer.
"""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import ClassVar, Final, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from receiver.api.answers import error_body

_REASONS: Final[Mapping[HTTPStatus, tuple[str, str]]] = MappingProxyType(
    {
        HTTPStatus.BAD_REQUEST: ("invalid_request", "This is not a valid HTTP/1.1 request."),
        HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: ("headers_too_large", "The headers are too large."),
        HTTPStatus.HTTP_VERSION_NOT_SUPPORTED: ("http_version_not_supported", "Use HTTP/1.1."),
    }
)

_HEAD_END: Final = b"\r\n\r\n"
_WHITE: Final = b" \t"
"""White space that may stand around a header value and is no part of it (RFC 9110, section 5.5)."""


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
    _tail: bytes = b""
    """The last bytes of the previous read, in which the end of a head may have begun."""
    _clean_head: bytes | None = None
    """The head that the parser has just read, as it is to be read again."""

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
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self._refuse(HTTPStatus.BAD_REQUEST)
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

    def _parse(self, data: bytes) -> None:
        """Feed the parser in pieces, of which each ends where a head may end.

        If a head offers an upgrade or has white space behind a value, a new parser reads it again without
        that. The first one would skip the body of such a request, or not see that it is chunked, and it does
        not tell where the head ended. With these pieces that is always at the end of one.
        """
        view = memoryview(data)
        start = 0
        while start < len(data) and not self._deaf:
            end = self._next_cut(data, start)
            try:
                self.parser.feed_data(view[start:end])
            except (httptools.HttpParserUpgrade, httptools.HttpParserError):
                if self._clean_head is None:
                    raise
            if self._clean_head is not None:
                head, self._clean_head = self._clean_head, None
                self.parser = httptools.HttpRequestParser(self)
                # As uvicorn does: a pipelined request behind the last one is no reason to refuse that.
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                self.parser.feed_data(head)
            start = end
        self._tail = (self._tail + data)[-3:] if len(data) < len(_HEAD_END) else data[-3:]

    def _next_cut(self, data: bytes, start: int) -> int:
        if start == 0 and self._tail.endswith((b"\r", b"\n")):
            split = (self._tail + data[:3]).find(_HEAD_END)
            if split >= 0:
                return split + len(_HEAD_END) - len(self._tail)
        at = data.find(_HEAD_END, start)
        return len(data) if at < 0 else at + len(_HEAD_END)

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
        if self.parser.should_upgrade() or any(value[-1:] in _WHITE for _, value in self.headers if value):
            self._clean_head = self._make_clean_head()
            return
        self._stop_deadline()
        self._in_head = False
        self._in_body = True
        super().on_headers_complete()
        # Trailers go where nobody looks: uvicorn would add them to the headers of a running request.
        self.headers = []
        self.cycle.transport = self._answers

    def on_body(self, body: bytes) -> None:
        """Note the progress."""
        self._callbacks += 1
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that a head comes next."""
        self._callbacks += 1
        if self._clean_head is not None:
            # The request itself is still to come.
            return
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

    def close_after_answer(self) -> None:
        """Make the answer that is under way, if there is one, the last on this connection."""
        if self._unanswered is not None:
            self._unanswered.keep_alive = False

    def close(self) -> None:
        """Close after an answer."""
        if self.cycle.response_complete and self.cycle.more_body:
            self._linger()
        else:
            self.transport.close()

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
        # The parser takes what follows for a tunnel's bytes, whatever the headers say.
        if self.parser.get_method() == b"CONNECT":
            return HTTPStatus.BAD_REQUEST
        return None

    def _make_clean_head(self) -> bytes:
        """Write the head as it should have come: values are trimmed, the offer of an upgrade is left out."""
        version = self.parser.get_http_version().encode()
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
        lines += [
            b"%b: %b" % (name, value.strip(_WHITE)) for name, value in self.headers if name != b"upgrade"
        ]
        return b"\r\n".join([*lines, b"", b""])

    def _head_is_too_large(self) -> bool:
        lines = sum(len(name) + len(value) + len(b": \r\n") for name, value in self.headers)
        return len(self.url) + lines > self.MAX_HEADER_BYTES

    def _values(self, name: bytes) -> list[bytes]:
        return [value.strip(_WHITE).lower() for each, value in self.headers if each == name]

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
