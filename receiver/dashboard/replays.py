"""Replays: the events are counted before one is ordered, and its progress is shown."""

import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from starlette.responses import Response

from receiver.api.parameters import invalid
from receiver.core.request_values import read_moment
from receiver.dashboard.generation import read_id
from receiver.dashboard.pages import HOME, Page, View, Visit, done, go_to
from receiver.db.selection import Selection
from receiver.db.views import ReplayCounts
from receiver.replays import ReplayRequest

PAGE_ROWS: Final = 50
FILTERS: Final = tuple(name for name in Selection.model_fields if name != "ids")
OPTIONS: Final = ("media", "force", "all")
_OTHERS: Final = frozenset({"ids", "to", "rate", "reason", "key", *OPTIONS})


async def show_all(visit: Visit) -> View:
    """List replays."""
    page = await visit.client.list_replays(limit=PAGE_ROWS, cursor=visit.request.query_params.get("cursor"))
    return View(template="replays.html", values={"page": page})


async def ask(visit: Visit) -> View:
    """Show the form for a new replay."""
    return await _form_view(visit, visit.filters(*FILTERS), counts=None)


async def count(visit: Visit) -> View:
    """Count the events and deliveries of a replay, without an order."""
    values = _read_form(visit)
    counts = await visit.client.count_replay(ReplayRequest.read(values))
    return await _form_view(visit, values, counts=counts)


async def order(visit: Visit) -> Response:
    """Order a replay. The key was made with the count, so a second click is the same order."""
    values = {**_read_form(visit), "reason": visit.reason or ""}
    found = await visit.client.order_replay(ReplayRequest.read(values), key=visit.field("key") or None)
    return go_to(f"{HOME}/replays/{found['id']}")


async def show(visit: Visit) -> View:
    """Show a replay with its progress."""
    found = await visit.client.show_replay(read_id(visit.key))
    return View(template="replay.html", values={"each": found})


async def cancel(visit: Visit) -> Response:
    """Stop a replay."""
    await visit.client.cancel_replay(read_id(visit.key), reason=visit.reason)
    return done(f"{HOME}/replays/{visit.key}", "replay_canceled")


def _read_form(visit: Visit) -> dict[str, Any]:
    """Return the order in a form. Raises RequestError.

    A filter that a replay does not have is an error: without it, the replay would have more events.
    """
    form = visit.form
    for name in form:
        if name not in _OTHERS and name not in FILTERS and visit.field(name):
            raise invalid(f"a replay has no filter {name[:64]!r}: leave it out, or select single events")
    selection: dict[str, Any] = {name: visit.field(name) for name in FILTERS if visit.field(name)}
    for name in ("since", "until"):
        if name in selection:
            selection[name] = _read_time(name, selection[name])
    if ids := [line.strip() for text in form.getlist("ids") for line in text.splitlines() if line.strip()]:
        selection["ids"] = ids
    values: dict[str, Any] = {"selection": selection} | {name: True for name in OPTIONS if visit.field(name)}
    if to := form.getlist("to"):
        values["to"] = to
    if rate := visit.field("rate"):
        values["rate"] = rate
    return values


def _read_time(name: str, text: str) -> str:
    """Return a time without an age in it: the order comes later than the count, and has the same events."""
    try:
        return read_moment(text, now=datetime.now(UTC)).isoformat()
    except ValueError as error:
        raise invalid(f"{name}: {error}") from None


async def _form_view(visit: Visit, values: Mapping[str, Any], *, counts: ReplayCounts | None) -> View:
    selection = values.get("selection", values)
    destinations = await visit.client.list_destinations()
    return View(
        template="replay_form.html",
        values={
            "order": values,
            "filters": selection,
            "ids": selection.get("ids", []),
            "names": [each["name"] for each in destinations if each["configured"] and each["when"]],
            "counts": counts,
            "key": uuid.uuid4(),
        },
    )


PAGES = (
    Page(path="/replays", handler=show_all),
    Page(path="/replays/new", handler=ask),
    Page(method="POST", path="/replays/count", handler=count),
    Page(method="POST", path="/replays", handler=order),
    Page(path="/replays/{id}", handler=show),
    Page(method="POST", path="/replays/{id}/cancel", handler=cancel),
)
