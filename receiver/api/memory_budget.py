"""A budget for the memory that clients can make a web process hold, with or without a webhook secret.

Connections, heads, bodies and requests that wait for the database count. If the budget is used up, the
largest incomplete request is answered 503, then the next, until enough is free: many large bodies cannot
keep a small webhook out.
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
DEFAULT_BUDGET_BYTES: Final = 64 * MIB
CONNECTION_BYTES: Final = 8 * 1024
"""Counted for an open connection: the objects of uvicorn, of the event loop and of the parser."""
REQUEST_BYTES: Final = 4 * 1024
"""Counted for a request, in addition to its head and its body."""
PART_BYTES: Final = 512
"""Counted for each read or chunk of a body, in addition to its content."""
LARGE_BYTES: Final = 64 * 1024
"""A connection that holds more is large; the last quarter of the budget is reserved for small ones."""
BURST_BYTES: Final = 8 * MIB
"""If more was in use, unused memory is given back to the system afterwards."""
REST_SECONDS: Final = 2.0
"""Seconds from a burst until memory is given back: another burst may follow at once and need it."""

_M_MMAP_THRESHOLD: Final = -3  # of <malloc.h>
_MAPPED_BYTES: Final = 128 * 1024
"""Larger blocks are mapped; asyncpg's buffers, which grow to 64 KiB, must not be among them."""

log = structlog.get_logger()


class Connection(Protocol):
    """A connection that holds memory for a client."""

    @property
    def is_unfinished(self) -> bool:
        """Whether it waits for its client, and so may be shed."""

    def shed(self) -> None:
        """Answer 503 if a request has begun, and free the memory."""


class Counted(Connection, Protocol):
    """A connection, or the account of one, with the number of its bytes."""

    held: int
    """Its bytes; only the budget changes the number."""


class MemoryBudget:
    """Counts bytes, and sheds connections if there are too many. It belongs to one event loop."""

    def __init__(self, limit: int) -> None:
        """`limit` is in bytes."""
        self._limit = limit
        self._used = 0
        self._peak = 0
        # In order of arrival.
        self._connections: dict[Counted, None] = {}
        self._rest: asyncio.TimerHandle | None = None
        self._logged_at = float("-inf")

    @property
    def used(self) -> int:
        """Bytes of all connections."""
        return self._used

    def accept(self, connection: Counted) -> None:
        """Count a new connection; shed others if they use up the budget."""
        self.add(connection, CONNECTION_BYTES)
        if self.is_used_up:
            self._shed(spared=connection)

    def add(self, connection: Counted, size: int) -> None:
        """Count bytes; they may exceed the budget."""
        self._connections[connection] = None
        connection.held += size
        self._used += size

    def grow(self, connection: Counted, size: int) -> None:
        """Count bytes of an unfinished request; shed connections if needed, and maybe this one."""
        # Calling `add` would do the same, but this runs for each read of a body, and a call costs time.
        self._connections[connection] = None
        connection.held += size
        self._used += size
        if self._used > (self._limit // 4 * 3 if connection.held > LARGE_BYTES else self._limit):
            self._shed()

    def release(self, connection: Counted, size: int) -> None:
        """Stop counting bytes."""
        self._peak = max(self._peak, self._used)
        connection.held -= size
        self._used -= size
        if not connection.held:
            self._connections.pop(connection, None)
        if self._peak > BURST_BYTES > 2 * self._used and self._rest is None:
            self._rest = asyncio.get_running_loop().call_later(REST_SECONDS, self._give_back)

    @property
    def is_used_up(self) -> bool:
        """Whether more bytes are in use than the budget allows."""
        return self._used > self._limit

    @property
    def is_half_used(self) -> bool:
        """Whether pipelined requests have to be rejected.

        They cannot be shed: if they used the whole budget, each small webhook would be shed in their place.
        """
        return self._used > self._limit // 2

    def _shed(self, spared: Counted | None = None) -> None:
        unfinished = [each for each in self._connections if each.is_unfinished and each is not spared]
        # A stable sort: of two of about the same size the older one goes, as a webhook takes milliseconds.
        unfinished.sort(key=lambda each: each.held // 4096, reverse=True)
        shed = 0
        for connection in unfinished:
            # Shedding only what is needed would sort all connections again at the next read.
            if self._used <= (
                self._limit // 8 * 5 if connection.held > LARGE_BYTES else self._limit // 16 * 15
            ):
                break
            connection.shed()
            shed += 1
        REQUESTS_SHED.inc(shed)
        now = time.monotonic()
        if shed and now - self._logged_at >= 1.0:
            self._logged_at = now
            log.warning(
                "requests rejected: RECEIVER_MAX_BUFFERED_BYTES is used up", used=self._used, shed=shed
            )

    def _give_back(self) -> None:
        self._rest = None
        if 2 * self._used < BURST_BYTES:
            self._peak = 0
            give_memory_back()


class Account:
    """The bytes of one connection: its own, those of an incomplete head, and those of each request.

    The budget refers to the account as long as it holds bytes, and the account to its connection. Both
    references are dropped with the last byte.
    """

    __slots__ = ("_budget", "_connection", "_head", "_is_open", "_requests", "held")

    def __init__(self, budget: MemoryBudget, connection: Connection) -> None:
        """Count a new connection; shed others if they use up the budget."""
        self.held = 0
        self._budget = budget
        self._connection: Connection | None = connection
        self._is_open = True
        # Bytes of the next request's head, until that is complete.
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
        """Return whether bytes of a request are counted."""
        return request in self._requests

    def grow_head(self, size: int) -> None:
        """Count a read of an incomplete head; the connection may be shed."""
        # Once for the text, and once for its objects.
        self._head += 2 * size
        self._budget.grow(self, 2 * size)

    def begin(self, request: object, head: int) -> None:
        """Count a request with a complete head of `head` bytes.

        This sheds no connection: a request without a body may be the health check.
        """
        size = REQUEST_BYTES + 2 * head
        self._requests[request] = size
        self._budget.add(self, size)
        if self._head:
            self._end_head()

    def grow_body(self, request: object, size: int) -> None:
        """Count a read of a request's body; the connection may be shed."""
        size += PART_BYTES
        self._requests[request] += size
        self._budget.grow(self, size)

    def end(self, request: object) -> None:
        """Stop counting a request."""
        self._budget.release(self, self._requests.pop(request, 0))
        if not self.held:
            self._connection = None

    def close(self) -> None:
        """Stop counting the connection itself and an incomplete head."""
        if self._head:
            self._end_head()
        if self._is_open:
            self._is_open = False
            self._budget.release(self, CONNECTION_BYTES)
        if not self.held:
            self._connection = None

    def _end_head(self) -> None:
        size, self._head = self._head, 0
        self._budget.release(self, size)


def give_memory_back() -> None:
    """Free cyclic garbage, and give unused memory back to the system: the allocator would keep it."""
    gc.collect()
    _call_libc("malloc_trim", 0)


def set_up_allocator() -> None:
    """Have malloc map each large body on its own, so that freeing it gives the memory back to the system.

    By default glibc raises the mmap threshold when a large block is freed. Bodies are then allocated on the
    heap between small objects, and the process keeps the gaps that they leave.
    """
    _call_libc("mallopt", _M_MMAP_THRESHOLD, _MAPPED_BYTES)


def _call_libc(name: str, *arguments: int) -> None:
    # Other C libraries lack these functions, and their allocators do not need them.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        getattr(ctypes.CDLL(None), name)(*arguments)
