"""Events: the list with its filters."""

from receiver.dashboard.pages import Page, View, Visit

PAGE_ROWS = 50


async def show(visit: Visit) -> View:
    """List events."""
    filters = visit.filters("state", "status", "model", "source", "caller", "destination", "since", "until")
    page = await visit.client.list_events(
        limit=PAGE_ROWS, cursor=visit.request.query_params.get("cursor"), **filters
    )
    return View(template="events.html", values={"page": page, "filters": filters})


PAGES = (Page(path="/events", handler=show),)
