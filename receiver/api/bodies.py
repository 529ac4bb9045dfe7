"""The body of a request on its way to the application, in few parts."""

from typing import Final

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

PART_BYTES: Final = 256 * 1024
"""The application gets a body up to this size in one part, and larger ones in parts of more than it."""


class BodyParts:
    """Collects reads of a body; the application need not wake up for each of them."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, cycle: RequestResponseCycle, part: bytes) -> None:
        """Keep a read of a request's body; if there is enough of it, let the application have it."""
        # A bytearray that grows piece by piece would take an eighth more, and leave gaps behind.
        self._parts.append(part)
        self._size += len(part)
        if self._size > PART_BYTES:
            self.hand_over(cycle)
            cycle.flow.pause_reading()
            cycle.message_event.set()

    def hand_over(self, cycle: RequestResponseCycle) -> None:
        """Let the application have all that is kept."""
        if self._parts:
            cycle.body = bytearray().join((cycle.body, *self._parts))
            self._parts = []
            self._size = 0

    def drop(self) -> None:
        """Keep nothing."""
        self._parts = []
        self._size = 0
