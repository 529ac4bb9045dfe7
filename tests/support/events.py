"""Events, destinations and workers inside a test, with a real database, folder and CDN."""

import asyncio
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from cloudevents.core.v1.event import CloudEvent
from sqlalchemy import ColumnElement, FromClause, Table, select, update

from receiver import background
from receiver.core.lane_names import Wake, wake_no_lane
from receiver.core.output_files import FileRules
from receiver.core.retry import RetryPolicy
from receiver.db import jobs, sources, tables
from receiver.db.clock import db_time
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.postgresql import Statements
from receiver.db.rows import NewEvent, NewJob, digest_token, new_id
from receiver.db.statements import insert_unless_taken
from receiver.db.tables import deliveries, events
from receiver.db.views import ReplayCounts, ReplayDetails
from receiver.destination_settings import FilterSettings
from receiver.errors import PublishFailed, PublishRejected
from receiver.ingest import make_event
from receiver.lanes.base import LEASE_SECONDS, Lane
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.destination_states import DestinationStates
from receiver.lanes.fan_out import FanOut
from receiver.lanes.media import STORAGE_PAUSE_SECONDS, FreshUrl, MediaLane
from receiver.lanes.replay import ReplayLane, ReplayPace
from receiver.lanes.targets import Target
from receiver.lanes.worker import Timing, Wakeups, Worker
from receiver.media import Downloader, MediaHosts, open_storage
from receiver.replays import MAX_CANCELED, ReplayRequest, Replays
from receiver.tracing import OFF, Tracer
from support.payloads import body

SECONDS = 20.0
RETRY = RetryPolicy(initial=0.05, cap=0.05)

T = TypeVar("T")


async def until(find: Callable[[], Awaitable[T | None]], *, seconds: float = SECONDS) -> T:
    """Call `find` until it returns something."""
    deadline = time.monotonic() + seconds
    while not (found := await find()):
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)
    return found


def driver_of(database: Database) -> Statements:
    """Return the connection for single statements of a PostgreSQL database."""
    assert database.statements is not None
    return database.statements


class Recorder:
    """A destination inside the test, which records what is published and can be made to fail."""

    concurrency = 32

    def __init__(self) -> None:
        self.published: list[CloudEvent] = []
        self.behave: Callable[[CloudEvent], Any] = lambda _event: None
        self.under_way = 0

    async def start(self) -> None:
        """Do no work: there is no connection."""

    async def check(self) -> None:
        """Pass."""

    async def close(self) -> None:
        """Do no work: there is no connection."""

    async def publish(self, event: CloudEvent) -> None:
        """Confirm, unless `behave` says otherwise."""
        self.under_way += 1
        try:
            outcome = self.behave(event)
            if outcome is not None:
                await outcome
        finally:
            self.under_way -= 1
        self.published.append(event)

    @property
    def subjects(self) -> list[str]:
        """The request ids that were confirmed."""
        return [str(event.get_subject()) for event in self.published]

    def replayed(self, replay_id: uuid.UUID) -> list[CloudEvent]:
        """Return the confirmed messages of one replay."""
        return [event for event in self.published if event.get_extension("replayid") == str(replay_id)]


class GroupRecorder(Recorder):
    """A destination that takes groups, as a file and Redis do."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[int] = []
        self.at_once = sys.maxsize

    async def publish_first(
        self, events: Sequence[CloudEvent]
    ) -> Sequence[PublishFailed | PublishRejected | None]:
        """Confirm up to `at_once` events, unless `behave` says otherwise of one."""
        events = events[: self.at_once]
        self.groups.append(len(events))
        results = await asyncio.gather(*map(self.publish, events), return_exceptions=True)
        failures: list[PublishFailed | PublishRejected | None] = []
        for result in results:
            if result is not None and not isinstance(result, PublishFailed | PublishRejected):
                raise result
            failures.append(result)
        return failures


@asynccontextmanager
async def running(*workers: Worker) -> AsyncIterator[None]:
    """Run workers inside the block."""
    tasks = [asyncio.create_task(each.run()) for each in workers]
    try:
        yield
    finally:
        for each in workers:
            each.stop()
        await asyncio.gather(*tasks)


async def insert_event(connection: SqlConnection, event: NewEvent) -> int | None:
    """Insert an event in a transaction, and return its `seq`, or None if its id is taken."""
    seq = await insert_unless_taken(connection, tables.events, event.columns())
    if seq is not None:
        await sources.add(connection, event.source)
    return seq


class World:
    """A database, a storage folder, destinations, and workers for them."""

    def __init__(self, database: Database, folder: Path, *media_hosts: str) -> None:
        self.database = database
        self.targets: list[Target] = []
        self.recorders: dict[str, Recorder] = {}
        self.fresh_url: FreshUrl | None = None
        self.rules = FileRules()
        self.replay_pace = ReplayPace()
        self.max_canceled = MAX_CANCELED
        self.timing = Timing()
        self.tracer: Tracer = OFF
        self.shares_states = False
        self.states_of_workers: list[DestinationStates] = []
        self.lease_seconds = LEASE_SECONDS
        self.storage_pause_seconds = STORAGE_PAUSE_SECONDS
        self.folder = folder
        self.storage = open_storage(f"file:{folder}")
        self.downloader = Downloader(
            hosts=MediaHosts.parse(media_hosts or ("media.clipia.ai",)), storage=self.storage
        )

    def add_destination(
        self,
        name: str,
        *,
        waits_for_media: bool = True,
        retry: RetryPolicy = RETRY,
        recorder: Recorder | None = None,
        **wanted: Any,
    ) -> Recorder:
        """Configure a destination; `wanted` is its filter."""
        recorder = self.recorders[name] = recorder or Recorder()
        target = Target(
            name=name,
            destination=recorder,
            waits_for_media=waits_for_media,
            retry=retry,
            filter=FilterSettings(**wanted),
        )
        self.targets.append(target)
        return recorder

    @property
    def replays(self) -> Replays:
        """Return the replays of the destinations that are configured now."""
        filters = {target.name: target.filter for target in self.targets}
        return Replays(self.database, filters, max_canceled=self.max_canceled)

    def replay_lane(self, wake: Wake = wake_no_lane) -> ReplayLane:
        """Return a replay lane that the test runs by itself."""
        return ReplayLane(
            self.database,
            self.targets,
            self.storage,
            wake=wake,
            rules=self.rules,
            pace=self.replay_pace,
        )

    def delivery_lane(self, index: int = 0, *, concurrency: int = 32) -> DeliveryLane:
        """Return a destination's lane that the test runs by itself."""
        return DeliveryLane(self.database, self.targets[index], wake=wake_no_lane, concurrency=concurrency)

    def media_lane(self, wake: Wake = wake_no_lane) -> MediaLane:
        """Return a media lane that the test runs by itself."""
        return MediaLane(
            self.database,
            self.downloader,
            wake=wake,
            fresh_url=self.fresh_url,
            storage_pause_seconds=self.storage_pause_seconds,
            tracer=self.tracer,
        )

    def worker(
        self,
        *,
        drain: float = 5.0,
        wakeups: Wakeups | None = None,
        states: DestinationStates | None = None,
    ) -> Worker:
        """Return a worker with all lanes."""
        wakeups = wakeups or Wakeups()
        lanes: list[Lane] = [
            self.media_lane(wakeups.wake),
            *(
                DeliveryLane(self.database, target, wake=wakeups.wake, states=states, tracer=self.tracer)
                for target in self.targets
            ),
            self.replay_lane(wakeups.wake),
        ]
        for lane in lanes:
            lane.lease_seconds = self.lease_seconds
        fan_out = FanOut(self.database, self.targets, wake=wakeups.wake, rules=self.rules, tracer=self.tracer)
        return Worker(fan_out, lanes, wakeups, timing=replace(self.timing, drain_seconds=drain))

    @asynccontextmanager
    async def working(self, *, count: int = 1, drain: float = 5.0) -> AsyncIterator[None]:
        """Run workers inside the block; with `shares_states` each follows the states of destinations."""
        async with AsyncExitStack() as stack:
            for _ in range(count):
                wakeups, states = Wakeups(), None
                if self.shares_states:
                    states = DestinationStates(self.database, wake=wakeups.wake)
                    await states.refresh()
                    self.states_of_workers.append(states)
                    task = background.running(states.run(wakeups), name="states")
                    await stack.enter_async_context(task)
                worker = self.worker(drain=drain, wakeups=wakeups, states=states)
                await stack.enter_async_context(running(worker))
            yield

    async def add(
        self,
        content: bytes,
        *,
        source: str = "clipia",
        job_id: uuid.UUID | None = None,
        token: str | None = None,
    ) -> None:
        """Store an event as ingest does; `job_id` and `token` are those of the callback's path."""
        digest = None if token is None else digest_token(token)
        event = make_event(source, content, received_at=time.time(), job_id=job_id, path_token=digest)
        async with self.database.write() as connection:
            await insert_event(connection, event)

    async def fan_out(self) -> None:
        """Move all events out of `received`."""
        fan_out = FanOut(self.database, self.targets, wake=wake_no_lane, rules=self.rules)
        while await fan_out.run(limit=1000):
            pass

    async def add_history(self, *contents: bytes) -> None:
        """Store events that were delivered to all their destinations a minute ago."""
        for content in contents:
            await self.add(content)
        await self.fan_out()
        await self.change(
            deliveries, state="delivered", attempts=1, next_attempt_at=None, finished_at=db_time(-60.0)
        )

    async def add_job(
        self,
        name: str,
        *,
        caller: str = "shop",
        source: str = "clipia",
        request_id: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> uuid.UUID:
        """Store a job with its name as its token; without a `request_id` it is still being submitted."""
        job = NewJob(
            id=new_id(),
            caller=caller,
            idempotency_key=name,
            fingerprint="0" * 64,
            source=source,
            model="m",
            request=b"{}",
            has_webhook=True,
            provider_key=uuid.uuid4(),
            metadata=dict(metadata or {}),
            max_cost=None,
            cost=None,
            account="live-kit",
            path_token=digest_token(name),
        )
        async with self.database.write() as connection:
            assert await jobs.insert(connection, job)
        state = "pending" if request_id is None else "submitted"
        mine = tables.jobs.c.id == job.id
        await self.change(tables.jobs, mine, state=state, request_id=request_id, sent_at=db_time(0.0))
        return job.id

    async def order(self, *, key: str | None = None, caller: str = "ops", **values: Any) -> ReplayDetails:
        """Order a replay, of all events unless there is a selection."""
        return await self.replays.order(_request(values), key=key, caller=caller)

    async def dry_run(self, **values: Any) -> ReplayCounts:
        """Return the result of a dry run."""
        return await self.replays.dry_run(_request(values))

    async def until_replayed(self, order: Mapping[str, Any]) -> ReplayDetails:
        """Wait until a replay has ended and none of its deliveries is pending."""

        async def find_ended() -> ReplayDetails | None:
            found = await self.replays.show(order["id"])
            assert found is not None
            pending = any("pending" in counts for counts in found["deliveries"].values())
            return None if pending or found["state"] == "pending" else found

        return await until(find_ended)

    async def rows(self, table: FromClause, *where: ColumnElement[bool]) -> list[dict[str, Any]]:
        """Return the rows of a table, in the order of their insertion."""
        order = table.c.seq if "seq" in table.c else table.c.id
        async with self.database.read() as connection:
            found = await connection.execute(select(table).where(*where).order_by(order))
            return [dict(row) for row in found.mappings()]

    async def states(self, table: Table, *where: ColumnElement[bool]) -> Counter[str]:
        """Count the rows of a table by their state."""
        return Counter(row["state"] for row in await self.rows(table, *where))

    async def until_states(self, table: Table, *where: ColumnElement[bool], **counts: int) -> None:
        """Wait until the rows of a table have these states, and no others."""

        async def are_reached() -> bool:
            return await self.states(table, *where) == counts

        try:
            await until(are_reached)
        except AssertionError:
            raise AssertionError(f"{await self.states(table, *where)}, wanted {counts}") from None

    async def change(self, table: Table, *where: ColumnElement[bool], **values: Any) -> None:
        """Change rows of a table."""
        async with self.database.write() as connection:
            await connection.execute(update(table).where(*where).values(**values))

    async def sent_to(self) -> set[tuple[str, str]]:
        """Return (request id, destination) of each delivery, in any state."""
        statement = select(events.c.request_id, deliveries.c.destination).join(
            events, deliveries.c.event_seq == events.c.seq
        )
        async with self.database.read() as connection:
            return {(row[0], row[1]) for row in await connection.execute(statement)}


def _request(values: Mapping[str, Any]) -> ReplayRequest:
    return ReplayRequest.model_validate({"all": not values.get("selection"), **values})


@asynccontextmanager
async def opened(database: Database, folder: Path, *media_hosts: str) -> AsyncIterator[World]:
    """Open a world without destinations."""
    world = World(database, folder, *media_hosts)
    await world.downloader.start()
    try:
        yield world
    finally:
        await world.downloader.close()
        await world.storage.close()


def plain(request_id: str, *, model: str = "m") -> bytes:
    """Return the body of an event without files."""
    return body(request_id, payload={"model": model, "output": {}, "cost": 1})


def with_files(cdn: str, request_id: str, *paths: str) -> bytes:
    """Return the body of an event with images of a CDN."""
    images = [{"url": f"{cdn}{path}", "width": 1, "height": 1} for path in paths]
    return body(request_id, payload={"model": "m", "output": {"images": images}, "cost": 3})
