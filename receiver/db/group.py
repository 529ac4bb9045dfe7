"""Group commit: what arrives while a transaction is under way shares the next one."""

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from receiver.errors import DatabaseUnavailable

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class _Entry(NamedTuple, Generic[ItemT, ResultT]):
    item: ItemT
    future: asyncio.Future[ResultT]
    since: float


class GroupCommit(Generic[ItemT, ResultT]):
    """Hands items to `write` in groups; one that arrives alone is written at once.

    `write` takes items and returns a result for each of them, in one transaction of its own. Where it fails
    for a group, each item is written by itself, so that a bad one fails no other.
    """

    def __init__(
        self,
        write: Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT]]],
        *,
        limit: int,
        wait: float = math.inf,
        room: int | None = None,
    ) -> None:
        """`limit` is the size of the largest group.

        With `wait` (seconds), an item is given up that is not written by then, however long `write` hangs; it
        may be written nevertheless. With `room`, no more than so many items wait for their group.
        """
        self._write = write
        self._limit = limit
        self._wait = wait
        self._room = room
        self._waiting: deque[_Entry[ItemT, ResultT]] = deque()
        self._group: list[_Entry[ItemT, ResultT]] = []
        self._writing: asyncio.Task[None] | None = None
        self._watch: asyncio.TimerHandle | None = None

    async def add(self, item: ItemT) -> ResultT:
        """Write an item; return its result once that is committed.

        Raises what `write` raises, and DatabaseUnavailable where there is no room or the time is over.
        """
        if len(self._waiting) == self._room:
            raise DatabaseUnavailable(f"{self._room} items wait already", reason="busy")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        self._waiting.append(_Entry(item, future, loop.time()))
        if self._writing is None:
            self._writing = loop.create_task(self._run(), name="group commit")
        if self._watch is None and self._wait < math.inf:
            self._watch = loop.call_later(self._wait, self._give_up)
        return await future

    def _give_up(self) -> None:
        """End the waiting of those whose time is over. One timer does for all: most never need it."""
        loop = asyncio.get_running_loop()
        limit = loop.time() - self._wait
        waiting = [entry for entry in (*self._group, *self._waiting) if not entry.future.done()]
        for entry in waiting:
            if entry.since > limit:
                self._watch = loop.call_at(entry.since + self._wait, self._give_up)
                return
            entry.future.set_exception(
                DatabaseUnavailable(f"not written within {self._wait} s", reason="timeout")
            )
        self._watch = None

    async def _run(self) -> None:
        try:
            while self._waiting:
                size = min(self._limit, len(self._waiting))
                self._group = [self._waiting.popleft() for _ in range(size)]
                await self._write_group(self._group)
        finally:
            self._group = []
            self._writing = None

    async def _write_group(self, group: Sequence[_Entry[ItemT, ResultT]]) -> None:
        # Whoever gave up meanwhile wants nothing written.
        group = [entry for entry in group if not entry.future.done()]
        if not group:
            return
        try:
            results = await self._write([entry.item for entry in group])
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            if len(group) > 1 and not isinstance(error, DatabaseUnavailable):
                for entry in group:
                    await self._write_group([entry])
                return
            for entry in group:
                if not entry.future.done():
                    entry.future.set_exception(error)
        else:
            for entry, result in zip(group, results, strict=True):
                if not entry.future.done():
                    entry.future.set_result(result)
