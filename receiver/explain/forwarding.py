"""The state of an event's files and deliveries; pure."""

from collections import Counter
from collections.abc import Iterator, Sequence

from receiver.core.failure_causes import cause_of
from receiver.core.lane_names import MEDIA_LANE, destination_lane
from receiver.db.deliveries import FailureGroup
from receiver.db.views import Delivery, DeliveryWithLog, EventDetails
from receiver.explain.facts import DestinationFacts, Facts, Part, clock

_LOST = ("gone", "blocked", "not_media")
_VERBS = {"pending": ("waits", "wait"), "dead": ("is dead", "are dead")}
_STATE_WORDS = {"not_media": "no media", "gone": "lost", "pending": "not stored yet"}


def media_words(event: EventDetails) -> str:
    """Return the files in words: `video stored`, `2 images stored`."""
    counts = Counter(
        (file["kind"], file["state"])
        for file in event["media"]
        if file["variant"] == "original" and file["state"] != "superseded"
    )
    words = []
    for (kind, state), number in counts.items():
        noun = kind if number == 1 else f"{number} {'audio files' if kind == 'audio' else kind + 's'}"
        words.append(f"{noun} {_STATE_WORDS.get(state, state)}")
    return ", ".join(words)


def media_parts(facts: Facts, event: EventDetails) -> Iterator[Part]:
    """Return the states of files that are not stored."""
    for file in event["media"]:
        if file["state"] in _LOST:
            error = f": {file['error']}" if file["error"] else ""
            command = f"receiver replay {event['id']} --media"
            yield Part(
                "media_lost", f"a file is {_STATE_WORDS.get(file['state'], file['state'])}{error}", (command,)
            )
        elif file["state"] == "pending":
            if MEDIA_LANE not in facts.lanes:
                yield Part("no_worker", "no running worker downloads files", ("receiver worker",))
                continue
            error = f": {file['error']}" if file["error"] else ""
            command = f"receiver media give-up {event['id']}"
            yield Part("media_pending", f"a file is not stored yet{error}", (command,) if error else ())


def delivery_parts(facts: Facts, event: EventDetails) -> Iterator[Part]:
    """Return the state of the delivery to each destination, or of one delivery."""
    known = {each.name: each for each in facts.destinations}
    for row in _chosen(event["deliveries"], facts):
        destination = known.get(row["destination"]) or DestinationFacts(
            name=row["destination"], configured=False
        )
        if facts.delivery_id is None and _is_superseded(row):
            yield _superseded_part(destination)
        else:
            yield _delivery_part(facts, row, destination)
    if not event["deliveries"]:
        yield _without_delivery(facts, event)


def _without_delivery(facts: Facts, event: EventDetails) -> Part:
    configured = [each for each in facts.destinations if each.configured]
    if not configured:
        return Part("stored", "no destination is configured: the event is only stored")
    names = ", ".join(each.name for each in configured if each.mismatch is None)
    if names:
        text = f"it has no delivery: {names} took no such events when it came"
        return Part("filtered", text, (f"receiver replay {event['id']}",))
    reasons = "; ".join(f"{each.name}: {each.mismatch}" for each in configured)
    text = f"each destination's filter leaves it out ({reasons})"
    return Part("filtered", text, (f"receiver route {event['id']}",))


def _chosen(rows: Sequence[DeliveryWithLog], facts: Facts) -> list[DeliveryWithLog]:
    """Return the delivery that was asked for, or the one of each destination that counts."""
    if facts.delivery_id is not None:
        return [row for row in rows if row["id"] == facts.delivery_id]
    newest: dict[str, DeliveryWithLog] = {}
    for row in sorted(
        rows,
        key=lambda row: (not _is_superseded(row), row["state"] in ("delivered", "pending"), row["id"]),
    ):
        # A replay that was delivered stands for a dead letter before it.
        newest[row["destination"]] = row
    return list(newest.values())


def _is_superseded(row: DeliveryWithLog) -> bool:
    """Tell whether a delivery belongs to a body that another one has superseded."""
    return any(attempt["outcome"] == "superseded" for attempt in row["attempt_log"])


def _superseded_part(destination: DestinationFacts) -> Part:
    name = destination.name
    if not destination.configured:
        return Part("filtered", f"{name} is not configured any more and does not get the promoted body")
    if destination.mismatch is not None:
        text = f"{name} does not get the promoted body: its filter leaves it out ({destination.mismatch})"
        return Part("filtered", text)
    return Part("delivery_due", f"{name} gets the promoted body by a replay next", ("receiver replays list",))


def _delivery_part(facts: Facts, row: Delivery, destination: DestinationFacts) -> Part:
    name = row["destination"]
    if row["state"] == "delivered":
        at = row["finished_at"] or row["created_at"]
        return Part("delivered", f"delivered to {name} at {clock(at, facts.now)}")
    if row["state"] == "canceled":
        return Part(
            "delivery_canceled", f"the delivery to {name} was canceled: {row['error'] or 'by a person'}"
        )
    if row["state"] == "dead":
        at = row["finished_at"] or row["created_at"]
        text = f"{name} has not got it: dead letter since {clock(at, facts.now)}: {cause_of(row['error'])}"
        commands = (f"receiver deliveries show {row['id']}", f"receiver deliveries retry {row['id']}")
        return Part("delivery_dead", text + _others(row, destination), commands)
    return _pending_part(facts, row, destination)


def _pending_part(facts: Facts, row: Delivery, destination: DestinationFacts) -> Part:
    name = row["destination"]
    if not destination.configured:
        commands = (f"receiver deliveries move {name} NEW", f"receiver deliveries discard {name}")
        return Part("destination_removed", f"{name} is not configured any more", commands)
    if (pause := destination.pause) is not None:
        reason = f": {pause.reason}" if pause.reason else ""
        text = f"{name} has been paused since {clock(pause.at, facts.now)} by {pause.by}{reason}"
        return Part("destination_paused", text, (f"receiver destinations resume {name}",))
    if row["next_attempt_at"] is None:
        return Part("waits_for_media", f"{name} gets it when its files are stored")
    if not facts.lanes:
        return Part("no_worker", f"no worker is running that delivers to {name}", ("receiver worker",))
    if destination_lane(name) not in facts.lanes:
        text = f"no running worker delivers to {name}: restart the workers with the present settings"
        return Part("destination_unserved", text, ("receiver check",))
    return _tried_part(facts, row, destination)


def _tried_part(facts: Facts, row: Delivery, destination: DestinationFacts) -> Part:
    name, due = row["destination"], row["next_attempt_at"] or facts.now
    at = "now" if due <= facts.now else f"at {clock(due, facts.now)}"
    if row["error"] is not None:
        group = _group(row, destination)
        since = f" since {clock(group['first'], facts.now)}" if group else ""
        others = _others(row, destination)
        text = f"{name} has failed{since}: {cause_of(row['error'])}{others}; next attempt {at}"
        commands = (
            f"receiver deliveries show {row['id']}",
            f"receiver deliveries failures --destination {name}",
        )
        return Part("delivery_failing", text, commands)
    if destination.circuit is not None:
        since = clock(destination.circuit.open_since, facts.now)
        text = (
            f"{name} has been down since {since}: {cause_of(destination.circuit.error)}; only probes are sent"
        )
        return Part("destination_down", text, (f"receiver deliveries failures --destination {name}",))
    if row["attempts"] and due > facts.now:
        return Part("delivery_under_way", f"{name} is getting it now")
    return Part("delivery_due", f"{name} gets it {at}")


def _group(row: Delivery, destination: DestinationFacts) -> FailureGroup | None:
    cause = cause_of(row["error"])
    same = (each for each in destination.failures if each["state"] == row["state"] and each["cause"] == cause)
    return next(same, None)


def _others(row: Delivery, destination: DestinationFacts) -> str:
    group = _group(row, destination)
    number = group["count"] - 1 if group else 0
    if number < 1:
        return ""
    verb = _VERBS[row["state"]][number > 1]
    return f"; {number} {'others' if number > 1 else 'other'} {verb} for the same reason"
