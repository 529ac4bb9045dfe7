"""One generation on one page: its job, receipts, files, deliveries and replays."""

from urllib.parse import quote

from starlette.responses import Response

from receiver.dashboard.pages import Page, View, Visit, go_to


async def show(visit: Visit) -> View:
    """Show the object that an id belongs to, with the verdict on top."""
    found = await visit.client.explain_object(visit.key)
    event_id, job_id = found["event_id"], found["job_id"]
    values = {
        "key": visit.key,
        "explanation": found,
        "event": None if event_id is None else await visit.client.show_event(str(event_id)),
        "job": None if job_id is None else await visit.client.show_job(job_id),
    }
    return View(
        template="generation.html", values=values, status=404 if found["outcome"] == "unknown" else 200
    )


async def find(visit: Visit) -> Response:
    """Go to the page of an id."""
    key = visit.request.query_params.get("id", "").strip()
    path = f"/dashboard/generations/{quote(key, safe='')}"
    return go_to(path if key else "/dashboard/events")


PAGES = (
    Page(path="/find", handler=find),
    Page(path="/generations/{id:path}", handler=show),
)
