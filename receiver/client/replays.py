"""The calls of the client about replays."""

from typing import Final
from uuid import UUID

from receiver.client.calls import Page
from receiver.client.events import EventCalls
from receiver.db.views import ReplayCounts, ReplayDetails, ReplayHead
from receiver.replays import ReplayOptions, ReplayRequest

COUNT_SECONDS: Final = 480.0
"""Counting goes through all selected events."""


class ReplayCalls(EventCalls):
    """Orders to send stored events again."""

    async def order_replay(self, request: ReplayRequest, *, key: str | None = None) -> ReplayDetails:
        """Send stored events again; the same `key` is the same replay."""
        body = request.model_dump(mode="json", exclude_unset=True)
        found: ReplayDetails = await self._act(ReplayDetails, "POST", "/v1/replays", body, key=key)
        return found

    async def count_replay(self, request: ReplayRequest) -> ReplayCounts:
        """Return the events and the deliveries that a replay would have, without an order."""
        body = request.model_dump(mode="json", exclude_unset=True) | {"dry_run": True}
        found: ReplayCounts = await self._act(ReplayCounts, "POST", "/v1/replays", body, wait=COUNT_SECONDS)
        return found

    async def replay_event(
        self, event: str, options: ReplayOptions | None = None, *, key: str | None = None
    ) -> ReplayDetails:
        """Send one event again, by its id or request_id."""
        path = f"{await self._event_path(event)}/replay"
        body = None if options is None else options.model_dump(mode="json", exclude_unset=True)
        found: ReplayDetails = await self._act(ReplayDetails, "POST", path, body, key=key)
        return found

    async def list_replays(self, *, limit: int = 50, cursor: str | None = None) -> Page[ReplayHead]:
        """Return replays, newest first."""
        return await self._list(ReplayHead, "/v1/replays", {"cursor": cursor}, limit=limit)

    async def show_replay(self, replay_id: UUID) -> ReplayDetails:
        """Return a replay, its progress, and its deliveries by destination and state."""
        found: ReplayDetails = await self._get(ReplayDetails, f"/v1/replays/{replay_id}")
        return found

    async def cancel_replay(self, replay_id: UUID, *, reason: str | None = None) -> ReplayDetails:
        """Stop a replay, except for deliveries under way."""
        path = f"/v1/replays/{replay_id}/cancel"
        found: ReplayDetails = await self._act(ReplayDetails, "POST", path, reason=reason)
        return found
