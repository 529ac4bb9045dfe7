"""The calls of the client about events."""

from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from receiver.api.models import ShownEvent, ShownReceipt
from receiver.client.calls import MAX_PAGE_ROWS, Calls, Page, by_metadata, escaped
from receiver.db.rows import DeliveryState, EventState, EventStatus
from receiver.db.views import EventSummary
from receiver.errors import RequestError
from receiver.promotions import Promoted


class EventCalls(Calls):
    """Stored events."""

    async def list_events(
        self,
        *,
        limit: int = 50,
        cursor: str | None = None,
        after: str | None = None,
        wait: float = 0.0,
        source: str | None = None,
        state: EventState | None = None,
        status: EventStatus | None = None,
        model: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        caller: str | None = None,
        metadata: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        job_id: UUID | None = None,
        event_id: UUID | None = None,
        request_id: str | None = None,
        delivery_id: UUID | None = None,
        delivery_state: DeliveryState | None = None,
        destination: str | None = None,
    ) -> Page[EventSummary]:
        """Return events, newest first; with `after` those since then, after up to `wait` seconds."""
        query = {
            "cursor": cursor,
            "after": after,
            "wait": wait or None,
            "source": source,
            "state": state,
            "status": status,
            "model": model,
            "since": since,
            "until": until,
            "caller": caller,
            "idempotency_key": idempotency_key,
            "job_id": job_id,
            "event_id": event_id,
            "request_id": request_id,
            "delivery_id": delivery_id,
            "delivery_state": delivery_state,
            "destination": destination,
            **by_metadata(metadata),
        }
        if after is None:
            return await self._list(EventSummary, "/v1/events", query, limit=limit)
        query["limit"] = min(limit, MAX_PAGE_ROWS)
        page: Page[EventSummary] = await self._get(Page[EventSummary], "/v1/events", query, wait=wait)
        return page

    async def show_event(self, key: str, *, exact: bool = False) -> ShownEvent:
        """Return an event, by its id or request_id, with its receipts, files, deliveries and attempts.

        With `exact`, it always has the exact bytes of its body.
        """
        query = {"exact": exact or None}
        found: ShownEvent = await self._get(ShownEvent, await self._event_path(key), query)
        return found

    async def list_receipts(
        self, key: str, *, limit: int = 50, cursor: str | None = None
    ) -> Page[ShownReceipt]:
        """Return the receipts of an event, oldest first."""
        path = f"{await self._event_path(key)}/receipts"
        return await self._list(ShownReceipt, path, {"cursor": cursor}, limit=limit)

    async def promote_receipt(
        self, event_key: str, receipt_seq: int, *, dry_run: bool = False, reason: str | None = None
    ) -> Promoted:
        """Make the body of a conflicting receipt the event's body, and send it to all destinations."""
        path = f"{await self._event_path(event_key)}/receipts/{receipt_seq}/promote"
        done: Promoted = await self._act(Promoted, "POST", path, {"dry_run": dry_run}, reason=reason)
        return done

    async def _event_path(self, key: str) -> str:
        """Return the path of an event. Raises RequestError."""
        if "/" in key:
            # A server decodes %2F before it routes the call.
            found = (await self.list_events(request_id=key, limit=2)).data
            if not found:
                raise RequestError("there is no such event", code="not_found")
            if len(found) > 1:
                text = "events of several sources have this request_id: give the id of one of them"
                raise RequestError(text, code="ambiguous")
            key = str(found[0]["id"])
        return f"/v1/events/{escaped(key)}"
