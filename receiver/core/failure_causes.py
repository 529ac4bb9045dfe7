"""The short cause of a failure: the part of an error that is the same for all deliveries that fail alike."""

import re
from typing import Final

MAX_CAUSE_CHARACTERS: Final = 120

_CLASS: Final = re.compile(r"^[A-Z][A-Za-z]+: ")
_ADVICE: Final = re.compile(r": [^:]*\?$")
_ADDRESS: Final = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s,;]*[^\s,;:.]")
_ID: Final = re.compile(r"[0-9a-fA-F]{8}-?(?:[0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}|\b(?=\w*[0-9])\w{12,}\b")
_NUMBER: Final = re.compile(r"[0-9]{4,}")
"""Statuses have three digits, and their number is the cause."""
_QUOTED: Final = re.compile(r"'[^']*'|\"[^\"]*\"")


def cause_of(error: str | None) -> str:
    """Return the cause of a stored error: without its class, and without addresses, ids and quoted text."""
    text = _CLASS.sub("", error or "", count=1)
    for pattern in (_ADDRESS, _QUOTED, _ID, _NUMBER):
        text = pattern.sub("…", text)
    text = _CLASS.sub("", text.removeprefix("…").lstrip(": "), count=1)
    text = _ADVICE.sub("", text)
    return " ".join(text.split())[:MAX_CAUSE_CHARACTERS] or "unknown"
