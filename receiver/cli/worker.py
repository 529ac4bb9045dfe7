"""`receiver worker`: a worker without a web process."""

import asyncio
import signal
import socket
from collections.abc import Sequence

import uvloop

from receiver.api.metrics import Metrics, serving_metrics
from receiver.background import running
from receiver.cli.database import opened_database
from receiver.cli.heartbeat import beating
from receiver.cli.listeners import MetricsHost, MetricsPort, bind_metrics
from receiver.cli.remote import local_only
from receiver.lanes.worker import Wakeups
from receiver.logs import configure_logging
from receiver.process import check_parts, collect_garbage_less, prepare, running_worker
from receiver.reload import Reloader, accept_reloads, hold_reloads, is_hangup
from receiver.settings import Settings
from receiver.submitter import Submitter
from receiver.tracing import require_tracing, start_tracing


@local_only("it runs a worker on this machine")
def worker(metrics_port: MetricsPort = None, metrics_host: MetricsHost = "127.0.0.1") -> None:
    """Save media, forward events and submit jobs; any number of workers may share a PostgreSQL database.

    On SIGTERM the worker claims no new work, and finishes or releases the work that it has. On SIGHUP it
    reads the destinations of receiver.toml again, unless its terminal was closed: then it ends.
    """
    hold_reloads()
    settings = Settings.load()
    configure_logging(level=settings.log_level)
    require_tracing()
    asyncio.run(check_parts(settings))
    listeners = [each for group in bind_metrics(metrics_host, metrics_port) for each in group]
    uvloop.run(_run(settings, listeners))


async def _run(settings: Settings, listeners: Sequence[socket.socket]) -> None:
    async with beating("worker"), opened_database(settings) as database:
        await prepare(settings)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        wakeups = Wakeups()
        tracer = start_tracing()
        submitter = Submitter.configured(settings, database, wake=wakeups.wake, tracer=tracer)
        try:
            metrics = Metrics.with_rows(settings, database, submitter)
            reloader = Reloader(settings)
            async with (
                running_worker(settings, database, wakeups, submitter) as found,
                running(reloader.run(), name="reload"),
                serving_metrics(metrics, listeners),
            ):
                reloader.replace = found.replace
                asyncio.get_running_loop().add_signal_handler(
                    signal.SIGHUP, lambda: stop.set() if is_hangup() else reloader.request()
                )
                accept_reloads()
                collect_garbage_less()
                await stop.wait()
        finally:
            await submitter.close()
            await tracer.close()
