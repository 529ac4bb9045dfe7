"""`/v1/rejections`: rejected requests to the callback, each with its diagnosis."""

from typing import Annotated, Any

from starlette.responses import Response

from receiver.api import rejection_examples
from receiver.api.endpoints import Call, Endpoint, json_response, list_response, not_found, page_response
from receiver.api.models import ShownRejection, ShownRejectionGroup
from receiver.api.parameters import Cursor, Limit, Moment, Parameters, one_of
from receiver.core.diagnosis import Cause
from receiver.core.remedies import REMEDIES
from receiver.db import rejections
from receiver.db.database import Database
from receiver.db.rejections import ListedRejection, Rejection

_MAX_DIGITS = 18


class RejectionsQuery(Parameters):
    """Filters of a list of rejected requests."""

    limit: Limit = 50
    cursor: Cursor = None
    """The `next` of the page before."""
    source: str | None = None
    """`-` if the path names no source."""
    reason: str | None = None
    cause: Annotated[Cause | None, one_of(Cause)] = None
    since: Moment | None = None
    """Received at or after this time."""
    until: Moment | None = None
    """Received before this time."""


class GroupsQuery(Parameters):
    """A time."""

    since: Moment | None = None
    """Only requests received at or after this time."""


class RejectionEndpoints:
    """The endpoints need the scope `operate`: a diagnosis would help a forger."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def table(self) -> list[Endpoint]:
        """Return the rows."""
        return [
            Endpoint(
                method="GET",
                path="/v1/rejections",
                scope="operate",
                handler=self._list,
                name="list_rejections",
                summary="List rejected requests to the callback with their diagnoses, newest first",
                query=RejectionsQuery,
                answer=ListedRejection,
                is_list=True,
                example=rejection_examples.REJECTION_HEAD,
            ),
            Endpoint(
                method="GET",
                path="/v1/rejections/causes",
                scope="operate",
                handler=self._group,
                name="group_rejections",
                summary="Group the kept requests by source and cause, with what to do",
                query=GroupsQuery,
                answer=ShownRejectionGroup,
                is_list=True,
                example=rejection_examples.REJECTION_GROUP,
            ),
            Endpoint(
                method="GET",
                path="/v1/rejections/{id}",
                scope="operate",
                handler=self._show,
                name="show_rejection",
                summary="Show a rejected request with its headers and the start of its body",
                answer=ShownRejection,
                example=rejection_examples.REJECTION,
                errors=("not_found",),
            ),
        ]

    async def _list(self, call: Call[RejectionsQuery, None]) -> Response:
        query = call.query
        filters = query.model_dump(exclude={"limit", "cursor"})
        async with self._database.read() as connection:
            rows = await rejections.list_rejections(
                connection, limit=query.limit + 1, before=query.cursor, **filters
            )
        return page_response(rows, query.limit, "id")

    async def _group(self, call: Call[GroupsQuery, None]) -> Response:
        async with self._database.read() as connection:
            found = await rejections.group(connection, since=call.query.since)
        return list_response([{**each, "remedy": REMEDIES[each["cause"]]} for each in found])

    async def _show(self, call: Call[None, None]) -> Response:
        found = None
        if call.key.isascii() and call.key.isdigit() and len(call.key) <= _MAX_DIGITS:
            async with self._database.read() as connection:
                found = await rejections.find(connection, int(call.key))
        if found is None:
            raise not_found("rejection")
        # A body is a stranger's: a browser must show it as text.
        return json_response(readable(found), headers={"x-content-type-options": "nosniff"})


def readable(rejection: Rejection) -> dict[str, Any]:
    """Return a rejected request for JSON, with its body as text, and what to do about it."""
    body = rejection["body"]
    return {
        **rejection,
        "body": None if body is None else body.decode("utf-8", "backslashreplace"),
        "remedy": REMEDIES[rejection["cause"]],
    }
