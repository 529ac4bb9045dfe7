"""uvicorn's HTTP/1.1 protocol with the limits that it lacks.

uvicorn on httptools has no deadline for request headers, no limit to their size and no limit to the memory
of all requests together. It forgets a connection if the body is still arriving when its answer has been
sent, and leaves rejected requests to the garbage collector. Pass the class to
`uvicorn.Config(http=DeadlineHttpToolsProtocol)`.

This module has the rejections, `timers` the deadlines, `heads` the heads, `bodies` the bodies,
`memory_budget` the count of their bytes and `direct` the webhooks, which go to their endpoint without ASGI.
ASGI endpoints set the deadline for a body. If an endpoint answers before it has read the body, with
`connection: close` or without, the protocol gives the client time to read the answer and then closes the
connection.
"""

import asyncio
import time
from functools import partial
from http import HTTPStatus
from typing import ClassVar, Final, cast

import httptools
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from receiver.api.answers import HEAD_COMPLETE, AnswerCut, raw_error_response
from receiver.api.bodies import BodyParts
from receiver.api.direct import DirectDoor, DirectRequest
from receiver.api.heads import HeadRewriter, examine, head_size
from receiver.api.memory_budget import DEFAULT_BUDGET_BYTES, Account, MemoryBudget
from receiver.api.timers import TimedHttpToolsProtocol

DIRECT_DOOR: Final = "receiver.direct_door"
"""The key of a DirectDoor in the lifespan's state, which uvicorn passes to the protocol."""
_NOTABLE_HEAD: Final = 4096
"""A head's size is computed only if more bytes than this were read; must not exceed MAX_HEADER_BYTES."""


class _Rejected(Exception):
    pass


class DeadlineHttpToolsProtocol(TimedHttpToolsProtocol):
    """Closes slow connections, limits the header section, rejects requests that RFC 9112 forbids.

    The limits are class attributes; times are in seconds.
    """

    MAX_HEADER_BYTES: ClassVar[int] = 16 * 1024
    """Request line, headers and trailers together; also one chunk's extensions."""
    MAX_HEADERS: ClassVar[int] = 100
    """Number of headers and trailers: as objects they take several times their bytes."""
    MAX_PIPELINED: ClassVar[int] = 16
    """Requests that may wait on a connection behind the one that is being answered."""
    budget: ClassVar[MemoryBudget] = MemoryBudget(DEFAULT_BUDGET_BYTES)
    """Bytes that all connections of this process may hold."""

    _invalid_logged_at: ClassVar[float] = float("-inf")

    _in_head: bool = False
    _in_body: bool = False
    _is_lost: bool = False
    _running: RequestResponseCycle | None = None
    """The request that the application serves; with pipelining it is older than `cycle`."""
    _callbacks: int = 0
    """The parser's callbacks so far: a read without one made no progress."""
    _unparsed: int = 0
    """Bytes since the last callback."""
    _read_size: int = 0

    # asyncio.Protocol takes any transport here. uvicorn narrows the type, so a subclass has to as well.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it
        """Start the deadline of the first request: the connection of a silent client is closed, too."""
        super().connection_made(transport)
        self._answers = cast("asyncio.Transport", _AnswerTransport(self))
        self._heads = HeadRewriter()
        self._body = BodyParts()
        self.headers = []
        self._door: DirectDoor | None = self.app_state.get(DIRECT_DOOR)
        if self.root_path or self.limit_concurrency is not None:
            self._door = None
        self._start_deadline()
        self._account = Account(self.budget, self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers and drop all references to this object, except that of a running request."""
        self._is_lost = True
        running = self._running
        if isinstance(running, DirectRequest):
            running.disconnect()
        elif running is not None and not running.response_complete:
            # uvicorn marks only the newest request; this older one would write to a closed transport.
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)
        self._account.close()
        for cycle, _ in self.pipeline:
            self.forget(cycle)
        self.pipeline.clear()
        self._in_head = False
        if not self._account.has(self.cycle):
            self._drop_request()
        del self._answers

    def data_received(self, data: bytes) -> None:
        """Parse a read in pieces: if one is rejected, the rest of the read is not parsed."""
        for start in range(0, len(data), self.MAX_HEADER_BYTES):
            if self.deaf:
                return
            self._parse(data[start : start + self.MAX_HEADER_BYTES])

    def _parse(self, data: bytes) -> None:
        """Parse, and limit the bytes without progress: of a head, of trailers, of a chunk's extensions.

        A timer or a callback of our own for each header would be simpler, but would cost each request
        more than its parsing does.
        """
        callbacks = self._callbacks
        self._read_size = len(data)
        self._unset_keepalive_if_required()
        try:
            self._heads.feed(self, data)
        except httptools.HttpParserError:
            self._log_invalid()
            self._reject(HTTPStatus.BAD_REQUEST)
        if self.deaf:
            return
        self._count_unparsed(len(data), self._callbacks - callbacks)
        if self.deaf:
            return
        if self._in_head or (self._callbacks == callbacks and not self._in_body):
            # Line ends before a request cause no callback, and uvicorn has stopped its keep-alive timer.
            self._start_deadline()

    def _count_unparsed(self, size: int, callbacks: int) -> None:
        if not callbacks:
            self._unparsed += size
        else:
            # With one callback, for the start of a head, the whole read belongs to that head.
            self._unparsed = size if callbacks == 1 and self._in_head else 0
        if self._unparsed > self.MAX_HEADER_BYTES or len(self.headers) > self.MAX_HEADERS:
            self._reject(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif self._in_head:
            self._account.grow_head(size)

    def _log_invalid(self) -> None:
        """Log an invalid request, at most one a second: a flood of them must not fill the disk."""
        now = time.monotonic()
        if now - DeadlineHttpToolsProtocol._invalid_logged_at >= 1.0:
            DeadlineHttpToolsProtocol._invalid_logged_at = now
            self.logger.warning("Invalid HTTP request received.")

    def on_message_begin(self) -> None:
        """Mark the start of a request; its scope is made if it goes through ASGI."""
        self._callbacks += 1
        self._in_head = True
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_headers_complete(self) -> None:
        """Stop the deadline and pass the request to the application, unless RFC 9112 forbids it."""
        self._callbacks += 1
        size = 0
        if self._unparsed + self._read_size > _NOTABLE_HEAD:
            size = head_size(self.url, self.headers)
        too_large = size > self.MAX_HEADER_BYTES or len(self.headers) > self.MAX_HEADERS
        fault = examine(self.parser, self.headers, too_large=too_large)
        if fault == "misread":
            self._heads.rewrite(self.parser, self.url, self.headers)
            return
        if fault is not None:
            self._reject(fault)
            raise _Rejected
        self._stop_deadline()
        self._in_head = False
        self._in_body = True
        before = self.cycle
        direct = None if self._door is None else self._accept(self._door)
        if direct is None:
            self._start_asgi()
        else:
            self.cycle = self._running = direct
        self._account.begin(self.cycle, size)
        # Trailers go to a list of their own: uvicorn would add them to the headers of a running request.
        self.headers = []
        if self.pipeline and (len(self.pipeline) > self.MAX_PIPELINED or self.budget.is_half_used):
            self._reject_pipelined(before)
            raise _Rejected

    def _accept(self, door: DirectDoor) -> DirectRequest | None:
        """Return the request as a direct one, or None if it has to go through ASGI."""
        if self._unanswered is not None or self.flow.write_paused or self.expect_100_continue:
            return None
        parser = self.parser
        try:
            return door.accept(
                self,
                method=parser.get_method(),
                url=self.url,
                headers=self.headers,
                keep_alive=parser.get_http_version() != "1.0" and parser.should_keep_alive(),
            )
        except Exception:
            self.logger.exception("a request cannot be accepted directly")
            return None

    def _start_asgi(self) -> None:
        url, headers, expect_100_continue = self.url, self.headers, self.expect_100_continue
        # This makes the scope, and resets the fields of the head.
        super().on_message_begin()
        self.url, self.expect_100_continue = url, expect_100_continue
        self.headers.extend(headers)
        super().on_headers_complete()
        self.cycle.transport = self._answers
        self.scope["state"][HEAD_COMPLETE] = self.loop.time()

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body, unless the memory budget is used up."""
        self._callbacks += 1
        cycle = self.cycle
        if cycle.response_complete:
            return
        self._account.grow_body(cycle, len(body))
        if self.deaf:
            raise _Rejected
        if isinstance(cycle, DirectRequest):
            self._body.keep(body)
        else:
            self._body.add(cycle, body)

    def on_message_complete(self) -> None:
        """Pass the rest of the body to the application."""
        self._callbacks += 1
        if self._heads.clean_head is not None:
            # The first parser skipped the body; the second one reads the request.
            return
        if self.headers and head_size(self.url, self.headers) > self.MAX_HEADER_BYTES:
            self._reject(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            raise _Rejected
        self._in_body = False
        cycle = self.cycle
        if isinstance(cycle, DirectRequest):
            if not cycle.response_complete:
                cycle.handle(self._body.take())
            return
        self._body.hand_over(cycle)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on, or close the connection if the request was answered before its body had arrived."""
        super().on_response_complete()
        # uvicorn would keep it open for ever: the next byte of the body stops the keep-alive timer for good.
        if self._is_answered_early:
            self._linger()

    def close_after_answer(self) -> None:
        """Close the connection after the answer that is being sent, if there is one."""
        if self._unanswered is not None:
            self._unanswered.keep_alive = False

    def close(self) -> None:
        """Close the connection; if the body is still arriving, let the client read the answer first."""
        if self._is_answered_early:
            self._linger()
        else:
            self.transport.close()

    @property
    def _is_answered_early(self) -> bool:
        # `cycle` is None if the connection is lost, or if the application fails after its answer.
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
        except AnswerCut:
            # `close` would first send the rest of the buffer, for as long as the client does not read it.
            cycle.disconnected = True
            self.transport.abort()
        finally:
            self.forget(cycle)

    def forget(self, cycle: RequestResponseCycle) -> None:
        """Free the memory of a request that has ended."""
        self._account.end(cycle)
        cycle.body = bytearray()
        if cycle is self._running:
            self._running = None
        if cycle is self.cycle:
            self._body.drop()
            if cycle.response_complete or cycle.disconnected:
                self._drop_request()

    def _drop_request(self) -> None:
        # The request refers to this object. With the reference gone, reference counting frees both at once.
        self.cycle = None  # type: ignore[assignment]  # uvicorn starts with None
        if not self._in_head:
            self.scope = None  # type: ignore[assignment]  # likewise
            self.headers = []
            self.url = b""

    @property
    def is_unfinished(self) -> bool:
        """Whether the server waits for the client's next bytes."""
        if self._is_lost:
            # Its transport takes no answer, and its memory is freed as soon as the application notices.
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
        if isinstance(cycle, DirectRequest):
            cycle.disconnect()
        else:
            cycle.disconnected = True
            cycle.message_event.set()
            cycle.body = bytearray()
            self._body.drop()
            self._account.end(cycle)
        self._linger()

    def _reject_pipelined(self, before: RequestResponseCycle) -> None:
        """Drop a pipelined request; the connection ends with the answer to the one before it."""
        cycle, _ = self.pipeline.popleft()
        self.forget(cycle)
        self.cycle = before
        before.keep_alive = False
        self.deaf = True

    def _reject(self, status: HTTPStatus) -> None:
        """Answer with an error and close; only the first error of a connection is answered."""
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
            # The fault is in a later request: the client still gets the answer to this one, and no more.
            cycle.keep_alive = False
        else:
            if not cycle.response_started and not self.pipeline:
                self._write_error(status)
            self.transport.close()

    def _write_error(self, status: HTTPStatus) -> None:
        self.transport.write(raw_error_response(status, self.server_state.default_headers))


class _AnswerTransport:
    """The transport for uvicorn's request cycle; `close` lets the client read the answer first."""

    def __init__(self, protocol: DeadlineHttpToolsProtocol) -> None:
        self.write = protocol.transport.write
        self.is_closing = protocol.transport.is_closing
        self.close = protocol.close
