"""Destinations: their state, pause, test, failures, and the deliveries that a removed one has left."""

from urllib.parse import quote

from starlette.responses import Response

from receiver.api.parameters import invalid
from receiver.dashboard.pages import HOME, Page, View, Visit, done
from receiver.destination_control import DestinationTest
from receiver.errors import RequestError
from receiver.removed_deliveries import Redirected

RECENT_ROWS = 20


async def show_all(visit: Visit) -> View:
    """List the destinations."""
    values = {"destinations": await visit.client.list_destinations()}
    return View(template="destinations.html", values=values)


async def show(visit: Visit) -> View:
    """Show one destination."""
    return await _view(visit)


async def pause(visit: Visit) -> Response:
    """Stop deliveries."""
    await visit.client.pause_destination(visit.key, reason=visit.reason)
    return done(_path(visit), "paused")


async def resume(visit: Visit) -> Response:
    """Go on with deliveries."""
    await visit.client.resume_destination(visit.key, reason=visit.reason)
    return done(_path(visit), "resumed")


async def test(visit: Visit) -> View:
    """Check the connection, and send a test message if wanted."""
    send = bool(visit.field("send"))
    return await _view(visit, await visit.client.test_destination(visit.key, send=send, reason=visit.reason))


async def count(visit: Visit) -> View:
    """Count the deliveries that would be moved or discarded."""
    return _redirected_view(visit, await _redirect(visit, dry_run=True), is_count=True)


async def redirect(visit: Visit) -> View:
    """Move or discard deliveries; one visit does as many as one call."""
    return _redirected_view(visit, await _redirect(visit, dry_run=False), is_count=False)


async def _redirect(visit: Visit, *, dry_run: bool) -> Redirected:
    to, dead, client = visit.field("to"), bool(visit.field("dead")), visit.client
    if visit.field("verb") == "discard":
        return await client.discard_deliveries(visit.key, dead=dead, dry_run=dry_run, reason=visit.reason)
    if not to:
        raise invalid("Choose the destination that the deliveries go to.")
    return await client.move_deliveries(visit.key, to=to, dead=dead, dry_run=dry_run, reason=visit.reason)


def _redirected_view(visit: Visit, found: Redirected, *, is_count: bool) -> View:
    values = {
        "name": visit.key,
        "found": found,
        "is_count": is_count,
        "fields": {name: visit.field(name) for name in ("verb", "to", "dead")},
        "reason": visit.reason,
    }
    return View(template="redirected.html", values=values)


async def _view(visit: Visit, result: DestinationTest | None = None) -> View:
    every = await visit.client.list_destinations()
    found = next((each for each in every if each["name"] == visit.key), None)
    if found is None:
        raise RequestError(f"There is no destination {visit.key!r}.", code="not_found")
    values = {
        "each": found,
        "others": [each["name"] for each in every if each["configured"]],
        "test": result,
        "failures": await visit.client.list_failures(destination=visit.key),
        "recent": (await visit.client.list_deliveries(destination=visit.key, limit=RECENT_ROWS)).data,
    }
    return View(template="destination.html", values=values)


def _path(visit: Visit) -> str:
    return f"{HOME}/destinations/{quote(visit.key, safe='')}"


PAGES = (
    Page(path="/destinations", handler=show_all),
    Page(path="/destinations/{name}", handler=show),
    Page(method="POST", path="/destinations/{name}/pause", handler=pause),
    Page(method="POST", path="/destinations/{name}/resume", handler=resume),
    Page(method="POST", path="/destinations/{name}/test", handler=test),
    Page(method="POST", path="/destinations/{name}/count", handler=count),
    Page(method="POST", path="/destinations/{name}/redirect", handler=redirect),
)
