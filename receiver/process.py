"""The parts of a process: they are opened in order and closed in reverse."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

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
from receiver.db.signals import listen
from receiver.destination_settings import DestinationSettings
from receiver.destinations import Destination, open_for_work, started
from receiver.errors import StorageUnavailable
from receiver.ingest import Ingest
from receiver.lanes.alerts import AlertLane
from receiver.lanes.attempts import logged_failures
from receiver.lanes.base import Lane
from receiver.lanes.delivery import DeliveryLane
from receiver.lanes.destination_states import DestinationStates
from receiver.lanes.fan_out import FanOut
from receiver.lanes.fresh_urls import FreshUrls
from receiver.lanes.media import MediaLane
from receiver.lanes.poll import PollLane
from receiver.lanes.removed_destinations import giving_up
from receiver.lanes.replay import ReplayLane
from receiver.lanes.targets import Target
from receiver.lanes.worker import Wakeups, Worker
from receiver.lanes.worker_presence import present
from receiver.media import Downloader, MediaHosts, Storage, open_storage
from receiver.rejections import Rejections
from receiver.replays import Replays
from receiver.settings import Settings
from receiver.submitter import Submitter

log = structlog.get_logger()


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
            rules=FileRules(
                skip_reason=hosts.skip_reason,
                max_files=settings.media_max_files,
                max_url_length=settings.media_max_url_length,
            ),
            downloader=Downloader(
                hosts=hosts,
                storage=storage,
                ca=settings.media_ca,
                proxy=settings.media_proxy.get_secret_value() if settings.media_proxy else None,
            ),
            destinations={each.name: open_for_work(each) for each in settings.every_destination},
        )


async def prepare(settings: Settings) -> None:
    """Check the database before anything is served; bring an SQLite schema up to date.

    Raises SettingsError, with advice for the operator, and DatabaseUnavailable.
    """
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
) -> AsyncIterator[Worker]:
    """Open storage and destinations, run a worker inside the block, and drain it at the end."""
    async with AsyncExitStack() as stack:
        worker = await _open_worker(settings, database, wakeups, submitter, stack)
        if database.statements is not None:
            await stack.enter_async_context(running(listen(database.statements, wakeups.wake), name="listen"))
        names = [each.name for each in settings.all_destinations]
        await stack.enter_async_context(giving_up(database, names))
        await stack.enter_async_context(watching(settings, database, wake=wakeups.wake))
        account = submitter.client.account if submitter.lane is not None else None

        async def work() -> None:
            # `present` is inside the task: a worker that has failed must not be reported as running.
            async with present(database, worker.lanes, account=account):
                await worker.run()

        task = asyncio.create_task(work(), name="worker")
        try:
            yield worker
        finally:
            worker.stop()
            await task


async def _open_worker(
    settings: Settings, database: Database, wakeups: Wakeups, submitter: Submitter, stack: AsyncExitStack
) -> Worker:
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
    down = await stack.enter_async_context(started(parts.destinations))
    targets = [
        make_target(
            each,
            parts.destinations[each.name],
            is_down=each.name in down,
            internal_url=settings.internal_url,
        )
        for each in settings.all_destinations
    ]
    if not targets:
        log.warning("no destination is configured: events are stored and not forwarded")
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
        ),
        *(DeliveryLane(database, target, wake=wakeups.wake, states=states) for target in targets),
        ReplayLane(database, targets, parts.storage, wake=wakeups.wake, rules=parts.rules),
        *_job_lanes(settings, database, wakeups, submitter),
        *(
            AlertLane(database, each.name, parts.destinations[each.name], wake=wakeups.wake)
            for each in settings.alert_destinations
        ),
    ]
    return Worker(FanOut(database, targets, wake=wakeups.wake, rules=parts.rules), lanes, wakeups)


def _job_lanes(settings: Settings, database: Database, wakeups: Wakeups, submitter: Submitter) -> list[Lane]:
    if submitter.lane is None:
        return []
    ingest = make_ingest(settings, database, wakeups)

    async def store(source: str, body: bytes) -> None:
        await ingest.record_result(source, body)

    poll = PollLane(
        database, submitter.client, store=store, wake=wakeups.wake, poll_after=settings.poll_after
    )
    return [submitter.lane, poll]


def make_ingest(
    settings: Settings, database: Database, wakeups: Wakeups, *, clock: Callable[[], float] = time.time
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
        internal_url=internal_url,
    )


def make_replays(settings: Settings, database: Database, *, wake: Wake = wake_no_lane) -> Replays:
    """Make the service that orders replays to the destinations of the settings."""
    filters = {each.name: each.filter for each in settings.all_destinations}
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
