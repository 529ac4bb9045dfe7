"""Alerts: each worker reads the conditions in turn, and writes messages for the destinations of alerts.

An alert and its messages are committed together, so a process that dies leaves either both or none. The lanes
`alerts:<destination>` send the messages.
"""

import asyncio
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

import structlog

from receiver.background import running
from receiver.core.alerting import RUNBOOKS, Alert, Finding, Told, observe, settle
from receiver.core.lane_names import POLL_LANE, Wake, alert_lane, destination_lane
from receiver.db import alerts, destinations, retention_runs, submission_freezes, workers
from receiver.db.alerts import Occurrences
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.destinations import Circuit
from receiver.db.rows import Backlog, new_id
from receiver.disks import LEAST_FREE_SHARE, DiskStatus, free_share, read_disks
from receiver.lanes.attempts import logged_failures
from receiver.lanes.backlog import read_backlog
from receiver.settings import Settings
from receiver.status import OLD_SECONDS, age
from receiver.submitter.account_status import read_account_status

ROUND_SECONDS: Final = 15.0
"""Pause between two readings of the conditions."""
LEAST_MISMATCHES: Final = 3
"""Rejected signatures of a source: one or two may be a stranger's."""
TYPES: Final[Mapping[Told, str]] = {
    "raised": "ai.clipia.receiver.alert.raised",
    "resolved": "ai.clipia.receiver.alert.resolved",
}

NONE: Final = Occurrences(0, None, None, ())

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The rows and disks that the conditions compare."""

    circuits: Sequence[Circuit] = ()
    paused: Collection[str] = ()
    """Destinations that an operator has paused: their events wait on purpose."""
    backlog: Mapping[str, Backlog] = field(default_factory=dict)
    dead_letters: Mapping[str, Occurrences] = field(default_factory=dict)
    unsure: Occurrences = NONE
    refused_accounts: Collection[str] = ()
    frozen_at: datetime | None = None
    mismatches: Mapping[str, Occurrences] = field(default_factory=dict)
    failed_pruning: datetime | None = None
    disks: Sequence[DiskStatus] = ()
    host: str = ""


def find_conditions(seen: Seen) -> Iterator[Finding]:
    """Return the conditions that hold."""
    yield from _destinations(seen)
    yield from _jobs(seen)
    for source, found in seen.mismatches.items():
        if found.number >= LEAST_MISMATCHES:
            yield Finding(
                kind="secret_mismatch",
                subject=source,
                text=f"no signature of {source} matches: the secret is wrong, or a forger calls",
                command=f"receiver rejections list --source {source}",
                count=found.number,
                first_at=found.first_at,
                examples=tuple(found.examples),
            )
    yield from _backlogs(seen)
    for disk in seen.disks:
        share = free_share(disk)
        if share is not None and share < LEAST_FREE_SHARE:
            yield Finding(
                kind="disk_nearly_full",
                subject=_disk_subject(seen.host, disk),
                text=f"the disk of {disk['path']} ({disk['holds']}) on {seen.host} has {share:.1%} left",
                command="receiver status",
            )
    if seen.failed_pruning is not None:
        yield Finding(
            kind="retention_failed",
            subject="prune",
            text="the last run of retention failed or did not end",
            command="receiver retention list",
            last_at=seen.failed_pruning,
        )


def _disk_subject(host: str, disk: DiskStatus) -> str:
    return f"{host}:{disk['path']}"[:255]


def _destinations(seen: Seen) -> Iterator[Finding]:
    down = dict[str, list[datetime]]()
    for circuit in seen.circuits:
        down.setdefault(circuit.destination, []).append(circuit.open_since)
    for name, times in down.items():
        waiting = seen.backlog.get(destination_lane(name), Backlog(rows=0, oldest=0.0)).rows
        yield Finding(
            kind="destination_down",
            subject=name,
            text=f"destination {name} is down, and {waiting} deliveries wait",
            command=f"receiver destinations test {name}",
            count=max(waiting, 1),
            first_at=min(times),
        )
    for name, found in seen.dead_letters.items():
        yield Finding(
            kind="dead_letters",
            subject=name,
            text=f"deliveries to {name} were given up: {found.number}",
            command=f"receiver deliveries list --destination {name} --state dead",
            count=found.number,
            first_at=found.first_at,
            last_at=found.last_at,
            examples=tuple(found.examples),
        )


def _jobs(seen: Seen) -> Iterator[Finding]:
    if seen.unsure.number:
        yield Finding(
            kind="jobs_unsure",
            subject="jobs",
            text=f"jobs that may or may not have reached Clipia: {seen.unsure.number}",
            command="receiver jobs list --state unsure",
            count=seen.unsure.number,
            first_at=seen.unsure.first_at,
            last_at=seen.unsure.last_at,
            examples=tuple(seen.unsure.examples),
        )
    for account in seen.refused_accounts:
        yield Finding(
            kind="submissions_paused",
            subject=account,
            text="Clipia refuses the account: no job is submitted",
            command="receiver account",
        )
    if seen.frozen_at is not None:
        yield Finding(
            kind="submissions_paused",
            subject="freeze",
            text="an operator has frozen submissions: no job is submitted",
            command="receiver account",
            first_at=seen.frozen_at,
        )


def _backlogs(seen: Seen) -> Iterator[Finding]:
    # A job is polled until its webhook comes, so its age says nothing. A destination that is down has its own
    # alert.
    expected = {POLL_LANE}
    expected |= {destination_lane(each.destination) for each in seen.circuits}
    expected |= {destination_lane(name) for name in seen.paused}
    for lane, found in seen.backlog.items():
        if found.oldest > OLD_SECONDS and lane not in expected:
            yield Finding(
                kind="backlog_old",
                subject=lane,
                text=f"lane {lane}: {found.rows} waiting, the oldest for {age(found.oldest)}",
                command="receiver status",
                count=found.rows,
            )


async def read_conditions(settings: Settings, database: Database) -> Seen:
    """Read what the conditions compare. Raises DatabaseUnavailable."""
    backlog = await read_backlog(database, settings.all_destinations)
    async with database.read() as connection:
        freeze = await submission_freezes.find(connection)
        failed_run = await retention_runs.find_failed(connection)
        pauses = await destinations.read_pauses(connection)
        return Seen(
            circuits=await destinations.read_circuits(connection),
            paused=[name for name, state in pauses.items() if state.pause is not None],
            backlog=backlog,
            dead_letters=await alerts.find_dead_letters(connection),
            unsure=await alerts.find_unsure_jobs(connection),
            refused_accounts=await _find_refused_accounts(connection),
            frozen_at=None if freeze is None else freeze.frozen_at,
            mismatches=await alerts.find_mismatches(connection, [each.name for each in settings.all_sources]),
            failed_pruning=None if failed_run is None else failed_run["seen_at"],
        )


async def _find_refused_accounts(connection: SqlConnection) -> list[str]:
    """Return the accounts that Clipia refuses, among those that workers use now."""
    runs = await workers.find_runs(connection)
    used = sorted({run.account for run in runs if run.is_running and run.account is not None})
    return [name for name in used if (await read_account_status(connection, name)).pause is not None]


async def run_round(settings: Settings, database: Database) -> list[str]:
    """Record the conditions and write the messages that are due; return the lanes that have some.

    Each process looks at its own disks. The process whose turn it is reads the rows, ends alerts and writes
    messages. Raises DatabaseUnavailable.
    """
    names = [each.name for each in settings.alert_destinations]
    disks, host = await read_disks(settings, database), socket.gethostname()[:63]
    silent = [disk for disk in disks if disk["free_bytes"] is None]
    for disk in silent:
        log.warning("a disk does not answer", path=disk["path"], holds=disk["holds"])
    findings = list(find_conditions(Seen(disks=disks, host=host)))
    async with database.write() as connection:
        has_turn = await alerts.take_turn(connection, seconds=ROUND_SECONDS * 0.9)
    if has_turn:
        findings += find_conditions(await read_conditions(settings, database))
    elif not findings and not silent:
        return []
    unknown = {_disk_subject(host, disk) for disk in silent}
    async with database.write() as connection:
        told = await _record(connection, findings, names, unknown=unknown, settles=has_turn)
    for alert, type_ in told:
        log.warning("alert", type=type_, alert=alert.kind, subject=alert.subject, text=alert.text)
    return [alert_lane(name) for name in names] if told else []


async def _record(
    connection: SqlConnection,
    findings: Sequence[Finding],
    names: Sequence[str],
    *,
    unknown: Collection[str],
    settles: bool,
) -> list[tuple[Alert, Told]]:
    """Record findings. `unknown` are the subjects of disks that do not answer: their alerts stay open."""
    now = await alerts.lock(connection)
    known = await alerts.load(connection)
    before = dict(known)
    for finding in findings:
        known[finding.key] = observe(known.get(finding.key), finding, now=now, occurrence=new_id())
    for key, alert in known.items():
        if alert.kind == "disk_nearly_full" and alert.subject in unknown and alert.resolved_at is None:
            known[key] = replace(alert, seen_at=now)
    since = await alerts.read_watched_since(connection) if settles else now
    told = []
    for key, alert in known.items():
        after, type_ = settle(alert, now=now, watched_since=since) if settles else (alert, None)
        if after != before.get(key):
            await alerts.save(connection, after)
        if type_ is not None:
            message = make_message(after, type_, at=now)
            await alerts.add_messages(connection, names, message, occurrence=after.occurrence, told=type_)
            told.append((after, type_))
    if settles:
        await alerts.delete_old(connection)
    return told


def make_message(alert: Alert, told: Told, *, at: datetime) -> dict[str, Any]:
    """Return the CloudEvent of a message as JSON. `id` is the message's, `data.id` is the alert's."""
    last_at = alert.last_at or alert.seen_at
    return {
        "specversion": "1.0",
        "id": str(new_id()),
        "source": "/v1/alerts",
        "type": TYPES[told],
        "subject": f"{alert.kind}/{alert.subject}",
        "time": at.isoformat(),
        "datacontenttype": "application/json",
        "data": {
            "id": str(alert.occurrence),
            "alert": alert.kind,
            "subject": alert.subject,
            "text": alert.text if told == "raised" else f"over: {alert.text}",
            "command": alert.command,
            "runbook": RUNBOOKS[alert.kind],
            "count": alert.count,
            "first_at": alert.first_at and alert.first_at.isoformat(),
            "last_at": last_at.isoformat(),
            "raised_at": alert.raised_at.isoformat(),
            "resolved_at": alert.resolved_at and alert.resolved_at.isoformat(),
            "examples": list(alert.examples),
        },
    }


def watching(settings: Settings, database: Database, *, wake: Wake) -> AbstractAsyncContextManager[None]:
    """Watch the conditions inside the block as long as a destination takes alerts; a reload may add one."""
    return running(_watch(settings, database, wake), name="alerts")


async def _watch(settings: Settings, database: Database, wake: Wake) -> None:
    while True:
        if settings.alert_destinations:
            with logged_failures("conditions of alerts not read"):
                for lane in await run_round(settings, database):
                    wake(lane)
        await asyncio.sleep(ROUND_SECONDS)
