"""Why an object is in its state: the rows are read here, and `verdict` explains them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime

from receiver.core.routing import RoutingFacts, mismatch
from receiver.db import deliveries, destinations, submission_freezes, workers
from receiver.db import explain as rows
from receiver.db.connection import SqlConnection
from receiver.db.database import Database
from receiver.db.deliveries import FailureGroup
from receiver.db.explain import Found
from receiver.db.views import EventDetails, JobDetails
from receiver.destination_settings import DestinationSettings
from receiver.explain.facts import DestinationFacts, Explanation, Facts
from receiver.explain.verdict import explain
from receiver.settings import DEFAULT_SOURCE
from receiver.submitter.account_status import read_account_status
from receiver.submitter.job import read_error


async def explain_key(
    database: Database, key: str, configured: Callable[[], Sequence[DestinationSettings]]
) -> Explanation:
    """Explain an id. Raises DatabaseUnavailable."""
    async with database.read() as connection:
        found = await rows.find(connection, key, default_source=DEFAULT_SOURCE)
        account = found.job["account"] if found.job is not None else None
        status = None if account is None else await read_account_status(connection, account)
        facts = Facts(
            key=key,
            now=datetime.now(UTC),
            job=found.job,
            event=found.event,
            delivery_id=found.delivery_id,
            others=found.others,
            rejections=found.rejections,
            freeze=await submission_freezes.find(connection),
            pause=None if status is None or status.pause is None else read_error(status.pause),
            workers=await workers.find_runs(connection),
            destinations=await _read_destinations(connection, found, configured()),
        )
    return explain(facts)


async def _read_destinations(
    connection: SqlConnection, found: Found, configured: Sequence[DestinationSettings]
) -> list[DestinationFacts]:
    event = found.event
    if event is None:
        return []
    about = _routing_facts(event, found.job)
    known = {
        each.name: DestinationFacts(name=each.name, mismatch=mismatch(each.filter, about))
        for each in configured
    }
    pauses = await destinations.read_pauses(connection)
    circuits = {each.destination: each for each in reversed(await destinations.read_circuits(connection))}
    for name in {row["destination"] for row in event["deliveries"]}:
        known[name] = replace(
            known.get(name) or DestinationFacts(name=name, configured=False),
            pause=pauses[name].pause if name in pauses else None,
            circuit=circuits.get(name),
            failures=await _read_failures(connection, event, name),
        )
    return list(known.values())


def _routing_facts(event: EventDetails, job: JobDetails | None) -> RoutingFacts:
    return RoutingFacts(
        status=event["status"] or "",
        model=event["model"],
        source=event["source"],
        caller=None if job is None else job["caller"],
        metadata={} if job is None else job["metadata"],
    )


async def _read_failures(
    connection: SqlConnection, event: EventDetails, destination: str
) -> Sequence[FailureGroup]:
    """Return the failures at a destination, if the event's delivery to it has failed."""
    rows = (row for row in event["deliveries"] if row["destination"] == destination)
    if not any(row["error"] for row in rows if row["state"] in ("pending", "dead")):
        return ()
    return await deliveries.list_failures(connection, destination=destination)


__all__ = ["Explanation", "explain_key"]
