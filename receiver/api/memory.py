"""One budget for the memory that clients can make a web process keep, whether or not they have a secret.

Connections, heads, bodies and requests that wait for the database all count. If the budget is used up, the
largest request that is not complete is answered 503, then the next, until there is room: many large bodies
cannot keep a small webhook out.
"""

import asyncio
import contextlib
import ctypes
import gc
import time
from typing import Final, Protocol

import structlog

from receiver.observability import REQUESTS_SHED

MIB: Final = 1024 * 1024
DEFAULT_BUDGET: Final = 64 * MIB
CONNECTION: Final = 8 * 1024
"""Bytes that an open connection counts for: the objects of uvicorn, of the event loop and of the parser."""
REQUEST: Final = 4 * 1024
"""Bytes that a request counts for beside its head and its body."""
PART: Final = 512
"""Bytes that each read or chunk of a body counts for beside its content."""
LARGE: Final = 64 * 1024
"""Bytes above which a connection is large; the last quarter of the budget is for the others."""
BURST: Final = 8 * MIB
"""Bytes in use after which unused memory is given back to the system."""
REST: Final = 2.0
"""Seconds after a burst in which there may be another one, before memory is given back."""

log = structlog.get_logger()


class Connection(Protocol):
    """Something that holds memory for a client."""

    held: int
    """Bytes that it counts for; only the budget changes it."""

    @property
    def is_unfinished(self) -> bool:
        """Whether it waits for its client, so that it may be shed."""

    def shed(self) -> None:
        """Answer 503 if a request has begun, and free the memory."""


class MemoryBudget:
    """Counts bytes and sheds connections if there are too many. It belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes."""
        self._limit = limit
        self._used = 0
        self._peak = 0
        # In the order of their arrival.
        self._connections: dict[Connection, None] = {}
        self._rest: asyncio.TimerHandle | None = None
        self._logged_at = float("-inf")

    @property
    def used(self) -> int:
        """Bytes that all connections count for."""
        return self._used

    def accept(self, connection: Connection) -> None:
        """Count a new connection; shed others if they use up the budget."""
        self.add(connection, CONNECTION)
        if self.is_used_up:
            self._make_room(spared=connection)

    def add(self, connection: Connection, size: int) -> None:
        """Count bytes, whether or not there is room for them."""
        self._connections[connection] = None
        connection.held += size
        self._used += size

    def grow(self, connection: Connection, size: int) -> None:
        """Count bytes of an unfinished request; if there is no room, shed connections: this one, maybe."""
        self.add(connection, size)
        if self._used > (self._limit // 4 * 3 if connection.held > LARGE else self._limit):
            self._make_room()

    def release(self, connection: Connection, size: int) -> None:
        """Count bytes no more."""
        self._peak = max(self._peak, self._used)
        connection.held -= size
        self._used -= size
        if not connection.held:
            self._connections.pop(connection, None)
        if self._peak > BURST > 2 * self._used and self._rest is None:
            self._rest = asyncio.get_running_loop().call_later(REST, self._give_back)

    @property
    def is_used_up(self) -> bool:
        """Whether there is no room for more."""
        return self._used > self._limit

    def _make_room(self, spared: Connection | None = None) -> None:
        unfinished = [each for each in self._connections if each.is_unfinished and each is not spared]
        # Those of about the same size in the order of their arrival: a webhook is a matter of milliseconds.
        unfinished.sort(key=lambda each: each.held // 4096, reverse=True)
        shed = 0
        for connection in unfinished:
            # More than needed, so that not every read has to sort the connections.
            if self._used <= (self._limit // 8 * 5 if connection.held > LARGE else self._limit // 16 * 15):
                break
            connection.shed()
            shed += 1
        REQUESTS_SHED.inc(shed)
        now = time.monotonic()
        if shed and now - self._logged_at >= 1.0:
            self._logged_at = now
            log.warning(
                "requests refused: RECEIVER_MAX_BUFFERED_BYTES is used up", used=self._used, shed=shed
            )

    def _give_back(self) -> None:
        self._rest = None
        if 2 * self._used < BURST:
            self._peak = 0
            give_memory_back()


def give_memory_back() -> None:
    """Free cyclic garbage, and give unused memory to the system, which the allocator would keep."""
    gc.collect()
    _call_libc("malloc_trim", 0)


def set_up_allocator() -> None:
    """Let the allocator map each large body by itself, so that its memory goes back when it is freed.

    By default glibc raises this threshold as soon as such memory is freed. Bodies then come to lie between
    small objects, and the gaps that they leave stay in the process.
    """
    _call_libc("mallopt", _M_MMAP_THRESHOLD, LARGE)


_M_MMAP_THRESHOLD: Final = -3


def _call_libc(name: str, *arguments: int) -> None:
    # Only glibc has these functions, and only its allocator needs them.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), name)(*arguments)
