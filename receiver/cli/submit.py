"""`receiver submit`: submit one job from the command line."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from rich.status import Status

from receiver.cli.client import with_client
from receiver.cli.clipia_calls import Input, Strict, read_input
from receiver.cli.completion import complete_model
from receiver.cli.options import Json, read_pair
from receiver.cli.remote import is_remote
from receiver.cli.terminal import amount, print_json, print_line, print_note, size, stderr
from receiver.cli.waiting import GaveUp, Patience, Timeout, find_missing
from receiver.client import Client
from receiver.core.lane_names import FAN_OUT_LANE, MEDIA_LANE, POLL_LANE, SUBMIT_LANE
from receiver.db.rows import new_id
from receiver.errors import RefusedByClipia, RequestError, SettingsError
from receiver.submitter import Job, JobFile

CALLER: Final = "cli"
UNATTENDED_SECONDS: Final = 5.0
"""If due work has waited this long, the command prints why."""
WEBHOOK_SECONDS: Final = 60.0
"""How long the command waits for a webhook before it requires a worker that polls."""


def submit(
    model: Annotated[
        str, typer.Argument(help="The model's slug; see `receiver models`.", autocompletion=complete_model)
    ],
    given: Input,
    key: Annotated[
        str | None,
        typer.Option(
            help="Idempotency key: the same key is the same job. Default: a random one, which is printed if "
            "the receiver's answer is lost."
        ),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Returned with the job and with its message. Repeatable."),
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="The most credits that the job may cost.", min=0)
    ] = None,
    strict: Strict = None,
    caller: Annotated[
        str | None,
        typer.Option(
            help=f"The job's caller, which has keys of its own. Default: {CALLER}. A receiver at --url takes "
            "the token's name."
        ),
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the result and its files.")] = False,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Submit a job to Clipia exactly once, even if a process crashes meanwhile.

    The job is stored before it is sent to Clipia, and a running `receiver serve` or `receiver worker` takes
    it over if this command ends first. With --wait the exit status is 0 for a result, 1 for a job that ended
    without one, 3 if no running worker can take it over, and 124 after --timeout.
    """
    patience = Patience(timeout, waits=wait)
    values = dict(read_pair(text) for text in metadata or ())
    parameters = read_input(given)

    if caller is not None and is_remote():
        raise typer.BadParameter(
            "the receiver at --url takes the token's name as the caller", param_hint="--caller"
        )

    async def run(client: Client) -> tuple[Job, int]:
        with nullcontext(key) if key is not None else _new_key() as used:
            job = await client.submit_job(
                model, parameters, key=used, metadata=values, max_cost=max_cost, strict=strict
            )
        _print_submitted(job)
        return await _watch(client, job, patience) if wait else (job, 0)

    job, status = with_client(run, caller=CALLER if caller is None else caller, prepares=True, is_traced=True)
    if json:
        print_json(job.as_dict())
    elif wait:
        _print_result(job)
    if status:
        raise typer.Exit(status)


@contextmanager
def _new_key() -> Iterator[str]:
    """Yield a new key, and print it if the block may have made a job without an answer.

    The receiver would make one too, but names it in the answer alone: a repeated command would be a second
    paid job.
    """
    key = str(new_id())
    try:
        yield key
    except BaseException as error:
        is_unmade = isinstance(error, RequestError) and error.job_id is None
        if not is_unmade and not isinstance(error, RefusedByClipia | SettingsError):
            print_note(f"Repeat the command with `--key {key}`: the same key is the same job.")
        raise


async def _watch(client: Client, job: Job, patience: Patience) -> tuple[Job, int]:
    """Return the job and the exit status once it has ended, or once waiting is of no use."""
    try:
        job = await _wait(client, job, patience)
    except GaveUp as over:
        job = await client.show_job(job.id)
        print_note(f"The job is {job.state}, and this command stops waiting: {over}.")
        print_note(f"`receiver jobs show {job.id}` shows its progress.")
        return job, over.status
    except BaseException:
        print_note(f"The job goes on; `receiver jobs show {job.id}` shows its progress.")
        raise
    return job, 0 if job.state == "completed" else 1


async def _wait(client: Client, job: Job, patience: Patience) -> Job:
    """Return the job when it has ended. Raises GaveUp."""
    explained = warned = False
    began = time.monotonic()
    with Status(_line(job, 0.0), console=stderr) as status:
        while not job.ended:
            missing, overdue = await _find_missing(client, job)
            if missing and not warned:
                warned = True
                print_note(f"Nothing continues this job now: {missing}.")
            patience.check(missing if overdue else None)
            job = await client.show_job(job.id, wait=min(1.0, patience.left))
            status.update(_line(job, time.monotonic() - began))
            awaits_webhook = job.has_webhook and job.state != "pending"
            if not explained and not missing and not awaits_webhook and _unattended(job):
                explained = True
                print_note(
                    "The job waits for Clipia's limits or for the end of a pause: see `receiver account`."
                )
    return job


async def _find_missing(client: Client, job: Job) -> tuple[str | None, bool]:
    """Return the step that the job needs from a person, or None; and whether the job is late without it.

    A worker of an earlier release is not listed but may do the work, so only a late job ends the command.
    """
    seen = await client.list_workers()
    if job.event is not None:
        lane = FAN_OUT_LANE if job.event.state == "received" else MEDIA_LANE
    elif job.state == "pending":
        if (await client.show_freeze())["frozen"]:
            return "submissions are frozen: run `receiver jobs thaw`", True
        lane = SUBMIT_LANE
    elif job.has_webhook and _age(job.submitted_at) < WEBHOOK_SECONDS:
        lane = FAN_OUT_LANE
    else:
        lane = POLL_LANE
    missing = find_missing(seen, [lane], live=job.live)
    return missing, lane == MEDIA_LANE or _unattended(job)


def _line(job: Job, elapsed: float) -> str:
    step = "files" if job.event is not None else job.state
    progress = f" {job.progress} %" if job.progress is not None and job.event is None else ""
    return f"{step}{progress}, {elapsed:.0f} s"


def _unattended(job: Job) -> bool:
    if job.ended:
        return False
    due = job.next_attempt_at
    if job.event is not None and job.event.state == "received":
        due = job.event.received_at
    return _age(due) > UNATTENDED_SECONDS


def _age(moment: datetime | None) -> float:
    return 0.0 if moment is None else (datetime.now(UTC) - moment).total_seconds()


def _print_submitted(job: Job) -> None:
    """Print the submission on standard error; standard output is for the result."""
    print_note(f"Job {job.id}{'' if job.new else ' (its key was used before)'}")
    reason = f" ({reason_text(job.error)})" if job.error else ""
    if job.state == "pending":
        print_note(f"Clipia has not accepted it yet{reason}; a running receiver submits it.")
    elif job.request_id is None:
        print_note(f"It is {job.state}{reason}.")
    elif job.new:
        print_note(f"Clipia accepted it as {job.request_id}; it costs {amount(job.cost, 'credits')}.")
    for warning in job.warnings:
        print_note(f"Warning: {warning.get('message') or warning}")


def _print_result(job: Job) -> None:
    charged = "" if job.charged is None else f", {job.charged} credits charged"
    print_line(f"{job.state}{charged}")
    if job.error:
        print_line(f"  {reason_text(job.error)}")
    for file in job.event.media if job.event is not None else ():
        print_line(f"  {file_text(file)}")


def reason_text(error: Mapping[str, Any]) -> str:
    """Return an error in one line; Clipia may leave its code or its message out."""
    return ": ".join(str(error[name]) for name in ("code", "message") if error.get(name)) or "no reason given"


def file_text(file: JobFile) -> str:
    """Return one line about a file: its location, or the reason why it is not stored."""
    head = f"{file.kind} {file.variant}:"
    if file.state == "stored" and file.uri is not None and file.size is not None:
        warning = f"; {file.warning}" if file.warning else ""
        return f"{head} {file.uri} ({size(file.size)}, {file.content_type}){warning}"
    return f"{head} {file.state}, {file.error or 'no attempt yet'} ({file.url})"
