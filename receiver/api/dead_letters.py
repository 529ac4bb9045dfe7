"""`/v1/deliveries`: the list of deliveries, and dead letters that are delivered again."""

from dataclasses import replace
from typing import Annotated, Final

import structlog
from pydantic import Field
from starlette.responses import Response

from receiver.api import examples
from receiver.api.auth import Caller
from receiver.api.endpoints import Call, Endpoint, json_response, not_found, page_response
from receiver.api.known_destinations import KnownDestinations
from receiver.api.models import Restarted, RestartedMany
from receiver.api.parameters import (
    Flag,
    IdCursor,
    Ids,
    Limit,
    Moment,
    Name,
    Parameters,
    invalid,
    one_of,
)
from receiver.db import deliveries, outbox, pruning, reads
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.outbox import DeadLetters
from receiver.db.rows import DeliveryState
from receiver.db.views import ListedDelivery
from receiver.errors import RequestError

MAX_RESTARTED: Final = 10_000
"""Dead letters that one call restarts; the answer's `more` tells whether to call again."""


log = structlog.get_logger()


class DeliveriesQuery(Parameters):
    """Filters of a list of deliveries."""

    limit: Limit = 50
    cursor: IdCursor = None
    """The `next` of the page before."""
    state: Annotated[DeliveryState | None, one_of(DeliveryState)] = None
    destination: str | None = None
    since: Moment | None = None
    """Made at or after this time."""
    until: Moment | None = None
    """Made before this time."""
    cause: Name | None = None
    """A cause of `list_failures`; it selects failing deliveries and dead letters alone."""


class RetryBody(Parameters):
    """The dead letters to deliver again: those that match all given filters."""

    ids: Ids = Field(default_factory=list)
    """Ids of deliveries."""
    destination: Name | None = None
    since: Moment | None = None
    """Given up at or after this time."""
    until: Moment | None = None
    """Given up before this time."""
    cause: Name | None = None
    """A cause of `list_failures`."""
    all: Flag = False
    """All dead letters; required without a filter."""
    not_restarted_since: Moment | None = None
    """Leave out those that were restarted since then: the `began` of the first answer."""

    @property
    def is_part(self) -> bool:
        """Whether it goes on with an earlier call."""
        return self.not_restarted_since is not None


class DeadLetterEndpoints:
    """The endpoints need the scope `operate`: they show and change the deliveries of every caller."""

    def __init__(self, database: Database, destinations: KnownDestinations) -> None:
        self._database = database
        self._destinations = destinations

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="GET",
                path="/v1/deliveries",
                scope="operate",
                handler=self._list_deliveries,
                name="list_deliveries",
                summary="List deliveries, newest first, each with the reason of its last failure",
                query=DeliveriesQuery,
                answer=ListedDelivery,
                is_list=True,
                example=examples.DELIVERY,
            ),
            Endpoint(
                method="POST",
                path="/v1/deliveries/retry",
                scope="operate",
                handler=self._retry_many,
                name="retry_dead_letters",
                summary="Deliver dead letters again",
                body=RetryBody,
                body_example={"destination": "orders", "since": "2026-11-20T00:00:00Z"},
                answer=RestartedMany,
                example=examples.RESTARTED_MANY,
                statuses=((202, "They are due now."),),
            ),
            Endpoint(
                method="POST",
                path="/v1/deliveries/{id}/retry",
                scope="operate",
                handler=self._retry,
                name="retry_dead_letter",
                summary="Deliver one dead letter again",
                answer=Restarted,
                example={"restarted": {"orders": 1}},
                statuses=((202, "It is due now."),),
                errors=("not_found",),
            ),
        ]

    async def _list_deliveries(self, call: Call[DeliveriesQuery, None]) -> Response:
        query = call.query
        async with self._database.read() as connection:
            rows = await reads.list_deliveries(
                connection,
                limit=query.limit + 1,
                before=query.cursor,
                state=query.state,
                destination=query.destination,
                since=query.since,
                until=query.until,
                errors=await _errors_of(connection, query),
            )
        if not rows:
            await self._destinations.require(query.destination)
        return page_response(rows, query.limit, "id")

    async def _retry(self, call: Call[None, None]) -> Response:
        if call.id is None:
            raise not_found("delivery")
        done = await self._restart(DeadLetters(ids=[call.id]), call.caller, limit=1)
        if not done:
            raise RequestError("there is no dead letter with this id", code="not_found")
        return json_response({"restarted": done}, status=202)

    async def _retry_many(self, call: Call[None, RetryBody]) -> Response:
        body = await call.read_body()
        selected = DeadLetters(**body.model_dump(exclude={"all", "cause"}))
        has_filter = body.cause is not None or replace(selected, not_restarted_since=None) != DeadLetters(
            ids=[]
        )
        if not has_filter and not body.all:
            raise invalid('say which dead letters: ids, destination, since, until, cause, or {"all": true}')
        async with self._database.read() as connection:
            began = body.not_restarted_since or await pruning.moment_ago(connection, seconds=0.0)
            selected = replace(selected, errors=await _errors_of(connection, body))
        call.record.note_run(body.ids, body.destination, body.since, body.until, body.cause, body.all, began)
        done = await self._restart(selected, call.caller, limit=MAX_RESTARTED)
        if not done:
            await self._destinations.require(body.destination)
        answer = RestartedMany(
            restarted=done,
            not_configured=sorted(done.keys() - set(self._destinations.configured)),
            more=sum(done.values()) == MAX_RESTARTED,
            began=began,
        )
        return json_response(answer, status=202)

    async def _restart(self, selected: DeadLetters, caller: Caller, *, limit: int) -> dict[str, int]:
        async with self._database.write() as connection:
            done = await outbox.restart(connection, selected, by=caller.name, limit=limit)
        log.info("dead letters restarted", by=caller.name, count=sum(done.values()))
        return done


async def _errors_of(connection: SqlConnection, which: DeliveriesQuery | RetryBody) -> set[str] | None:
    """Return the errors behind the cause that is selected; None if none is."""
    if which.cause is None:
        return None
    return await deliveries.find_errors(connection, which.cause, destination=which.destination)
