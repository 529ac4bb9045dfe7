"""`/v1/destinations`: list, pause, resume and test destinations."""

from typing import Annotated, Any, Final

from pydantic import Field
from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, json_response, list_response, while_connected
from receiver.api.parameters import Flag, Parameters
from receiver.destination_control import DestinationControl, DestinationTest, ListedDestination

_ACTION: Final[dict[str, Any]] = {
    "method": "POST",
    "scope": "operate",
    "body_is_optional": True,
    "errors": ("not_found",),
}


class PauseBody(Parameters):
    """A pause."""

    reason: Annotated[str | None, Field(max_length=1000)] = None
    """Shown with the pause."""


class TestBody(Parameters):
    """A test."""

    send: Flag = False
    """Also send a message of the type `ai.clipia.receiver.test`."""


class DestinationEndpoints:
    """Destinations."""

    def __init__(self, control: DestinationControl) -> None:
        self._control = control

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="GET",
                path="/v1/destinations",
                scope="read",
                handler=self._list,
                name="list_destinations",
                summary="List destinations, and removed ones that have deliveries, with the next command",
                answer=ListedDestination,
                is_list=True,
                example=examples.DESTINATION,
            ),
            Endpoint(
                path="/v1/destinations/{name}/pause",
                handler=self._pause,
                name="pause_destination",
                summary="Stop deliveries to a destination in all processes; events wait",
                body=PauseBody,
                body_example={"reason": "orders moves its database"},
                answer=ListedDestination,
                example=examples.PAUSED_DESTINATION,
                **_ACTION,
            ),
            Endpoint(
                path="/v1/destinations/{name}/resume",
                handler=self._resume,
                name="resume_destination",
                summary="End the pause of a destination",
                answer=ListedDestination,
                example=examples.DESTINATION,
                **_ACTION,
            ),
            Endpoint(
                path="/v1/destinations/{name}/test",
                handler=self._test,
                name="test_destination",
                summary="Check the connection to a destination, and send a test message if wanted",
                body=TestBody,
                body_example={"send": True},
                answer=DestinationTest,
                example=examples.DESTINATION_TEST,
                **_ACTION,
            ),
        ]

    async def _list(self, _call: Call[None, None]) -> Response:
        return list_response(await self._control.list_all())

    async def _pause(self, call: Call[None, PauseBody]) -> Response:
        self._control.require(call.key)
        await call.read_body()
        # The record has the reason of the query or of the body, without secrets and control characters.
        reason = call.record.reason
        return json_response(await self._control.pause(call.key, by=call.caller.name, reason=reason))

    async def _resume(self, call: Call[None, None]) -> Response:
        return json_response(await self._control.resume(call.key))

    async def _test(self, call: Call[None, TestBody]) -> Response:
        self._control.require(call.key)
        body = await call.read_body()
        return json_response(
            await while_connected(call.request, self._control.test(call.key, send=body.send))
        )
