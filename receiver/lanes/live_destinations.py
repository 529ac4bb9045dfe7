"""The destinations of a worker, each with its lanes. They can be replaced while the worker runs."""

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final, NamedTuple

import structlog

from receiver.core.lane_names import Wake, alert_lane, destination_lane
from receiver.db.database import Database
from receiver.destination_settings import DestinationSettings
from receiver.destinations import Destination, load_kind, open_for_work, started
from receiver.lanes.alerts import AlertLane
from receiver.lanes.attempts import logged_failures
from receiver.lanes.base import Lane
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.destination_states import DestinationStates
from receiver.lanes.fan_out import FanOut
from receiver.lanes.replay import ReplayLane
from receiver.lanes.targets import Target
from receiver.lanes.worker import Worker
from receiver.metrics import CIRCUIT_OPEN
from receiver.tracing import OFF, Tracer

MakeTarget = Callable[..., Target]

RELOAD_SECONDS: Final = 25.0
"""How long a reload waits for the lanes of old destinations. Later they end in the background: attempts with
a long `timeout`, or results that wait for the database, must not keep the next reload waiting."""

log = structlog.get_logger()


class Users(NamedTuple):
    """The parts of a worker that know its destinations."""

    worker: Worker
    fan_out: FanOut
    replay: ReplayLane


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A destination that is open."""

    settings: DestinationSettings
    target: Target
    closing: AsyncExitStack

    @property
    def takes_events(self) -> bool:
        """Whether it takes events, and not alerts alone."""
        return self.settings.alerts != "only"

    @property
    def lanes(self) -> list[str]:
        """The names of its lanes."""
        name = self.target.name
        alerts = [alert_lane(name)] if self.settings.alerts else []
        return [destination_lane(name), *alerts] if self.takes_events else alerts

    def serves(self, wanted: DestinationSettings) -> bool:
        """Return whether it can stay open. One with certificates cannot: their files may have changed."""
        # Not the models themselves: they also compare which headers are secret, as far as it was known then.
        return wanted.tls is None and self.settings.model_dump() == wanted.model_dump()


class LiveDestinations:
    """Opens, replaces and closes destinations with their lanes."""

    def __init__(
        self,
        database: Database,
        states: DestinationStates,
        *,
        wake: Wake,
        make_target: MakeTarget,
        tracer: Tracer = OFF,
    ) -> None:
        """`make_target` makes a Target of its settings, a destination, and `is_down`."""
        self._database = database
        self._states = states
        self._wake = wake
        self._make_target = make_target
        self._tracer = tracer
        self._open: dict[str, _Open] = {}
        self._working: dict[str, _Open] = {}
        """The destinations with lanes; an old one stays until its lanes have ended."""
        self._retiring = set[asyncio.Task[None]]()
        self._closing: list[AsyncExitStack] = []
        """One for each destination that is not closed yet, with those that are being opened or replaced."""

    @property
    def targets(self) -> list[Target]:
        """The destinations for fan-out and replays."""
        return [each.target for each in self._open.values() if each.takes_events]

    def make_lanes(self) -> list[Lane]:
        """Make the lanes of all destinations."""
        self._working = dict(self._open)
        return [lane for each in self._open.values() for lane in self._lanes_of(each)]

    def _lanes_of(self, opened: _Open) -> Iterator[Lane]:
        target = opened.target
        if opened.takes_events:
            yield DeliveryLane(
                self._database, target, wake=self._wake, states=self._states, tracer=self._tracer
            )
        if opened.settings.alerts:
            yield AlertLane(self._database, target.name, target.destination, wake=self._wake)

    async def start(
        self, settings: Iterable[DestinationSettings], destinations: Mapping[str, Destination]
    ) -> None:
        """Start the destinations of a process that starts; one that is down does not stop it."""
        opened = await self._start([(each, destinations[each.name]) for each in settings])
        self._open = {each.target.name: each for each in opened}

    async def replace(
        self, wanted: Sequence[DestinationSettings], users: Users, *, done: Callable[[], None]
    ) -> dict[str, list[str]]:
        """Open new and changed destinations, and close the others; return the names of each change.

        Raises SettingsError before anything has changed. `done` is called when the new ones are in use; then
        the lanes of the others end. A changed destination gets its new lane after that, so that its limits
        hold; if it is changed again meanwhile, only the newest one gets a lane.
        """
        fresh = await self._open_fresh([each for each in wanted if not self._serves(each)])
        opened = {each.target.name: each for each in await self._start(fresh)}
        before = self._open
        self._open = {each.name: opened.get(each.name) or before[each.name] for each in wanted}
        # Without an await in between: an event goes either to the old destinations or to the new ones.
        users.fan_out.targets = self.targets
        users.replay.replace_targets(self.targets)
        done()
        changed = before.keys() & opened.keys()
        removed = before.keys() - self._open.keys()
        for name in opened.keys() - self._working.keys():
            self._add_lanes(name, users)
        await self._retire_all([before[name] for name in sorted(changed | removed)], users)
        return {
            "added": sorted(opened.keys() - changed),
            "changed": sorted(changed),
            "removed": sorted(removed),
        }

    async def close(self) -> None:
        """Close all destinations; their lanes have ended."""
        await asyncio.gather(*self._retiring)
        await asyncio.gather(*(each.aclose() for each in self._closing))

    def _serves(self, wanted: DestinationSettings) -> bool:
        return wanted.name in self._open and self._open[wanted.name].serves(wanted)

    async def _open_fresh(
        self, wanted: Iterable[DestinationSettings]
    ) -> list[tuple[DestinationSettings, Destination]]:
        fresh: list[tuple[DestinationSettings, Destination]] = []
        try:
            for each in wanted:
                # In a thread: the import of a broker's client would keep webhooks waiting.
                await asyncio.to_thread(load_kind, each)
                fresh.append((each, open_for_work(each)))
        except BaseException:
            for _, destination in fresh:
                with contextlib.suppress(Exception):
                    await destination.close()
            raise
        return fresh

    async def _start(self, fresh: Iterable[tuple[DestinationSettings, Destination]]) -> list[_Open]:
        return list(await asyncio.gather(*(self._start_one(*each) for each in fresh)))

    async def _start_one(self, settings: DestinationSettings, destination: Destination) -> _Open:
        closing = AsyncExitStack()
        self._closing.append(closing)
        down = await closing.enter_async_context(started({settings.name: destination}))
        target = self._make_target(settings, destination, is_down=bool(down))
        return _Open(settings=settings, target=target, closing=closing)

    def _add_lanes(self, name: str, users: Users) -> None:
        self._working[name] = self._open[name]
        for lane in self._lanes_of(self._open[name]):
            users.worker.add(lane)

    async def _retire_all(self, old: Sequence[_Open], users: Users) -> None:
        tasks = [asyncio.create_task(self._retire(each, users), name="retire") for each in old]
        if not tasks:
            return
        self._retiring.update(tasks)
        for task in tasks:
            task.add_done_callback(self._retiring.discard)
        done, late = await asyncio.wait(tasks, timeout=RELOAD_SECONDS)
        if late:
            names = [each.target.name for each, task in zip(old, tasks, strict=True) if task in late]
            log.warning("old destinations still finish their work", names=names)
        for task in done:
            task.result()

    async def _retire(self, old: _Open, users: Users) -> None:
        """End the lanes of a destination, begin those of its successor, and close it."""
        name = old.target.name
        # One that was replaced before it had lanes is only closed.
        if self._working.get(name) is old:
            await asyncio.gather(*map(users.worker.remove, old.lanes))
            self._states.forget(name)
            with contextlib.suppress(KeyError):
                CIRCUIT_OPEN.remove(name)
            del self._working[name]
            if name in self._open:
                self._add_lanes(name, users)
        # The others have been replaced: an error of this one's library must not look like a failed reload.
        with logged_failures("destination not closed", destination=name):
            await old.closing.aclose()
        self._closing.remove(old.closing)
