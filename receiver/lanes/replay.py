"""Replays: an order goes through its events by `seq`, one step at a time.

One transaction adds the deliveries of a step and records the progress of the order. If the process dies in
between, no event is left out, and none is sent twice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Final

import structlog

from receiver.core.lane_names import MEDIA_LANE, REPLAY_LANE, Wake, destination_lane
from receiver.core.output_files import FileRules
from receiver.core.retry import GIVE_UP_SECONDS
from receiver.db import leases, outbox, replays, tables, workers
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.rows import Claim, ReplayOrder
from receiver.db.selection import Selection
from receiver.errors import SettingsError, TransientError
from receiver.lanes.attempts import crash_error, stored_text
from receiver.lanes.base import Lane, Work
from receiver.lanes.replay_downloads import Wanted, find_wanted
from receiver.lanes.targets import Routes, Target, load_facts
from receiver.media import Storage

FAILURE_PAUSE_SECONDS: Final = 5.0
MAX_FAILED_STEPS: Final = int(GIVE_UP_SECONDS / FAILURE_PAUSE_SECONDS)
"""Steps in a row that may fail: three days of them."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class ReplayPace:
    """How fast a replay adds deliveries."""

    step_events: int = 100
    """Events of one step."""
    max_waiting: int = 1000
    """A replay adds no deliveries while its fastest destination has this many unfinished ones."""
    pause_seconds: float = 0.5
    """Pause of a replay with too many unfinished deliveries."""
    failure_pause_seconds: float = FAILURE_PAUSE_SECONDS
    """Pause after a step that failed."""


DEFAULT_PACE: Final = ReplayPace()


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """A step: the rows that it adds and changes."""

    reached: int
    """The `seq` up to which the order is done after the step."""
    handled: int
    """Events of the step."""
    delay: float
    """Seconds until the next step."""
    routes: Routes
    wanted: Wanted


class ReplayLane(Lane):
    """Carries out replays."""

    def __init__(
        self,
        database: Database,
        targets: Collection[Target],
        storage: Storage,
        *,
        wake: Wake,
        rules: FileRules | None = None,
        pace: ReplayPace = DEFAULT_PACE,
    ) -> None:
        """Files that were skipped are downloaded if `rules` no longer skip them."""
        super().__init__(database, tables.replays, name=REPLAY_LANE, concurrency=2, wake=wake)
        self._targets = {target.name: target for target in targets}
        self._storage = storage
        self._rules = rules
        self._pace = pace

    def replace_targets(self, targets: Collection[Target]) -> None:
        """Send replays to these destinations from now on; a step that misses one is tried again."""
        self._targets = {target.name: target for target in targets}

    async def claim(self, limit: int) -> list[Work]:
        """Claim replays with a step that is due. Raises DatabaseUnavailable."""
        async with self._database.write() as connection:
            claimed = await replays.claim(connection, limit=limit, lease=self.lease_seconds)
        return [Work(claim=claim, run=partial(self._run, claim, order)) for claim, order in claimed]

    async def _run(self, claim: Claim, order: ReplayOrder) -> None:
        if crashed := crash_error(claim, "carrying out this replay"):
            await self._end(claim, state="failed", error=crashed)
            return
        try:
            await self._step(claim, order)
        except Exception as error:  # noqa: BLE001 - any error belongs to this order, not to its lane
            await self._failed(claim, error)

    async def _step(self, claim: Claim, order: ReplayOrder) -> None:
        await self._require_destinations(order)
        if order.after_seq >= order.until_seq:
            await self._end(claim, state="completed")
            return
        async with self._database.read() as connection:
            waiting = await replays.count_waiting(connection, order.id, order.destinations)
        if waiting >= self._pace.max_waiting:
            await self._database.run_transaction(_put_back(claim, delay=self._pace.pause_seconds))
            return
        plan = await self._plan(order)
        downloads = await self._apply(claim, order, plan)
        if downloads is None:
            log.warning("replay's step not recorded: lease lost", replay_id=str(order.id))
            return
        for name in {name for _, name in plan.routes.due}:
            self._wake(destination_lane(name))
        if downloads:
            self._wake(MEDIA_LANE)
        asyncio.get_running_loop().call_later(plan.delay, self._wake, REPLAY_LANE)

    async def _require_destinations(self, order: ReplayOrder) -> None:
        """Raise TransientError or SettingsError if this worker lacks a destination of the order."""
        unknown = [name for name in order.destinations if name not in self._targets]
        if not unknown:
            return
        message = f"this worker has no destination {unknown[0]!r}: restart it, or cancel the replay"
        async with self._database.read() as connection:
            seen = await workers.find_runs(connection)
        lanes = set(map(destination_lane, unknown))
        if any(each.is_running and lanes <= set(each.lanes) for each in seen):
            # Another worker may have newer settings.
            raise TransientError(message, reason="settings")
        raise SettingsError(message)

    async def _plan(self, order: ReplayOrder) -> _Plan:
        """Select the next events, and find their destinations and the files to download again."""
        size = self._pace.step_events
        async with self._database.read() as connection:
            page, reached = await replays.select_events(
                connection,
                Selection.model_validate(order.selection),
                replays.Scope(after_seq=order.after_seq, until_seq=order.until_seq),
                ordered_at=order.created_at,
                limit=size if order.rate is None else max(1, min(size, int(order.rate))),
            )
            facts = await load_facts(connection, page)
            files = await outbox.load_media(connection, [event.seq for event in page])
        wanted = Wanted()
        if order.media:
            # Failed generations have no files.
            by_event = {event.seq: files.get(event.seq, []) for event in page if event.status == "OK"}
            wanted = await find_wanted(
                self._database, self._storage, by_event, force=order.force, rules=self._rules
            )
        targets, routes = [self._targets[name] for name in order.destinations], Routes()
        for event, each in zip(page, facts, strict=True):
            is_fetching = event.state == "fetching" or event.seq in wanted.events
            routes.add(event.seq, targets, each, is_fetching=is_fetching)
        delay = 0.0 if order.rate is None else len(page) / order.rate
        return _Plan(reached=reached, handled=len(page), delay=delay, routes=routes, wanted=wanted)

    async def _apply(self, claim: Claim, order: ReplayOrder, plan: _Plan) -> int | None:
        """Carry out a step in one transaction; return how many files are to be downloaded again.

        Returns None if the lease was lost.
        """
        async with self._database.write() as connection:
            if not await replays.advance(
                connection, claim, after_seq=plan.reached, handled=plan.handled, delay=plan.delay
            ):
                return None
            downloads = await self._restart_downloads(connection, plan.wanted)
            insert = partial(outbox.insert_deliveries, connection, replay_id=order.id)
            ordered = await insert(plan.routes.due, due=True) + await insert(plan.routes.held, due=False)
            for seq in sorted({seq for seq, _ in plan.routes.held}):
                # The event's last file may have been stored since the plan was made.
                await outbox.release_held(connection, seq)
            await replays.add_counts(connection, order.id, ordered=ordered, downloads=downloads)
        return downloads

    async def _restart_downloads(self, connection: SqlConnection, wanted: Wanted) -> int:
        """Make files due for download, and hold the deliveries that wait for them; return how many files."""
        await replays.change_urls(connection, wanted.urls)
        seqs = await replays.restart_media(connection, wanted.files, intact=wanted.intact)
        seqs += await replays.add_media(connection, wanted.added)
        waiting = [name for name, target in self._targets.items() if target.waits_for_media]
        await outbox.hold(connection, set(seqs), waiting)
        return len(seqs)

    async def _failed(self, claim: Claim, error: Exception) -> None:
        """Try a step again, or end its replay if steps have failed for three days."""
        text = stored_text(error)
        is_transient = isinstance(error, TransientError)
        # Age alone does not decide, because a long replay may have worked until a moment ago. Attempts alone
        # do not either, because earlier releases counted each step.
        if claim.age >= GIVE_UP_SECONDS and claim.attempt >= MAX_FAILED_STEPS and not is_transient:
            await self._end(claim, state="failed", error=text)
            return
        log.warning("replay's step failed", replay_id=str(claim.id), error=text)
        attempts = claim.attempt - 1 if is_transient else claim.attempt
        delay = self._pace.failure_pause_seconds
        await self._record(claim, _put_back(claim, delay=delay, error=text, attempts=attempts))

    async def _end(self, claim: Claim, *, state: str, error: str | None = None) -> None:
        finish = partial(leases.finish, table=tables.replays, held=claim, state=state, error=error)
        if await self._record(claim, finish):
            log.info("replay ended", replay_id=str(claim.id), state=state)


def _put_back(
    claim: Claim, *, delay: float, error: str | None = None, attempts: int = 0
) -> Callable[[SqlConnection], Awaitable[bool]]:
    return partial(
        leases.retry, table=tables.replays, held=claim, delay=delay, error=error, attempts=attempts
    )
