"""`/v1/status`: the service on one screen."""

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, json_response
from receiver.status import Status


class StatusEndpoints:
    """The endpoint of the status."""

    def __init__(self, read: Callable[[], Awaitable[Status]]) -> None:
        self._read = read

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="GET",
                path="/v1/status",
                scope="read",
                handler=self._show,
                name="show_status",
                summary="Show lanes, destinations, workers, jobs and disks, and the problems in them",
                answer=Status,
                example=examples.STATUS,
            )
        ]

    async def _show(self, _call: Call[None, None]) -> Response:
        return json_response(await self._read())
