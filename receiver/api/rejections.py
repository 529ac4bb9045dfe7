"""Rejected webhooks: each is counted, and one per reason and second is logged."""

import time
from typing import Final

import structlog

from receiver.metrics import REJECTIONS

NO_SOURCE: Final = "-"
"""The source label if a path names no configured source; a source cannot have this name."""
MAX_SEGMENT_LENGTH: Final = 15
"""Longer segments of a logged path are cut: they may be a secret, such as a token."""
MAX_PATH_LENGTH: Final = 120

log = structlog.get_logger()


class Rejections:
    """Counts and logs rejected requests; it logs few of them, so that a flood cannot fill the disk."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}

    def note(self, source: str, reason: str, *, path: str | None = None) -> None:
        """Count a rejection. `source` has to be a configured one or `NO_SOURCE`, so that labels stay few."""
        REJECTIONS.labels(source, reason).inc()
        now = time.monotonic()
        if now - self._logged.get(reason, float("-inf")) >= 1.0:
            self._logged[reason] = now
            shown = {} if path is None else {"path": readable_path(path)}
            log.warning("webhook rejected", source=source, reason=reason, **shown)


def readable_path(path: str) -> str:
    """Return a path for the log: without control characters, and without segments that may be a secret."""
    segments = [
        segment if len(segment) <= MAX_SEGMENT_LENGTH else f"{segment[:4]}…"
        for segment in path[:MAX_PATH_LENGTH].split("/")
    ]
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}"
        for character in "/".join(segments)
    )
