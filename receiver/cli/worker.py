"""`receiver worker`: a worker without a web process."""

import asyncio
import signal

import uvloop

from receiver.cli.database import opened_database
from receiver.cli.heartbeat import beating
from receiver.lanes.worker import Wakeups
from receiver.logs import configure_logging
from receiver.process import Parts, collect_garbage_less, prepare, running_worker
from receiver.settings import Settings
from receiver.submitter import Submitter


def worker() -> None:
    """Save media, forward events and submit jobs; any number of workers may share a PostgreSQL database.

    On SIGTERM the worker claims no new work, and finishes or releases the work that it has.
    """
    settings = Settings.load()
    configure_logging(level=settings.log_level)
    Parts.make(settings)
    uvloop.run(_run(settings))


async def _run(settings: Settings) -> None:
    async with beating("worker"), opened_database(settings) as database:
        await prepare(settings)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        wakeups = Wakeups()
        submitter = Submitter.configured(settings, database, wake=wakeups.wake)
        try:
            async with running_worker(settings, database, wakeups, submitter):
                collect_garbage_less()
                await stop.wait()
        finally:
            await submitter.close()
