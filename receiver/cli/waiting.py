"""Shared parts of the commands that wait: `--timeout`, and giving up if no worker does the work."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import typer

from receiver.core.lane_names import POLL_LANE, RETENTION_LANE, SUBMIT_LANE, destination_lane
from receiver.errors import UsageError
from receiver.exit_status import NO_WORKER, TIMED_OUT
from receiver.status import WorkerStatus

GRACE_SECONDS: Final = 10.0
"""How long a worker may be missing: it may be starting."""

Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0.0, help=f"Stop waiting after this time; exit status {TIMED_OUT}."),
]


class GaveUp(Exception):
    """The command stops waiting; `status` is its exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Patience:
    """Decides when a command stops waiting."""

    def __init__(self, timeout: float | None, *, waits: bool) -> None:
        """`timeout` is in seconds from now; None is no limit. Raises UsageError without --wait."""
        if timeout is not None and not waits:
            raise UsageError("--timeout needs --wait")
        self._timeout = math.inf if timeout is None else timeout
        self._began = time.monotonic()
        self._missing_since: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the timeout."""
        return max(0.0, self._began + self._timeout - time.monotonic())

    def check(self, missing: str | None) -> None:
        """Raise GaveUp after the timeout, or if something has been missing for GRACE_SECONDS."""
        now = time.monotonic()
        if missing is None:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since > GRACE_SECONDS:
            raise GaveUp(missing, NO_WORKER)
        if not self.left:
            raise GaveUp(f"the {self._timeout:g} seconds of --timeout are over", TIMED_OUT)


def find_missing(
    seen: Sequence[WorkerStatus], lanes: Iterable[str], *, live: bool | None = None
) -> str | None:
    """Return which worker is missing for these lanes, and how to start it; None if all of them run.

    Workers with a live key serve jobs of live keys alone, and workers with a test key those of test keys:
    `live` names the kind of key that is needed.
    """
    running = [worker for worker in seen if worker["running"]]
    if not running:
        return "no worker is running on this database: start `receiver serve` or `receiver worker`"
    missing = (_missing_for(lane, running, live) for lane in lanes)
    return next(filter(None, missing), None)


def _missing_for(lane: str, running: Sequence[WorkerStatus], live: bool | None) -> str | None:
    able = [worker for worker in running if lane in worker["lanes"]]
    if lane in (SUBMIT_LANE, POLL_LANE):
        return _missing_key(able, running, live)
    if able:
        return None
    if lane == RETENTION_LANE:
        return (
            "no running worker deletes old events: set RECEIVER_RETENTION_DAYS for the workers, too, and "
            "restart them"
        )
    name = lane.removeprefix(destination_lane(""))
    return f"no running worker has the destination {name!r}: restart the workers with this command's settings"


def _missing_key(
    able: Sequence[WorkerStatus], running: Sequence[WorkerStatus], live: bool | None
) -> str | None:
    if not able:
        return (
            f"{process_name(running[0])} is running without CLIPIA_KEY, so it neither submits jobs nor polls "
            "their results: restart it with CLIPIA_KEY"
        )
    if live is None or any(worker["live"] is live for worker in able):
        return None
    kind = "live" if live else "test"
    return (
        f"{process_name(able[0])} is running with a CLIPIA_KEY that is not a {kind} key: restart it with the "
        "key of this command"
    )


def process_name(worker: WorkerStatus) -> str:
    """Return a name for the process of a worker."""
    return f"process {worker['pid']} on {worker['host']}"
