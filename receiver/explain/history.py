"""The facts behind a verdict, in the order of time; pure."""

from collections.abc import Iterator
from typing import Final

from receiver.db.receipts import POLLED
from receiver.db.views import DeliveryWithLog, EventDetails, FileWithLog, JobDetails
from receiver.explain.facts import Fact, Facts

SHOWN_ATTEMPTS: Final = 5
"""Of each job, file and delivery the last ones are shown."""
MAX_FACTS: Final = 100


def history(facts: Facts) -> list[Fact]:
    """Return the newest facts, oldest first."""
    found = sorted(_facts(facts), key=lambda fact: fact["at"])
    return found[-MAX_FACTS:]


def _facts(facts: Facts) -> Iterator[Fact]:
    if facts.job is not None:
        yield from _job_facts(facts.job)
    if facts.event is not None:
        yield from _event_facts(facts, facts.event)
    for rejection in facts.rejections:
        text = f"a request was rejected: {rejection['diagnosis']} (rejection {rejection['id']})"
        yield Fact(at=rejection["received_at"], text=text)
    if facts.freeze is not None and facts.job is not None and facts.job["state"] == "pending":
        text = f"submissions were frozen by {facts.freeze.by}: {facts.freeze.reason}"
        yield Fact(at=facts.freeze.frozen_at, text=text)
    for destination in facts.destinations:
        if destination.pause is not None:
            yield Fact(
                at=destination.pause.at, text=f"{destination.name} was paused by {destination.pause.by}"
            )
        if (circuit := destination.circuit) is not None:
            text = f"{destination.name}: {circuit.owner} opened its circuit: {circuit.error}"
            yield Fact(at=circuit.open_since, text=text)


def _job_facts(job: JobDetails) -> Iterator[Fact]:
    yield Fact(at=job["created_at"], text=f"{job['caller']} asked for the job {job['id']} ({job['model']})")
    for attempt in job["attempt_log"][-SHOWN_ATTEMPTS:]:
        error = f": {attempt['error']}" if attempt["error"] else ""
        yield Fact(at=attempt["started_at"], text=f"submission {attempt['outcome']}{error}")
    if job["submitted_at"] is not None:
        price = "" if job["cost"] is None else f" for {job['cost']} credits"
        yield Fact(at=job["submitted_at"], text=f"Clipia accepted it as {job['request_id']}{price}")
    if job["finished_at"] is not None:
        charged = "" if job["charged"] is None else f", {job['charged']} credits charged"
        yield Fact(at=job["finished_at"], text=f"the job was {job['state']}{charged}")


def _event_facts(facts: Facts, event: EventDetails) -> Iterator[Fact]:
    if event["origin"] == "poll":
        yield Fact(at=event["received_at"], text="the result was fetched from Clipia")
    for receipt in event["receipts"][:SHOWN_ATTEMPTS]:
        more = f" and {receipt['repeated']} more" if receipt["repeated"] else ""
        text = f"webhook {receipt['outcome']}{more}, signed with the secret {receipt['secret_id']}"
        if receipt["secret_id"] == POLLED:
            text = f"polled result {receipt['outcome']}"
        yield Fact(at=receipt["received_at"], text=text)
    for file in event["media"]:
        yield from _file_facts(file)
    for delivery in event["deliveries"]:
        if facts.delivery_id in (None, delivery["id"]):
            yield from _delivery_facts(delivery)
    yield from _filter_facts(facts, event)


def _filter_facts(facts: Facts, event: EventDetails) -> Iterator[Fact]:
    with_delivery = {delivery["destination"] for delivery in event["deliveries"]}
    for destination in facts.destinations:
        if destination.mismatch is not None and destination.name not in with_delivery:
            text = f"{destination.name}: its filter leaves the event out: {destination.mismatch}"
            yield Fact(at=event["received_at"], text=text)


def _file_facts(file: FileWithLog) -> Iterator[Fact]:
    label = f"{file['kind']} {file['variant']} {file['position']}"
    for attempt in file["attempt_log"][-SHOWN_ATTEMPTS:]:
        if attempt["outcome"] != "succeeded":
            error = f": {attempt['error']}" if attempt["error"] else ""
            yield Fact(at=attempt["started_at"], text=f"{label}: download {attempt['outcome']}{error}")
    if file["finished_at"] is not None:
        place = f" at {file['uri']}" if file["uri"] else f": {file['error']}" if file["error"] else ""
        yield Fact(at=file["finished_at"], text=f"{label}: {file['state']}{place}")


def _delivery_facts(delivery: DeliveryWithLog) -> Iterator[Fact]:
    name = delivery["destination"]
    if delivery["replay_id"] is not None:
        text = f"{name}: the replay {delivery['replay_id']} ordered it again"
        yield Fact(at=delivery["created_at"], text=text)
    for attempt in delivery["attempt_log"][-SHOWN_ATTEMPTS:]:
        error = f": {attempt['error']}" if attempt["error"] else ""
        answer = f"; it answered {attempt['answer']}" if attempt["answer"] else ""
        number = f"attempt {attempt['number']} " if attempt["number"] else ""
        yield Fact(at=attempt["started_at"], text=f"{name}: {number}{attempt['outcome']}{error}{answer}")
    if delivery["finished_at"] is not None:
        yield Fact(at=delivery["finished_at"], text=f"{name}: {delivery['state']}")
