"""`/v1/events/fetch`: ask Clipia for a result that never arrived."""

from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, json_response
from receiver.api.models import Fetched
from receiver.api.parameters import Name, Parameters
from receiver.result_fetch import ResultFetch


class FetchBody(Parameters):
    """The generation whose result is missing."""

    request_id: Name
    """Clipia's id."""
    source: Name | None = None
    """The source whose webhook would have brought it; required if several are configured and the job was
    submitted elsewhere."""


class ResultFetchEndpoints:
    """The endpoint needs the scope `operate`: the result may be another caller's."""

    def __init__(self, fetch: ResultFetch) -> None:
        self._fetch = fetch

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="POST",
                path="/v1/events/fetch",
                scope="operate",
                handler=self._ask,
                name="fetch_event",
                summary="Ask Clipia for a result that never arrived, and store it as an event",
                body=FetchBody,
                body_example={"request_id": examples.EVENT["request_id"]},
                answer=Fetched,
                example={"event_id": str(examples.EVENT["id"]), "stored": True},
                statuses=((200, "It was stored before."), (201, "It is stored now.")),
                asks_clipia=True,
                errors=("unknown_request", "not_finished"),
            )
        ]

    async def _ask(self, call: Call[None, FetchBody]) -> Response:
        body = await call.read_body()
        found = await self._fetch.fetch(body.request_id, source=body.source)
        answer = Fetched(event_id=found.event_id, stored=found.is_new)
        return json_response(answer, status=201 if found.is_new else 200)
