"""The pages that stand for commands: models name the next step as a command, and pages link to it."""

import shlex
from typing import Final
from urllib.parse import quote, urlencode

_LISTS: Final = {
    ("alerts", "list"): "/dashboard/audit/alerts",
    ("audit", "list"): "/dashboard/audit",
    ("deliveries", "failures"): "/dashboard/dead-letters",
    ("deliveries", "list"): "/dashboard/dead-letters",
    ("destinations", "list"): "/dashboard/destinations",
    ("events", "list"): "/dashboard/events",
    ("jobs", "list"): "/dashboard/jobs",
    ("rejections", "list"): "/dashboard/rejections",
    ("replays", "list"): "/dashboard/replays",
}
"""Commands whose options are the filters of a page."""
_OBJECTS: Final = {
    ("deliveries", "discard"): "/dashboard/destinations/{}",
    ("deliveries", "move"): "/dashboard/destinations/{}",
    ("deliveries", "retry"): "/dashboard/generations/{}",
    ("deliveries", "show"): "/dashboard/generations/{}",
    ("destinations", "resume"): "/dashboard/destinations/{}",
    ("destinations", "test"): "/dashboard/destinations/{}",
    ("events", "fetch"): "/dashboard/events/fetch?request_id={}",
    ("events", "promote"): "/dashboard/generations/{}",
    ("events", "show"): "/dashboard/generations/{}",
    ("jobs", "cancel"): "/dashboard/generations/{}",
    ("jobs", "resubmit"): "/dashboard/generations/{}",
    ("jobs", "show"): "/dashboard/generations/{}",
    ("media", "give-up"): "/dashboard/generations/{}",
    ("rejections", "show"): "/dashboard/rejections/{}",
    ("replays", "show"): "/dashboard/replays/{}",
}
"""Commands whose argument is the id of a page's object."""
_SINGLE: Final = {"replay": "/dashboard/generations/{}", "route": "/dashboard/generations/{}"}
"""Commands of one word whose argument is the id of a page's object."""
_OTHERS: Final = {
    ("account",): "/dashboard/jobs/account",
    ("events", "recover"): "/dashboard/events/recover",
    ("jobs", "thaw"): "/dashboard/jobs/account",
    ("status",): "/dashboard",
}
FOR_THE_SHELL: Final = frozenset({"check", "prune", "retention", "worker"})
"""Commands that no page can carry out: they start processes, or read the settings of their own machine."""


def page_of(command: str) -> str | None:
    """Return the address of the page on which a command can be carried out; None if there is none."""
    try:
        words = shlex.split(command)[1:]
    except ValueError:
        return None
    names = tuple(words[:2])
    if names in _LISTS:
        options = words[2:]
        filters = {
            name.removeprefix("--"): value
            for name, value in zip(options[::2], options[1::2], strict=False)
            if name.startswith("--")
        }
        return _LISTS[names] + (f"?{urlencode(filters)}" if filters else "")
    if names in _OBJECTS and len(words) > len(names):
        return _OBJECTS[names].format(quote(words[2], safe=""))
    if names[:1] and names[0] in _SINGLE and len(words) > 1:
        return _SINGLE[names[0]].format(quote(words[1], safe=""))
    return _OTHERS.get(names) or _OTHERS.get(names[:1])
