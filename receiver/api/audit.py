"""`/v1/audit`: the actions of operators. The guard of the endpoints records them."""

from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, page_response
from receiver.api.parameters import Cursor, Limit, Moment, Parameters
from receiver.db import audit
from receiver.db.audit import Action
from receiver.db.database import Database


class AuditQuery(Parameters):
    """Filters of a list of actions."""

    limit: Limit = 50
    cursor: Cursor = None
    """The `next` of the page before."""
    by: str | None = None
    """The name of a token, or `NAME on the command line`."""
    operation: str | None = None
    """An operation's id in this specification."""
    target: str | None = None
    """The id in the path of the call."""
    since: Moment | None = None
    """Begun at or after this time."""
    until: Moment | None = None
    """Begun before this time."""


class AuditEndpoints:
    """The endpoint needs the scope `operate`, as the actions do."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="GET",
                path="/v1/audit",
                scope="operate",
                handler=self._list,
                name="list_actions",
                summary="List the actions of operators with their reasons and outcomes, newest first",
                query=AuditQuery,
                answer=Action,
                is_list=True,
                example=examples.ACTION,
            )
        ]

    async def _list(self, call: Call[AuditQuery, None]) -> Response:
        query = call.query
        filters = query.model_dump(exclude={"limit", "cursor"})
        async with self._database.read() as connection:
            rows = await audit.list_actions(connection, limit=query.limit + 1, before=query.cursor, **filters)
        return page_response(rows, query.limit, "id")
