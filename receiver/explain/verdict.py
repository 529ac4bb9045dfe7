"""The explanation of an id: one state, one sentence, the next commands; pure."""

from collections.abc import Iterator
from uuid import UUID

from typing_extensions import TypedDict

from receiver.core.lane_names import FAN_OUT_LANE
from receiver.db.views import EventDetails
from receiver.explain.facts import Explanation, Facts, Part, first, outcome_of
from receiver.explain.forwarding import delivery_parts, media_parts, media_words
from receiver.explain.history import history
from receiver.explain.jobs import error_words, job_part, rejected_part
from receiver.submitter.job import read_error

MAX_COMMANDS = 5


def explain(facts: Facts) -> Explanation:
    """Explain the state of an id."""
    parts = first(_parts(facts))
    words = [_head(facts), *dict.fromkeys(part.text for part in parts)]
    commands = dict.fromkeys(command for part in parts for command in part.commands)
    ids = _ids(facts)
    return Explanation(
        key=facts.key,
        state=parts[0].state,
        outcome=outcome_of(parts[0].state),
        verdict="; ".join(word for word in words if word),
        facts=history(facts),
        commands=list(commands)[:MAX_COMMANDS],
        **ids,
    )


class _Ids(TypedDict):
    event_id: UUID | None
    request_id: str | None
    job_id: UUID | None
    delivery_id: UUID | None


def _ids(facts: Facts) -> _Ids:
    job, event = facts.job, facts.event
    named = event or job
    return {
        "event_id": event and event["id"],
        "request_id": named and named["request_id"],
        "job_id": job and job["id"],
        "delivery_id": facts.delivery_id,
    }


def _parts(facts: Facts) -> list[Part]:
    if facts.event is not None:
        return list(_event_parts(facts, facts.event))
    if facts.job is not None:
        return [job_part(facts, facts.job)]
    if facts.rejections:
        return [rejected_part(facts)]
    text = (
        "no event, job, delivery, file or rejected request has this id: it never arrived, was pruned, or "
        "belongs to another receiver"
    )
    return [
        Part("unknown", text, ("receiver rejections list", f"receiver events fetch {_quoted(facts.key)}"))
    ]


def _event_parts(facts: Facts, event: EventDetails) -> Iterator[Part]:
    if event["state"] == "erased":
        yield Part("event_erased", "the event was erased by a person: only a tombstone is left")
        return
    if event["state"] == "unrecognized":
        yield _unrecognized(event)
        return
    if event["state"] == "received":
        yield _received(facts, event)
        return
    yield from media_parts(facts, event)
    yield from delivery_parts(facts, event)
    conflicts = [receipt["seq"] for receipt in event["receipts"] if receipt["outcome"] == "conflict"]
    if conflicts:
        text = "a webhook with the same request_id and another body came later and was kept apart"
        show = f"receiver events show {event['id']}"
        promote = f"receiver events promote {event['id']} {conflicts[-1]} --dry-run"
        yield Part("conflict", text, (show, promote))


def _unrecognized(event: EventDetails) -> Part:
    reason = f" ({event['reason']})" if event["reason"] else ""
    if event.get("recoverable"):
        text = f"an earlier release did not recognize it{reason}, and this one can read it"
        return Part("event_unrecognized", text, ("receiver events recover --dry-run",))
    text = f"it is stored, but not recognized as an event{reason}, so it is not forwarded"
    return Part("event_unrecognized", text, (f"receiver events show {event['id']}",))


def _received(facts: Facts, event: EventDetails) -> Part:
    if FAN_OUT_LANE not in facts.lanes:
        return Part(
            "no_worker", "it is stored, but no worker is running that forwards it", ("receiver worker",)
        )
    waited = (facts.now - event["received_at"]).total_seconds()
    text = f"it was stored {waited:.0f} s ago and is forwarded next"
    return Part("event_received", text, ("receiver status",))


def _head(facts: Facts) -> str:
    """Return the generation in words: its price, its result and its files."""
    job, event = facts.job, facts.event
    words = []
    if facts.others:
        words.append(f"{facts.others} other callers have a job with this key, too")
    words += _price(facts)
    if event is not None and event["status"] == "ERROR":
        error = error_words(read_error(job["error"])) if job is not None else ""
        words.append(f"the generation failed{error}")
    if event is not None and (media := media_words(event)):
        words.append(media)
    return ", ".join(words)


def _price(facts: Facts) -> Iterator[str]:
    job, event = facts.job, facts.event
    if job is not None and job["charged"]:
        yield f"paid {job['charged']} credits"
    elif job is None and event is not None and event["cost"]:
        yield f"cost {event['cost']} credits"


def _quoted(key: str) -> str:
    """Return an id for a shell."""
    return key if key.replace("-", "").replace("_", "").isalnum() else "'" + key.replace("'", "'\\''") + "'"
