"""Group commit: what arrives while a transaction is under way shares the next one."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from receiver.errors import DatabaseUnavailable

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class GroupCommit(Generic[ItemT, ResultT]):
    """Hands items to `write` in groups; one that arrives alone is written at once.

    `write` takes items and returns a result for each of them, in one transaction of its own. Where it fails
    for a group, each item is written by itself, so that a bad one fails no other.
    """

    def __init__(
        self, write: Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT]]], *, limit: int
    ) -> None:
        """`limit` is the size of the largest group."""
        self._write = write
        self._limit = limit
        self._waiting: deque[tuple[ItemT, asyncio.Future[ResultT]]] = deque()
        self._writing: asyncio.Task[None] | None = None

    async def add(self, item: ItemT) -> ResultT:
        """Write an item; return its result once that is committed. Raises what `write` raises."""
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._writing is None:
            self._writing = asyncio.create_task(self._run(), name="group commit")
        return await future

    async def _run(self) -> None:
        try:
            while self._waiting:
                size = min(self._limit, len(self._waiting))
                await self._write_group([self._waiting.popleft() for _ in range(size)])
        finally:
            self._writing = None

    async def _write_group(self, group: Sequence[tuple[ItemT, asyncio.Future[ResultT]]]) -> None:
        # Whoever gave up meanwhile wants nothing written.
        group = [(item, future) for item, future in group if not future.done()]
        if not group:
            return
        try:
            results = await self._write([item for item, _ in group])
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            if len(group) > 1 and not isinstance(error, DatabaseUnavailable):
                for each in group:
                    await self._write_group([each])
                return
            for _, future in group:
                if not future.done():
                    future.set_exception(error)
        else:
            for (_, future), result in zip(group, results, strict=True):
                if not future.done():
                    future.set_result(result)
