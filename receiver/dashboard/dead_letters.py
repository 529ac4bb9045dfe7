"""Dead letters: failures by cause, and deliveries, which are retried or discarded."""

from typing import Any, Final
from urllib.parse import urlencode

from starlette.responses import Response

from receiver.dashboard.generation import page_of_key, read_id
from receiver.dashboard.pages import HOME, Page, View, Visit, done

PAGE_ROWS: Final = 50
_PATH: Final = f"{HOME}/dead-letters"
_FILTERS: Final = ("destination", "state", "cause", "since", "until")


async def show(visit: Visit) -> View:
    """List failures by cause, and deliveries; without a filter by state, the dead ones."""
    filters = {"state": "dead", **visit.filters(*_FILTERS)}
    cursor = visit.request.query_params.get("cursor")
    page = await visit.client.list_deliveries(limit=PAGE_ROWS, cursor=cursor, **filters)
    destinations = await visit.client.list_destinations()
    values = {
        "page": page,
        "filters": filters,
        "groups": await visit.client.list_failures(destination=filters.get("destination")),
        "destinations": [each["name"] for each in destinations],
        "dead": {each["name"]: each["dead"] for each in destinations if each["dead"]},
        "back": urlencode(visit.filters(*_FILTERS)),
    }
    return View(template="dead_letters.html", values=values)


async def retry(visit: Visit) -> View | Response:
    """Deliver the dead letters that match the form again; one visit does as many as one call."""
    # The API reads the values, and says which one is wrong.
    chosen: dict[str, Any] = {
        name: visit.field(name)
        for name in ("destination", "cause", "since", "until", "all", "not_restarted_since")
        if visit.field(name)
    }
    if "ids" in visit.form:
        chosen["ids"] = visit.form.getlist("ids")
    answer = await visit.client.retry_dead_letters(**chosen | {"all": "all" in chosen}, reason=visit.reason)
    count = sum(answer["restarted"].values())
    if not answer["more"]:
        return done(_back(visit), "retried", count=count)
    fields = {**chosen, "not_restarted_since": answer["began"].isoformat(), "reason": visit.reason or ""}
    return View(template="retried.html", values={"fields": fields, "count": count})


async def retry_one(visit: Visit) -> Response:
    """Deliver one dead letter again."""
    await visit.client.retry_dead_letter(read_id(visit.key), reason=visit.reason)
    return done(_back(visit), "delivery_retried")


async def discard(visit: Visit) -> Response:
    """End a delivery for good."""
    await visit.client.discard_delivery(visit.key, reason=visit.reason)
    return done(_back(visit), "delivery_discarded")


def _back(visit: Visit) -> str:
    """Return the page whose form it was: a generation, or the list with its filters."""
    if key := visit.field("page"):
        return page_of_key(key)
    filters = visit.filters(*_FILTERS)
    return _PATH + (f"?{urlencode(filters)}" if filters else "")


PAGES = (
    Page(path="/dead-letters", handler=show),
    Page(method="POST", path="/dead-letters/retry", handler=retry),
    Page(method="POST", path="/deliveries/{id}/retry", handler=retry_one),
    Page(method="POST", path="/deliveries/{id}/discard", handler=discard),
)
