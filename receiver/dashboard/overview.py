"""The first page: the status of the service."""

from receiver.dashboard.pages import Page, View, Visit


async def show(visit: Visit) -> View:
    """Show the status."""
    return View(template="overview.html", values={"status": await visit.client.show_status()})


PAGES = (Page(path="", handler=show),)
