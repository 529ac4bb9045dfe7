"""`/v1/deliveries/move` and `/discard`: deliveries to a destination that is no longer in the settings."""

from pydantic import Field
from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, json_response
from receiver.api.parameters import Flag, Name, Parameters
from receiver.removed_deliveries import Redirected, RemovedDeliveries


class DiscardBody(Parameters):
    """A removed destination."""

    destination: Name = Field(min_length=1)
    """Its former name."""
    dead: Flag = False
    """Include its dead letters."""
    dry_run: Flag = False
    """Only count."""


class MoveBody(DiscardBody):
    """A removed destination and another one."""

    to: Name
    """A configured destination."""


class RemovedDeliveryEndpoints:
    """The endpoints need the scope `operate`."""

    def __init__(self, deliveries: RemovedDeliveries) -> None:
        self._deliveries = deliveries

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="POST",
                path="/v1/deliveries/move",
                scope="operate",
                handler=self._move,
                name="move_deliveries",
                summary="Move the deliveries of a removed destination to another one",
                body=MoveBody,
                body_example={"destination": "old-orders", "to": "orders"},
                answer=Redirected,
                example={**examples.REDIRECTED, "moved": 312, "discarded": 0},
                errors=("not_settled",),
            ),
            Endpoint(
                method="POST",
                path="/v1/deliveries/discard",
                scope="operate",
                handler=self._discard,
                name="discard_deliveries",
                summary="Cancel the deliveries of a removed destination",
                body=DiscardBody,
                body_example={"destination": "old-orders"},
                answer=Redirected,
                example=examples.REDIRECTED,
            ),
        ]

    async def _move(self, call: Call[None, MoveBody]) -> Response:
        body = await call.read_body()
        if body.dry_run:
            return json_response(await self._deliveries.count(body.destination, to=body.to, dead=body.dead))
        return json_response(
            await self._deliveries.move(body.destination, to=body.to, dead=body.dead, by=call.caller.name)
        )

    async def _discard(self, call: Call[None, DiscardBody]) -> Response:
        body = await call.read_body()
        if body.dry_run:
            return json_response(await self._deliveries.count(body.destination, to=None, dead=body.dead))
        return json_response(
            await self._deliveries.discard(body.destination, dead=body.dead, by=call.caller.name)
        )
