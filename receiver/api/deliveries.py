"""`/v1/deliveries`: a single delivery with its message, its end by an operator, and failures by cause."""

import orjson
import structlog
from pydantic import Field
from starlette.responses import Response
from typing_extensions import TypedDict

from receiver.api import examples
from receiver.api.endpoints import (
    MAX_REASON_LENGTH,
    Call,
    Endpoint,
    json_response,
    list_response,
    not_found,
)
from receiver.api.known_destinations import KnownDestinations
from receiver.api.models import CloudEventModel
from receiver.api.parameters import Name, Parameters
from receiver.db import deliveries
from receiver.db.database import Database
from receiver.db.deliveries import FailureGroup, ShownDelivery
from receiver.destinations.base import encode
from receiver.errors import PublishRejected, RequestError, UnrecognizedBody
from receiver.lanes import envelope

log = structlog.get_logger()


class FailuresQuery(Parameters):
    """Filters of the failures."""

    destination: str | None = None


class ReasonBody(Parameters):
    """The reason of an action, for its record."""

    reason: Name | None = Field(default=None, max_length=MAX_REASON_LENGTH)


class Discarded(TypedDict):
    """A delivery that is not made any more."""

    discarded: bool


class DeliveryEndpoints:
    """The endpoints need the scope `operate`: they show and change the deliveries of every caller."""

    def __init__(
        self, database: Database, destinations: KnownDestinations, internal_url: str | None = None
    ) -> None:
        """`internal_url` is the start of the links of files in messages."""
        self._database = database
        self._destinations = destinations
        self._internal_url = internal_url

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="GET",
                path="/v1/deliveries/failures",
                scope="operate",
                handler=self._list_failures,
                name="list_failures",
                summary="Group failing deliveries and dead letters by destination and cause, the most first",
                query=FailuresQuery,
                answer=FailureGroup,
                is_list=True,
                example=examples.FAILURES,
            ),
            Endpoint(
                method="GET",
                path="/v1/deliveries/{id}",
                scope="operate",
                handler=self._show,
                name="show_delivery",
                summary="Show a delivery with every attempt and the start of the consumer's answers",
                answer=ShownDelivery,
                example=examples.SHOWN_DELIVERY,
                errors=("not_found",),
            ),
            Endpoint(
                method="GET",
                path="/v1/deliveries/{id}/message",
                scope="operate",
                handler=self._show_message,
                name="show_message",
                summary="Show the message of the last attempt, made again from the rows as they are now",
                answer=CloudEventModel,
                example=examples.MESSAGE,
                errors=("not_found", "no_message"),
            ),
            Endpoint(
                method="POST",
                path="/v1/deliveries/{id}/discard",
                scope="operate",
                handler=self._discard,
                name="discard_delivery",
                summary="End a pending or dead delivery for good: its event is not sent to the destination",
                body=ReasonBody,
                body_is_optional=True,
                body_example={"reason": "the order was canceled"},
                answer=Discarded,
                example={"discarded": True},
                errors=("not_found", "not_cancelable"),
            ),
        ]

    async def _list_failures(self, call: Call[FailuresQuery, None]) -> Response:
        async with self._database.read() as connection:
            found = await deliveries.list_failures(connection, destination=call.query.destination)
        if not found:
            await self._destinations.require(call.query.destination)
        return list_response(found)

    async def _show(self, call: Call[None, None]) -> Response:
        found = None
        if call.id is not None:
            async with self._database.read() as connection:
                found = await deliveries.show(connection, call.id)
        if found is None:
            raise not_found("delivery")
        # An answer is a stranger's: a browser must show it as text.
        return json_response(found, headers={"x-content-type-options": "nosniff"})

    async def _show_message(self, call: Call[None, None]) -> Response:
        parts = None
        if call.id is not None:
            async with self._database.read() as connection:
                parts = await deliveries.load_message(connection, call.id)
        if parts is None:
            raise not_found("delivery")
        try:
            message = encode(envelope.build(*parts, internal_url=self._internal_url))
        except (UnrecognizedBody, PublishRejected):
            text = "the event cannot be made a message: this release cannot read its body"
            raise RequestError(text, code="no_message") from None
        return json_response(orjson.Fragment(message))

    async def _discard(self, call: Call[None, ReasonBody]) -> Response:
        if call.id is None:
            raise not_found("delivery")
        async with self._database.read() as connection:
            if await deliveries.show(connection, call.id) is None:
                raise not_found("delivery")
        await call.read_body()
        # The record has the reason of the query or of the body, without secrets and control characters.
        reason = call.record.reason
        async with self._database.write() as connection:
            state, is_done = await deliveries.discard(connection, call.id, by=call.caller.name, reason=reason)
        if state is None:
            raise not_found("delivery")
        if not is_done:
            under_way = "a worker attempts it now: try again in a minute"
            text = under_way if state == "pending" else "only a pending or a dead one can be discarded"
            raise RequestError(f"the delivery is {state}; {text}", code="not_cancelable")
        log.warning("delivery discarded", delivery_id=str(call.id), by=call.caller.name)
        return json_response({"discarded": True})
