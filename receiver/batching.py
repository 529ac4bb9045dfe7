"""Batching: items that arrive while a group is being sent form the next group.

A commit, a flush to the disk or a round trip to a broker costs about the same for one item as for a hundred.
"""

import asyncio
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[ItemT, ResultT]):
    """Passes items to `send` in groups, in the order of `add`; an item goes at once if no group is under way.

    `send` returns a result for each item of the group, or raises an error for all of them.
    """

    def __init__(
        self,
        send: Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT]]],
        *,
        max_items: int = sys.maxsize,
        weigh: Callable[[ItemT], int] | None = None,
        max_bytes: int = sys.maxsize,
        max_in_flight: int = 1,
        shared_errors: type[Exception] = Exception,
    ) -> None:
        """`max_items`, and `max_bytes` as `weigh` counts them, limit a group; a larger item goes alone.

        `max_in_flight` groups are sent at once. If `send` raises an error that is none of `shared_errors` for
        a group of several items, each of them is sent by itself, because only one of them may be bad.
        """
        self._send = send
        self._max_items = max_items
        self._weigh = weigh
        self._max_bytes = max_bytes
        self._max_in_flight = max_in_flight
        self._shared_errors = shared_errors
        self._waiting: OrderedDict[asyncio.Future[ResultT], ItemT] = OrderedDict()
        self._senders: set[asyncio.Task[None]] = set()

    async def add(self, item: ItemT) -> ResultT:
        """Send an item with its group and return its result. Raises the errors of `send`.

        If the caller is cancelled, an item that still waits is dropped. If its group is being sent, it may
        still arrive.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        self._waiting[future] = item
        if len(self._senders) < self._max_in_flight:
            self._senders.add(loop.create_task(self._send_waiting(), name="batcher"))
        try:
            return await future
        finally:
            self._waiting.pop(future, None)
            # An error's traceback refers to this frame. If the frame referred to the future, and so to the
            # error, all of them would stay in memory until the garbage collector runs.
            del future

    async def drain(self) -> None:
        """Return when all items are sent; the caller must not add any more."""
        if self._senders:
            await asyncio.wait(self._senders)

    async def _send_waiting(self) -> None:
        try:
            while group := self._take_group():
                await self._send_group(group)
        finally:
            # A done callback would run too late: an item that is added before it would wait for a sender
            # that has ended.
            self._senders.discard(asyncio.current_task())

    def _take_group(self) -> dict[asyncio.Future[ResultT], ItemT]:
        group: dict[asyncio.Future[ResultT], ItemT] = {}
        size = 0
        while self._waiting and len(group) < self._max_items:
            future, item = self._waiting.popitem(last=False)
            # The caller has given up.
            if future.done():
                continue
            if self._weigh is not None:
                size += self._weigh(item)
                if group and size > self._max_bytes:
                    self._waiting[future] = item
                    self._waiting.move_to_end(future, last=False)
                    break
            group[future] = item
        return group

    async def _send_group(self, group: dict[asyncio.Future[ResultT], ItemT]) -> None:
        results = await self._attempt([*group.values()])
        if isinstance(results, Exception) and len(group) > 1 and not isinstance(results, self._shared_errors):
            # One bad item must not fail the others, and they keep their order: one after another.
            for future, item in group.items():
                if not future.done():
                    await self._send_group({future: item})
            del future, item
        else:
            _resolve(group, results)
        # On Python 3.13 an error's traceback leads to this frame, too. If the frame led to the error, both
        # would stay in memory with all items until the garbage collector runs.
        group.clear()
        del results

    async def _attempt(self, items: Sequence[ItemT]) -> Sequence[ResultT] | Exception:
        # In a frame of its own, which the traceback of an error refers to and which holds no futures.
        try:
            return await self._send(items)
        except Exception as error:  # noqa: BLE001 - the callers of `add` get it
            return error


def _resolve(group: dict[asyncio.Future[ResultT], ItemT], results: Sequence[ResultT] | Exception) -> None:
    if isinstance(results, Exception):
        for future in group:
            if not future.done():
                future.set_exception(results)
        return
    for future, result in zip(group, results, strict=True):
        if not future.done():
            future.set_result(result)
