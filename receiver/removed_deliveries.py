"""Deliveries to a destination that was removed from the settings: the operator moves or discards them."""

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

from sqlalchemy.exc import IntegrityError

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.core.lane_names import destination_lane
from receiver.db import removed_destinations, workers
from receiver.db.database import Database
from receiver.db.removed_destinations import Taken
from receiver.errors import RequestError

BATCH_ROWS: Final = 1000
"""One call changes at most this many deliveries, in one transaction."""
MAX_COLLISIONS: Final = 5


class Redirected(TypedDict):
    """Deliveries and replays of a removed destination that one call changed, or would change."""

    moved: int
    discarded: int
    replays: int
    """Replays that go to the other destination, or leave the removed one out; 0 in a dry run."""
    under_way: int
    """Deliveries that workers have claimed, or had claimed when they were killed: they stay."""
    under_way_seconds: float
    """When the last of these claims ends."""
    still_in: list[str]
    """Running worker processes that still have the destination and may add deliveries to it."""
    more: bool
    """Whether others are left: call again."""


class RemovedDeliveries:
    """Moves and discards; `destinations` are the configured ones, each with whether it waits for media."""

    def __init__(self, database: Database, destinations: Mapping[str, bool]) -> None:
        self._database = database
        self._destinations = destinations

    async def move(self, name: str, *, to: str, dead: bool, by: str) -> Redirected:
        """Move the deliveries to another destination. Raises RequestError if the settings forbid it."""
        waits = self._find(name, to)
        take = partial(removed_destinations.move, to=to, waits=waits, destination=name, dead=dead, by=by)
        return await self._take(name, take, to=to)

    async def discard(self, name: str, *, dead: bool, by: str) -> Redirected:
        """Cancel the deliveries. Raises RequestError if the destination is configured."""
        self._require_removed(name)
        take = partial(removed_destinations.discard, destination=name, dead=dead, by=by)
        return await self._take(name, take, to=None)

    async def count(self, name: str, *, to: str | None, dead: bool) -> Redirected:
        """Return the numbers of a run, without changes. Raises RequestError."""
        if to is None:
            self._require_removed(name)
        else:
            self._find(name, to)
        async with self._database.read() as connection:
            found = await removed_destinations.count_free(connection, name, dead=dead)
            had = found
            if to is not None:
                had = await removed_destinations.count_free(connection, name, dead=dead, had_by=to)
        return await self._report(name, Taken(moved=found - had, discarded=had))

    def _require_removed(self, name: str) -> None:
        if name in self._destinations:
            raise _invalid(
                f"{name!r} is configured, so workers deliver to it: remove it from the settings first"
            )

    def _find(self, name: str, to: str) -> bool:
        self._require_removed(name)
        if to not in self._destinations:
            known = ", ".join(self._destinations) or "none"
            raise _invalid(f"there is no destination {to!r}; configured: {known}")
        return self._destinations[to]

    async def _take(self, name: str, take: Callable[..., Awaitable[Taken]], *, to: str | None) -> Redirected:
        """Redirect the replays, then move or discard a batch."""
        async with self._database.write() as connection:
            replays = await removed_destinations.redirect_replays(connection, name, to=to)
        batch = await self._take_batch(take)
        more = batch.moved + batch.discarded == BATCH_ROWS
        return await self._report(name, batch, replays=replays, more=more)

    async def _take_batch(self, take: Callable[..., Awaitable[Taken]]) -> Taken:
        for _ in range(MAX_COLLISIONS):
            # If a replay adds the same event for the other destination meanwhile, the next attempt finds it.
            with contextlib.suppress(IntegrityError):
                async with self._database.write() as connection:
                    return await take(connection, limit=BATCH_ROWS)
        raise RequestError(
            "a replay is adding the same deliveries: try again when it has ended", code="not_settled"
        )

    async def _report(self, name: str, taken: Taken, *, replays: int = 0, more: bool = False) -> Redirected:
        async with self._database.read() as connection:
            claimed, seconds = await removed_destinations.count_under_way(connection, name)
            seen = await workers.find_runs(connection)
        return Redirected(
            moved=taken.moved,
            discarded=taken.discarded,
            replays=replays,
            under_way=claimed,
            under_way_seconds=max(0.0, round(seconds, 1)),
            still_in=[
                run.process_name for run in seen if run.is_running and destination_lane(name) in run.lanes
            ],
            more=more,
        )


def _invalid(message: str) -> RequestError:
    return RequestError(message, code="invalid_request")
