"""Destinations in filters: a mistyped name would match nothing, and that would look like an answer."""

from collections.abc import Collection

from receiver.api.parameters import invalid
from receiver.db import outbox, removed_destinations
from receiver.db.database import Database


class KnownDestinations:
    """The configured destinations, and removed ones with deliveries that wait or are dead."""

    def __init__(self, database: Database, configured: Collection[str]) -> None:
        self._database = database
        self.configured = configured

    async def require(self, name: str | None) -> None:
        """Raise RequestError, which names the known ones, for a name that no destination has.

        Call it if nothing matches: a removed destination may have delivered events, which no index finds.
        """
        if name is None or name in self.configured:
            return
        async with self._database.read() as connection:
            removed = await removed_destinations.find_destinations(connection)
            removed |= (await outbox.count_dead(connection)).keys()
        if name not in removed:
            known = ", ".join(sorted({*self.configured, *removed})) or "none"
            raise invalid(f"destination: there is no destination {name[:64]!r}; known: {known}")
