"""The direct door of the callback: complete requests go from the protocol to `Ingest`, without ASGI.

ASGI costs each webhook a scope, a task, a future and two timers, together half of its time. The direct door
takes plain requests only: POST to a callback path of a known source with a Content-Length within the limit,
and no request before it on the connection that is still unanswered. All others go through ASGI, which answers
a webhook with the same bytes.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Final, Protocol

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.server import ServerState

from receiver.api.answers import CLOSE, Answer, Headers
from receiver.api.webhook import Head, Target, WebhookEndpoint, read_head
from receiver.errors import SignatureError
from receiver.ingest import Received, Submission
from receiver.metrics import ACK_SECONDS
from receiver.rejections import RawRequest
from receiver.settings import CALLBACK_PATH, DEFAULT_SOURCE

_PLAIN_SEGMENT: Final = re.compile(rb"[A-Za-z0-9._~-]+")
"""A segment of a path that is the same with and without percent-decoding."""
_SWEEP_SECONDS: Final = 0.1
"""Deadlines are checked at most this often, and are late by at most as much."""
_NO_WAITER: Final = asyncio.Event()
"""uvicorn's protocol sets the event of a request; no task waits for a direct one."""

log = structlog.get_logger()


class Connection(Protocol):
    """A connection with a parser, as a direct request sees it."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    server_state: ServerState
    client: tuple[str, int] | None

    def close(self) -> None:
        """Close the connection after the answer."""

    def on_response_complete(self) -> None:
        """Go on with the next request."""

    def forget(self, cycle: RequestResponseCycle) -> None:
        """Free the memory of a request."""


class DirectRequest(RequestResponseCycle):
    """A request in the place of uvicorn's cycle, whose fields the protocol uses."""

    def __init__(
        self,
        door: "DirectDoor",
        connection: Connection,
        target: Target,
        head: Head,
        *,
        url: bytes,
        headers: Headers,
        keep_alive: bool,
    ) -> None:
        # The base class would make an event for each request.
        self.message_event = _NO_WAITER
        self.disconnected = self.response_started = self.response_complete = False
        self.more_body = True
        self.keep_alive = keep_alive
        self._began: Final = connection.loop.time()
        # The event loop's own clock stands still while it runs callbacks.
        self._seen: Final = time.perf_counter()
        self._door = door
        self._connection = connection
        self._target = target
        self._head = head
        self._url = url
        self._headers = headers
        self._submission: Submission | asyncio.Handle | None = None
        door.open(self)

    def handle(self, body: bytes) -> None:
        """Store the request; its body is complete."""
        self.more_body = False
        try:
            request = self._target.request(self._head, body)
            self._submission = self._door.endpoint.ingest.submit(request, self._finish)
        # Answers are sent later: the parser may have the next request in hand, and an answer may close the
        # connection.
        except SignatureError as error:
            make_answer = partial(self._reject, error.reason, body)
            self._submission = self._connection.loop.call_soon(self._end, make_answer)
        except Exception as error:  # noqa: BLE001 - each error has an answer
            self._submission = self._connection.loop.call_soon(self._finish, None, error)

    def disconnect(self) -> None:
        """Note that the client has gone. If the body is complete, the request is stored nevertheless."""
        self.disconnected = True
        if self.more_body:
            self._door.close(self)
            self._connection.forget(self)

    @property
    def deadline(self) -> float:
        """The event loop's time at which the body, or else the answer, is late."""
        endpoint = self._door.endpoint
        return self._began + (endpoint.BODY_SECONDS if self.more_body else endpoint.ANSWER_SECONDS)

    def expire(self) -> None:
        """Answer that the body, or storing it, took too long."""
        endpoint = self._door.endpoint
        if self.more_body:
            self._end(partial(self._reject, "too_slow", None))
            return
        if self._submission is not None:
            self._submission.cancel()
        self._finish(None, endpoint.late())

    def _reject(self, reason: str, body: bytes | None) -> Answer:
        client = self._connection.client
        request = RawRequest(self._url.decode("latin-1"), self._headers, client and client[0], body)
        return self._door.endpoint.reject(self._target.source, reason, request)

    def _finish(self, received: Received | None, error: Exception | None) -> None:
        self._end(partial(self._door.endpoint.answer, self._target.source, received, error))

    def _end(self, make_answer: Callable[[], Answer]) -> None:
        """Answer. An error here ends the connection, so that Clipia sends the webhook again."""
        self._door.close(self)
        self._submission = None
        try:
            answer = make_answer()
            if not self.disconnected:
                self._send(answer)
        except Exception:
            log.exception("webhook not answered", source=self._target.source)
            self._connection.transport.abort()
        finally:
            self._connection.forget(self)

    def _send(self, answer: Answer) -> None:
        connection = self._connection
        head, closes = self._door.heads.get(connection.server_state.default_headers, answer)
        self.keep_alive = self.keep_alive and not closes
        end = b"\r\n" if self.keep_alive or closes else b"connection: close\r\n\r\n"
        self.response_started = self.response_complete = True
        connection.transport.write(b"%b%b%b" % (head, end, answer.body))
        if not self.keep_alive:
            connection.close()
        connection.on_response_complete()
        ACK_SECONDS.observe(time.perf_counter() - self._seen)


class DirectDoor:
    """Decides which requests are direct, and ends them at their deadlines."""

    def __init__(self, endpoint: WebhookEndpoint) -> None:
        self.endpoint: Final = endpoint
        sources = endpoint.ingest.sources
        self.heads: Final = _AnswerHeads()
        named = {f"{CALLBACK_PATH}/{source}".encode(): Target(source) for source in sources}
        self._jobs: Final[Mapping[bytes, Target]] = named
        self._targets: Final = dict(named)
        if DEFAULT_SOURCE in sources:
            self._targets[CALLBACK_PATH.encode()] = Target(DEFAULT_SOURCE)
        self._open: dict[DirectRequest, None] = {}
        self._sweep: asyncio.TimerHandle | None = None

    def accept(
        self, connection: Connection, *, method: bytes, url: bytes, headers: Headers, keep_alive: bool
    ) -> DirectRequest | None:
        """Return a direct request for a complete head, or None if the request has to go through ASGI."""
        target = self._find(url)
        if target is None or method != b"POST":
            return None
        head = read_head(headers)
        if head.is_encoded or head.content_length is None:
            return None
        if head.content_length > self.endpoint.max_body_bytes:
            return None
        return DirectRequest(self, connection, target, head, url=url, headers=headers, keep_alive=keep_alive)

    def _find(self, url: bytes) -> Target | None:
        found = self._targets.get(url)
        if found is None:
            path, _, segment = url.rpartition(b"/")
            source = self._jobs.get(path)
            if source is not None and _PLAIN_SEGMENT.fullmatch(segment):
                return Target.read(source.source, segment.decode())
        return found

    def open(self, request: DirectRequest) -> None:
        """Start the deadlines of a request."""
        self._open[request] = None
        if self._sweep is None:
            loop = asyncio.get_running_loop()
            self._sweep = loop.call_later(self.endpoint.BODY_SECONDS, self._check)

    def close(self, request: DirectRequest) -> None:
        """Stop the deadlines of a request."""
        self._open.pop(request, None)

    def _check(self) -> None:
        """End the requests that are late. One timer serves all: most requests take milliseconds."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._sweep = None
        try:
            for request in [each for each in self._open if each.deadline <= now]:
                request.expire()
        finally:
            if self._open:
                due = max(min(each.deadline for each in self._open), now + _SWEEP_SECONDS)
                # A request that comes meanwhile is due after BODY_SECONDS at the earliest.
                self._sweep = loop.call_at(min(due, now + self.endpoint.BODY_SECONDS), self._check)


class _AnswerHeads:
    """The heads of answers, without their last line."""

    def __init__(self) -> None:
        self._defaults: Sequence[tuple[bytes, bytes]] = ()
        self._heads: dict[tuple[int, int, Headers], tuple[bytes, bool]] = {}

    def get(self, defaults: Sequence[tuple[bytes, bytes]], answer: Answer) -> tuple[bytes, bool]:
        """Return the head of an answer, and whether it says `connection: close`."""
        if defaults is not self._defaults:
            # uvicorn makes a new list once a second, for the date.
            self._defaults = defaults
            self._heads.clear()
        key = answer.status, len(answer.body), answer.headers
        found = self._heads.get(key)
        if found is None:
            headers = [*defaults, *answer.all_headers]
            lines = b"".join(b"%b: %b\r\n" % header for header in headers)
            found = self._heads[key] = (STATUS_LINE[answer.status] + lines, CLOSE[0] in headers)
        return found
