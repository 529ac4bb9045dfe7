"""The calls of the client about deliveries."""

from collections.abc import Sequence
from datetime import datetime
from uuid import UUID

from receiver.api.models import Restarted, RestartedMany
from receiver.client.calls import Calls, Page
from receiver.db.rows import DeliveryState
from receiver.db.views import ListedDelivery
from receiver.removed_deliveries import Redirected


class DeliveryCalls(Calls):
    """Deliveries and dead letters."""

    async def list_deliveries(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        state: DeliveryState | None = None,
        destination: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        cause: str | None = None,
    ) -> Page[ListedDelivery]:
        """Return deliveries, newest first, each with the reason of its last failure.

        `cause` is one of `list_failures`.
        """
        query = {
            "cursor": cursor,
            "state": state,
            "destination": destination,
            "since": since,
            "until": until,
            "cause": cause,
        }
        return await self._list(ListedDelivery, "/v1/deliveries", query, limit=limit)

    async def retry_dead_letters(
        self,
        *,
        ids: Sequence[UUID] = (),
        destination: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        cause: str | None = None,
        all: bool = False,  # noqa: A002 - the API's name
        not_restarted_since: datetime | None = None,
        reason: str | None = None,
    ) -> RestartedMany:
        """Deliver dead letters again. If the answer's `more` is true, call it again with its `began`."""
        body = {
            "ids": ids,
            "destination": destination,
            "since": since,
            "until": until,
            "cause": cause,
            "all": all,
            "not_restarted_since": not_restarted_since,
        }
        found: RestartedMany = await self._act(
            RestartedMany, "POST", "/v1/deliveries/retry", body, reason=reason
        )
        return found

    async def retry_dead_letter(self, delivery_id: UUID, *, reason: str | None = None) -> Restarted:
        """Deliver one dead letter again."""
        path = f"/v1/deliveries/{delivery_id}/retry"
        found: Restarted = await self._act(Restarted, "POST", path, reason=reason)
        return found

    async def move_deliveries(
        self,
        destination: str,
        *,
        to: str,
        dead: bool = False,
        dry_run: bool = False,
        reason: str | None = None,
    ) -> Redirected:
        """Move deliveries of a removed destination. If the answer's `more` is true, call it again."""
        body = {"destination": destination, "to": to, "dead": dead, "dry_run": dry_run}
        found: Redirected = await self._act(Redirected, "POST", "/v1/deliveries/move", body, reason=reason)
        return found

    async def discard_deliveries(
        self, destination: str, *, dead: bool = False, dry_run: bool = False, reason: str | None = None
    ) -> Redirected:
        """Cancel deliveries of a removed destination. If the answer's `more` is true, call it again."""
        body = {"destination": destination, "dead": dead, "dry_run": dry_run}
        found: Redirected = await self._act(Redirected, "POST", "/v1/deliveries/discard", body, reason=reason)
        return found
