"""The calls of the client that answer an operator's questions about one object."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, cast

import httpx

from receiver.api.models import CloudEventModel, Fetched
from receiver.api.tail import HEARTBEAT_SECONDS
from receiver.client.calls import Answer, Calls, Page, escaped
from receiver.db.deliveries import FailureGroup, ShownDelivery
from receiver.db.tail import TailItem
from receiver.explain import Explanation


class InquiryCalls(Calls):
    """Single deliveries, and failures by cause."""

    async def explain_object(self, key: str) -> Explanation:
        """Return the reason why an object is in its state, by any of its ids."""
        # A server decodes %2F before it routes the call.
        path, query = (
            (f"/v1/explain/{escaped(key)}", {}) if "/" not in key else ("/v1/explain/-", {"id": key})
        )
        return cast("Explanation", await self._get(Explanation, path, query))

    async def stream_tail(
        self, *, after: str | None = None, wait: float, destination: str | None = None, failures: bool = False
    ) -> AsyncIterator[tuple[str, TailItem | None]]:
        """Iterate over the items of one stream, each with its cursor, for `wait` seconds.

        The last cursor is the next call's `after`; the first one comes without an item.
        """
        query = {"after": after, "wait": wait, "destination": destination, "failures": failures or None}
        cursor = ""
        async with aclosing(self._lines("/v1/tail", query, silent_for=2 * HEARTBEAT_SECONDS)) as lines:
            async for line in lines:
                name, _, value = line.partition(b": ")
                if name == b"id":
                    cursor = value.decode(errors="replace")
                elif name == b"data":
                    yield cursor, self._parsed(TailItem, Answer(value, httpx.Headers()), "/v1/tail")
                elif not line and cursor:
                    yield cursor, None

    async def fetch_event(
        self, request_id: str, *, source: str | None = None, reason: str | None = None
    ) -> Fetched:
        """Ask Clipia for a result that never arrived, and store it. Raises RequestError.

        `source` is required if several are configured and the job was submitted elsewhere.
        """
        body = {"request_id": request_id, "source": source}
        return cast(
            "Fetched", await self._act(Fetched, "POST", "/v1/events/fetch", body, reason=reason, wait=60.0)
        )

    async def show_delivery(self, delivery_id: object) -> ShownDelivery:
        """Return a delivery with every attempt."""
        return cast("ShownDelivery", await self._get(ShownDelivery, f"/v1/deliveries/{escaped(delivery_id)}"))

    async def show_message(self, delivery_id: object) -> dict[str, Any]:
        """Return the message of a delivery's last attempt, made again from the rows as they are now."""
        path = f"/v1/deliveries/{escaped(delivery_id)}/message"
        return cast("dict[str, Any]", await self._get(CloudEventModel, path))

    async def discard_delivery(self, delivery_id: object, *, reason: str | None = None) -> None:
        """End a pending or dead delivery for good. Raises RequestError."""
        path = f"/v1/deliveries/{escaped(delivery_id)}/discard"
        await self._act(dict[str, bool], "POST", path, {"reason": reason})

    async def list_failures(self, *, destination: str | None = None) -> list[FailureGroup]:
        """Return failing deliveries and dead letters, grouped by destination and cause."""
        page: Page[FailureGroup] = await self._get(
            Page[FailureGroup], "/v1/deliveries/failures", {"destination": destination}
        )
        return page.data
