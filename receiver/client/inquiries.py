"""The calls of the client that answer an operator's questions about one object."""

from typing import Any, cast

from receiver.api.models import CloudEventModel
from receiver.client.calls import Calls, Page, escaped
from receiver.db.deliveries import FailureGroup, ShownDelivery
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
