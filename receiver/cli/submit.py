"""`receiver submit`: one job from the command line."""

import time
from datetime import UTC, datetime
from typing import Annotated, Final

import typer
from rich.status import Status
from rich.text import Text

from receiver.cli.submitting import Input, read_input, read_pair, with_submitter
from receiver.cli.terminal import Json, print_json, print_line, size, stderr
from receiver.submitter import Job, JobFile, Submitter

CALLER: Final = "cli"
UNATTENDED: Final = 5.0
"""Seconds after which work that is due and that nobody does is worth a hint."""


def submit(
    model: Annotated[str, typer.Argument(help="The model's slug; `receiver models` lists them.")],
    given: Input,
    key: Annotated[
        str | None,
        typer.Option(help="Idempotency key: the same one again is the same job. Default: a new one."),
    ] = None,
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Comes back with the job and its message. Repeatable."),
    ] = None,
    max_cost: Annotated[
        int | None, typer.Option(help="Refuse the job if it costs more credits.", min=0)
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the result and its files.")] = False,
    json: Json = False,
) -> None:
    """Submit a job to Clipia: once, whatever crashes in between.

    The job is on record before Clipia hears of it; a running `receiver serve` or `receiver worker` goes on
    with what this command does not see the end of. With --wait the exit status is 0 only for a result.
    """
    values = dict(read_pair(text) for text in metadata or ())
    parameters = read_input(given)

    async def run(submitter: Submitter) -> Job:
        job = await submitter.submit(
            model, parameters, idempotency_key=key, metadata=values, max_cost=max_cost, caller=CALLER
        )
        _tell_submitted(job)
        return await _watch(submitter, job) if wait else job

    job = with_submitter(run)
    if json:
        print_json(job.as_dict())
    elif wait:
        _tell_result(job)
    if wait and job.state != "completed":
        raise typer.Exit(1)


async def _watch(submitter: Submitter, job: Job) -> Job:
    began = time.monotonic()
    hinted = False
    with Status(_line(job, 0.0), console=stderr) as status:
        try:
            while not job.ended:
                job = await submitter.wait(job.id, seconds=1.0) or job
                status.update(_line(job, time.monotonic() - began))
                if not hinted and _unattended(job):
                    hinted = True
                    _say(
                        "Nobody goes on with it yet: it waits for its turn, or neither `receiver serve` nor "
                        "`receiver worker` is running on this database."
                    )
        except BaseException:
            _say(f"The job goes on; `receiver jobs show {job.id}` tells how.")
            raise
    return job


def _line(job: Job, elapsed: float) -> str:
    what = "files" if job.event is not None else job.state
    progress = f" {job.progress} %" if job.progress is not None and job.event is None else ""
    return f"{what}{progress}, {elapsed:.0f} s"


def _unattended(job: Job) -> bool:
    if job.ended:
        return False
    due = job.next_attempt_at
    if job.event is not None and job.event.state == "received":
        due = job.event.received_at
    return due is not None and (datetime.now(UTC) - due).total_seconds() > UNATTENDED


def _tell_submitted(job: Job) -> None:
    """Say on standard error what became of the submission; standard output is for the result."""
    _say(f"Job {job.id}{'' if job.new else ' (known already: its key was used before)'}")
    why = f" ({job.error.get('message')})" if job.error else ""
    if job.state == "pending":
        _say(f"Clipia has not taken it yet{why}; a running receiver goes on with it.")
    elif job.request_id is None:
        _say(f"It is {job.state}{why}.")
    elif job.new:
        _say(f"Clipia took it as {job.request_id}; it costs {job.cost} credits.")
    for warning in job.warnings:
        _say(f"Warning: {warning.get('message') or warning}")


def _tell_result(job: Job) -> None:
    charged = "" if job.charged is None else f", {job.charged} credits charged"
    print_line(f"{job.state}{charged}")
    if job.error:
        print_line(f"  {job.error.get('code', '')}: {job.error.get('message', '')}")
    for file in job.event.media if job.event is not None else ():
        print_line(f"  {describe_file(file)}")


def describe_file(file: JobFile) -> str:
    """Return one line about a file: where it is, or why it is not."""
    head = f"{file.kind} {file.variant}:"
    if file.uri is not None and file.size is not None:
        return f"{head} {file.uri} ({size(file.size)}, {file.content_type})"
    return f"{head} {file.state}, {file.error or 'not tried yet'} ({file.url})"


def _say(message: str) -> None:
    stderr.print(Text(message), soft_wrap=True)
