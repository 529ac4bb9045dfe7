"""`/v1/events`, `/v1/deliveries` and `/v1/replays`: what came in, where it went, and sending it again."""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, get_args
from uuid import UUID

import structlog
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver import retention
from receiver.api.auth import Caller, Tokens
from receiver.api.endpoints import (
    Endpoint,
    guarded,
    invalid,
    json_answer,
    nothing_left,
    read_choice,
    read_id,
    read_limit,
    read_object,
    read_query,
    read_time,
)
from receiver.core.lenient_json import present
from receiver.core.request_checks import invalid_request, read_cursor
from receiver.db import outbox, reads
from receiver.db.database import Database
from receiver.db.outbox import DeadLetters
from receiver.db.reads import EventFinder, EventT
from receiver.db.rows import DeliveryState, EventState, EventStatus
from receiver.db.views import Receipt
from receiver.errors import RequestError, StorageUnavailable
from receiver.media import Storage
from receiver.replays import ReplayRequest, Replays

MOST_RESTARTED: Final = 10_000
"""Dead letters that one call restarts; the answer says whether there are more."""

log = structlog.get_logger()


class Ledger:
    """The endpoints. All of them show or touch every caller's events, so they need `operate`."""

    def __init__(
        self, database: Database, replays: Replays, tokens: Tokens, *, open_storage: Callable[[], Storage]
    ) -> None:
        self._database = database
        self._open_storage = open_storage
        self._replays = replays
        self._tokens = tokens

    def routes(self) -> list[BaseRoute]:
        """Return the routes, each with the scope that it needs."""
        table: list[Endpoint] = [
            ("GET", "/v1/events", "operate", self._events),
            ("GET", "/v1/events/{id}", "operate", self._event),
            ("DELETE", "/v1/events/{id}", "operate", self._erase),
            ("GET", "/v1/events/{id}/receipts", "operate", self._receipts),
            ("POST", "/v1/events/{id}/replay", "operate", self._replay_event),
            ("GET", "/v1/deliveries", "operate", self._deliveries),
            ("POST", "/v1/deliveries/retry", "operate", self._retry_many),
            ("POST", "/v1/deliveries/{id}/retry", "operate", self._retry),
            ("GET", "/v1/replays", "operate", self._list_replays),
            ("POST", "/v1/replays", "operate", self._replay),
            ("GET", "/v1/replays/{id}", "operate", self._show_replay),
            ("POST", "/v1/replays/{id}/cancel", "operate", self._cancel_replay),
        ]
        return guarded(table, self._tokens)

    async def _events(self, request: Request, _caller: Caller) -> Response:
        query = read_query(request)
        limit = read_limit(query.pop("limit", "50"))
        cursor = read_cursor(query.pop("cursor", None))
        async with self._database.read() as connection:
            rows = await reads.list_events(
                connection,
                limit=limit + 1,
                before=cursor,
                since=read_time("since", query.pop("since", None)),
                until=read_time("until", query.pop("until", None)),
                state=read_choice(query, "state", get_args(EventState)),
                status=read_choice(query, "status", get_args(EventStatus)),
                **{name: query.pop(name, None) for name in ("source", "model")},
            )
        nothing_left(query)
        return json_answer(_page(rows, limit, "seq"))

    async def _event(self, request: Request, _caller: Caller) -> Response:
        event = await self._find_event(request, reads.show_event)
        shown = {name: value for name, value in event.items() if name != "body"}
        shown["receipts"] = [_shown(receipt) for receipt in event["receipts"]]
        return json_answer(shown | present(event["body"]))

    async def _erase(self, request: Request, caller: Caller) -> Response:
        id_ = request.path_params["id"]
        # Opened for this call alone: a process without a worker needs no storage to start.
        storage = self._open_storage()
        try:
            # No database stores NUL.
            erased = None if "\0" in id_ else await retention.erase(self._database, storage, id_)
        except StorageUnavailable as error:
            log.warning("files not deleted", key=id_, error=str(error))
            raise RequestError(
                "The event is erased and its files are not: the storage is unavailable. Send it again.",
                code="service_unavailable",
                type_="api_error",
            ) from None
        finally:
            await storage.close()
        if erased is None:
            raise _nothing("event")
        log.warning("event erased", event_id=str(erased.id), by=caller.name, files=erased.files)
        return json_answer(asdict(erased))

    async def _receipts(self, request: Request, _caller: Caller) -> Response:
        query = read_query(request)
        limit = read_limit(query.pop("limit", "50"))
        after = read_cursor(query.pop("cursor", None)) or 0
        nothing_left(query)
        event = await self._find_event(request, reads.find_event)
        async with self._database.read() as connection:
            rows = await reads.list_receipts(connection, event["seq"], limit=limit + 1, after=after)
        return json_answer(_page([_shown(row) for row in rows], limit, "seq"))

    async def _deliveries(self, request: Request, _caller: Caller) -> Response:
        query = read_query(request)
        limit = read_limit(query.pop("limit", "50"))
        cursor = query.pop("cursor", None)
        async with self._database.read() as connection:
            rows = await reads.list_deliveries(
                connection,
                limit=limit + 1,
                before=None if cursor is None else _uuid(cursor),
                since=read_time("since", query.pop("since", None)),
                until=read_time("until", query.pop("until", None)),
                state=read_choice(query, "state", get_args(DeliveryState)),
                destination=query.pop("destination", None),
            )
        nothing_left(query)
        return json_answer(_page(rows, limit, "id"))

    async def _retry(self, request: Request, caller: Caller) -> Response:
        delivery_id = read_id(request)
        if delivery_id is None:
            raise _nothing("delivery")
        done = await self._restart(DeadLetters(ids=[delivery_id]), caller, limit=1)
        if not done:
            raise RequestError("there is no dead letter with this id", code="not_found")
        return json_answer({"restarted": done}, status=202)

    async def _retry_many(self, request: Request, caller: Caller) -> Response:
        body = await read_object(request)
        ids = body.pop("ids", [])
        destination = body.pop("destination", None)
        named = destination is None or (isinstance(destination, str) and "\x00" not in destination)
        if not isinstance(ids, list) or not named:
            raise invalid("write ids as a list, destination as a name")
        which = DeadLetters(
            ids=[_uuid(each) for each in ids],
            destination=destination,
            since=read_time("since", _text(body.pop("since", None))),
            until=read_time("until", _text(body.pop("until", None))),
        )
        everything = body.pop("all", False)
        nothing_left(body)
        if which == DeadLetters(ids=[]) and everything is not True:
            raise invalid('say which: ids, destination, since, until, or {"all": true}')
        done = await self._restart(which, caller, limit=MOST_RESTARTED)
        more = sum(done.values()) == MOST_RESTARTED
        return json_answer({"restarted": done, "more": more}, status=202)

    async def _restart(self, which: DeadLetters, caller: Caller, *, limit: int) -> dict[str, int]:
        async with self._database.write() as connection:
            done = await outbox.restart(connection, which, by=caller.name, limit=limit)
        log.info("dead letters restarted", by=caller.name, count=sum(done.values()))
        return done

    async def _find_event(self, request: Request, find: EventFinder[EventT]) -> EventT:
        async with self._database.read() as connection:
            event = await find(connection, request.path_params["id"])
        if event is None:
            raise _nothing("event")
        return event

    async def _replay_event(self, request: Request, caller: Caller) -> Response:
        event = await self._find_event(request, reads.find_event)
        values = await read_object(request, optional=True)
        return await self._order(request, caller, values | {"selection": {"ids": [str(event["id"])]}})

    async def _replay(self, request: Request, caller: Caller) -> Response:
        values = await read_object(request)
        dry_run = values.pop("dry_run", False)
        if not isinstance(dry_run, bool):
            raise invalid("dry_run: write true or false")
        if dry_run:
            return json_answer(await self._replays.dry_run(_read(values)))
        return await self._order(request, caller, values)

    async def _order(self, request: Request, caller: Caller, values: dict[str, Any]) -> Response:
        order = await self._replays.order(
            _read(values), key=request.headers.get("idempotency-key"), caller=caller.name
        )
        headers = {"location": f"/v1/replays/{order['id']}", "idempotency-key": order["idempotency_key"]}
        return json_answer(order, status=202, headers=headers)

    async def _list_replays(self, request: Request, _caller: Caller) -> Response:
        query = read_query(request)
        limit = read_limit(query.pop("limit", "50"))
        rows = await self._replays.list_orders(limit=limit + 1, before=read_cursor(query.pop("cursor", None)))
        nothing_left(query)
        return json_answer(_page(rows, limit, "seq"))

    async def _show_replay(self, request: Request, _caller: Caller) -> Response:
        replay_id = read_id(request)
        found = None if replay_id is None else await self._replays.show(replay_id)
        if found is None:
            raise _nothing("replay")
        return json_answer(found)

    async def _cancel_replay(self, request: Request, caller: Caller) -> Response:
        replay_id = read_id(request)
        if replay_id is None or await self._replays.show(replay_id) is None:
            raise _nothing("replay")
        if not await self._replays.cancel(replay_id, by=caller.name):
            raise RequestError("the replay has ended", code="not_cancelable")
        return json_answer(await self._replays.show(replay_id))


def _read(values: object) -> ReplayRequest:
    try:
        return ReplayRequest.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error) from None


def _shown(receipt: Receipt) -> dict[str, Any]:
    body = receipt["body"]
    return {**receipt, "body": None if body is None else base64.b64encode(body).decode()}


def _page(rows: Sequence[Mapping[str, Any]], limit: int, cursor: str) -> dict[str, Any]:
    more = len(rows) > limit
    return {"data": rows[:limit], "next": str(rows[limit - 1][cursor]) if more else None}


def _uuid(text: object) -> UUID:
    try:
        return UUID(str(text))
    except ValueError:
        raise invalid(f"{str(text)[:64]!r} is no id") from None


def _text(value: object) -> str | None:
    if not isinstance(value, str | None):
        raise invalid("write times as text, such as 2026-01-31T12:00:00Z")
    return value


def _nothing(what: str) -> RequestError:
    return RequestError(f"there is no such {what}", code="not_found")
