"""`/v1/retention`: the runs of retention, of the schedule and of operators."""

from typing import Any, Final

from starlette.responses import Response

from receiver.api.endpoints import Call, Endpoint, list_response
from receiver.api.parameters import Limit, Parameters
from receiver.db import retention_runs
from receiver.db.database import Database
from receiver.db.retention_runs import RetentionRun

RUN: Final[dict[str, Any]] = {
    "id": "01a1fdfe-da8d-7f2d-8a66-991a87796372",
    "by": "schedule",
    "state": "completed",
    "host": "worker-1",
    "older_than_days": 90,
    "before": "2026-01-31T12:00:00Z",
    "media": True,
    "dead_letters": False,
    "events": 4120,
    "kept": 2,
    "files": 5012,
    "files_elsewhere": 0,
    "jobs": 3980,
    "rejections": 12,
    "actions": 0,
    "error": None,
    "created_at": "2026-05-01T03:00:04Z",
    "seen_at": "2026-05-01T03:02:10Z",
    "finished_at": "2026-05-01T03:02:10Z",
}
"""An example."""


class RetentionQuery(Parameters):
    """The number of runs."""

    limit: Limit = 50


class RetentionEndpoints:
    """The endpoint of the runs."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="GET",
                path="/v1/retention",
                scope="read",
                handler=self._list,
                name="list_retention_runs",
                summary="List the runs of retention with their numbers, newest first",
                query=RetentionQuery,
                answer=RetentionRun,
                is_list=True,
                example=RUN,
            )
        ]

    async def _list(self, call: Call[RetentionQuery, None]) -> Response:
        async with self._database.read() as connection:
            return list_response(await retention_runs.list_runs(connection, limit=call.query.limit))
