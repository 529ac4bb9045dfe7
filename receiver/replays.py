"""Replay: stored events are sent again, as a durable order that workers carry out.

An order goes through its events by `seq`, a step at a time: the deliveries that a step adds and how far the
order has come are one transaction, so a process that dies in between leaves neither a gap nor a double.
"""

import asyncio
import hashlib
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Final, Self

import orjson
import structlog
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy.ext.asyncio import AsyncConnection

from receiver.core.output_files import FileRules
from receiver.core.request_checks import check_key
from receiver.core.retry import GIVE_UP_SECONDS
from receiver.core.routing import RoutingFacts, mismatch
from receiver.db import job_events, leases, outbox, replays, tables, workers
from receiver.db.database import Database
from receiver.db.rows import Claim, NewReplay, ReplayedEvent, ReplayOrder, new_id
from receiver.db.selection import Selection
from receiver.db.views import ReplayCounts, ReplayDetails, ReplayHead
from receiver.destination_settings import FilterSettings
from receiver.errors import RequestError, SettingsError, TransientError
from receiver.lanes.base import (
    LEASE,
    MAX_LOST,
    MEDIA_LANE,
    Target,
    Work,
    WorkLane,
    describe,
    destination_lane,
    facts_of,
)
from receiver.lanes.refetch import Wanted, find_wanted
from receiver.media import Storage

REPLAY_LANE: Final = "replay"
STEP: Final = 100
"""Events of one step at most."""
MOST_WAITING: Final = 1000
"""Unfinished deliveries of a replay, to the destination that has the fewest, beyond which it adds no more."""
PAUSE: Final = 0.5
"""Seconds until a replay that waits looks again."""
TROUBLE_PAUSE: Final = 5.0
"""Seconds until a step that failed is tried again."""
MOST_TROUBLE: Final = int(GIVE_UP_SECONDS / TROUBLE_PAUSE)
"""Steps in a row that may fail: three days of them."""
BATCH: Final = 5000
"""Deliveries that one transaction cancels at most."""

log = structlog.get_logger()


class ReplayRequest(BaseModel):
    """A replay as somebody orders it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    selection: Selection = Selection()
    all: bool = False
    """Whether an empty selection is meant: all events."""
    to: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    """Destinations; none given is all that are configured. A destination's filter holds for replays, too."""
    media: bool = False
    """Download again what is missing, no longer has its checksum or is no media."""
    force: bool = False
    """With `media`: download again what is intact, too."""
    rate: Annotated[float, Field(ge=0.001, le=100_000)] | None = None
    """Events per second at most."""
    reason: Annotated[str, Field(max_length=1000, pattern=r"^[^\x00]*$")] = ""

    @model_validator(mode="after")
    def _says_which(self) -> Self:
        # An empty list of ids is a caller's mistake, and not a wish for everything.
        if "ids" in self.selection.model_fields_set and not self.selection.ids:
            raise ValueError("selection.ids is empty")
        if "to" in self.model_fields_set and not self.to:
            raise ValueError("to is empty")
        if self.force and not self.media:
            raise ValueError("force needs media")
        if self.selection == Selection() and not self.all:
            raise ValueError('say which events: a selection, or "all": true')
        return self


class Replays:
    """Orders replays and looks at them."""

    def __init__(
        self,
        database: Database,
        filters: Mapping[str, FilterSettings],
        *,
        wake: Callable[[str], None] = lambda _lane: None,
    ) -> None:
        """Take the filters of the destinations that are configured, by name."""
        self._database = database
        self._filters = filters
        self._wake = wake

    async def order(self, request: ReplayRequest, *, key: str | None, caller: str) -> ReplayDetails:
        """Order a replay, or return the one that this caller's key already stands for.

        Raises RequestError for an unknown destination and for a key that stands for another order.
        """
        if key is not None:
            check_key(key)
        destinations = self._destinations(request)
        # Without `force` the fingerprint is that of the releases which did not know it.
        content = request.model_dump(mode="json", exclude=None if request.force else {"force"})
        order_id = new_id()
        order = NewReplay(
            id=order_id,
            caller=caller,
            idempotency_key=key or str(order_id),
            fingerprint=hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest(),
            reason=request.reason,
            selection=content["selection"],
            destinations=destinations,
            media=request.media,
            force=request.force,
            rate=request.rate,
        )
        # Counting takes long, and not in a transaction that writes.
        async with self._database.read() as connection:
            scope = await _find_scope(connection, request.selection)
            matched = await replays.count(connection, request.selection, scope)
        async with self._database.write() as connection:
            if not await replays.insert_order(connection, order, scope, matched=matched):
                known = await replays.find(connection, caller, order.idempotency_key)
                if known is None or known.fingerprint != order.fingerprint:
                    raise RequestError(
                        "this Idempotency-Key was used for another replay",
                        code="idempotency_key_reuse",
                    )
                order_id = known.id
            found = await replays.show(connection, order_id)
        if found is None:
            raise RequestError("the replay vanished while it was looked up", code="not_found")
        log.info("replay ordered", replay_id=str(order_id), by=caller, events=found["matched"])
        self._wake(REPLAY_LANE)
        return found

    async def dry_run(self, request: ReplayRequest) -> ReplayCounts:
        """Count the events that a replay would go through, and its deliveries by destination."""
        filters = {name: self._filters[name] for name in self._destinations(request)}
        counts: Counter[str] = Counter(dict.fromkeys(filters, 0))
        events = 0
        async with self._database.read() as connection:
            scope = await _find_scope(connection, request.selection)
        while scope.after_seq < scope.until_seq:
            async with self._database.read() as connection:
                page, reached = await replays.select_events(connection, request.selection, scope)
                facts = await _facts(connection, page)
            events += len(page)
            scope = replace(scope, after_seq=reached)
            counts.update(
                name for each in facts for name, wanted in filters.items() if mismatch(wanted, each) is None
            )
        return {"events": events, "deliveries": dict(counts)}

    async def show(self, replay_id: uuid.UUID) -> ReplayDetails | None:
        """Return a replay with its progress."""
        async with self._database.read() as connection:
            return await replays.show(connection, replay_id)

    async def list_orders(self, *, limit: int, before: int | None = None) -> list[ReplayHead]:
        """Return replays, newest first."""
        async with self._database.read() as connection:
            return await replays.list_orders(connection, limit=limit, before=before)

    async def cancel(self, replay_id: uuid.UUID, *, by: str) -> bool:
        """Stop a replay; False where there is nothing of it left to stop."""
        async with self._database.write() as connection:
            stopped = await replays.cancel(connection, replay_id)
        while True:
            async with self._database.write() as connection:
                dropped = await replays.drop_waiting(connection, replay_id, limit=BATCH)
            stopped |= dropped > 0
            if dropped < BATCH:
                break
        if stopped:
            log.warning("replay canceled", replay_id=str(replay_id), by=by)
        return stopped

    def _destinations(self, request: ReplayRequest) -> list[str]:
        if unknown := [name for name in request.to if name not in self._filters]:
            known = ", ".join(self._filters) or "none"
            raise RequestError(
                f"there is no destination {unknown[0]!r}; configured: {known}",
                code="invalid_request",
            )
        if not self._filters:
            raise RequestError("no destination is configured", code="invalid_request")
        return list(request.to or self._filters)


class ReplayLane(WorkLane):
    """Carries out replays, a step at a time."""

    def __init__(
        self,
        database: Database,
        targets: Collection[Target],
        storage: Storage,
        *,
        wake: Callable[[str], None],
        rules: FileRules | None = None,
    ) -> None:
        """`rules` say which files that were skipped are not skipped any more; without them, none."""
        super().__init__(database, tables.replays, name=REPLAY_LANE, concurrency=2, wake=wake)
        self._targets = {target.name: target for target in targets}
        self._storage = storage
        self._rules = rules

    async def claim(self, limit: int) -> list[Work]:
        """Claim replays that are due for their next step. Raises DatabaseUnavailable."""
        async with self._database.write() as connection:
            claimed = await replays.claim(connection, limit=limit, lease=LEASE)
        return [Work(claim=claim, run=partial(self._run, claim, order)) for claim, order in claimed]

    async def _run(self, claim: Claim, order: ReplayOrder) -> None:
        if claim.lost >= MAX_LOST:
            await self._end(claim, state="failed", error=f"its steps ended {claim.lost} workers")
            return
        try:
            await self._step(claim, order)
        except Exception as error:  # noqa: BLE001 - whatever happened belongs to this order, not to its lane
            message = describe(error)
            is_transient = isinstance(error, TransientError)
            # Not its age alone: a long replay may have gone on until a moment ago. And not the tries alone:
            # releases before this one counted each step.
            if claim.age >= GIVE_UP_SECONDS and claim.attempt >= MOST_TROUBLE and not is_transient:
                await self._end(claim, state="failed", error=message)
                return
            log.warning("replay held up", replay_id=str(claim.id), error=message)
            tries = claim.attempt - 1 if is_transient else claim.attempt

            async def put_back(connection: AsyncConnection) -> bool:
                return await self._later(
                    connection, claim, delay=TROUBLE_PAUSE, error=message, attempts=tries
                )

            await self._record(claim, put_back)

    async def _step(self, claim: Claim, order: ReplayOrder) -> None:
        if unknown := [name for name in order.destinations if name not in self._targets]:
            message = f"this worker has no destination {unknown[0]!r}: restart it, or cancel"
            if await self._others_have(unknown):
                # Their settings may be newer.
                raise TransientError(message, reason="settings")
            raise SettingsError(message)
        scope = replays.Scope(after_seq=order.after_seq, until_seq=order.until_seq)
        if scope.after_seq >= scope.until_seq:
            await self._end(claim, state="completed")
            return
        size = STEP if order.rate is None else max(1, min(STEP, int(order.rate)))
        if await self._is_crowded(order):
            async with self._database.write() as connection:
                await self._later(connection, claim, delay=PAUSE)
            return
        async with self._database.read() as connection:
            page, reached = await replays.select_events(
                connection,
                Selection.model_validate(order.selection),
                scope,
                ordered_at=order.created_at,
                limit=size,
            )
            facts = await _facts(connection, page)
            files = await outbox.load_media(connection, [event.seq for event in page])
        wanted = Wanted()
        if order.media:
            # The others have no files, or none any more.
            every = {event.seq: files.get(event.seq, []) for event in page if event.status == "OK"}
            wanted = await find_wanted(
                self._database, self._storage, every, force=order.force, rules=self._rules
            )
        due, held = self._deliveries(order, page, facts, wanted.events)
        delay = 0.0 if order.rate is None else len(page) / order.rate
        async with self._database.write() as connection:
            if not await replays.advance(
                connection, claim, after_seq=reached, handled=len(page), delay=delay
            ):
                log.warning("replay's step refused: lease lost", replay_id=str(order.id))
                return
            await replays.change_urls(connection, wanted.urls)
            loading = await replays.restart_media(connection, wanted.files, intact=wanted.intact)
            loading += await replays.add_media(connection, wanted.added)
            waiting = [name for name, target in self._targets.items() if target.waits_for_media]
            await outbox.hold(connection, set(loading), waiting)
            insert = partial(outbox.insert_deliveries, connection, replay_id=order.id)
            ordered = await insert(due, due=True) + await insert(held, due=False)
            for seq in sorted({seq for seq, _ in held}):
                # Its last file may have been settled since it was read.
                await outbox.release_held(connection, seq)
            await replays.add_counts(connection, order.id, ordered=ordered, downloads=len(loading))
        for name in {name for _, name in due}:
            self._wake(destination_lane(name))
        if loading:
            self._wake(MEDIA_LANE)
        asyncio.get_running_loop().call_later(delay, self._wake, REPLAY_LANE)

    async def _others_have(self, names: Collection[str]) -> bool:
        """Return whether another worker delivers to all of these destinations."""
        async with self._database.read() as connection:
            seen = await workers.seen(connection)
        lanes = {destination_lane(name) for name in names}
        return any(each.is_running and lanes <= set(each.lanes) for each in seen)

    async def _is_crowded(self, order: ReplayOrder) -> bool:
        async with self._database.read() as connection:
            return await replays.waiting(connection, order.id, order.destinations) >= MOST_WAITING

    def _deliveries(
        self,
        order: ReplayOrder,
        page: Sequence[ReplayedEvent],
        facts: Sequence[RoutingFacts],
        loading: Collection[int],
    ) -> tuple[list[tuple[int, str]], list[tuple[int, str]]]:
        """Return (event's `seq`, destination): those that are due, and those that wait for media."""
        due: list[tuple[int, str]] = []
        held: list[tuple[int, str]] = []
        for event, each in zip(page, facts, strict=True):
            for name in order.destinations:
                target = self._targets[name]
                if mismatch(target.filter, each) is not None:
                    continue
                fetching = event.state == "fetching" or event.seq in loading
                (held if target.waits_for_media and fetching else due).append((event.seq, name))
        return due, held

    async def _later(
        self,
        connection: AsyncConnection,
        claim: Claim,
        *,
        delay: float,
        error: str | None = None,
        attempts: int = 0,
    ) -> bool:
        return await leases.retry(
            connection, tables.replays, claim, delay=delay, error=error, attempts=attempts
        )

    async def _end(self, claim: Claim, *, state: str, error: str | None = None) -> None:
        async def write(connection: AsyncConnection) -> bool:
            return await leases.finish(connection, tables.replays, claim, state=state, error=error)

        if await self._record(claim, write):
            log.info("replay ended", replay_id=str(claim.id), state=state)


async def _facts(connection: AsyncConnection, page: Sequence[ReplayedEvent]) -> list[RoutingFacts]:
    refs = await job_events.load_refs(connection, [event.seq for event in page])
    return [facts_of(event, event.model, refs.get(event.seq)) for event in page]


async def _find_scope(connection: AsyncConnection, selection: Selection) -> replays.Scope:
    """Return what a selection may reach. Raises RequestError for ids that there are not."""
    if selection.ids and (unknown := await replays.find_unknown(connection, selection)):
        raise RequestError(
            f"there is no event {', '.join(map(repr, unknown[:5]))}{' …' if unknown[5:] else ''}",
            code="invalid_request",
        )
    return await replays.find_scope(connection, selection)
