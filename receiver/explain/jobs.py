"""The state of a job that has no event yet; pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from receiver.core.lane_names import POLL_LANE, SUBMIT_LANE
from receiver.db.views import JobDetails
from receiver.db.workers import SeenWorker
from receiver.explain.facts import Facts, Part, State, clock
from receiver.submitter.job import read_error

_NO_WORKER = Part("no_worker", "no worker is running", ("receiver worker",))


def job_part(facts: Facts, job: JobDetails) -> Part:
    """Return the state of a job without an event."""
    if job["state"] == "pending":
        return _pending(facts, job)
    if job["state"] == "submitted":
        return _submitted(facts, job)
    if job["state"] == "unsure":
        return _unsure(job)
    if job["state"] == "completed":
        return Part("event_pruned", "it was completed, and its event has been pruned since")
    state: State = "job_canceled" if job["state"] == "canceled" else "job_failed"
    words = error_words(read_error(job["error"]))
    charged = "" if job["charged"] else "; nothing was charged"
    again = () if job["request_id"] else (f"receiver jobs resubmit {job['id']}",)
    return Part(state, f"it {'was canceled' if state == 'job_canceled' else 'failed'}{words}{charged}", again)


def _pending(facts: Facts, job: JobDetails) -> Part:
    if facts.freeze is not None:
        freeze = facts.freeze
        since = clock(freeze.frozen_at, facts.now)
        text = f"submissions have been frozen since {since} by {freeze.by}: {freeze.reason}"
        return Part("job_frozen", text, ("receiver jobs thaw",))
    missing = _missing_worker(facts, job, SUBMIT_LANE, "submits")
    if missing is not None:
        return missing
    if facts.pause is not None:
        text = f"Clipia refuses the account{error_words(facts.pause)}"
        return Part("account_paused", text, ("receiver account",))
    error = error_words(read_error(job["error"]))
    if job["refused_at"] is not None:
        since = clock(job["refused_at"], facts.now)
        text = f"Clipia has refused it for now since {since}{error}{_next(facts, job)}"
        return Part("job_refused", text, ("receiver account", f"receiver jobs cancel {job['id']}"))
    if error:
        return Part("job_pending", f"Clipia has not accepted it yet{error}{_next(facts, job)}")
    return Part(
        "job_pending",
        f"it waits for its turn within Clipia's limits{_next(facts, job)}",
        ("receiver account",),
    )


def _submitted(facts: Facts, job: JobDetails) -> Part:
    if facts.rejections:
        return rejected_part(facts)
    missing = _missing_worker(facts, job, POLL_LANE, "polls")
    if missing is not None and (missing.state == "no_worker" or not job["has_webhook"]):
        return missing
    accepted = "" if job["submitted_at"] is None else f" since {clock(job['submitted_at'], facts.now)}"
    progress = "" if job["progress"] is None else f" ({job['progress']} %)"
    text = f"Clipia has worked on it{accepted}{progress}; {_awaited(facts, job, polled=missing is None)}"
    return Part("job_submitted", text, (f"receiver events fetch {job['request_id']}",))


def _awaited(facts: Facts, job: JobDetails, *, polled: bool) -> str:
    words = "its webhook is awaited" if job["has_webhook"] else "it has no webhook"
    if polled and job["next_attempt_at"] is not None:
        words += f", and Clipia is asked at {clock(job['next_attempt_at'], facts.now)}"
    error = error_words(read_error(job["error"]))
    return f"{words}; the last poll failed{error}" if error else words


def rejected_part(facts: Facts) -> Part:
    """Return the state of an id that rejected requests contain."""
    newest = facts.rejections[0]
    number = len(facts.rejections)
    times = "a request with its id was" if number == 1 else f"{number} requests with its id were"
    text = f"{times} rejected, last at {clock(newest['received_at'], facts.now)}: {newest['diagnosis']}"
    return Part("webhook_rejected", text, (f"receiver rejections show {newest['id']}",))


def _unsure(job: JobDetails) -> Part:
    words = error_words(read_error(job["error"]))
    commands: tuple[str, ...] = (
        f"receiver jobs resubmit {job['id']}",
        f"receiver jobs cancel {job['id']}",
    )
    if job["request_id"] is not None:
        commands = (f"receiver events fetch {job['request_id']}", *commands)
    return Part("job_unsure", f"Clipia may or may not have it{words}: look in its console", commands)


def _missing_worker(facts: Facts, job: JobDetails, lane: str, verb: str) -> Part | None:
    running = [each for each in facts.workers if each.is_running]
    if not running:
        return _NO_WORKER
    kind = (job["account"] or "").partition("-")[0]
    if _has_key(running, lane, kind):
        return None
    names = ", ".join(f"process {each.pid} on {each.host}" for each in running[:3])
    text = f"no running worker {verb} it: {names} has no CLIPIA_KEY of the {kind or 'right'} kind"
    return Part("no_key", text, ("receiver check",))


def _has_key(running: Sequence[SeenWorker], lane: str, kind: str) -> bool:
    accounts = [each.account or "" for each in running if lane in each.lanes]
    return any(account.startswith(kind) for account in accounts)


def _next(facts: Facts, job: JobDetails) -> str:
    due = job["next_attempt_at"]
    if due is None:
        return ""
    return "; it is due now" if due <= facts.now else f"; next attempt at {clock(due, facts.now)}"


def error_words(error: Mapping[str, Any] | None) -> str:
    """Return an error for the end of a clause, such as ` (insufficient_credits: …)`."""
    words = ": ".join(str(error[name]) for name in ("code", "message") if error.get(name)) if error else ""
    return f" ({words})" if words else ""
