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

from receiver.metrics import REQUESTS_SHED

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

    @property
    def is_unfinished(self) -> bool:
        """Whether it waits for its client, so that it may be shed."""

    def shed(self) -> None:
        """Answer 503 if a request has begun, and free the memory."""


class Counted(Connection, Protocol):
    """A connection, or the account of one, with the number of its bytes."""

    held: int
    """Bytes that it counts for; only the budget changes it."""


class MemoryBudget:
    """Counts bytes and sheds connections if there are too many. It belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes."""
        self._limit = limit
        self._used = 0
        self._peak = 0
        # In the order of their arrival.
        self._connections: dict[Counted, None] = {}
        self._rest: asyncio.TimerHandle | None = None
        self._logged_at = float("-inf")

    @property
    def used(self) -> int:
        """Bytes that all connections count for."""
        return self._used

    def accept(self, connection: Counted) -> None:
        """Count a new connection; shed others if they use up the budget."""
        self.add(connection, CONNECTION)
        if self.is_used_up:
            self._make_room(spared=connection)

    def add(self, connection: Counted, size: int) -> None:
        """Count bytes, whether or not there is room for them."""
        self._connections[connection] = None
        connection.held += size
        self._used += size

    def grow(self, connection: Counted, size: int) -> None:
        """Count bytes of an unfinished request; if there is no room, shed connections: this one, maybe."""
        # As `add` does, without a call: each read of a body comes here.
        self._connections[connection] = None
        connection.held += size
        self._used += size
        if self._used > (self._limit // 4 * 3 if connection.held > LARGE else self._limit):
            self._make_room()

    def release(self, connection: Counted, size: int) -> None:
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

    @property
    def is_half_used(self) -> bool:
        """Whether there is no room for requests that wait behind others on their connection.

        They cannot be shed: if they took all, each small webhook that comes would be shed in their place.
        """
        return self._used > self._limit // 2

    def _make_room(self, spared: Counted | None = None) -> None:
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


class Account:
    """The bytes that one connection counts for: its own, those of a head that is coming, and each request's.

    An account that counts for nothing does not refer to its connection; until then the budget does, too.
    """

    __slots__ = ("_budget", "_connection", "_head", "_is_open", "_requests", "held")

    def __init__(self, budget: MemoryBudget, connection: Connection) -> None:
        """Count a new connection; shed others if they use up the budget."""
        self.held = 0
        self._budget = budget
        self._connection: Connection | None = connection
        self._is_open = True
        # Bytes that the head of the next request counts for as long as it is not complete.
        self._head = 0
        self._requests: dict[object, int] = {}
        budget.accept(self)

    @property
    def is_unfinished(self) -> bool:
        """Whether the connection waits for its client."""
        return self._connection is not None and self._connection.is_unfinished

    def shed(self) -> None:
        """Shed the connection."""
        if self._connection is not None:
            self._connection.shed()

    def has(self, request: object) -> bool:
        """Tell whether a request counts."""
        return request in self._requests

    def grow_head(self, size: int) -> None:
        """Count a read of a head that is not complete; the connection may be shed."""
        # As text and as objects.
        self._head += 2 * size
        self._budget.grow(self, 2 * size)

    def begin(self, request: object, head: int) -> None:
        """Count a request whose head, of so many bytes, is complete.

        A request without a body is not refused for want of room: it may be the health check.
        """
        size = REQUEST + 2 * head
        self._requests[request] = size
        self._budget.add(self, size)
        if self._head:
            self._end_head()

    def grow_body(self, request: object, size: int) -> None:
        """Count a read of a request's body; the connection may be shed."""
        size += PART
        self._requests[request] += size
        self._budget.grow(self, size)

    def end(self, request: object) -> None:
        """Count a request no more."""
        self._budget.release(self, self._requests.pop(request, 0))
        if not self.held:
            self._connection = None

    def close(self) -> None:
        """Count the connection itself and the head that was coming no more."""
        if self._head:
            self._end_head()
        if self._is_open:
            self._is_open = False
            self._budget.release(self, CONNECTION)
        if not self.held:
            self._connection = None

    def _end_head(self) -> None:
        size, self._head = self._head, 0
        self._budget.release(self, size)


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
