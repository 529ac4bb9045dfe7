"""The timers of a connection: for the head of a request, between requests, and before it is closed."""

import asyncio
import contextlib
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle


class TimedHttpToolsProtocol(HttpToolsProtocol):
    """uvicorn's protocol with a deadline for heads, one keep-alive timer, and time to read an answer."""

    HEADER_TIMEOUT: ClassVar[float] = 10.0
    """From accept, or from the first byte of a later request, to the end of its headers."""
    LINGER_TIMEOUT: ClassVar[float] = 2.0
    """How long the rest of a rejected request is read and dropped before the connection is closed."""

    deaf: bool = False
    """Further bytes are not parsed: the connection ends with the answer that is being sent."""
    _deadline: asyncio.TimerHandle | None = None
    _idle_since: float | None = None
    """The event loop's time since which no request is open; None while one is."""
    _idle_timer: asyncio.TimerHandle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers: they refer to this object."""
        self._stop_deadline()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start the next request, or the keep-alive time.

        uvicorn's own method starts and cancels a timer for each request; here a connection has one timer.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since = self.loop.time()
        if self._idle_timer is None:
            self._idle_timer = self.loop.call_later(self.timeout_keep_alive, self._on_idle)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since = None

    def _on_idle(self) -> None:
        """Close the connection if it was idle for the whole time."""
        self._idle_timer = None
        if self._idle_since is None:
            return
        left = self._idle_since + self.timeout_keep_alive - self.loop.time()
        if left > 0:
            self._idle_timer = self.loop.call_later(left, self._on_idle)
        else:
            self.timeout_keep_alive_handler()

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
            # The head of a pipelined request may wait as long as the one before it is being answered.
            self._start_deadline()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Close the connection after LINGER_TIMEOUT, and drop the bytes that arrive until then.

        Closing it at once would reset the connection if bytes are unread, and the client may get the reset
        before the answer.
        """
        self.deaf = True
        self._stop_deadline()
        if self.transport.can_write_eof():
            # If the client has hung up and the event loop does not know it yet, this fails.
            with contextlib.suppress(OSError):
                self.transport.write_eof()
        self._deadline = self.loop.call_later(self.LINGER_TIMEOUT, self.transport.abort)
