"""Rejections: requests to the callback that were rejected, by cause, each with its diagnosis."""

from typing import Final

from receiver.core.diagnosis import CAUSES
from receiver.dashboard.pages import Page, View, Visit
from receiver.errors import RequestError

PAGE_ROWS: Final = 50
_MAX_DIGITS: Final = 18


async def show_all(visit: Visit) -> View:
    """List rejections, and their number by cause."""
    filters = visit.filters("cause", "source", "reason", "since", "until")
    cursor = visit.request.query_params.get("cursor")
    page = await visit.client.list_rejections(limit=PAGE_ROWS, cursor=cursor, **filters)
    values = {
        "page": page,
        "filters": filters,
        "groups": await visit.client.group_rejections(),
        "causes": sorted(CAUSES),
    }
    return View(template="rejections.html", values=values)


async def show(visit: Visit) -> View:
    """Show one rejection with its headers and the start of its body."""
    if not visit.key.isascii() or not visit.key.isdigit() or len(visit.key) > _MAX_DIGITS:
        raise RequestError("There is no such rejected request.", code="not_found")
    return View(template="rejection.html", values={"each": await visit.client.show_rejection(int(visit.key))})


PAGES = (
    Page(path="/rejections", handler=show_all),
    Page(path="/rejections/{id}", handler=show),
)
