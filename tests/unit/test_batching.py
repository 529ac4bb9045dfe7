"""Batching: which items share a group, and which caller gets which result."""

import asyncio
import gc
import weakref
from collections.abc import Sequence

import pytest

from receiver.batching import Batcher
from receiver.errors import DatabaseUnavailable


class Writer:
    """Records the groups that it is given; a transaction lasts until `commit` is set."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.commit = asyncio.Event()
        self.commit.set()
        self.bad: set[int] = set()
        self.away = False

    async def __call__(self, items: Sequence[int]) -> list[int]:
        """Double every item."""
        self.groups.append(list(items))
        await self.commit.wait()
        if self.away:
            raise DatabaseUnavailable("gone", reason="database")
        if found := self.bad.intersection(items):
            raise ValueError(min(found))
        return [item * 2 for item in items]


class Item:
    """An object that a weak reference can watch."""


def grouped(
    writer: Writer, *, max_items: int = 10, max_in_flight: int = 1, is_balanced: bool = False
) -> Batcher[int, int]:
    """Return a batcher as the database's users make it."""
    return Batcher(
        writer,
        max_items=max_items,
        max_in_flight=max_in_flight,
        is_balanced=is_balanced,
        shared_errors=DatabaseUnavailable,
    )


async def start(group: Batcher[int, int], *items: int) -> list[asyncio.Task[int]]:
    """Add items, each from a task of its own, in their order."""
    tasks = [asyncio.create_task(group.add(item)) for item in items]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_a_lone_item_is_sent_at_once() -> None:
    """An item does not wait for others."""
    writer = Writer()
    assert await grouped(writer).add(4) == 8
    assert writer.groups == [[4]]


async def test_items_that_come_meanwhile_share_the_next_transaction() -> None:
    """C6: each caller gets the result of its own item, and only after the commit."""
    writer = Writer()
    writer.commit.clear()
    group = grouped(writer)
    first = await start(group, 0)
    later = await start(group, 1, 2, 3)
    assert writer.groups == [[0]]
    assert not any(task.done() for task in (*first, *later))
    writer.commit.set()
    assert await asyncio.gather(*first, *later) == [0, 2, 4, 6]
    assert writer.groups == [[0], [1, 2, 3]]


async def test_clients_that_wait_for_their_answers_make_groups_of_equal_size() -> None:
    """A group of nearly all items and a group of a few do not alternate."""
    writer = Writer()
    writer.commit.clear()
    group = grouped(writer, max_items=100, is_balanced=True)
    tasks = await start(group, 0)
    tasks += await start(group, *range(1, 64))
    for _ in range(10):
        answered = len(writer.groups[-1])
        writer.commit.set()
        writer.commit.clear()
        tasks += await start(group, *range(answered))
    assert [len(each) for each in writer.groups] == [1] + [32] * 10
    writer.commit.set()
    await asyncio.gather(*tasks)


@pytest.mark.parametrize(
    ("max_items", "max_in_flight", "under_way"),
    [
        (10, 1, [[0]]),
        (10, 2, [[0], [1, 2, 3, 4, 5, 6]]),
        (2, 1, [[0]]),
        (2, 2, [[0], [1, 2]]),
        (2, 3, [[0], [1, 2], [3, 4]]),
    ],
)
async def test_groups_in_flight_are_bounded(
    max_items: int, max_in_flight: int, under_way: list[list[int]]
) -> None:
    """E6: if a group is under way further groups are sent beside it, up to the limit, and the rest waits."""
    writer = Writer()
    writer.commit.clear()
    group = grouped(writer, max_items=max_items, max_in_flight=max_in_flight)
    tasks = [*await start(group, 0), *await start(group, *range(1, 7))]
    assert writer.groups == under_way
    writer.commit.set()
    assert await asyncio.gather(*tasks) == [*range(0, 14, 2)]
    assert [item for items in writer.groups for item in items] == [*range(7)]


async def test_a_group_is_bounded() -> None:
    """A transaction has a limited number of items, however many wait."""
    writer = Writer()
    assert await asyncio.gather(*await start(grouped(writer, max_items=4), *range(10))) == [*range(0, 20, 2)]
    assert [len(each) for each in writer.groups] == [4, 4, 2]


async def test_a_bad_item_fails_alone() -> None:
    """If a group fails each item is written by itself, and only the bad one gets the error."""
    writer = Writer()
    writer.bad = {2}
    results = await asyncio.gather(*await start(grouped(writer), 1, 2, 3), return_exceptions=True)
    assert (results[0], results[2]) == (2, 6)
    assert isinstance(results[1], ValueError)
    assert writer.groups == [[1, 2, 3], [1], [2], [3]]


async def test_without_shared_errors_a_group_is_not_split() -> None:
    """An error is every caller's by default, for destinations with an outcome for each message."""
    writer = Writer()
    writer.bad = {2}
    batcher: Batcher[int, int] = Batcher(writer)
    results = await asyncio.gather(*await start(batcher, 1, 2, 3), return_exceptions=True)
    assert [type(each) for each in results] == [ValueError] * 3
    assert writer.groups == [[1, 2, 3]]


async def test_an_outage_fails_the_whole_group() -> None:
    """C3: all callers get the error at once, no item is tried by itself, and the next ones are written."""
    writer = Writer()
    writer.away = True
    group = grouped(writer)
    results = await asyncio.gather(*await start(group, 1, 2, 3), return_exceptions=True)
    assert [type(each) for each in results] == [DatabaseUnavailable] * 3
    assert len(writer.groups) == 1
    writer.away = False
    assert await group.add(5) == 10


@pytest.mark.parametrize("fails", [False, True])
async def test_a_cancelled_caller_takes_no_other_along(*, fails: bool) -> None:
    """If its caller is cancelled a waiting item is not written; the others of its group are."""
    writer = Writer()
    writer.commit.clear()
    writer.bad = {0} if fails else set()
    group = grouped(writer)
    (first,) = await start(group, 0)
    second, third = await start(group, 1, 2)
    first.cancel()
    second.cancel()
    await asyncio.wait([first, second])
    writer.commit.set()
    assert await third == 4
    assert writer.groups == [[0], [2]]


async def test_a_caller_that_gives_up_just_before_its_group_is_skipped() -> None:
    """An item is skipped even if its caller was cancelled in the moment in which its group is made."""
    writer = Writer()
    group = grouped(writer)
    tasks = [asyncio.create_task(group.add(item)) for item in (0, 1)]
    asyncio.get_running_loop().call_soon(tasks[0].cancel)
    await asyncio.wait(tasks)
    assert (tasks[0].cancelled(), tasks[1].result(), writer.groups) == (True, 2, [[1]])


async def test_a_writer_that_hangs_keeps_no_item_of_a_cancelled_caller() -> None:
    """C4: an item that waits for its group is forgotten in the moment in which its caller is cancelled."""
    writer = Writer()
    writer.commit.clear()

    async def write(items: Sequence[int | Item]) -> list[int]:
        return await writer([item for item in items if isinstance(item, int)])

    group = Batcher(write)
    item = Item()
    known = weakref.ref(item)
    first = asyncio.create_task(group.add(0))
    await asyncio.sleep(0)
    second = asyncio.create_task(group.add(item))
    del item
    await asyncio.sleep(0)
    second.cancel()
    await asyncio.wait([second])
    del second
    assert known() is None
    writer.commit.set()
    assert await first == 0
    assert writer.groups == [[0]]


@pytest.mark.parametrize(
    ("weights", "groups"),
    [
        ([1, 1, 1, 1], [[1], [1, 1, 1]]),
        ([1, 4, 5, 2, 9, 1, 20, 3], [[1], [4, 5], [2], [9, 1], [20], [3]]),
    ],
)
async def test_a_group_is_bounded_in_bytes(weights: list[int], groups: list[list[int]]) -> None:
    """A transaction has a limited number of bytes, unless it has a single item."""
    writer = Writer()
    group: Batcher[int, int] = Batcher(writer, max_items=10, weigh=lambda item: item, max_bytes=10)
    writer.commit.clear()
    tasks = [*await start(group, weights[0]), *await start(group, *weights[1:])]
    writer.commit.set()
    assert await asyncio.gather(*tasks) == [weight * 2 for weight in weights]
    assert writer.groups == groups


@pytest.mark.parametrize("max_in_flight", [1, 2])
async def test_drain_waits_for_items_that_wait(max_in_flight: int) -> None:
    """E16: draining ends when no item waits or is being sent; an idle batcher is drained at once."""
    writer = Writer()
    writer.commit.clear()
    group = grouped(writer, max_items=2, max_in_flight=max_in_flight)
    await group.drain()
    tasks = await start(group, *range(7))
    draining = asyncio.create_task(group.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    writer.commit.set()
    await draining
    assert [task.result() for task in tasks] == [*range(0, 14, 2)]
    assert await group.add(9) == 18


@pytest.mark.parametrize("error", [DatabaseUnavailable("gone", reason="database"), ValueError("bad")])
async def test_a_failure_leaves_no_cycle_behind(error: Exception) -> None:
    """C3: if a group fails its items are freed with their tasks: no garbage collection is needed."""

    async def fail(_items: Sequence[Item]) -> Sequence[None]:
        raise type(error)(*error.args, **vars(error))

    async def add(item: Item) -> None:
        with pytest.raises(type(error)):
            await group.add(item)

    group = Batcher(fail, max_items=10, shared_errors=DatabaseUnavailable)
    items = [Item() for _ in range(3)]
    known = [weakref.ref(item) for item in items]
    gc.collect()
    gc.disable()
    try:
        tasks = [asyncio.create_task(add(item)) for item in items]
        items.clear()
        await asyncio.wait(tasks)
        del tasks
        await asyncio.sleep(0)
        assert [each() for each in known] == [None] * 3
    finally:
        gc.enable()
