"""`/v1/status` and `/v1/workers`: the service on one screen, and its worker processes."""

from collections.abc import Awaitable, Callable

from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, json_response, list_response
from receiver.db.database import Database
from receiver.status import Status, WorkerStatus, read_workers


class StatusEndpoints:
    """The endpoints of the status."""

    def __init__(self, database: Database, read: Callable[[], Awaitable[Status]]) -> None:
        self._database = database
        self._read = read

    def table(self) -> list[Endpoint]:
        """Return the rows."""
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
            ),
            Endpoint(
                method="GET",
                path="/v1/workers",
                scope="read",
                handler=self._list_workers,
                name="list_workers",
                summary="List the worker processes that run or crashed lately, with their lanes",
                answer=WorkerStatus,
                is_list=True,
                example=examples.WORKER,
            ),
        ]

    async def _show(self, _call: Call[None, None]) -> Response:
        return json_response(await self._read())

    async def _list_workers(self, _call: Call[None, None]) -> Response:
        async with self._database.read() as connection:
            return list_response(await read_workers(connection))
