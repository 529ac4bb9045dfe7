"""`/v1/explain`: why an object is in its state, found by any of its ids."""

from collections.abc import Callable, Sequence

from pydantic import Field
from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, json_response
from receiver.api.parameters import Parameters
from receiver.db.database import Database
from receiver.destination_settings import DestinationSettings
from receiver.explain import Explanation, explain_key


class ExplainQuery(Parameters):
    """An id that a path cannot have."""

    id: str | None = Field(default=None, min_length=1)
    """In place of the id in the path: an id with a slash, such as a URL."""


class ExplainEndpoints:
    """The endpoint needs the scope `operate`: it counts other callers' deliveries and quotes diagnoses."""

    def __init__(self, database: Database, configured: Callable[[], Sequence[DestinationSettings]]) -> None:
        self._database = database
        self._configured = configured

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="GET",
                path="/v1/explain/{id}",
                scope="operate",
                handler=self._explain,
                name="explain_object",
                summary="Say why an object is in its state, and the next command to run",
                query=ExplainQuery,
                answer=Explanation,
                example=examples.EXPLANATION,
            )
        ]

    async def _explain(self, call: Call[ExplainQuery, None]) -> Response:
        key = call.key if call.query.id is None else call.query.id
        found = await explain_key(self._database, key, self._configured)
        # It quotes a consumer's answer: a browser must show it as text.
        return json_response(found, headers={"x-content-type-options": "nosniff"})
