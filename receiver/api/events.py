"""`/v1/events`: stored events and their receipts."""

import asyncio
import base64
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Final, Self

import structlog
from pydantic import model_validator
from starlette.responses import Response

from receiver import retention
from receiver.api import examples
from receiver.api.endpoints import (
    Call,
    Endpoint,
    json_response,
    list_response,
    not_found,
    page_response,
    while_connected,
)
from receiver.api.known_destinations import KnownDestinations
from receiver.api.models import ShownEvent, ShownReceipt
from receiver.api.parameters import (
    Cursor,
    Id,
    Limit,
    MetadataFilter,
    Moment,
    Parameters,
    QueryFlag,
    Seconds,
    invalid,
    one_of,
)
from receiver.core.file_links import file_link
from receiver.core.lenient_json import display_fields
from receiver.db import forward, reads
from receiver.db.database import Database
from receiver.db.event_filter import EventFilter
from receiver.db.reads import EventFinder, EventT
from receiver.db.rows import DeliveryState, EventState, EventStatus
from receiver.db.views import EventDetails, EventSummary, Receipt
from receiver.errors import RequestError, StorageUnavailable
from receiver.media import Storage
from receiver.retention import Erased

POLL_SECONDS: Final = 0.5
"""Time between two looks for a new event while a call waits for one."""

log = structlog.get_logger()


class EventsQuery(MetadataFilter):
    """Filters of a list of events."""

    limit: Limit = 50
    cursor: Cursor = None
    """The `next` of the page before."""
    after: Cursor = None
    """Read forward, oldest first, from the `next` of the answer before; 0 is the beginning."""
    wait: Seconds = 0.0
    """With `after`: seconds to wait for an event."""
    source: str | None = None
    state: Annotated[EventState | None, one_of(EventState)] = None
    status: Annotated[EventStatus | None, one_of(EventStatus)] = None
    model: str | None = None
    since: Moment | None = None
    """Received at or after this time."""
    until: Moment | None = None
    """Received before this time."""
    caller: str | None = None
    """The caller of its job."""
    idempotency_key: str | None = None
    """The key of its job."""
    job_id: Id | None = None
    event_id: Id | None = None
    request_id: str | None = None
    """Clipia's id."""
    delivery_id: Id | None = None
    delivery_state: Annotated[DeliveryState | None, one_of(DeliveryState)] = None
    """Events with a delivery in this state, and to `destination` if that is given."""
    destination: str | None = None

    @model_validator(mode="after")
    def _reads_one_way(self) -> Self:
        if self.after is not None and self.cursor is not None:
            raise invalid("cursor: leave it out; `after` takes the `next` of the answer before")
        if self.after is None and self.wait:
            raise invalid("wait: it needs `after`")
        return self

    @property
    def which(self) -> EventFilter:
        """The filters alone."""
        return EventFilter(**self.model_dump(exclude={"limit", "cursor", "after", "wait"}))


class EventQuery(Parameters):
    """The form of an event."""

    exact: QueryFlag = False
    """Give the exact bytes of the body, too, even if `body` does not differ from them."""


class ReceiptsQuery(Parameters):
    """A page of receipts."""

    limit: Limit = 50
    cursor: Cursor = None
    """The `next` of the page before."""


class EventEndpoints:
    """The endpoints need the scope `operate`: they show and change the events of every caller."""

    def __init__(
        self,
        database: Database,
        *,
        open_storage: Callable[[], Storage],
        destinations: KnownDestinations,
        internal_url: str | None,
    ) -> None:
        self._database = database
        self._destinations = destinations
        self._open_storage = open_storage
        self._internal_url = internal_url

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="GET",
                path="/v1/events",
                scope="operate",
                handler=self._list,
                name="list_events",
                summary="List events, newest first; or read them forward, and wait for new ones",
                query=EventsQuery,
                answer=EventSummary,
                is_list=True,
                example=examples.EVENT_SUMMARY,
            ),
            Endpoint(
                method="GET",
                path="/v1/events/{id}",
                scope="operate",
                handler=self._show,
                name="show_event",
                summary="Show an event with its body, receipts, files, deliveries and every attempt",
                query=EventQuery,
                answer=ShownEvent,
                example=examples.EVENT,
                errors=("not_found",),
            ),
            Endpoint(
                method="DELETE",
                path="/v1/events/{id}",
                scope="operate",
                handler=self._erase,
                name="erase_event",
                summary="Erase an event for good: its body, files and deliveries, and its job's input",
                answer=Erased,
                example=examples.ERASED,
                errors=("not_found", "ambiguous", "not_settled", "not_configured"),
            ),
            Endpoint(
                method="GET",
                path="/v1/events/{id}/receipts",
                scope="operate",
                handler=self._list_receipts,
                name="list_receipts",
                summary="List all receipts of an event, oldest first",
                query=ReceiptsQuery,
                answer=ShownReceipt,
                is_list=True,
                example=examples.RECEIPT,
                errors=("not_found",),
            ),
        ]

    async def _list(self, call: Call[EventsQuery, None]) -> Response:
        query = call.query
        if query.after is not None:
            return await while_connected(call.request, self._read_forward(query, query.after))
        async with self._database.read() as connection:
            rows = await reads.list_events(
                connection, limit=query.limit + 1, before=query.cursor, which=query.which
            )
        if not rows:
            await self._destinations.require(query.destination)
        return page_response(rows, query.limit, "seq")

    async def _read_forward(self, query: EventsQuery, after: int) -> Response:
        """Answer when there are events, or when the time is over; `next` is never null."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + query.wait
        while True:
            start, until = await forward.settle(self._database, after)
            async with self._database.read() as connection:
                rows = await reads.read_events(
                    connection, limit=query.limit, after=start, until=until, which=query.which
                )
            if len(rows) == query.limit:
                until = rows[-1]["seq"]
            left = deadline - loop.time()
            if rows or left <= 0:
                if not rows:
                    await self._destinations.require(query.destination)
                return list_response(rows, str(until))
            after = until
            # Without a pause if events were read and none matches.
            await asyncio.sleep(min(POLL_SECONDS, left) if until == start else 0)

    async def _show(self, call: Call[EventQuery, None]) -> Response:
        event = await load_event(self._database, call.key, reads.show_event)
        shown = readable(event, self._internal_url)
        if call.query.exact:
            shown["body_base64"] = base64.b64encode(event["body"]).decode()
        return json_response(shown)

    async def _erase(self, call: Call[None, None]) -> Response:
        # Opened for this call alone: a process without a worker must be able to start without a storage.
        storage = await asyncio.to_thread(self._open_storage)
        try:
            # PostgreSQL rejects NUL in a text parameter.
            erased = None if "\0" in call.key else await retention.erase(self._database, storage, call.key)
        except StorageUnavailable as error:
            log.warning("files not deleted", key=call.key, error=str(error))
            raise RequestError(
                "The event is erased, but its files are not: the storage is unavailable. Call this again.",
                code="service_unavailable",
                type_="api_error",
            ) from None
        finally:
            await storage.close()
        if erased is None:
            raise not_found("event")
        log.warning("event erased", event_id=str(erased.id), by=call.caller.name, files=erased.files)
        return json_response(asdict(erased))

    async def _list_receipts(self, call: Call[ReceiptsQuery, None]) -> Response:
        query = call.query
        event = await load_event(self._database, call.key, reads.find_event)
        async with self._database.read() as connection:
            rows = await reads.list_receipts(
                connection, event["seq"], limit=query.limit + 1, after=query.cursor
            )
        return page_response([_with_text_body(row) for row in rows], query.limit, "seq")


async def load_event(database: Database, key: str, find: EventFinder[EventT]) -> EventT:
    """Return an event by its id or request_id. Raises RequestError."""
    async with database.read() as connection:
        event = await find(connection, key)
    if event is None:
        raise not_found("event")
    return event


def readable(event: EventDetails, internal_url: str | None) -> dict[str, Any]:
    """Return an event for JSON: its body is decoded, and the bodies of its receipts are base64."""
    shown: dict[str, Any] = {name: value for name, value in event.items() if name != "body"}
    shown |= display_fields(event["body"])
    shown["receipts"] = [_with_text_body(row) for row in event["receipts"]]
    for row in shown["media"]:
        row["link"] = file_link(internal_url, row["id"], row["storage_key"])
    return shown


def _with_text_body(receipt: Receipt) -> dict[str, Any]:
    body = receipt["body"]
    return {**receipt, "body": None if body is None else base64.b64encode(body).decode()}
