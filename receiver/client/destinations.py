"""The calls of the client about destinations."""

from receiver.client.calls import Calls, Page, escaped
from receiver.destination_control import TEST_SECONDS, DestinationTest, ListedDestination


class DestinationCalls(Calls):
    """Destinations."""

    async def list_destinations(self) -> list[ListedDestination]:
        """Return destinations, and removed ones that have deliveries, with the next command of each."""
        page: Page[ListedDestination] = await self._get(Page[ListedDestination], "/v1/destinations")
        return page.data

    async def pause_destination(self, name: str, *, reason: str | None = None) -> ListedDestination:
        """Stop deliveries to a destination in all processes; events wait."""
        return await self._change(name, "pause", reason)

    async def resume_destination(self, name: str, *, reason: str | None = None) -> ListedDestination:
        """End the pause of a destination."""
        return await self._change(name, "resume", reason)

    async def test_destination(
        self, name: str, *, send: bool = False, reason: str | None = None
    ) -> DestinationTest:
        """Check the connection to a destination, and send a test message if wanted."""
        path = f"/v1/destinations/{escaped(name)}/test"
        found: DestinationTest = await self._act(
            DestinationTest, "POST", path, {"send": send}, reason=reason, wait=TEST_SECONDS
        )
        return found

    async def _change(self, name: str, verb: str, reason: str | None) -> ListedDestination:
        path = f"/v1/destinations/{escaped(name)}/{verb}"
        found: ListedDestination = await self._act(ListedDestination, "POST", path, reason=reason)
        return found
