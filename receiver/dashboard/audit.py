"""Audit: the actions of operators, and alerts."""

from typing import Final

from receiver.dashboard.pages import Page, View, Visit

PAGE_ROWS: Final = 100
ALERT_ROWS: Final = 100


async def show(visit: Visit) -> View:
    """List actions."""
    filters = visit.filters("by", "operation", "target", "since", "until")
    cursor = visit.request.query_params.get("cursor")
    page = await visit.client.list_actions(limit=PAGE_ROWS, cursor=cursor, **filters)
    return View(template="audit.html", values={"page": page, "filters": filters})


async def show_alerts(visit: Visit) -> View:
    """List alerts, open ones first."""
    page = await visit.client.list_alerts(limit=ALERT_ROWS)
    return View(template="alerts.html", values={"alerts": page.data})


PAGES = (
    Page(path="/audit", handler=show),
    Page(path="/audit/alerts", handler=show_alerts),
)
