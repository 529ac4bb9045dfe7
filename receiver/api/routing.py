"""`/v1/events/{id}/route`: the destinations of an event, and why it does not go to the others."""

from collections.abc import Mapping

from starlette.responses import Response
from typing_extensions import TypedDict

from receiver.api.endpoints import Call, Endpoint, list_response
from receiver.api.events import load_event
from receiver.core.routing import mismatch
from receiver.db import inbox, job_events, reads
from receiver.db.database import Database
from receiver.destination_settings import FilterSettings
from receiver.errors import RequestError
from receiver.lanes.targets import facts_of


class Verdict(TypedDict):
    """Whether an event goes to a destination."""

    destination: str
    refused: str | None
    """Why its filter keeps the event out; null if the event goes to it."""


class RoutingEndpoints:
    """The endpoint needs the scope `operate`; `filters` are those of the configured destinations."""

    def __init__(self, database: Database, filters: Mapping[str, FilterSettings]) -> None:
        self._database = database
        self._filters = filters

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="GET",
                path="/v1/events/{id}/route",
                scope="operate",
                handler=self._show,
                name="route_event",
                summary="Show which destinations an event goes to, and why not to the others",
                answer=Verdict,
                is_list=True,
                example={"destination": "orders", "refused": None},
                errors=("not_found", "no_message"),
            ),
        ]

    async def _show(self, call: Call[None, None]) -> Response:
        found = await load_event(self._database, call.key, reads.find_event)
        if found["state"] in ("unrecognized", "erased"):
            message = f"the event is {found['state']}: it goes to no destination"
            raise RequestError(message, code="no_message")
        seq = found["seq"]
        async with self._database.read() as connection:
            event = (await inbox.load_events(connection, [seq]))[seq]
            refs = await job_events.load_refs(connection, [seq])
        facts = facts_of(event, found["model"], refs.get(seq))
        return list_response(
            [
                Verdict(destination=name, refused=mismatch(wanted, facts))
                for name, wanted in self._filters.items()
            ]
        )
