"""The parts of a process: they are opened in order and closed in reverse."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial

import structlog

from receiver.alerts import watching
from receiver.background import running
from receiver.core.diagnosis import Known
from receiver.core.lane_names import FAN_OUT_LANE, Wake, wake_no_lane
from receiver.core.output_files import FileRules
from receiver.core.retry import RetryPolicy
from receiver.core.signature import Secret
from receiver.db import migrate
from receiver.db.database import Database
from receiver.db.retention_runs import Plan
from receiver.db.signals import listen
from receiver.destination_settings import ByName, DestinationSettings
from receiver.destinations import Destination, open_for_work
from receiver.errors import StorageUnavailable
from receiver.ingest import Ingest
from receiver.lanes.attempts import logged_failures
from receiver.lanes.base import Lane
from receiver.lanes.destination_states import DestinationStates
from receiver.lanes.fan_out import FanOut
from receiver.lanes.fresh_urls import FreshUrls
from receiver.lanes.live_destinations import LiveDestinations, Users
from receiver.lanes.media import MediaLane
from receiver.lanes.poll import PollLane
from receiver.lanes.removed_destinations import giving_up
from receiver.lanes.replay import ReplayLane
from receiver.lanes.retention import RetentionLane
from receiver.lanes.targets import Target
from receiver.lanes.worker import Wakeups, Worker
from receiver.lanes.worker_presence import present
from receiver.media import Downloader, MediaHosts, Storage, open_storage
from receiver.rejections import Rejections
from receiver.replays import Replays
from receiver.settings import Settings, unknown_variables
from receiver.submitter import Submitter
from receiver.tracing import OFF, Tracer

log = structlog.get_logger()


def file_rules(settings: Settings) -> FileRules:
    """Return the rules that say which files are downloaded. Raises SettingsError."""
    return FileRules(
        skip_reason=MediaHosts.parse(settings.media_hosts).skip_reason,
        max_files=settings.media_max_files,
        max_url_length=settings.media_max_url_length,
    )


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a worker beside the database; making them sends no request."""

    storage: Storage
    rules: FileRules
    downloader: Downloader
    destinations: dict[str, Destination]

    @classmethod
    def make(cls, settings: Settings) -> "Parts":
        """Make the parts. Raises SettingsError if one cannot be made from the settings."""
        storage = open_storage(settings.storage_url.get_secret_value())
        hosts = MediaHosts.parse(settings.media_hosts)
        return cls(
            storage=storage,
            rules=file_rules(settings),
            downloader=Downloader(
                hosts=hosts,
                storage=storage,
                ca=settings.media_ca,
                proxy=settings.media_proxy.get_secret_value() if settings.media_proxy else None,
            ),
            destinations={each.name: open_for_work(each) for each in settings.every_destination},
        )

    async def close(self) -> None:
        """Close the parts, which nothing has used."""
        closing = [each.close() for each in self.destinations.values()]
        await asyncio.gather(*closing, self.downloader.close(), self.storage.close(), return_exceptions=True)


async def check_parts(settings: Settings) -> None:
    """Raise SettingsError if a part of a worker cannot be made from the settings."""
    await Parts.make(settings).close()


@dataclass(frozen=True, kw_only=True)
class RunningWorker:
    """A worker with its destinations."""

    settings: Settings
    live: LiveDestinations
    users: Users

    @property
    def lanes(self) -> Sequence[str]:
        """The names of its lanes."""
        return self.users.worker.lanes

    async def replace(self, loaded: Settings) -> object:
        """Take the destinations of settings that were read again. Raises SettingsError before any change."""
        done = partial(self.settings.take_destinations, loaded)
        return await self.live.replace(loaded.every_destination, self.users, done=done)


async def prepare(settings: Settings) -> None:
    """Check the database before anything is served; bring an SQLite schema up to date.

    Raises SettingsError, with advice for the operator, and DatabaseUnavailable.
    """
    for name, closest in unknown_variables().items():
        log.warning("a variable is not a setting: is it mistyped?", variable=name, closest=closest)
    database = Database(settings.database_url.get_secret_value())
    try:
        await migrate.prepare(database, durable_without=settings.durable_without)
        if not database.is_sqlite and settings.durable_without:
            log.warning(
                "commits are as durable as the database's storage", without=list(settings.durable_without)
            )
        await database.probe()
    finally:
        await database.close()


@asynccontextmanager
async def running_worker(
    settings: Settings, database: Database, wakeups: Wakeups, submitter: Submitter
) -> AsyncIterator[RunningWorker]:
    """Open storage and destinations, run a worker inside the block, and drain it at the end."""
    async with AsyncExitStack() as stack:
        found = await _open_worker(settings, database, wakeups, submitter, stack)
        worker = found.users.worker
        if database.statements is not None:
            await stack.enter_async_context(running(listen(database.statements, wakeups.wake), name="listen"))
        names = ByName(lambda: settings.all_destinations, lambda each: each.name)
        await stack.enter_async_context(giving_up(database, names))
        await stack.enter_async_context(watching(settings, database, wake=wakeups.wake))
        account = submitter.client.account if submitter.lane is not None else None

        async def work() -> None:
            # `present` is inside the task: a worker that has failed must not be reported as running.
            async with present(database, worker.lanes, account=account):
                await worker.run()

        task = asyncio.create_task(work(), name="worker")
        try:
            yield found
        finally:
            worker.stop()
            await task


async def _open_worker(
    settings: Settings, database: Database, wakeups: Wakeups, submitter: Submitter, stack: AsyncExitStack
) -> RunningWorker:
    parts = Parts.make(settings)
    for origin in MediaHosts.parse(settings.media_hosts).development_origins:
        log.warning("media is fetched from a development origin, unguarded", origin=origin)
    stack.push_async_callback(parts.storage.close)
    try:
        await parts.storage.sweep()
    except StorageUnavailable as error:
        # Webhooks are accepted without the storage, and downloads are retried.
        log.error("storage not cleaned up", error=str(error))
    stack.push_async_callback(parts.downloader.close)
    await parts.downloader.start()
    states = DestinationStates(database, wake=wakeups.wake)
    with logged_failures("state of destinations not read"):
        # Before the first claim: a destination may be paused.
        await states.refresh()
    await stack.enter_async_context(running(states.run(wakeups), name="destination states"))
    live = LiveDestinations(
        database,
        states,
        wake=wakeups.wake,
        make_target=partial(make_target, internal_url=settings.internal_url),
        tracer=submitter.tracer,
    )
    stack.push_async_callback(live.close)
    await live.start(settings.every_destination, parts.destinations)
    targets = live.targets
    if not targets:
        log.warning("no destination is configured: events are stored and not forwarded")
    replay = ReplayLane(database, targets, parts.storage, wake=wakeups.wake, rules=parts.rules)
    fan_out = FanOut(database, targets, wake=wakeups.wake, rules=parts.rules, tracer=submitter.tracer)
    lanes: list[Lane] = [
        MediaLane(
            database,
            parts.downloader,
            wake=wakeups.wake,
            fresh_url=(
                FreshUrls(database, submitter.client, rules=parts.rules).find
                if submitter.lane is not None
                else None
            ),
            tracer=submitter.tracer,
        ),
        *live.make_lanes(),
        replay,
        *_retention_lanes(settings, database, wakeups, parts.storage),
        *_job_lanes(settings, database, wakeups, submitter),
    ]
    users = Users(Worker(fan_out, lanes, wakeups), fan_out, replay)
    return RunningWorker(settings=settings, live=live, users=users)


def _retention_lanes(
    settings: Settings, database: Database, wakeups: Wakeups, storage: Storage
) -> list[Lane]:
    if settings.retention_days is None:
        return []
    plan = Plan(
        older_than_days=settings.retention_days,
        media="media" in settings.retention_also,
        dead_letters="dead_letters" in settings.retention_also,
    )
    return [RetentionLane(database, plan, storage, wake=wakeups.wake)]


def _job_lanes(settings: Settings, database: Database, wakeups: Wakeups, submitter: Submitter) -> list[Lane]:
    if submitter.lane is None:
        return []
    ingest = make_ingest(settings, database, wakeups)

    async def store(source: str, body: bytes) -> None:
        await ingest.record_result(source, body)

    poll = PollLane(
        database,
        submitter.client,
        store=store,
        wake=wakeups.wake,
        poll_after=settings.poll_after,
        tracer=submitter.tracer,
    )
    return [submitter.lane, poll]


def make_ingest(
    settings: Settings,
    database: Database,
    wakeups: Wakeups,
    *,
    clock: Callable[[], float] = time.time,
    tracer: Tracer = OFF,
) -> Ingest:
    """Make the ingest of all sources; a source without a secret can record polled results only."""
    return Ingest(
        database,
        secrets={
            source.name: [Secret.from_text(text) for text in source.secrets]
            for source in settings.all_sources
        },
        tolerance=settings.signature_tolerance,
        clock=clock,
        on_accepted=lambda: wakeups.wake(FAN_OUT_LANE),
        tracer=tracer,
    )


def make_rejections(
    settings: Settings, database: Database, *, clock: Callable[[], float] = time.time, keep: bool
) -> Rejections:
    """Make the record of rejected requests; without `keep`, they are only counted and logged."""
    sources = settings.all_sources
    known = Known(
        secrets={each.name: [Secret.from_text(text) for text in each.secrets] for each in sources},
        retired={each.name: [Secret.from_text(text) for text in each.retired_secrets] for each in sources},
        tolerance=settings.signature_tolerance,
    )
    return Rejections(database, known, kept=settings.rejections_kept if keep else 0, clock=clock)


def make_target(
    settings: DestinationSettings,
    destination: Destination,
    *,
    is_down: bool = False,
    internal_url: str | None = None,
) -> Target:
    """Combine a destination with its settings for the lanes."""
    return Target(
        name=settings.name,
        destination=destination,
        waits_for_media=settings.when == "media_stored",
        retry=RetryPolicy(**settings.retry.model_dump()),
        filter=settings.filter,
        is_down=is_down,
        concurrency=settings.concurrency,
        rate=settings.rate,
        scheme=settings.url.get_secret_value().partition(":")[0].lower(),
        internal_url=internal_url,
    )


def make_replays(settings: Settings, database: Database, *, wake: Wake = wake_no_lane) -> Replays:
    """Make the service that orders replays to the destinations of the settings."""
    filters = ByName(lambda: settings.all_destinations, lambda each: each.filter)
    return Replays(database, filters, wake=wake)


def collect_garbage_less() -> None:
    """Let the cyclic garbage collector run less often in a process that has started."""
    # The objects made at start live as long as the process; each full collection would scan them for tens of
    # milliseconds. `freeze` takes them out of all collections.
    gc.collect()
    gc.freeze()
    # Webhooks and deliveries leave almost no reference cycles. With Python's threshold of 700 objects the
    # collections would take as long as the work itself.
    gc.set_threshold(50_000, 20, 100)
