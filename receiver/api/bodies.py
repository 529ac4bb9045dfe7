"""Collects the reads of a body: in a few large parts for ASGI, as a whole for the direct door."""

from typing import Final

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

PART_BYTES: Final = 256 * 1024
"""A body of up to this size is passed in one part, a larger one in parts of more than this size."""


class BodyParts:
    """Collects the reads of a body, so that the application does not wake up for each of them."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, cycle: RequestResponseCycle, part: bytes) -> None:
        """Keep a read of a body; once the reads exceed PART_BYTES, pass them to the application."""
        # A bytearray that grows with each read over-allocates by an eighth and fragments the heap.
        self._parts.append(part)
        self._size += len(part)
        if self._size > PART_BYTES:
            self.hand_over(cycle)
            cycle.flow.pause_reading()
            cycle.message_event.set()

    def keep(self, part: bytes) -> None:
        """Keep a read of a body that is needed as a whole."""
        self._parts.append(part)

    def take(self) -> bytes:
        """Return all kept reads in one piece."""
        parts, self._parts = self._parts, []
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def hand_over(self, cycle: RequestResponseCycle) -> None:
        """Pass all kept reads to the application."""
        if self._parts:
            cycle.body = bytearray().join((cycle.body, *self._parts))
            self._parts = []
            self._size = 0

    def drop(self) -> None:
        """Drop all kept reads."""
        self._parts = []
        self._size = 0
