"""`/v1/tail`: events, attempts at deliveries and rejected requests as they happen (server-sent events)."""

import asyncio
import re
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Final

import orjson
import structlog
from pydantic import BeforeValidator, WithJsonSchema
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from receiver.api.answers import in_time
from receiver.api.endpoints import Call, Endpoint
from receiver.api.known_destinations import KnownDestinations
from receiver.api.parameters import Parameters, QueryFlag, Seconds, invalid
from receiver.db import tail
from receiver.db.database import Database
from receiver.db.tail import Position, TailItem, TailPage, Wanted
from receiver.errors import DatabaseUnavailable, RequestError

MAX_STREAMS: Final = 16
"""Streams that a process serves at once; each looks for new rows twice a second."""
POLL_SECONDS: Final = 0.5
HEARTBEAT_SECONDS: Final = 15.0
"""A proxy closes a connection on which nothing is sent; most wait for a minute."""
STALL_SECONDS: Final = 30.0
"""How long a client may read nothing before its connection is aborted."""
RETRY_MILLISECONDS: Final = 1000
"""After this time a client connects again."""

_HEADERS: Final = {
    "cache-control": "no-store",
    # nginx would collect the events until its buffer is full.
    "x-accel-buffering": "no",
    "x-content-type-options": "nosniff",
}
_PATTERN: Final = "^[0-9]{1,18}-[0-9]{1,18}-[0-9]{1,18}$"
_EXAMPLE: Final = (
    "retry: 1000\nid: 41-97-3\n\nid: 42-97-3\nevent: event\n"
    'data: {"kind": "event", "at": "2026-01-31T12:00:00Z", "request_id": "…"}\n\n'
)

log = structlog.get_logger()


def _read_position(value: object) -> Position | None:
    if value is None:
        return None
    position = Position.read(str(value)) if re.fullmatch(_PATTERN, str(value)) else None
    if position is None:
        raise invalid("after: pass the id of the last event that you have")
    return position


class TailQuery(Parameters):
    """The position and the filters of a stream."""

    after: Annotated[
        Position | None,
        BeforeValidator(_read_position),
        WithJsonSchema({"type": "string", "pattern": _PATTERN}),
    ] = None
    """The id of the last event that the client has, as in `Last-Event-ID`; without both, from now on."""
    wait: Seconds = 0.0
    """Seconds until the stream ends; with 0 it has the events since `after`."""
    destination: str | None = None
    """Only attempts at deliveries to it."""
    failures: QueryFlag = False
    """Only failed attempts, dead letters and rejected requests."""


class TailEndpoints:
    """The endpoint needs the scope `operate`: it shows events of every caller, and diagnoses."""

    def __init__(self, database: Database, destinations: KnownDestinations) -> None:
        self._database = database
        self._destinations = destinations
        self._places = asyncio.Semaphore(MAX_STREAMS)

    def table(self) -> list[Endpoint]:
        """Return the row."""
        content = {"text/event-stream": {"schema": {"type": "string"}, "example": _EXAMPLE}}
        return [
            Endpoint(
                method="GET",
                path="/v1/tail",
                scope="operate",
                handler=self._stream,
                name="stream_tail",
                summary="Stream new events, attempts at deliveries and rejected requests as they happen",
                query=TailQuery,
                headers=(
                    {
                        "name": "Last-Event-ID",
                        "in": "header",
                        "description": "As `after`, which comes first. A text that is no id is ignored.",
                        "schema": {"type": "string"},
                        "example": "41-97-3",
                    },
                ),
                other_answers=((200, {"description": "Server-sent events.", "content": content}),),
                errors=("too_many_streams",),
            )
        ]

    async def _stream(self, call: Call[TailQuery, None]) -> Response:
        if self._places.locked():
            raise RequestError(
                f"this process serves {MAX_STREAMS} streams already; end one of them", code="too_many_streams"
            )
        query = call.query
        await self._destinations.require(query.destination)
        after = query.after or Position.read(call.request.headers.get("last-event-id", ""))
        if after is None:
            # Before the answer begins, so that it is 503 if the database is away.
            after = await tail.find_end(self._database)
        wanted = Wanted(destination=query.destination, failures=query.failures)
        return _Stream(self._places, self._frames(call.request, after, wanted, query.wait))

    async def _frames(
        self, request: Request, position: Position, wanted: Wanted, seconds: float
    ) -> AsyncGenerator[bytes]:
        """Return the parts of a stream; each page is read when the one before was sent."""
        loop = asyncio.get_running_loop()
        deadline, sent_at = loop.time() + seconds, loop.time()
        yield b"retry: %d\nid: %b\n\n" % (RETRY_MILLISECONDS, str(position).encode())
        # A process that stops ends its streams, so that they do not delay it.
        while not getattr(request.app.state, "draining", False):
            try:
                page = await tail.read(self._database, position, wanted)
            except DatabaseUnavailable as error:
                # The client connects again, and is answered 503.
                log.warning("stream ended", error=str(error))
                return
            is_new = page.position != position
            position = page.position
            if is_new:
                yield _frames_of(page)
                sent_at = loop.time()
            elif loop.time() - sent_at > HEARTBEAT_SECONDS:
                yield b": still there\n\n"
                sent_at = loop.time()
            left = deadline - loop.time()
            if left <= 0:
                return
            # Without a pause while it catches up.
            await asyncio.sleep(0 if is_new else min(POLL_SECONDS, left))


class _Stream(StreamingResponse):
    """A stream takes one place while it is served, and is cut if its client reads nothing."""

    def __init__(self, places: asyncio.Semaphore, frames: AsyncGenerator[bytes]) -> None:
        super().__init__(frames, headers=_HEADERS, media_type="text/event-stream")
        self._places = places
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._places, aclosing(self._frames):
            await super().__call__(scope, receive, in_time(send, STALL_SECONDS))


def _frames_of(page: TailPage) -> bytes:
    # The last frame has the position after rows that were left out.
    frames = [_frame(item, after) for item, after in page.items]
    return b"".join((*frames, b"id: %b\n\n" % str(page.position).encode()))


def _frame(item: TailItem, position: Position) -> bytes:
    data = orjson.dumps(item, option=orjson.OPT_UTC_Z)
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (str(position).encode(), item["kind"].encode(), data)
