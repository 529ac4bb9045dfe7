"""One generation on one page: its job, receipts, files, deliveries and replays, and the actions on them."""

import shlex
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import quote
from uuid import UUID

from starlette.responses import Response

from receiver.api.models import ShownEvent
from receiver.client import Client
from receiver.dashboard.pages import Page, View, Visit, done, go_to
from receiver.db.views import ReplayDetails
from receiver.errors import RequestError
from receiver.explain import Explanation
from receiver.submitter.job import Job

MAX_REPLAYS: Final = 5
"""The newest replays of an event that are shown with their reasons."""
MAX_DIGITS: Final = 19


async def show(visit: Visit) -> View:
    """Show the object that an id belongs to, with the verdict on top."""
    found = await visit.client.explain_object(visit.key)
    event_id, job_id = found["event_id"], found["job_id"]
    event = None if event_id is None else await visit.client.show_event(str(event_id), exact=True)
    job = None if job_id is None else await visit.client.show_job(job_id)
    values = {
        "key": visit.key,
        "here": page_of_key(visit.key),
        "explanation": found,
        "event": event,
        "job": job,
        "destinations": {each["name"]: each for each in await visit.client.list_destinations()},
        "replays": [] if event is None else await _read_replays(visit.client, event),
        "route": [] if event is None or event["deliveries"] else await _read_route(visit.client, event),
        "calls": list(_calls(found, event, job)),
    }
    return View(
        template="generation.html", values=values, status=404 if found["outcome"] == "unknown" else 200
    )


async def _read_replays(client: Client, event: ShownEvent) -> list[ReplayDetails]:
    ids = dict.fromkeys(each["replay_id"] for each in event["deliveries"] if each["replay_id"] is not None)
    return [await client.show_replay(each) for each in sorted(ids, reverse=True)[:MAX_REPLAYS]]


async def _read_route(client: Client, event: ShownEvent) -> list[Any]:
    """Return why an event goes to no destination."""
    try:
        return list(await client.route_event(str(event["id"])))
    except RequestError:  # it is not recognized, or erased
        return []


def _calls(found: Explanation, event: ShownEvent | None, job: Job | None) -> Iterable[tuple[str, str]]:
    """Return API calls for a shell, each with the command that makes it."""
    paths = [(f"/v1/explain/{quote(found['key'], safe='')}", f"why {shlex.quote(found['key'])}")]
    if event is not None:
        paths.append((f"/v1/events/{event['id']}", f"events show {event['id']}"))
    if job is not None:
        paths.append((f"/v1/jobs/{job.id}", f"jobs show {job.id}"))
    for path, command in paths:
        yield f'curl -H "Authorization: Bearer $RECEIVER_TOKEN" "$RECEIVER_URL"{path}', f"receiver {command}"


async def find(visit: Visit) -> Response:
    """Go to the page of an id."""
    key = visit.request.query_params.get("id", "").strip()
    return go_to(page_of_key(key) if key else "/dashboard/events")


def page_of_key(key: object) -> str:
    """Return the address of the page of any id."""
    return f"/dashboard/generations/{quote(str(key), safe='')}"


async def show_message(visit: Visit) -> View:
    """Show the message of a delivery's last attempt."""
    values = {
        "key": visit.key,
        "message": await visit.client.show_message(visit.key),
        "delivery": await visit.client.show_delivery(visit.key),
    }
    return View(template="message.html", values=values)


async def give_up_files(visit: Visit) -> Response:
    """Give up an event's pending downloads."""
    found = await visit.client.give_up_files(visit.key, reason=visit.reason)
    return _done(visit, "files_given_up", number=found["given_up"])


async def count_promotion(visit: Visit) -> View:
    """Show what the promotion of a conflict would change."""
    found = await visit.client.promote_receipt(visit.key, _read_receipt(visit), dry_run=True)
    return View(template="promote.html", values={"found": found})


async def promote(visit: Visit) -> Response:
    """Make the body of a conflict the event's body."""
    found = await visit.client.promote_receipt(visit.key, _read_receipt(visit), reason=visit.reason)
    return done(page_of_key(found.event_id), "promoted", number=len(found.destinations))


def _read_receipt(visit: Visit) -> int:
    text = visit.field("receipt")
    if not (text.isascii() and text.isdigit() and len(text) < MAX_DIGITS):
        raise RequestError("there is no such receipt", code="not_found")
    return int(text)


async def erase_event(visit: Visit) -> Response:
    """Erase an event for good."""
    await visit.client.erase_event(visit.key, reason=visit.reason)
    return _done(visit, "event_erased")


async def resubmit_job(visit: Visit) -> Response:
    """Submit a job again."""
    await visit.client.resubmit_job(visit.key, reason=visit.reason)
    return _done(visit, "job_resubmitted")


async def cancel_job(visit: Visit) -> Response:
    """End a job."""
    job = await visit.client.cancel_job(visit.key, reason=visit.reason)
    return _done(visit, "job_canceled" if job.state == "canceled" else "job_unsure")


def read_id(text: str) -> UUID:
    """Return an id of a path. Raises RequestError."""
    try:
        return UUID(text)
    except ValueError:
        raise RequestError("there is no object with this id", code="not_found") from None


def _done(visit: Visit, notice: str, **numbers: object) -> Response:
    """Go back to the page whose form it was."""
    return done(page_of_key(visit.field("page") or visit.key), notice, **numbers)


PAGES = (
    Page(path="/find", handler=find),
    Page(path="/generations/{id:path}", handler=show),
    Page(path="/deliveries/{id}/message", handler=show_message),
    Page(method="POST", path="/events/{id}/give-up", handler=give_up_files),
    Page(method="POST", path="/events/{id}/promote/count", handler=count_promotion),
    Page(method="POST", path="/events/{id}/promote", handler=promote),
    Page(method="POST", path="/events/{id}/erase", handler=erase_event),
    Page(method="POST", path="/jobs/{id}/resubmit", handler=resubmit_job),
    Page(method="POST", path="/jobs/{id}/cancel", handler=cancel_job),
)
