"""`receiver jobs`: submitted jobs, their results and their cost."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from receiver.cli.client import missing, with_client
from receiver.cli.completion import complete_model
from receiver.cli.options import CURSOR_HELP, Json, Limit, Reason, read_pair, since_option, until_option
from receiver.cli.submit import file_text, reason_text
from receiver.cli.terminal import (
    count,
    moment,
    print_line,
    print_list,
    print_result,
    print_rows,
    print_title,
    stdout,
)
from receiver.client import Client
from receiver.db.rows import CostGroup, JobState
from receiver.errors import RequestError
from receiver.submitter import Job, JobEvent

jobs = typer.Typer(
    help="Show jobs and their cost, resubmit or cancel them, and freeze submissions.", no_args_is_help=True
)

_Caller = Annotated[str | None, typer.Option(help="Only jobs of this caller.")]
_Since = Annotated[datetime | None, since_option("jobs submitted")]
_Until = Annotated[datetime | None, until_option("jobs submitted")]
_Key = Annotated[str, typer.Argument(metavar="JOB", help="The job's id, or Clipia's request_id.")]
_Yes = Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")]

_FACTS = (
    *("id", "state", "model", "caller", "idempotency_key", "request_id", "progress", "cost", "charged"),
    *("created_at", "submitted_at", "finished_at", "next_attempt_at"),
)
_COLUMNS = ("id", "state", "model", "caller", "key", "created_at", "credits")


@jobs.command("list")
def list_(
    state: Annotated[JobState | None, typer.Option(help="Only jobs in this state.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Only jobs of this model.", autocompletion=complete_model)
    ] = None,
    caller: _Caller = None,
    since: _Since = None,
    until: _Until = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Only jobs with this metadata. Repeatable.")
    ] = None,
    limit: Limit = 50,
    cursor: Annotated[str | None, typer.Option(help=CURSOR_HELP)] = None,
    json: Json = False,
) -> None:
    """List jobs, newest first."""
    wanted = dict(read_pair(text) for text in metadata or ())

    page = with_client(
        lambda client: client.list_jobs(
            limit=limit,
            cursor=cursor,
            caller=caller,
            state=state,
            model=model,
            since=since,
            until=until,
            metadata=wanted,
        ),
        prepares=True,
    )
    rows = [_row(job) for job in page.data]
    table = partial(print_rows, rows, *_COLUMNS, none="No jobs.")
    print_list([job.as_dict() for job in page.data], table, json=json, next_=page.next)


def _row(job: Job) -> dict[str, Any]:
    key = None if job.idempotency_key == str(job.id) else job.idempotency_key
    return vars(job) | {"key": key, "credits": job.cost if job.charged is None else job.charged}


@jobs.command()
def show(key: _Key, json: Json = False) -> None:
    """Show one job with its attempts, its files and its deliveries."""
    job = with_client(lambda client: _find(client, key), prepares=True)
    print_result(job.as_dict(), partial(_print_job, job), json=json)


@jobs.command()
def resubmit(key: _Key, yes: _Yes = False, reason: Reason = None, json: Json = False) -> None:
    """Submit an unsure, failed or canceled job again: you may pay for it twice."""
    job = _change(
        key, Client.resubmit_job, "" if yes else "Submit it again, and pay for it again?", reason=reason
    )
    print_result(job.as_dict(), f"Job {job.id} will be submitted again by a running receiver.", json=json)


@jobs.command()
def cancel(key: _Key, yes: _Yes = False, reason: Reason = None, json: Json = False) -> None:
    """Cancel a job that was never sent or is unsure; a sent one becomes unsure, as Clipia cannot cancel it.

    An unsure job may have been generated and charged: check it in Clipia's console before you cancel it.
    """
    job = _change(key, Client.cancel_job, "" if yes else "Cancel it?", reason=reason)
    print_result(job.as_dict(), f"Job {job.id} is {job.state}.", json=json)


def _change(key: str, change: Callable[..., Awaitable[Job]], question: str, *, reason: str | None) -> Job:
    """Change a job, after the user has confirmed the question if there is one."""

    async def run(client: Client) -> Job:
        job = await _find(client, key)
        if question:
            typer.confirm(f"Job {job.id} ({job.model}) is {job.state}. {question}", abort=True)
        return await change(client, job.id, reason=reason)

    return with_client(run, prepares=True)


@jobs.command()
def freeze(
    reason: Annotated[str, typer.Option(help="A reason, for the record.")] = "",
    restored: Annotated[
        bool,
        typer.Option("--restored", help="The database was restored, so keys used since the backup are lost."),
    ] = False,
) -> None:
    """Accept and submit no jobs until `jobs thaw`; submitted jobs continue, and webhooks are received.

    A request with a known key is answered as usual; a new key is rejected (503 `submissions_frozen`). After a
    restore, run this before you start anything: docs/operating.md says why, and which steps follow.
    """
    with_client(lambda client: client.freeze_submissions(reason=reason, restored=restored))
    stdout.print("Submissions are frozen until `receiver jobs thaw`.")


@jobs.command()
def thaw(reason: Reason = None) -> None:
    """Accept and submit jobs again.

    After a restore, a job that may have been sent too long ago becomes unsure: you decide whether to resubmit
    or cancel it.
    """
    done = with_client(lambda client: client.thaw_submissions(reason=reason))
    stdout.print("Jobs are accepted and submitted again.")
    for job_id in done["unsure"]:
        print_line(
            f"Job {job_id} is unsure: it may have been sent since the backup, and its key has expired."
        )


@jobs.command()
def cost(
    by: Annotated[CostGroup, typer.Option(help="Print one row per caller, model or day.")] = "day",
    caller: _Caller = None,
    since: _Since = None,
    until: _Until = None,
    json: Json = False,
) -> None:
    """Add up the credits of jobs: reserved until a job ends, then charged or refunded.

    Jobs of test keys cost nothing.
    """
    rows = with_client(
        lambda client: client.sum_costs(by=by, caller=caller, since=since, until=until), prepares=True
    )
    print_list(rows, partial(_print_costs, rows, by), json=json)


def _print_costs(rows: Sequence[Mapping[str, Any]], by: str) -> None:
    sums = ("jobs", "reserved", "charged", "refunded")
    table = Table(box=None)
    table.add_column(by)
    for name in sums:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row[by]), *(str(row[name]) for name in sums))
    table.add_row("[bold]total", *(str(sum(row[name] for row in rows)) for name in sums))
    stdout.print(table)


async def _find(client: Client, key: str) -> Job:
    with missing(RequestError(f"there is no job with the id or request_id {key!r}", code="not_found")):
        return await client.show_job(key)


def _print_job(job: Job) -> None:
    _print_facts(job)
    print_title("Attempts to submit it", job.attempts)
    for attempt in job.attempts:
        error = f": {reason_text(attempt.error)}" if attempt.error else ""
        print_line(f"  {moment(attempt.started_at)} {attempt.outcome} in {attempt.duration_ms} ms{error}")
    if job.event is not None:
        _print_event(job.event)


def _print_facts(job: Job) -> None:
    facts = Table(box=None, show_header=False)
    for name in _FACTS:
        value = getattr(job, name)
        if value is not None:
            facts.add_row(name, moment(value) if isinstance(value, datetime) else Text(str(value)))
    for name, value in sorted(job.metadata.items()):
        facts.add_row("metadata", Text(f"{name}={value}"))
    if job.error:
        facts.add_row("error", Text(reason_text(job.error)))
    for warning in job.warnings:
        facts.add_row("warning", Text(str(warning.get("message") or warning)))
    stdout.print(facts)


def _print_event(event: JobEvent) -> None:
    print_title(f"Event {event.id} ({event.status}, by {event.origin})", event.media)
    for file in event.media:
        print_line(f"  {file_text(file)}")
    print_title("Deliveries", event.deliveries)
    for delivery in event.deliveries:
        error = f": {delivery.error}" if delivery.error else ""
        attempts = count(delivery.attempts, "attempt")
        print_line(f"  {delivery.destination}: {delivery.state} after {attempts}{error}")
