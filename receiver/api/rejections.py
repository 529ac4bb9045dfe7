"""RequestError webhooks: each is counted, and a line for each reason is logged once a second at most."""

import time
from typing import Final

import structlog

from receiver.metrics import REJECTIONS

NO_SOURCE: Final = "-"
"""The source label of requests whose path names no source of ours; no source can have this name."""
LONGEST_SEGMENT: Final = 15
"""Characters: a longer part of a path may be a secret, such as a token, and is cut."""
LONGEST_PATH: Final = 120

log = structlog.get_logger()


class Refusals:
    """Counts and logs; a flood of refused requests must not fill the disk."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}

    def note(self, source: str, reason: str, *, path: str | None = None) -> None:
        """Count a refusal; `source` must be one of ours or `NO_SOURCE`, so that labels stay few."""
        REJECTIONS.labels(source, reason).inc()
        now = time.monotonic()
        if now - self._logged.get(reason, float("-inf")) >= 1.0:
            self._logged[reason] = now
            shown = {} if path is None else {"path": readable_path(path)}
            log.warning("webhook refused", source=source, reason=reason, **shown)


def readable_path(path: str) -> str:
    """Return a path as far as a log may show it: no control characters, no part that could be a secret."""
    parts = [
        part if len(part) <= LONGEST_SEGMENT else f"{part[:4]}…" for part in path[:LONGEST_PATH].split("/")
    ]
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in "/".join(parts)
    )
