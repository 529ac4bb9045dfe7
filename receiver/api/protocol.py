"""uvicorn's HTTP/1.1 protocol with the limits that it lacks.

uvicorn on httptools sets no deadline for request headers and no limit to their size, keeps whatever many
clients send, forgets a connection if the body is still coming when its answer has been sent, and leaves
requests that were refused to the garbage collector. Give the class to
`uvicorn.Config(http=DeadlineHttpToolsProtocol)`.

Deadlines and refusals are here, heads in `heads`, bodies in `bodies`, the bytes of both in `memory`. A
deadline for the body is the endpoint's. If it answers before it has read the body, with `connection: close`
or without, the connection is closed here, once the client had time to read the answer.
"""

import asyncio
import time
from functools import partial
from http import HTTPStatus
from typing import ClassVar, Final, cast

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from receiver.api.answers import HEAD_COMPLETE, raw_error_response
from receiver.api.bodies import BodyParts
from receiver.api.heads import HeadRewriter, find_fault, head_size, is_misread
from receiver.api.memory import DEFAULT_BUDGET, Account, MemoryBudget

_NOTABLE_HEAD: Final = 4096
"""Bytes of a read from which on it is worth counting those of its head; no more than MAX_HEADER_BYTES."""


class _Refused(Exception):
    pass


class DeadlineHttpToolsProtocol(HttpToolsProtocol):
    """Closes slow connections, limits the header section, refuses requests that RFC 9112 forbids.

    The limits are class attributes; times are in seconds.
    """

    HEADER_TIMEOUT: ClassVar[float] = 10.0
    """From accept, or from the first byte of a later request, to the end of its headers."""
    LINGER_TIMEOUT: ClassVar[float] = 2.0
    """How long the rest of a refused request is read and dropped before the connection is closed."""
    MAX_HEADER_BYTES: ClassVar[int] = 16 * 1024
    """Request line, headers and trailers together; also one chunk's extensions."""
    MAX_HEADERS: ClassVar[int] = 100
    """Headers, and trailers: each is an object several times its size."""
    MAX_PIPELINED: ClassVar[int] = 16
    """Requests that wait on a connection behind the one that is being answered."""
    budget: ClassVar[MemoryBudget] = MemoryBudget(DEFAULT_BUDGET)
    """Bytes that all connections of this process may hold."""

    _invalid_noted_at: ClassVar[float] = float("-inf")

    deaf: bool = False
    """Nothing more is parsed: the connection ends with the answer that is being sent."""
    _deadline: asyncio.TimerHandle | None = None
    _in_head: bool = False
    _in_body: bool = False
    _is_lost: bool = False
    _running: RequestResponseCycle | None = None
    """The request that the application serves; with pipelining it is older than `cycle`."""
    _callbacks: int = 0
    """Steps of the parser so far; a read that makes none was swallowed without result."""
    _swallowed: int = 0
    _read_size: int = 0

    # asyncio.Protocol takes any transport here; uvicorn narrows it, and so must its subclasses.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn
        """Start the deadline of the first request: a client that sends nothing is closed, too."""
        super().connection_made(transport)
        self._answers = cast("asyncio.Transport", _AnswerTransport(self))
        self._heads = HeadRewriter()
        self._body = BodyParts()
        self.headers = []
        self._start_deadline()
        self._account = Account(self.budget, self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks, and let go of all that refers to this object: only a running request keeps it."""
        self._stop_deadline()
        self._is_lost = True
        if self._running is not None and not self._running.response_complete:
            # uvicorn tells only the newest request, and this one would write to a closed transport.
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._account.close()
        for cycle, _ in self.pipeline:
            self._forget(cycle)
        self.pipeline.clear()
        self._in_head = False
        if not self._account.has(self.cycle):
            self._drop_request()
        del self._answers

    def data_received(self, data: bytes) -> None:
        """Parse a read in pieces: a request that is refused in the first ones is not parsed to its end."""
        for start in range(0, len(data), self.MAX_HEADER_BYTES):
            if self.deaf:
                return
            self._take(data[start : start + self.MAX_HEADER_BYTES])

    def _take(self, data: bytes) -> None:
        """Parse, and bound the bytes that make no progress: a head, trailers, a chunk's extensions.

        Every request comes here: a timer or an override for each header costs more than the parsing itself.
        """
        callbacks = self._callbacks
        self._read_size = len(data)
        self._unset_keepalive_if_required()
        try:
            self._heads.feed(self, data)
        except httptools.HttpParserError:
            self._note_invalid()
            self._refuse(HTTPStatus.BAD_REQUEST)
        if self.deaf:
            return
        made = self._callbacks - callbacks
        if not made:
            self._swallowed += len(data)
        else:
            # Where a head has begun in this read and nothing else happened, the whole read is that head's.
            self._swallowed = len(data) if made == 1 and self._in_head else 0
        if self._swallowed > self.MAX_HEADER_BYTES or len(self.headers) > self.MAX_HEADERS:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        if self._in_head:
            self._account.grow_head(len(data))
        if self.deaf:
            return
        if self._in_head or (not made and not self._in_body):
            # Line ends before a request begin no message, but they have stopped the keep-alive clock.
            self._start_deadline()

    def _note_invalid(self) -> None:
        """Log it, once a second at most: a flood of bytes that are no HTTP must not fill the disk."""
        now = time.monotonic()
        if now - DeadlineHttpToolsProtocol._invalid_noted_at >= 1.0:
            DeadlineHttpToolsProtocol._invalid_noted_at = now
            self.logger.warning("Invalid HTTP request received.")

    def on_message_begin(self) -> None:
        """Note that a request has begun."""
        self._callbacks += 1
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Stop the deadline and hand the request to the application, unless RFC 9112 forbids it."""
        self._callbacks += 1
        size = 0
        if self._swallowed + self._read_size > _NOTABLE_HEAD:
            size = head_size(self.url, self.headers)
        too_large = size > self.MAX_HEADER_BYTES or len(self.headers) > self.MAX_HEADERS
        fault = find_fault(self.parser, self.headers, too_large=too_large)
        if fault is not None:
            self._refuse(fault)
            raise _Refused
        if is_misread(self.parser, self.headers):
            self._heads.rewrite(self.parser, self.url, self.headers)
            return
        self._stop_deadline()
        self._in_head = False
        self._in_body = True
        before = self.cycle
        super().on_headers_complete()
        self.cycle.transport = self._answers
        self.scope["state"][HEAD_COMPLETE] = self.loop.time()
        self._account.begin(self.cycle, size)
        # Trailers go where nobody looks: uvicorn would add them to the headers of a running request.
        self.headers = []
        if self.pipeline and (len(self.pipeline) > self.MAX_PIPELINED or self.budget.is_half_used):
            self._refuse_pipelined(before)
            raise _Refused

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body, if there is room for it."""
        self._callbacks += 1
        cycle = self.cycle
        if cycle.response_complete:
            return
        self._account.grow_body(cycle, len(body))
        if self.deaf:
            raise _Refused
        self._body.add(cycle, body)

    def on_message_complete(self) -> None:
        """Note that a head comes next."""
        self._callbacks += 1
        if self._heads.clean_head is not None:
            # The request itself is still to come.
            return
        if self.headers and head_size(self.url, self.headers) > self.MAX_HEADER_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            raise _Refused
        self._in_body = False
        self._body.hand_over(self.cycle)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Close a connection whose request has been answered before its body came."""
        super().on_response_complete()
        # uvicorn would keep it open for ever: the next byte of the body stops the keep-alive clock for good.
        if self._is_answered_early:
            self._linger()

    def close_after_answer(self) -> None:
        """Make the answer that is under way, if there is one, the last on this connection."""
        if self._unanswered is not None:
            self._unanswered.keep_alive = False

    def close(self) -> None:
        """Close after an answer."""
        if self._is_answered_early:
            self._linger()
        else:
            self.transport.close()

    @property
    def _is_answered_early(self) -> bool:
        # There is no request if the connection is lost, or if the application fails after its answer.
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and cycle.response_complete and cycle.more_body

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, partial(self._serve, cycle, app))

    async def _serve(
        self,
        cycle: RequestResponseCycle,
        app: ASGI3Application,
        scope: Scope,
        receive: ASGIReceiveCallable,
        send: ASGISendCallable,
    ) -> None:
        try:
            await app(scope, receive, send)
        finally:
            self._forget(cycle)

    def _forget(self, cycle: RequestResponseCycle) -> None:
        """Free the memory of a request; nobody looks at it again."""
        self._account.end(cycle)
        cycle.body = bytearray()
        if cycle is self._running:
            self._running = None
        if cycle is self.cycle:
            self._body.drop()
            if cycle.response_complete or cycle.disconnected:
                self._drop_request()

    def _drop_request(self) -> None:
        # A connection that is kept alive needs no request; and the request refers to this object.
        self.cycle = None  # type: ignore[assignment] # uvicorn begins with None, too
        if not self._in_head:
            # The next request has not begun.
            self.scope = None  # type: ignore[assignment] # likewise
            self.headers = []
            self.url = b""

    @property
    def is_unfinished(self) -> bool:
        """Whether the connection waits for its client."""
        if self._is_lost:
            # What it still holds is freed as soon as the application notices; its transport takes no answer.
            return False
        cycle = self._unanswered
        return cycle is None or (cycle.more_body and not cycle.response_started and not self.pipeline)

    def shed(self) -> None:
        """Answer 503 if a request has begun, and free its memory."""
        if self.deaf:
            self._account.close()
            self.transport.abort()
            return
        cycle = self._unanswered
        if cycle is None:
            if self._in_head:
                self._write_error(HTTPStatus.SERVICE_UNAVAILABLE)
            self.deaf = True
            self._account.close()
            self.transport.close()
            return
        self._write_error(HTTPStatus.SERVICE_UNAVAILABLE)
        cycle.disconnected = True
        cycle.message_event.set()
        cycle.body = bytearray()
        self._body.drop()
        self._account.end(cycle)
        self._linger()

    def _refuse_pipelined(self, before: RequestResponseCycle) -> None:
        """Take no more requests: the answer to the one before is the last one."""
        cycle, _ = self.pipeline.popleft()
        self._forget(cycle)
        self.cycle = before
        before.keep_alive = False
        self.deaf = True

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

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer and close. Only the first refusal on a connection counts."""
        if self.deaf:
            return
        cycle = self._unanswered
        if cycle is None:
            self._write_error(status)
            self._in_head = False
            self._drop_request()
            self._linger()
            return
        self.deaf = True
        if not cycle.more_body:
            # The fault is in a later request. This one is owed its own answer; the connection ends with it.
            cycle.keep_alive = False
        else:
            if not cycle.response_started and not self.pipeline:
                self._write_error(status)
            self.transport.close()

    def _write_error(self, status: HTTPStatus) -> None:
        self.transport.write(raw_error_response(status, self.server_state.default_headers))

    def _linger(self) -> None:
        """Close, but read on for a while.

        Closing with unread bytes resets the connection, and the reset may overtake the answer.
        """
        self.deaf = True
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
