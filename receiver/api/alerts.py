"""`/v1/alerts`: conditions that an operator is told of."""

from typing import Annotated

from starlette.responses import Response

from receiver.api import examples
from receiver.api.endpoints import Call, Endpoint, list_response
from receiver.api.parameters import Limit, Parameters, one_of
from receiver.core.alerting import AlertKind
from receiver.db import alerts
from receiver.db.alerts import AlertState, ShownAlert
from receiver.db.database import Database


class AlertsQuery(Parameters):
    """Filters of a list of alerts."""

    limit: Limit = 200
    state: Annotated[AlertState | None, one_of(AlertState)] = None
    alert: Annotated[AlertKind | None, one_of(AlertKind)] = None


class AlertEndpoints:
    """The endpoint of alerts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def table(self) -> list[Endpoint]:
        """Return the row."""
        return [
            Endpoint(
                method="GET",
                path="/v1/alerts",
                scope="read",
                handler=self._list,
                name="list_alerts",
                summary="List alerts, open ones first; resolved ones are kept for 30 days",
                query=AlertsQuery,
                answer=ShownAlert,
                is_list=True,
                example=examples.ALERT,
            )
        ]

    async def _list(self, call: Call[AlertsQuery, None]) -> Response:
        query = call.query
        async with self._database.read() as connection:
            rows = await alerts.list_alerts(
                connection, limit=query.limit, state=query.state, kind=query.alert
            )
        return list_response(rows)
