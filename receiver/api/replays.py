"""`/v1/replays` and `/v1/events/{id}/replay`: send stored events again."""

from typing import Any
from uuid import UUID

from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, json_response, not_found, page_response
from receiver.api.events import load_event
from receiver.api.parameters import Cursor, Flag, Limit, Parameters
from receiver.db import reads
from receiver.db.database import Database
from receiver.db.selection import Selection
from receiver.db.views import ReplayCounts, ReplayDetails, ReplayHead
from receiver.errors import RequestError
from receiver.replays import ReplayOptions, ReplayRequest, Replays


class ReplaysQuery(Parameters):
    """A page of replays."""

    limit: Limit = 50
    cursor: Cursor = None
    """The `next` of the page before."""


class ReplayBody(ReplayRequest):
    """An order for a replay."""

    dry_run: Flag = False
    """Only count the events and deliveries."""


class ReplayEndpoints:
    """The endpoints need the scope `operate`: a replay may send any caller's events."""

    def __init__(self, database: Database, replays: Replays) -> None:
        self._database = database
        self._replays = replays

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="POST",
                path="/v1/events/{id}/replay",
                scope="operate",
                handler=self._replay_event,
                name="replay_event",
                summary="Send one event again",
                body=ReplayOptions,
                body_is_optional=True,
                body_example={"to": ["orders"], "reason": "orders lost its database"},
                answer=ReplayDetails,
                example=examples.REPLAY,
                statuses=((202, "A worker carries it out."),),
                errors=("not_found", "idempotency_key_reuse"),
                takes_key=True,
            ),
            Endpoint(
                method="GET",
                path="/v1/replays",
                scope="operate",
                handler=self._list,
                name="list_replays",
                summary="List replays, newest first",
                query=ReplaysQuery,
                answer=ReplayHead,
                is_list=True,
                example=examples.REPLAY_HEAD,
            ),
            Endpoint(
                method="POST",
                path="/v1/replays",
                scope="operate",
                handler=self._replay,
                name="order_replay",
                summary="Send stored events again, or count them with `dry_run`",
                body=ReplayBody,
                body_example=examples.REPLAY_BODY,
                answer=ReplayDetails | ReplayCounts,
                example=examples.REPLAY,
                statuses=((202, "A worker carries it out."), (200, "The counts of a dry run.")),
                errors=("idempotency_key_reuse",),
                takes_key=True,
            ),
            Endpoint(
                method="GET",
                path="/v1/replays/{id}",
                scope="operate",
                handler=self._show,
                name="show_replay",
                summary="Show a replay, its progress, and its deliveries by destination and state",
                answer=ReplayDetails,
                example=examples.REPLAY,
                errors=("not_found",),
            ),
            Endpoint(
                method="POST",
                path="/v1/replays/{id}/cancel",
                scope="operate",
                handler=self._cancel,
                name="cancel_replay",
                summary="Stop a replay, except for deliveries under way",
                answer=ReplayDetails,
                example=examples.REPLAY,
                errors=("not_found", "not_cancelable"),
            ),
        ]

    async def _replay_event(self, call: Call[None, ReplayOptions]) -> Response:
        event = await load_event(self._database, call.key, reads.find_event)
        options = (await call.read_body()).model_dump(exclude_unset=True)
        return await self._order(call, ReplayRequest(selection=Selection(ids=(str(event["id"]),)), **options))

    async def _replay(self, call: Call[None, ReplayBody]) -> Response:
        body = await call.read_body()
        if body.dry_run:
            return json_response(await self._replays.dry_run(body))
        return await self._order(call, body)

    async def _order(self, call: Call[None, Any], request: ReplayRequest) -> Response:
        order = await self._replays.order(
            request, key=call.request.headers.get("idempotency-key"), caller=call.caller.name
        )
        headers = {"location": f"/v1/replays/{order['id']}", "idempotency-key": order["idempotency_key"]}
        return json_response(order, status=202, headers=headers)

    async def _list(self, call: Call[ReplaysQuery, None]) -> Response:
        limit = call.query.limit
        rows = await self._replays.list_orders(limit=limit + 1, before=call.query.cursor)
        return page_response(rows, limit, "seq")

    async def _show(self, call: Call[None, None]) -> Response:
        _, order = await self._find(call)
        return json_response(order)

    async def _cancel(self, call: Call[None, None]) -> Response:
        replay_id, _ = await self._find(call)
        if not await self._replays.cancel(replay_id, by=call.caller.name):
            raise RequestError("the replay has ended, so it cannot be canceled", code="not_cancelable")
        return json_response(await self._replays.show(replay_id))

    async def _find(self, call: Call[None, None]) -> tuple[UUID, ReplayDetails]:
        order = None if call.id is None else await self._replays.show(call.id)
        if call.id is None or order is None:
            raise not_found("replay")
        return call.id, order
