"""Group commit: what arrives while a transaction is under way shares the next one."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from receiver.errors import DatabaseUnavailable

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class GroupCommit(Generic[ItemT, ResultT]):
    """Hands items to `write` in groups; one that arrives alone is written at once.

    `write` takes items and returns a result for each of them, in one transaction of its own. If it fails for
    a group, each item is written by itself, so that a bad one fails no other.
    """

    def __init__(
        self,
        write: Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT]]],
        *,
        limit: int,
        weigh: Callable[[ItemT], int] | None = None,
        heaviest: int = 0,
    ) -> None:
        """`limit` is the most items of a group, `heaviest` its most bytes as `weigh` counts those of an item.

        A group of one item may be heavier.
        """
        self._write = write
        self._limit = limit
        self._weigh = weigh
        self._heaviest = heaviest
        self._waiting: OrderedDict[asyncio.Future[ResultT], ItemT] = OrderedDict()
        self._writing: asyncio.Task[None] | None = None

    async def add(self, item: ItemT) -> ResultT:
        """Write an item; return its result once that is committed. Raises what `write` raises.

        An item whose task is cancelled is forgotten at once if it waits for its group; if its group is being
        written, it may be written nevertheless.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        self._waiting[future] = item
        if self._writing is None:
            self._writing = loop.create_task(self._run(), name="group commit")
        try:
            return await future
        finally:
            self._waiting.pop(future, None)
            # An error's traceback refers to this frame. If the frame referred to the future, and so to the
            # error, all of them would stay in memory until the garbage collector runs.
            del future

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._write_group(self._take_group())
        finally:
            self._writing = None

    def _take_group(self) -> dict[asyncio.Future[ResultT], ItemT]:
        group: dict[asyncio.Future[ResultT], ItemT] = {}
        weight = 0
        while self._waiting and len(group) < self._limit:
            future, item = next(iter(self._waiting.items()))
            if self._weigh is not None:
                weight += self._weigh(item)
                if group and weight > self._heaviest:
                    break
            group[future] = item
            del self._waiting[future]
        return group

    async def _write_group(self, group: dict[asyncio.Future[ResultT], ItemT]) -> None:
        # Skip items whose caller has given up.
        group = {future: item for future, item in group.items() if not future.done()}
        if not group:
            return
        results = await self._try([*group.values()])
        if isinstance(results, Exception) and len(group) > 1 and not isinstance(results, DatabaseUnavailable):
            for future, item in group.items():
                await self._write_group({future: item})
            del future, item
        else:
            _settle(group, results)
        # On Python 3.13 an error's traceback leads to this frame, too. If the frame led to the error, both
        # would stay in memory with all items until the garbage collector runs.
        group.clear()
        del results

    async def _try(self, items: Sequence[ItemT]) -> Sequence[ResultT] | Exception:
        # In a frame of its own, which the traceback of an error refers to and in which there are no futures.
        try:
            return await self._write(items)
        except Exception as error:  # noqa: BLE001 - it belongs to those who wait
            return error


def _settle(group: dict[asyncio.Future[ResultT], ItemT], results: Sequence[ResultT] | Exception) -> None:
    if isinstance(results, Exception):
        for future in group:
            if not future.done():
                future.set_exception(results)
        return
    for future, result in zip(group, results, strict=True):
        if not future.done():
            future.set_result(result)
