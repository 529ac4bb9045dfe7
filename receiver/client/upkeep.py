"""The calls of the client that check, delete and repair what is stored."""

from datetime import datetime
from typing import Final
from uuid import UUID

from receiver.api.media import FileLink, GivenUp
from receiver.api.routing import Verdict
from receiver.client.calls import Page
from receiver.client.events import EventCalls
from receiver.retention import Erased, Pruned
from receiver.unrecognized import Recovered
from receiver.verification import Verified

PART_SECONDS: Final = 480.0
"""A batch with large files, or the file that a call reads last, may take minutes."""


class UpkeepCalls(EventCalls):
    """Stored events and files."""

    async def erase_event(self, key: str, *, reason: str | None = None) -> Erased:
        """Erase an event for good: its body, files and deliveries, and its job's input."""
        path = await self._event_path(key)
        found: Erased = await self._act(Erased, "DELETE", path, reason=reason, wait=PART_SECONDS)
        return found

    async def route_event(self, key: str) -> list[Verdict]:
        """Return which destinations an event goes to, and why not to the others."""
        page: Page[Verdict] = await self._get(Page[Verdict], f"{await self._event_path(key)}/route")
        return page.data

    async def link_files(self, key: str, *, hours: int = 1) -> list[FileLink]:
        """Return links to an event's stored files that work without credentials for the bucket."""
        path = f"{await self._event_path(key)}/links"
        page: Page[FileLink] = await self._get(Page[FileLink], path, {"hours": hours})
        return page.data

    async def give_up_files(self, key: str, *, dry_run: bool = False, reason: str | None = None) -> GivenUp:
        """Give up an event's pending downloads, so that its messages are sent without them."""
        path = f"{await self._event_path(key)}/give-up"
        found: GivenUp = await self._act(GivenUp, "POST", path, {"dry_run": dry_run}, reason=reason)
        return found

    async def verify_files(self, *, cursor: str | None = None, since: datetime | None = None) -> Verified:
        """Read a part of the stored files, and compare each with its checksum."""
        query = {"cursor": cursor, "since": since}
        found: Verified = await self._get(Verified, "/v1/verification", query, wait=PART_SECONDS)
        return found

    async def prune_events(
        self,
        *,
        older_than_days: int | None = None,
        before: datetime | None = None,
        next: str | None = None,  # noqa: A002 - the API's name
        run: UUID | None = None,
        dead_letters: bool = False,
        media: bool = False,
        dry_run: bool = False,
        reason: str | None = None,
    ) -> Pruned:
        """Delete a part of the old events. The other parts take `before`, `next` and `run` of the answer."""
        body = {
            "older_than_days": older_than_days,
            "before": before,
            "next": next,
            "run": None if run is None else str(run),
            "dead_letters": dead_letters,
            "media": media,
            "dry_run": dry_run,
        }
        found: Pruned = await self._act(Pruned, "POST", "/v1/prune", body, reason=reason, wait=PART_SECONDS)
        return found

    async def recover_events(
        self, *, cursor: str | None = None, dry_run: bool = False, reason: str | None = None
    ) -> Page[Recovered]:
        """Recover a part of the unrecognized events that this release can read."""
        body = {"cursor": cursor, "dry_run": dry_run}
        found: Page[Recovered] = await self._act(
            Page[Recovered], "POST", "/v1/recovery", body, reason=reason, wait=PART_SECONDS
        )
        return found
