"""The status of the service on one screen, and the problems in it, each with the next command.

`receiver status` and `/v1/status` show it. It reads rows only, so it is the same from each machine; the disk
is that of the process that reads it.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal

# pydantic does not read the standard library's TypedDict before Python 3.12.
from typing_extensions import TypedDict

from receiver.core.lane_names import FAN_OUT_LANE, MEDIA_LANE, POLL_LANE, SUBMIT_LANE, destination_lane
from receiver.db import destinations, outbox, rejections, retention_runs, status, workers
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.destinations import Circuit
from receiver.db.retention_runs import RetentionRun
from receiver.db.rows import Backlog
from receiver.db.status import FailingFile, Rate
from receiver.destination_settings import DestinationSettings
from receiver.disks import LEAST_FREE_SHARE, DiskStatus, free_share, read_disks
from receiver.lanes.backlog import read_backlog
from receiver.settings import Settings
from receiver.submitter import Submitter
from receiver.submitter.job import is_live

JOB_HOURS: Final = 24
LATE_RETENTION: Final = timedelta(hours=6)
"""A run of retention that has not begun for this long is a problem."""
OLD_SECONDS: Final = 600.0
"""Rows that wait for longer are a problem, even if no attempt has failed."""


class LaneStatus(TypedDict):
    """Rows that a lane has not finished."""

    lane: str
    rows: int
    oldest_seconds: float


class PauseStatus(TypedDict):
    """An operator has paused a destination: events wait."""

    at: datetime
    by: str
    reason: str | None


class CircuitStatus(TypedDict):
    """A destination is down: processes send it probes only."""

    since: datetime
    processes: list[str]
    """Host and process id of those with an open circuit breaker."""
    error: str | None


class DestinationStatus(TypedDict):
    """Deliveries to one destination."""

    name: str
    configured: bool
    pending: int
    failing: int
    """Pending deliveries whose last attempt failed."""
    oldest_seconds: float
    dead: int
    delivered_per_minute: float
    failed_per_minute: float
    last_error: str | None
    pause: PauseStatus | None
    circuit: CircuitStatus | None


DestinationState = Literal["removed", "paused", "down", "failing", "ready"]


class FailingFiles(TypedDict):
    """Files whose last download failed; they are tried again."""

    number: int
    request_id: str
    """Of the event with the last of them."""
    error: str
    """Of its last attempt."""


class RetentionStatus(TypedDict):
    """Retention by `RECEIVER_RETENTION_DAYS`."""

    older_than_days: int
    next_at: datetime
    """The next run; in the past, if no worker has begun it."""


class WorkerStatus(TypedDict):
    """A worker process."""

    host: str
    pid: int
    lanes: list[str]
    running: bool
    seen_seconds_ago: float
    live: bool | None
    """Whether its CLIPIA_KEY is a live key; null without one."""


class Problem(TypedDict):
    """A sentence, and the command that shows more."""

    text: str
    command: str


class Status(TypedDict):
    """The service on one screen."""

    at: datetime
    database: str
    problems: list[Problem]
    last_webhook_at: datetime | None
    events_last_hour: list[int]
    """Events received in each minute, the newest minute last; fewer than 60 if more than 50,000 came."""
    delivered_last_hour: list[int]
    """Deliveries that succeeded in each minute; fewer minutes if there were more than 10,000 attempts."""
    failed_last_hour: list[int]
    """Attempts at deliveries that failed in the same minutes."""
    rejections_last_hour: dict[str, int]
    """Kept requests by cause."""
    jobs_last_day: dict[str, int]
    """Jobs made in the last 24 hours by state."""
    submissions_paused: bool
    lanes: list[LaneStatus]
    failing_files: FailingFiles | None
    retention: RetentionStatus | None
    """null if everything is kept until `receiver prune`."""
    last_retention: RetentionRun | None
    """The last run, of the schedule or of `receiver prune`."""
    retention_fails: bool
    """Whether that run failed, fails for now, or has made no progress for a day."""
    destinations: list[DestinationStatus]
    workers: list[WorkerStatus]
    disks: list[DiskStatus]


async def read_status(settings: Settings, database: Database, submitter: Submitter) -> Status:
    """Read the status. Raises DatabaseUnavailable."""
    now = datetime.now(UTC)
    backlog = await read_backlog(database, settings.all_destinations)
    paused = await submitter.paused()
    disks = await read_disks(settings, database)
    async with database.read() as connection:
        delivered, failed = await status.count_attempts(connection, now)
        found = Status(
            at=now,
            database=database.dialect_name,
            problems=[],
            last_webhook_at=await status.find_last_webhook(connection),
            events_last_hour=await status.count_events(connection, now),
            delivered_last_hour=delivered,
            failed_last_hour=failed,
            rejections_last_hour=await rejections.count_since(connection, now - timedelta(hours=1)),
            jobs_last_day=await status.count_jobs(connection, now - timedelta(hours=JOB_HOURS)),
            submissions_paused=paused,
            lanes=[
                LaneStatus(lane=lane, rows=backlog[lane].rows, oldest_seconds=round(backlog[lane].oldest, 1))
                for lane in (FAN_OUT_LANE, MEDIA_LANE, SUBMIT_LANE, POLL_LANE)
            ],
            failing_files=_failing_files(await status.find_failing_file(connection)),
            retention=await _read_retention(connection, settings.retention_days),
            last_retention=next(iter(await retention_runs.list_runs(connection, limit=1)), None),
            retention_fails=await retention_runs.find_failed(connection) is not None,
            destinations=await read_destinations(connection, settings.all_destinations, backlog),
            workers=await read_workers(connection),
            disks=disks,
        )
    found["problems"] = list(find_problems(found))
    return found


async def _read_retention(connection: SqlConnection, days: int | None) -> RetentionStatus | None:
    if days is None:
        return None
    return RetentionStatus(older_than_days=days, next_at=await retention_runs.next_due(connection))


def _failing_files(last: FailingFile | None) -> FailingFiles | None:
    if last is None:
        return None
    return FailingFiles(number=last.number, request_id=last.request_id, error=last.error)


async def read_destinations(
    connection: SqlConnection,
    settings: Sequence[DestinationSettings],
    backlog: Mapping[str, Backlog],
    *also: str,
) -> list[DestinationStatus]:
    """Return the destinations that are configured, are paused, or have deliveries, and `also` these.

    `backlog` is by lane.
    """
    configured = [each.name for each in settings]
    failing, dead = await status.count_failing(connection), await outbox.count_dead(connection)
    rates = await status.read_rates(connection)
    waiting = {
        lane.removeprefix(destination_lane("")) for lane in backlog if lane.startswith(destination_lane(""))
    }
    pauses = await _read_pauses(connection)
    circuits = await destinations.read_circuits(connection)
    found = []
    for name in sorted({*configured, *waiting, *dead, *pauses, *also}):
        pending = backlog.get(destination_lane(name), Backlog(rows=0, oldest=0.0))
        rate = rates.get(name, Rate(0.0, 0.0))
        has_failed = name in failing or name in dead
        found.append(
            DestinationStatus(
                name=name,
                configured=name in configured,
                pending=pending.rows,
                failing=failing.get(name, 0),
                oldest_seconds=round(pending.oldest, 1),
                dead=dead.get(name, 0),
                delivered_per_minute=round(rate.delivered, 1),
                failed_per_minute=round(rate.failed, 1),
                last_error=await status.find_last_error(connection, name) if has_failed else None,
                pause=pauses.get(name),
                circuit=_circuit([each for each in circuits if each.destination == name]),
            )
        )
    return found


async def _read_pauses(connection: SqlConnection) -> dict[str, PauseStatus]:
    return {
        name: PauseStatus(at=state.pause.at, by=state.pause.by, reason=state.pause.reason)
        for name, state in (await destinations.read_pauses(connection)).items()
        if state.pause is not None
    }


def _circuit(opened: Sequence[Circuit]) -> CircuitStatus | None:
    """Return the state of a destination by the circuits that processes have opened, the oldest first."""
    if not opened:
        return None
    return CircuitStatus(
        since=opened[0].open_since, processes=[each.owner for each in opened], error=opened[-1].error
    )


async def read_workers(connection: SqlConnection) -> list[WorkerStatus]:
    """Return the processes that work, or crashed lately."""
    return [
        WorkerStatus(
            host=run.host,
            pid=run.pid,
            lanes=run.lanes,
            running=run.is_running,
            seen_seconds_ago=round(run.age, 1),
            live=is_live(run.account),
        )
        for run in await workers.find_runs(connection)
    ]


def find_problems(found: Status) -> Iterator[Problem]:
    """Return the problems of a status, the most urgent first."""
    running = {lane for worker in found["workers"] if worker["running"] for lane in worker["lanes"]}
    if not running:
        yield Problem(text="no worker is running: nothing is forwarded", command="receiver worker")
    if found["submissions_paused"]:
        yield Problem(text="submissions are paused", command="receiver account")
    for each in found["destinations"]:
        is_served = not running or destination_lane(each["name"]) in running
        yield from _destination_problems(each, is_served=is_served)
    yield from _lane_problems(found["lanes"])
    if files := found["failing_files"]:
        text = f"downloads that fail: {files['number']}, the last one: {files['error']}"
        yield Problem(text=text, command=f"receiver events show {files['request_id']}")
    if unsure := found["jobs_last_day"].get("unsure"):
        text = f"jobs that may or may not have reached Clipia: {unsure}"
        yield Problem(text=text, command="receiver jobs list --state unsure")
    if rejected := sum(found["rejections_last_hour"].values()):
        text = f"rejected requests in the last hour: {rejected}"
        yield Problem(text=text, command="receiver rejections list")
    yield from _disk_problems(found["disks"])
    yield from _retention_problems(found)


def _retention_problems(found: Status) -> Iterator[Problem]:
    last, plan = found["last_retention"], found["retention"]
    if found["retention_fails"] and last is not None:
        why = last["error"] or f"no progress since {last['seen_at']:%Y-%m-%d %H:%M:%SZ}"
        yield Problem(text=f"the last run of retention fails: {why}", command="receiver retention list")
    elif plan is not None and found["at"] - plan["next_at"] > LATE_RETENTION:
        text = f"no worker has begun the run of retention of {plan['next_at']:%Y-%m-%d %H:%MZ}"
        yield Problem(text=text, command="receiver retention list")


def _lane_problems(lanes: Sequence[LaneStatus]) -> Iterator[Problem]:
    for lane in lanes:
        # A job is polled until its webhook comes, so its age says nothing.
        if lane["oldest_seconds"] > OLD_SECONDS and lane["lane"] != POLL_LANE:
            oldest = age(lane["oldest_seconds"])
            text = f"lane {lane['lane']}: {lane['rows']} waiting, the oldest for {oldest}"
            yield Problem(text=text, command=_LANE_COMMANDS[lane["lane"]])


def _disk_problems(disks: Sequence[DiskStatus]) -> Iterator[Problem]:
    for disk in disks:
        share, text = free_share(disk), f"the disk of {disk['path']} ({disk['holds']})"
        if share is None:
            yield Problem(text=f"{text} does not answer", command="receiver check")
        elif share < LEAST_FREE_SHARE:
            yield Problem(text=f"{text} has {share:.1%} left", command="receiver prune")


def state_of(each: DestinationStatus) -> DestinationState:
    """Return the state of a destination in one word, the first that is true."""
    if not each["configured"]:
        return "removed"
    if each["pause"] is not None:
        return "paused"
    if each["circuit"] is not None:
        return "down"
    return "failing" if each["failing"] else "ready"


def _destination_problems(each: DestinationStatus, *, is_served: bool) -> Iterator[Problem]:
    name, shown = each["name"], f"receiver deliveries list --destination {each['name']}"
    waiting = each["pending"] + each["dead"]
    if waiting and not each["configured"]:
        yield Problem(
            text=f"{name} is not configured any more: {waiting} pending or dead",
            command=f"receiver deliveries move {name} NEW",
        )
        return
    if each["pause"] or each["circuit"]:
        yield from _state_problems(each)
    elif each["failing"]:
        text = f"{name}: {each['failing']} of {each['pending']} pending fail: {each['last_error']}"
        yield Problem(text=text, command=f"{shown} --state pending")
    elif each["pending"]:
        yield from _waiting_problems(each, is_served=is_served)
    if each["dead"]:
        text = f"{name}: {each['dead']} dead, the last one: {each['last_error']}"
        yield Problem(text=text, command=f"{shown} --state dead")


def _waiting_problems(each: DestinationStatus, *, is_served: bool) -> Iterator[Problem]:
    """Return the problem of deliveries that wait for no reason of their destination."""
    waiting = f"{each['name']}: {each['pending']} pending"
    if not is_served:
        yield Problem(text=f"{waiting}, and no running worker serves it", command="receiver worker")
    elif each["oldest_seconds"] > OLD_SECONDS:
        command = f"receiver deliveries list --destination {each['name']} --state pending"
        yield Problem(text=f"{waiting}, the oldest for {age(each['oldest_seconds'])}", command=command)


def _state_problems(each: DestinationStatus) -> Iterator[Problem]:
    """Return the problem of a destination that is paused or down: the reason for all that waits."""
    name, circuit = each["name"], each["circuit"]
    if each["pause"] is not None:
        if each["pending"]:
            yield Problem(text=pause_text(each), command=f"receiver destinations resume {name}")
    elif circuit is not None:
        since = f"{circuit['since']:%H:%M:%SZ}"
        text = f"{name} is down since {since}, {each['pending']} pending: {circuit['error']}"
        yield Problem(text=text, command=f"receiver destinations test {name}")


def pause_text(each: DestinationStatus) -> str:
    """Return the pause of a destination and the number of deliveries that wait."""
    pause = each["pause"]
    if pause is None:
        return f"{each['name']} is not paused"
    reason = f" ({pause['reason']})" if pause["reason"] else ""
    since = f"{pause['at']:%Y-%m-%d %H:%M:%SZ}"
    return f"{each['name']} is paused by {pause['by']} since {since}{reason}: {each['pending']} wait"


_LANE_COMMANDS: Final = {
    FAN_OUT_LANE: "receiver worker",
    MEDIA_LANE: "receiver events list",
    SUBMIT_LANE: "receiver account",
}


def age(seconds: float) -> str:
    """Return a time span for people, in its largest unit."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
