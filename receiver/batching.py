"""Batching: items that arrive while a group is being sent form the next group.

A commit, a flush to the disk or a round trip to a broker costs about the same for one item as for a hundred.
"""

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, TypeVar, cast

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

Done = Callable[[ResultT | None, Exception | None], None]
"""Called once with the result of an item, or with None and the error."""

_SMALL_GROUP: Final = 16
"""A balanced group takes at least so many items, if they wait."""


class Entry(Generic[ItemT, ResultT]):
    """An item that waits or is being sent."""

    __slots__ = ("_done", "item")

    def __init__(self, item: ItemT, done: Done[ResultT] | None) -> None:
        self.item: ItemT | None = item
        self._done = done

    @property
    def is_cancelled(self) -> bool:
        """Whether the item need not be sent any more."""
        return self.item is None

    def cancel(self) -> None:
        """Drop the item if it still waits. If its group is being sent, it may still arrive."""
        self.item = self._done = None

    def finish(self, result: ResultT | None, error: Exception | None) -> None:
        """Pass on the result or the error, unless the entry is cancelled."""
        done = self._done
        self.cancel()
        if done is None:
            return
        try:
            done(result, error)
        except Exception as failure:  # noqa: BLE001 - the other items of the group get their results
            asyncio.get_running_loop().call_exception_handler(
                {"message": "the callback of a batched item failed", "exception": failure}
            )


class _Awaited(Entry[ItemT, ResultT]):
    """The entry of a caller that awaits a future."""

    __slots__ = ("_future",)

    def __init__(self, item: ItemT, future: asyncio.Future[ResultT]) -> None:
        super().__init__(item, None)
        self._future = future

    @property
    def is_cancelled(self) -> bool:
        # A cancelled task cancels its future at once, but runs its own code later.
        return self._future.done()

    def finish(self, result: ResultT | None, error: Exception | None) -> None:
        resolve(self._future, result, error)
        self.cancel()


class Batcher(Generic[ItemT, ResultT]):
    """Passes items to `send` in groups, in the order of `put`; an item goes at once if no group is under way.

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
        is_balanced: bool = False,
        shared_errors: type[Exception] = Exception,
    ) -> None:
        """`max_items`, and `max_bytes` as `weigh` counts them, limit a group; a larger item goes alone.

        `max_in_flight` groups are sent at once. If `send` raises an error that is none of `shared_errors` for
        a group of several items, each of them is sent by itself, because only one of them may be bad.

        `is_balanced` is for clients that wait for their answers before they send more. If all waiting items
        went at once, a group of nearly all of them and a group of a few would alternate, and this process
        would be idle during the large one. So a group takes half of the items that wait or were just
        answered.
        """
        self._send = send
        self._max_items = max_items
        self._weigh = weigh
        self._max_bytes = max_bytes
        self._max_in_flight = max_in_flight
        self._is_balanced = is_balanced
        self._shared_errors = shared_errors
        self._waiting: deque[Entry[ItemT, ResultT]] = deque()
        self._senders: set[asyncio.Task[None]] = set()

    def put(self, item: ItemT, done: Done[ResultT]) -> Entry[ItemT, ResultT]:
        """Send an item with its group, and call `done` with its result or with the error of `send`.

        A task for each item that awaits `add` would be simpler, but costs several microseconds.
        """
        entry: Entry[ItemT, ResultT] = Entry(item, done)
        self._enqueue(entry)
        return entry

    async def add(self, item: ItemT) -> ResultT:
        """Send an item with its group and return its result. Raises the errors of `send`.

        If the caller is cancelled, the item is too.
        """
        future: asyncio.Future[ResultT] = asyncio.get_running_loop().create_future()
        entry = _Awaited(item, future)
        self._enqueue(entry)
        try:
            return await future
        finally:
            entry.cancel()
            # An error's traceback refers to this frame. If the frame referred to the future, and so to the
            # error, all of them would stay in memory until the garbage collector runs.
            del entry, future

    def _enqueue(self, entry: Entry[ItemT, ResultT]) -> None:
        # If a group hangs, no sender takes the cancelled entries out.
        while self._waiting and self._waiting[0].is_cancelled:
            self._waiting.popleft()
        self._waiting.append(entry)
        if len(self._senders) < self._max_in_flight:
            loop = asyncio.get_running_loop()
            self._senders.add(loop.create_task(self._send_waiting(), name="batcher"))

    async def drain(self) -> None:
        """Return when all items are sent; the caller must not add any more."""
        if self._senders:
            await asyncio.wait(self._senders)
        await asyncio.sleep(0)  # the last group's results are passed on in the next turn of the event loop

    async def _send_waiting(self) -> None:
        try:
            answered = 0
            while group := self._take_group(answered):
                answered = len(group)
                await self._send_group(group)
        finally:
            # A done callback would run too late: an item that is added before it would wait for a sender
            # that has ended.
            self._senders.discard(asyncio.current_task())

    def _take_group(self, answered: int) -> list[Entry[ItemT, ResultT]]:
        """Take the next group; `answered` is the size of the one before it."""
        most = self._max_items
        if self._is_balanced:
            most = min(most, max(_SMALL_GROUP, (len(self._waiting) + answered + 1) // 2))
        group: list[Entry[ItemT, ResultT]] = []
        size = 0
        while self._waiting and len(group) < most:
            entry = self._waiting.popleft()
            if entry.item is None or entry.is_cancelled:
                continue
            if self._weigh is not None:
                size += self._weigh(entry.item)
                if group and size > self._max_bytes:
                    self._waiting.appendleft(entry)
                    break
            group.append(entry)
        return group

    async def _send_group(self, group: list[Entry[ItemT, ResultT]]) -> None:
        results = await self._attempt([entry.item for entry in group if entry.item is not None])
        if isinstance(results, Exception) and len(group) > 1 and not isinstance(results, self._shared_errors):
            # One bad item must not fail the others, and they keep their order: one after another.
            for entry in group:
                if not entry.is_cancelled:
                    await self._send_group([entry])
            group.clear()
            del entry
        else:
            # The next group is sent first: the database works while the callers get their results.
            asyncio.get_running_loop().call_soon(_finish, group, results)
        del results  # for the same reason as in `_finish`

    async def _attempt(self, items: Sequence[ItemT]) -> Sequence[ResultT] | Exception:
        # In a frame of its own, which the traceback of an error refers to and which holds no entries.
        try:
            return await self._send(items)
        except Exception as error:  # noqa: BLE001 - `done` gets it
            return error


def _finish(group: list[Entry[ItemT, ResultT]], results: Sequence[ResultT] | Exception) -> None:
    if isinstance(results, Exception):
        for entry in group:
            entry.finish(None, results)
    else:
        for entry, result in zip(group, results, strict=True):
            entry.finish(result, None)
    # On Python 3.13 an error's traceback leads to the frame of `_send_group`, and so to the group and to the
    # futures of its entries: with the error, all would stay in memory until the garbage collector runs.
    group.clear()


def resolve(future: asyncio.Future[ResultT], result: ResultT | None, error: Exception | None) -> None:
    """Give a future the result or else the error, unless it is cancelled."""
    if future.done():
        return
    if error is None:
        future.set_result(cast("ResultT", result))
    else:
        future.set_exception(error)
