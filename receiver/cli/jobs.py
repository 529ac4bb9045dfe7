"""`receiver jobs`: what was submitted and what became of it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import typer
from rich.table import Table
from rich.text import Text

from receiver.cli.database import with_database
from receiver.cli.submit import describe_error, describe_file
from receiver.cli.submitting import read_pair, with_submitter
from receiver.cli.terminal import (
    Json,
    moment,
    print_json,
    print_line,
    print_title,
    stderr,
    stdout,
    user_name,
    wide,
)
from receiver.core.retry import KEY_VALID_SECONDS
from receiver.db import freezes
from receiver.db.database import Database
from receiver.errors import ReceiverError
from receiver.lanes.attempts import error_json
from receiver.settings import Settings
from receiver.submitter import Job, JobEvent, JobPage, Submitter

jobs = typer.Typer(help="Look at submitted jobs.", no_args_is_help=True)

_Since = Annotated[datetime | None, typer.Option(help="Only submitted at or after this time (UTC).")]
_Until = Annotated[datetime | None, typer.Option(help="Only submitted before this time (UTC).")]
_Id = Annotated[str, typer.Argument(metavar="ID", help="A job's id, or Clipia's request_id.")]


_FACTS = (
    "id",
    "state",
    "model",
    "caller",
    "idempotency_key",
    "request_id",
    "progress",
    "cost",
    "charged",
    "created_at",
    "submitted_at",
    "finished_at",
    "next_attempt_at",
)


class State(StrEnum):
    """States of a job."""

    pending = "pending"
    submitted = "submitted"
    completed = "completed"
    failed = "failed"
    canceled = "canceled"
    unsure = "unsure"


class By(StrEnum):
    """What costs are added up by."""

    caller = "caller"
    model = "model"
    day = "day"


@jobs.command("list")
def list_(
    state: Annotated[State | None, typer.Option(help="Only in this state.")] = None,
    model: Annotated[str | None, typer.Option(help="Only of this model.")] = None,
    caller: Annotated[str | None, typer.Option(help="Only of this caller.")] = None,
    since: _Since = None,
    until: _Until = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Only with this metadata. Repeatable.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many at most.", min=1, max=1000)] = 50,
    cursor: Annotated[str | None, typer.Option(help="The next page: `next` of the page before.")] = None,
    json: Json = False,
) -> None:
    """List jobs, newest first."""
    wanted = dict(read_pair(text) for text in metadata or ())

    async def run(submitter: Submitter) -> JobPage:
        return await submitter.list_jobs(
            limit=limit,
            cursor=cursor,
            caller=caller,
            state=state.value if state else None,
            model=model,
            since=_utc(since),
            until=_utc(until),
            metadata=wanted,
        )

    page = with_submitter(run)
    if json:
        print_json({"data": [job.as_dict() for job in page.jobs], "next": page.next})
        return
    table = Table(box=None)
    for name in ("id", "state", "model", "caller", "key", "created", "credits"):
        table.add_column(name, no_wrap=True)
    for job in page.jobs:
        key = "-" if job.idempotency_key == str(job.id) else job.idempotency_key
        credits_ = job.cost if job.charged is None else job.charged
        table.add_row(
            str(job.id),
            job.state,
            Text(job.model),
            job.caller,
            Text(key),
            moment(job.created_at),
            "-" if credits_ is None else str(credits_),
        )
    wide.print(table if page.jobs else "No jobs.")
    if page.next is not None:
        stderr.print(f"More: --cursor {page.next}")


@jobs.command()
def show(key: _Id, json: Json = False) -> None:
    """Show one job with its tries, its files and its deliveries."""
    job = with_submitter(lambda submitter: _find(submitter, key))
    if json:
        print_json(job.as_dict())
    else:
        _print_job(job)


@jobs.command()
def resubmit(
    key: _Id,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Submit a job that is unsure, failed or canceled once more: it may be paid for twice."""

    async def run(submitter: Submitter) -> Job:
        job = await _find(submitter, key)
        if not yes:
            typer.confirm(
                f"Job {job.id} ({job.model}) is {job.state}. Submit it again, and pay for it again?",
                abort=True,
            )
        return await submitter.resubmit(job.id, by=f"{user_name()} on the command line")

    job = with_submitter(run)
    if json:
        print_json(job.as_dict())
    else:
        stdout.print(f"Job {job.id} will be submitted again by a running receiver.")


@jobs.command()
def cancel(
    key: _Id,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """End a job: canceled if it was never sent or is unsure, else unsure, for Clipia has no cancel.

    An unsure job may have been generated and paid for: look at Clipia's console before it is canceled.
    """

    async def run(submitter: Submitter) -> Job:
        job = await _find(submitter, key)
        if not yes:
            typer.confirm(f"Job {job.id} ({job.model}) is {job.state}. End it?", abort=True)
        return await submitter.cancel(job.id, by=f"{user_name()} on the command line")

    job = with_submitter(run)
    if json:
        print_json(job.as_dict())
    else:
        stdout.print(f"Job {job.id} is {job.state}.")


@jobs.command()
def freeze(
    reason: Annotated[str, typer.Option(help="Why, for the record.")] = "",
    restored: Annotated[
        bool,
        typer.Option("--restored", help="The database was restored: keys that were used since are unknown."),
    ] = False,
) -> None:
    """Take no new job and submit none until `jobs thaw`; what Clipia has goes on, webhooks are received.

    Repeats of keys that are on record are answered as ever; a new key is refused (503 `submissions_frozen`).
    After a restore, run this before anything else is started: docs/jobs.md says why, and what to do then.
    """
    by = f"{user_name()} on the command line"

    async def run(_settings: Settings, database: Database) -> None:
        async with database.write() as connection:
            await freezes.freeze(connection, by=by, reason=reason, restored=restored)

    with_database(run)
    stdout.print("Submissions are frozen until `receiver jobs thaw`.")


@jobs.command()
def thaw() -> None:
    """Take and submit jobs again.

    After a restore, jobs that may have been sent too long ago become unsure: a person decides about them.
    """
    text = error_json("restored", "The database was restored: this job may have been sent since the dump.")

    async def run(_settings: Settings, database: Database) -> list[UUID] | None:
        async with database.write() as connection:
            return await freezes.thaw(connection, key_holds=KEY_VALID_SECONDS, error=text)

    unsure = with_database(run)
    if unsure is None:
        raise ReceiverError("submissions are not frozen")
    stdout.print("Jobs are taken and submitted again.")
    for job_id in unsure:
        stdout.print(f"Job {job_id} is unsure: it may have been sent since the dump, too long ago.")


@jobs.command()
def cost(
    by: Annotated[By, typer.Option(help="What to add up by.")] = By.day,
    caller: Annotated[str | None, typer.Option(help="Only of this caller.")] = None,
    since: _Since = None,
    until: _Until = None,
    json: Json = False,
) -> None:
    """Add up credits: reserved while a job is open, then charged or refunded. Jobs of test keys cost none."""

    async def run(submitter: Submitter) -> Sequence[Mapping[str, Any]]:
        return await submitter.costs(by=by.value, caller=caller, since=_utc(since), until=_utc(until))

    rows = with_submitter(run)
    if json:
        print_json(rows)
        return
    sums = ("jobs", "reserved", "charged", "refunded")
    table = Table(box=None)
    table.add_column(by.value)
    for name in sums:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row[by.value]), *(str(row[name]) for name in sums))
    table.add_row("[bold]total", *(str(sum(row[name] for row in rows)) for name in sums))
    wide.print(table)


async def _find(submitter: Submitter, key: str) -> Job:
    try:
        job = await submitter.get(UUID(key))
    except ValueError:
        job = None
    job = job or await submitter.find(key)
    if job is None:
        raise ReceiverError(f"there is no job with the id or request_id {key!r}")
    return job


def _print_job(job: Job) -> None:
    facts = Table(box=None, show_header=False)
    for name in _FACTS:
        value = getattr(job, name)
        if value is not None:
            facts.add_row(name, moment(value) if isinstance(value, datetime) else Text(str(value)))
    for name, value in sorted(job.metadata.items()):
        facts.add_row("metadata", Text(f"{name}={value}"))
    if job.error:
        facts.add_row("error", Text(describe_error(job.error)))
    for warning in job.warnings:
        facts.add_row("warning", Text(str(warning.get("message") or warning)))
    stdout.print(facts)
    print_title("Tries to submit it", job.attempts)
    for attempt in job.attempts:
        error = f": {describe_error(attempt.error)}" if attempt.error else ""
        print_line(f"  {moment(attempt.started_at)} {attempt.outcome} in {attempt.duration_ms} ms{error}")
    if job.event is not None:
        _print_event(job.event)


def _print_event(event: JobEvent) -> None:
    print_title(f"Event {event.id} ({event.status}, by {event.origin})", event.media)
    for file in event.media:
        print_line(f"  {describe_file(file)}")
    print_title("Deliveries", event.deliveries)
    for delivery in event.deliveries:
        error = f": {delivery.error}" if delivery.error else ""
        print_line(f"  {delivery.destination}: {delivery.state} after {delivery.attempts} tries{error}")


def _utc(time: datetime | None) -> datetime | None:
    return time.replace(tzinfo=UTC) if time else None
