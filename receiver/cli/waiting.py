"""What commands that wait share: a time limit, and that they end if no worker does what they wait for."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Final

import typer

from receiver.core.lane_names import POLL_LANE, SUBMIT_LANE, destination_lane
from receiver.db.workers import SeenWorker

NOBODY_WORKS: Final = 3
"""Exit status of a command that has stopped waiting because no worker does what it waits for."""
TIMED_OUT: Final = 124
"""Exit status of a command whose time is over, as that of `timeout`."""
GRACE: Final = 10.0
"""Seconds for which workers may be missing: they may be starting right now."""

Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", min=0.0, help=f"Stop waiting after this time; exit status {TIMED_OUT}."),
]


class GaveUp(Exception):
    """A wait ended without what was waited for; `status` is the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Patience:
    """Tells a command that waits when to stop."""

    def __init__(self, timeout: float | None) -> None:
        """`timeout` counts from now, in seconds; None is no limit."""
        self._timeout = math.inf if timeout is None else timeout
        self._began = time.monotonic()
        self._missing_since: float | None = None

    @property
    def left(self) -> float:
        """Seconds until the time is over."""
        return max(0.0, self._began + self._timeout - time.monotonic())

    def check(self, missing: str | None) -> None:
        """Raise GaveUp if the time is over, or if something has been missing for a while."""
        now = time.monotonic()
        if missing is None:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        elif now - self._missing_since > GRACE:
            raise GaveUp(missing, NOBODY_WORKS)
        if not self.left:
            raise GaveUp(f"the {self._timeout:g} seconds of --timeout are over", TIMED_OUT)


def find_missing(
    seen: Sequence[SeenWorker], lanes: Iterable[str], *, account: str | None = None
) -> str | None:
    """Return in words what is missing so that all of these lanes run; None if they do.

    Jobs of a live `account` are submitted and polled by workers with a live key only, and those of a test
    account by workers with a test key.
    """
    running = [worker for worker in seen if worker.is_running]
    if not running:
        return "no worker is running on this database: start `receiver serve` or `receiver worker`"
    kind = (account or "").partition("-")[0]
    for lane in lanes:
        able = [worker for worker in running if lane in worker.lanes]
        if lane in (SUBMIT_LANE, POLL_LANE):
            if not able:
                return (
                    f"{name_of(running[0])} is running without CLIPIA_KEY, and so it neither submits jobs "
                    "nor asks Clipia for results: restart it with CLIPIA_KEY"
                )
            if not any((worker.account or "").startswith(kind) for worker in able):
                return (
                    f"{name_of(able[0])} is running with a CLIPIA_KEY that is no {kind} key: restart it "
                    "with the key of this command"
                )
        elif not able:
            what = f"the destination {lane.removeprefix(destination_lane(''))!r}"
            return f"no running worker has {what}: restart the workers with the settings of this command"
    return None


def name_of(worker: SeenWorker) -> str:
    """Return words for a process that works."""
    return f"process {worker.pid} on {worker.host}"
