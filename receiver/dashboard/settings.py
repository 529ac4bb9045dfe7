"""Settings in force, without a secret."""

from receiver.dashboard.pages import Page, View, Visit


async def show(visit: Visit) -> View:
    """Show the settings."""
    return View(template="settings.html", values={"report": await visit.client.show_settings()})


PAGES = (Page(path="/settings", handler=show),)
