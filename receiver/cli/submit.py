"""`receiver submit`: one job from the command line."""

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from rich.status import Status
from rich.text import Text

from receiver.cli.submitting import Input, Strict, read_input, read_pair, with_submitter
from receiver.cli.terminal import Json, amount, print_json, print_line, size, stderr
from receiver.cli.waiting import GaveUp, Patience, Timeout, find_missing
from receiver.core.lane_names import FAN_OUT_LANE, MEDIA_LANE, POLL_LANE, SUBMIT_LANE
from receiver.db import freezes, workers
from receiver.errors import ReceiverError
from receiver.submitter import Job, JobFile, Submitter

CALLER: Final = "cli"
UNATTENDED: Final = 5.0
"""Seconds after which work that is due and that nobody does is worth a hint."""
WEBHOOK_WAIT: Final = 60.0
"""Seconds for which a webhook may end the job even if no worker can ask Clipia for its result."""


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
        float | None, typer.Option(help="Refuse the job if it costs more credits.", min=0)
    ] = None,
    strict: Strict = None,
    caller: Annotated[
        str, typer.Option(help="Whose job it is. A key is one caller's: the API's callers are token names.")
    ] = CALLER,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the result and its files.")] = False,
    timeout: Timeout = None,
    json: Json = False,
) -> None:
    """Submit a job to Clipia: once, whatever crashes in between.

    The job is on record before Clipia hears of it; a running `receiver serve` or `receiver worker` goes on
    with what this command does not see the end of. With --wait the exit status is 0 only for a result, 1 for
    a job that ended without one, 3 if no worker is running that would go on with it, and 124 after --timeout.
    """
    if timeout is not None and not wait:
        raise ReceiverError("--timeout needs --wait")
    patience = Patience(timeout)
    values = dict(read_pair(text) for text in metadata or ())
    parameters = read_input(given)

    async def run(submitter: Submitter) -> tuple[Job, int]:
        job = await submitter.submit(
            model,
            parameters,
            idempotency_key=key,
            metadata=values,
            max_cost=max_cost,
            strict=strict,
            caller=caller,
        )
        _tell_submitted(job)
        return await _watch(submitter, job, patience) if wait else (job, 0)

    job, status = with_submitter(run)
    if json:
        print_json(job.as_dict())
    elif wait:
        _tell_result(job)
    if status:
        raise typer.Exit(status)


async def _watch(submitter: Submitter, job: Job, patience: Patience) -> tuple[Job, int]:
    """Return the job, and the exit status, when it has ended or there is no use in waiting."""
    hinted = False
    began = time.monotonic()
    with Status(_line(job, 0.0), console=stderr) as status:
        try:
            while not job.ended:
                missing = await _find_missing(submitter, job)
                patience.check(missing)
                job = await submitter.wait(job.id, seconds=min(1.0, patience.left)) or job
                status.update(_line(job, time.monotonic() - began))
                awaits_webhook = job.has_webhook and job.state != "pending"
                if not hinted and not missing and not awaits_webhook and _unattended(job):
                    hinted = True
                    _say("It waits for its turn: Clipia's limits, or a pause (`receiver account` tells).")
        except GaveUp as over:
            _say(f"The job is {job.state}, and this command stops waiting: {over}.")
            _say(f"`receiver jobs show {job.id}` tells what becomes of it.")
            return job, over.status
        except BaseException:
            _say(f"The job goes on; `receiver jobs show {job.id}` tells how.")
            raise
    return job, 0 if job.state == "completed" else 1


async def _find_missing(submitter: Submitter, job: Job) -> str | None:
    """Return in words what is missing so that the job goes on; None if nothing is."""
    async with submitter.database.read() as connection:
        seen = await workers.find_runs(connection)
        frozen = await freezes.find(connection)
    if job.event is not None:
        lane = FAN_OUT_LANE if job.event.state == "received" else MEDIA_LANE
    elif job.state == "pending":
        if frozen is not None:
            return "submissions are frozen: `receiver jobs thaw` ends that"
        lane = SUBMIT_LANE
    elif job.has_webhook and _age(job.submitted_at) < WEBHOOK_WAIT:
        lane = FAN_OUT_LANE
    else:
        lane = POLL_LANE
    missing = find_missing(seen, [lane], account=submitter.client.account)
    # What is not due yet may be done by a worker of the release before, which is not listed.
    return missing if lane == MEDIA_LANE or _unattended(job) else None


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
    return _age(due) > UNATTENDED


def _age(moment: datetime | None) -> float:
    return 0.0 if moment is None else (datetime.now(UTC) - moment).total_seconds()


def _tell_submitted(job: Job) -> None:
    """Say on standard error what became of the submission; standard output is for the result."""
    _say(f"Job {job.id}{'' if job.new else ' (known already: its key was used before)'}")
    why = f" ({describe_error(job.error)})" if job.error else ""
    if job.state == "pending":
        _say(f"Clipia has not taken it yet{why}; a running receiver goes on with it.")
    elif job.request_id is None:
        _say(f"It is {job.state}{why}.")
    elif job.new:
        _say(f"Clipia took it as {job.request_id}; it costs {amount(job.cost, 'credits')}.")
    for warning in job.warnings:
        _say(f"Warning: {warning.get('message') or warning}")


def _tell_result(job: Job) -> None:
    charged = "" if job.charged is None else f", {job.charged} credits charged"
    print_line(f"{job.state}{charged}")
    if job.error:
        print_line(f"  {describe_error(job.error)}")
    for file in job.event.media if job.event is not None else ():
        print_line(f"  {describe_file(file)}")


def describe_error(error: Mapping[str, Any]) -> str:
    """Return an error in one line; Clipia may leave its code or its message out."""
    return ": ".join(str(error[name]) for name in ("code", "message") if error.get(name)) or "no reason given"


def describe_file(file: JobFile) -> str:
    """Return one line about a file: where it is, or why it is not."""
    head = f"{file.kind} {file.variant}:"
    if file.state == "stored" and file.uri is not None and file.size is not None:
        warning = f"; {file.warning}" if file.warning else ""
        return f"{head} {file.uri} ({size(file.size)}, {file.content_type}){warning}"
    return f"{head} {file.state}, {file.error or 'not tried yet'} ({file.url})"


def _say(message: str) -> None:
    stderr.print(Text(message), soft_wrap=True)
