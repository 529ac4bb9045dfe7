"""`/v1/events` and `/v1/deliveries`: stored events, their receipts and deliveries, and dead letters."""

import base64
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final, get_args
from uuid import UUID

import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver import retention
from receiver.api.auth import Caller, Tokens
from receiver.api.endpoints import (
    Endpoint,
    guarded,
    invalid,
    json_response,
    not_found,
    page_of,
    read_choice,
    read_id,
    read_limit,
    read_object,
    read_query,
    read_time,
    reject_unknown,
)
from receiver.core.lenient_json import display_fields
from receiver.core.request_values import read_cursor, read_id_cursor
from receiver.db import outbox, reads
from receiver.db.database import Database
from receiver.db.outbox import DeadLetters
from receiver.db.reads import EventFinder, EventT
from receiver.db.rows import DeliveryState, EventState, EventStatus
from receiver.db.views import EventDetails, Receipt
from receiver.errors import RequestError, StorageUnavailable
from receiver.media import Storage

MAX_RESTARTED: Final = 10_000
"""Dead letters that one call restarts; the answer's `more` tells whether to call again."""

log = structlog.get_logger()


class EventEndpoints:
    """The endpoints need the scope `operate`: they show and change the events of every caller."""

    def __init__(self, database: Database, tokens: Tokens, *, open_storage: Callable[[], Storage]) -> None:
        self._database = database
        self._open_storage = open_storage
        self._tokens = tokens

    def routes(self) -> list[BaseRoute]:
        """Return the routes, each with the scope that it needs."""
        table: list[Endpoint] = [
            ("GET", "/v1/events", "operate", self._list),
            ("GET", "/v1/events/{id}", "operate", self._show),
            ("DELETE", "/v1/events/{id}", "operate", self._erase),
            ("GET", "/v1/events/{id}/receipts", "operate", self._list_receipts),
            ("GET", "/v1/deliveries", "operate", self._list_deliveries),
            ("POST", "/v1/deliveries/retry", "operate", self._retry_many),
            ("POST", "/v1/deliveries/{id}/retry", "operate", self._retry),
        ]
        return guarded(table, self._tokens)

    async def _list(self, request: Request, _caller: Caller) -> Response:
        query = read_query(request)
        limit = read_limit(query)
        async with self._database.read() as connection:
            rows = await reads.list_events(
                connection,
                limit=limit + 1,
                before=read_cursor(query.pop("cursor", None)),
                source=query.pop("source", None),
                state=read_choice(query, "state", get_args(EventState)),
                status=read_choice(query, "status", get_args(EventStatus)),
                model=query.pop("model", None),
                since=read_time(query, "since"),
                until=read_time(query, "until"),
            )
        reject_unknown(query)
        return json_response(page_of(rows, limit, "seq"))

    async def _show(self, request: Request, _caller: Caller) -> Response:
        return json_response(readable(await load_event(self._database, request, reads.show_event)))

    async def _erase(self, request: Request, caller: Caller) -> Response:
        id_ = request.path_params["id"]
        # Opened for this call alone: a process without a worker must be able to start without a storage.
        storage = self._open_storage()
        try:
            # PostgreSQL rejects NUL in a text parameter.
            erased = None if "\0" in id_ else await retention.erase(self._database, storage, id_)
        except StorageUnavailable as error:
            log.warning("files not deleted", key=id_, error=str(error))
            raise RequestError(
                "The event is erased, but its files are not: the storage is unavailable. Call this again.",
                code="service_unavailable",
                type_="api_error",
            ) from None
        finally:
            await storage.close()
        if erased is None:
            raise not_found("event")
        log.warning("event erased", event_id=str(erased.id), by=caller.name, files=erased.files)
        return json_response(asdict(erased))

    async def _list_receipts(self, request: Request, _caller: Caller) -> Response:
        query = read_query(request)
        limit = read_limit(query)
        after = read_cursor(query.pop("cursor", None))
        reject_unknown(query)
        event = await load_event(self._database, request, reads.find_event)
        async with self._database.read() as connection:
            rows = await reads.list_receipts(connection, event["seq"], limit=limit + 1, after=after)
        return json_response(page_of([_with_text_body(row) for row in rows], limit, "seq"))

    async def _list_deliveries(self, request: Request, _caller: Caller) -> Response:
        query = read_query(request)
        limit = read_limit(query)
        async with self._database.read() as connection:
            rows = await reads.list_deliveries(
                connection,
                limit=limit + 1,
                before=read_id_cursor(query.pop("cursor", None)),
                state=read_choice(query, "state", get_args(DeliveryState)),
                destination=query.pop("destination", None),
                since=read_time(query, "since"),
                until=read_time(query, "until"),
            )
        reject_unknown(query)
        return json_response(page_of(rows, limit, "id"))

    async def _retry(self, request: Request, caller: Caller) -> Response:
        delivery_id = read_id(request)
        if delivery_id is None:
            raise not_found("delivery")
        done = await self._restart(DeadLetters(ids=[delivery_id]), caller, limit=1)
        if not done:
            raise RequestError("there is no dead letter with this id", code="not_found")
        return json_response({"restarted": done}, status=202)

    async def _retry_many(self, request: Request, caller: Caller) -> Response:
        body = await read_object(request)
        selected = _read_dead_letters(body)
        everything = body.pop("all", False)
        reject_unknown(body)
        if selected == DeadLetters(ids=[]) and everything is not True:
            raise invalid('say which dead letters: ids, destination, since, until, or {"all": true}')
        done = await self._restart(selected, caller, limit=MAX_RESTARTED)
        more = sum(done.values()) == MAX_RESTARTED
        return json_response({"restarted": done, "more": more}, status=202)

    async def _restart(self, selected: DeadLetters, caller: Caller, *, limit: int) -> dict[str, int]:
        async with self._database.write() as connection:
            done = await outbox.restart(connection, selected, by=caller.name, limit=limit)
        log.info("dead letters restarted", by=caller.name, count=sum(done.values()))
        return done


async def load_event(database: Database, request: Request, find: EventFinder[EventT]) -> EventT:
    """Return the event that a path names by its id or request_id. Raises RequestError."""
    async with database.read() as connection:
        event = await find(connection, request.path_params["id"])
    if event is None:
        raise not_found("event")
    return event


def readable(event: EventDetails) -> dict[str, Any]:
    """Return an event for JSON: its body is decoded, and the bodies of its receipts are base64."""
    rest = {name: value for name, value in event.items() if name != "body"}
    return (
        rest
        | display_fields(event["body"])
        | {"receipts": [_with_text_body(row) for row in event["receipts"]]}
    )


def _with_text_body(receipt: Receipt) -> dict[str, Any]:
    body = receipt["body"]
    return {**receipt, "body": None if body is None else base64.b64encode(body).decode()}


def _read_dead_letters(body: dict[str, Any]) -> DeadLetters:
    ids = body.pop("ids", [])
    destination = body.pop("destination", None)
    if not isinstance(ids, list):
        raise invalid("ids: write a list")
    if destination is not None and (not isinstance(destination, str) or "\x00" in destination):
        raise invalid("destination: write a name")
    return DeadLetters(
        ids=[_id(each) for each in ids],
        destination=destination,
        since=read_time(body, "since"),
        until=read_time(body, "until"),
    )


def _id(text: object) -> UUID:
    try:
        return UUID(str(text))
    except ValueError:
        raise invalid(f"ids: {str(text)[:64]!r} is not an id") from None
