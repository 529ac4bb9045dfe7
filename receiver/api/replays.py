"""`/v1/replays` and `/v1/events/{id}/replay`: send stored events again."""

from typing import Any
from uuid import UUID

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute

from receiver.api.auth import Caller, Tokens
from receiver.api.endpoints import (
    Endpoint,
    guarded,
    invalid,
    json_response,
    not_found,
    page_of,
    read_id,
    read_limit,
    read_object,
    read_query,
    reject_unknown,
)
from receiver.api.events import load_event
from receiver.core.request_values import invalid_request, read_cursor
from receiver.db import reads
from receiver.db.database import Database
from receiver.db.views import ReplayDetails
from receiver.errors import RequestError
from receiver.replays import ReplayRequest, Replays


class ReplayEndpoints:
    """The endpoints need the scope `operate`: a replay may send any caller's events."""

    def __init__(self, database: Database, replays: Replays, tokens: Tokens) -> None:
        self._database = database
        self._replays = replays
        self._tokens = tokens

    def routes(self) -> list[BaseRoute]:
        """Return the routes, each with the scope that it needs."""
        table: list[Endpoint] = [
            ("POST", "/v1/events/{id}/replay", "operate", self._replay_event),
            ("GET", "/v1/replays", "operate", self._list),
            ("POST", "/v1/replays", "operate", self._replay),
            ("GET", "/v1/replays/{id}", "operate", self._show),
            ("POST", "/v1/replays/{id}/cancel", "operate", self._cancel),
        ]
        return guarded(table, self._tokens)

    async def _replay_event(self, request: Request, caller: Caller) -> Response:
        event = await load_event(self._database, request, reads.find_event)
        values = await read_object(request, optional=True)
        return await self._order(request, caller, values | {"selection": {"ids": [str(event["id"])]}})

    async def _replay(self, request: Request, caller: Caller) -> Response:
        values = await read_object(request)
        dry_run = values.pop("dry_run", False)
        if not isinstance(dry_run, bool):
            raise invalid("dry_run: write true or false")
        if dry_run:
            return json_response(await self._replays.dry_run(_read(values)))
        return await self._order(request, caller, values)

    async def _order(self, request: Request, caller: Caller, values: dict[str, Any]) -> Response:
        order = await self._replays.order(
            _read(values), key=request.headers.get("idempotency-key"), caller=caller.name
        )
        headers = {"location": f"/v1/replays/{order['id']}", "idempotency-key": order["idempotency_key"]}
        return json_response(order, status=202, headers=headers)

    async def _list(self, request: Request, _caller: Caller) -> Response:
        query = read_query(request)
        limit = read_limit(query)
        rows = await self._replays.list_orders(limit=limit + 1, before=read_cursor(query.pop("cursor", None)))
        reject_unknown(query)
        return json_response(page_of(rows, limit, "seq"))

    async def _show(self, request: Request, _caller: Caller) -> Response:
        _, order = await self._find(request)
        return json_response(order)

    async def _cancel(self, request: Request, caller: Caller) -> Response:
        replay_id, _ = await self._find(request)
        if not await self._replays.cancel(replay_id, by=caller.name):
            raise RequestError("the replay has ended", code="not_cancelable")
        return json_response(await self._replays.show(replay_id))

    async def _find(self, request: Request) -> tuple[UUID, ReplayDetails]:
        replay_id = read_id(request)
        order = None if replay_id is None else await self._replays.show(replay_id)
        if replay_id is None or order is None:
            raise not_found("replay")
        return replay_id, order


def _read(values: object) -> ReplayRequest:
    try:
        return ReplayRequest.model_validate(values)
    except ValidationError as error:
        raise invalid_request(error) from None
