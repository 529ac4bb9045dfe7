"""Events: the list with its filters, a result that never arrived, and unrecognized events."""

from collections import Counter
from typing import TYPE_CHECKING, Final, get_args

from starlette.responses import Response

from receiver.client import Page as Rows
from receiver.dashboard.generation import page_of_key
from receiver.dashboard.pages import Page, View, Visit, done
from receiver.dashboard.replays import FILTERS as REPLAYABLE
from receiver.db.rows import DeliveryState, EventState, EventStatus
from receiver.errors import RequestError

if TYPE_CHECKING:
    from receiver.db.views import EventSummary

PAGE_ROWS: Final = 50
FREQUENT: Final = ("state", "status", "destination", "delivery_state", "since")
FILTERS: Final = (
    *FREQUENT,
    *("until", "model", "caller", "source", "idempotency_key", "request_id"),
)
CHOICES: Final = {
    "state": get_args(EventState),
    "status": get_args(EventStatus),
    "delivery_state": get_args(DeliveryState),
}
MAX_PARTS: Final = 10
"""Parts of a recovery that one form carries out; each reads up to 1000 events."""


async def show(visit: Visit) -> View:
    """List events."""
    filters, status, error = visit.filters(*FILTERS), 200, None
    metadata = visit.filters("metadata").get("metadata", "")
    page: Rows[EventSummary] = Rows(data=[], next=None)
    try:
        page = await visit.client.list_events(
            limit=PAGE_ROWS,
            cursor=visit.request.query_params.get("cursor"),
            metadata=read_metadata(metadata),
            **filters,
        )
    except RequestError as raised:
        status, error = 400, str(raised)
    shown = filters | ({"metadata": metadata} if metadata else {})
    values = {
        "page": page,
        "filters": shown,
        "has_rare": bool(shown.keys() - FREQUENT),
        "choices": CHOICES,
        "destinations": [each["name"] for each in await visit.client.list_destinations()],
        "error": error,
        "selection": {} if error else filters,
        "not_replayable": sorted(shown.keys() - REPLAYABLE),
    }
    return View(template="events.html", values=values, status=status)


def read_metadata(text: str) -> dict[str, str]:
    """Return the filter by metadata of a text such as `order=4711`. Raises RequestError."""
    if not text:
        return {}
    name, mark, value = text.partition("=")
    if not mark or not name.strip():
        raise RequestError("metadata: write a name and its value, such as order=4711", code="invalid_request")
    return {name.strip(): value.strip()}


async def ask_fetch(visit: Visit) -> View:
    """Show the form for a result that never arrived."""
    return View(template="fetch.html", values={"asked": visit.filters("request_id", "source")})


async def fetch(visit: Visit) -> Response:
    """Ask Clipia for a result and store it."""
    found = await visit.client.fetch_event(
        visit.field("request_id"), source=visit.field("source") or None, reason=visit.reason
    )
    return done(page_of_key(found["event_id"]), "result_stored" if found["stored"] else "result_known")


async def ask_recover(_visit: Visit) -> View:
    """Show the form for unrecognized events."""
    return View(template="recover.html", values={"counts": None, "cursor": "", "is_done": False})


async def count_recoverable(visit: Visit) -> View:
    """Count the unrecognized events that this release can read."""
    return await _recover(visit, dry_run=True)


async def recover(visit: Visit) -> View:
    """Recover unrecognized events; if there are many, the page asks to go on."""
    return await _recover(visit, dry_run=False)


async def _recover(visit: Visit, *, dry_run: bool) -> View:
    counts: Counter[str] = Counter()
    cursor = visit.field("cursor") or None
    for _ in range(MAX_PARTS):
        part = await visit.client.recover_events(cursor=cursor, dry_run=dry_run, reason=visit.reason)
        counts.update(each.outcome for each in part.data)
        cursor = part.next
        if cursor is None:
            break
    values = {"counts": dict(counts), "cursor": cursor or "", "is_done": not dry_run}
    return View(template="recover.html", values=values)


PAGES = (
    Page(path="/events", handler=show),
    Page(path="/events/fetch", handler=ask_fetch),
    Page(method="POST", path="/events/fetch", handler=fetch),
    Page(path="/events/recover", handler=ask_recover),
    Page(method="POST", path="/events/recover/count", handler=count_recoverable),
    Page(method="POST", path="/events/recover", handler=recover),
)
