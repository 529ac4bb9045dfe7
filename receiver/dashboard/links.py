"""The pages that stand for commands: models name the next step as a command, and pages link to it."""

import shlex
from typing import Final
from urllib.parse import quote, urlencode

_LISTS: Final = {
    ("deliveries", "list"): "/dashboard/dead-letters",
    ("destinations", "list"): "/dashboard/destinations",
    ("events", "list"): "/dashboard/events",
    ("jobs", "list"): "/dashboard/jobs",
    ("rejections", "list"): "/dashboard/rejections",
    ("replays", "list"): "/dashboard/replays",
}
"""Commands whose options are the filters of a page."""
_OBJECTS: Final = {
    ("destinations", "resume"): "/dashboard/destinations/{}",
    ("destinations", "test"): "/dashboard/destinations/{}",
    ("events", "show"): "/dashboard/generations/{}",
    ("jobs", "resubmit"): "/dashboard/generations/{}",
    ("jobs", "show"): "/dashboard/generations/{}",
    ("rejections", "show"): "/dashboard/rejections/{}",
    ("replays", "show"): "/dashboard/replays/{}",
}
"""Commands whose argument is the id of a page's object."""
_OTHERS: Final = {"account": "/dashboard/jobs", "status": "/dashboard"}


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
    return _OTHERS.get(words[0]) if words else None
