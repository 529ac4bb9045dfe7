"""The calls of the client about rejected requests."""

from datetime import datetime

from receiver.api.models import ShownRejection, ShownRejectionGroup
from receiver.client.calls import Calls, Page
from receiver.core.diagnosis import Cause
from receiver.db.rejections import ListedRejection


class RejectionCalls(Calls):
    """Rejected requests to the callback."""

    async def list_rejections(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        source: str | None = None,
        reason: str | None = None,
        cause: Cause | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Page[ListedRejection]:
        """Return rejected requests with their diagnoses, newest first."""
        query = {
            "cursor": cursor,
            "source": source,
            "reason": reason,
            "cause": cause,
            "since": since,
            "until": until,
        }
        return await self._list(ListedRejection, "/v1/rejections", query, limit=limit)

    async def group_rejections(self, *, since: datetime | None = None) -> list[ShownRejectionGroup]:
        """Return the kept requests by source and cause, with what to do."""
        page: Page[ShownRejectionGroup] = await self._get(
            Page[ShownRejectionGroup], "/v1/rejections/causes", {"since": since}
        )
        return page.data

    async def show_rejection(self, rejection_id: int) -> ShownRejection:
        """Return a rejected request with its headers and the start of its body."""
        found: ShownRejection = await self._get(ShownRejection, f"/v1/rejections/{rejection_id}")
        return found
