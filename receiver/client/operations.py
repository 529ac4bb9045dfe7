"""The calls of the client about the service itself."""

from receiver.client.calls import Calls
from receiver.status import Status


class OperationCalls(Calls):
    """The status."""

    async def show_status(self) -> Status:
        """Return lanes, destinations, workers, jobs and disks, and the problems in them."""
        found: Status = await self._get(Status, "/v1/status")
        return found
