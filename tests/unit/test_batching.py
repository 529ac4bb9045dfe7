"""Group commit: who shares a transaction, and who is told what."""

import asyncio
import gc
import weakref
from collections.abc import Sequence

import pytest

from receiver.batching import GroupCommit
from receiver.errors import DatabaseUnavailable


class Writer:
    """Records the groups it is given; a transaction lasts until `commit` is set."""

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
    """Something whose end can be seen."""


async def start(group: GroupCommit[int, int], *items: int) -> list[asyncio.Task[int]]:
    """Add items, each from a task of its own, in their order."""
    tasks = [asyncio.create_task(group.add(item)) for item in items]
    for _ in range(3):
        await asyncio.sleep(0)
    return tasks


async def test_a_lone_item_is_written_at_once() -> None:
    """Nobody waits for company."""
    writer = Writer()
    assert await GroupCommit(writer, limit=10).add(4) == 8
    assert writer.groups == [[4]]


async def test_who_comes_meanwhile_shares_the_next_transaction() -> None:
    """C6: each gets the result of its own item, and not before that is committed."""
    writer = Writer()
    writer.commit.clear()
    group = GroupCommit(writer, limit=10)
    first = await start(group, 0)
    later = await start(group, 1, 2, 3)
    assert writer.groups == [[0]]
    assert not any(task.done() for task in (*first, *later))
    writer.commit.set()
    assert await asyncio.gather(*first, *later) == [0, 2, 4, 6]
    assert writer.groups == [[0], [1, 2, 3]]


async def test_a_group_is_bounded() -> None:
    """However many wait, a transaction has no more than so many."""
    writer = Writer()
    assert await asyncio.gather(*await start(GroupCommit(writer, limit=4), *range(10))) == [*range(0, 20, 2)]
    assert [len(each) for each in writer.groups] == [4, 4, 2]


async def test_a_bad_item_fails_alone() -> None:
    """Its neighbours are written, each by itself, and it gets its own error."""
    writer = Writer()
    writer.bad = {2}
    results = await asyncio.gather(
        *await start(GroupCommit(writer, limit=10), 1, 2, 3), return_exceptions=True
    )
    assert (results[0], results[2]) == (2, 6)
    assert isinstance(results[1], ValueError)
    assert writer.groups == [[1, 2, 3], [1], [2], [3]]


async def test_an_outage_is_everybodys() -> None:
    """C3: all who wait are told at once, no item is tried by itself, and the next ones are written."""
    writer = Writer()
    writer.away = True
    group = GroupCommit(writer, limit=10)
    results = await asyncio.gather(*await start(group, 1, 2, 3), return_exceptions=True)
    assert [type(each) for each in results] == [DatabaseUnavailable] * 3
    assert len(writer.groups) == 1
    writer.away = False
    assert await group.add(5) == 10


@pytest.mark.parametrize("fails", [False, True])
async def test_who_gives_up_takes_nobody_along(*, fails: bool) -> None:
    """An item that nobody waits for any more is not written, unless that has begun; the others go on."""
    writer = Writer()
    writer.commit.clear()
    writer.bad = {0} if fails else set()
    group = GroupCommit(writer, limit=10)
    (first,) = await start(group, 0)
    second, third = await start(group, 1, 2)
    first.cancel()
    second.cancel()
    await asyncio.wait([first, second])
    writer.commit.set()
    assert await third == 4
    assert writer.groups == [[0], [2]]


async def test_a_writer_that_hangs_keeps_no_item_of_who_gave_up() -> None:
    """C4: an item that waits for its group is forgotten in the moment in which its task is cancelled."""
    writer = Writer()
    writer.commit.clear()
    group = GroupCommit(writer, limit=10)
    item = Item()
    known = weakref.ref(item)
    (first,) = await start(group, 0)
    second = asyncio.create_task(group.add(item))  # type: ignore[arg-type]
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
    """A transaction has no more bytes than so many, unless it has a single item."""
    writer = Writer()
    group = GroupCommit(writer, limit=10, weigh=lambda item: item, heaviest=10)
    writer.commit.clear()
    tasks = [*await start(group, weights[0]), *await start(group, *weights[1:])]
    writer.commit.set()
    assert await asyncio.gather(*tasks) == [weight * 2 for weight in weights]
    assert writer.groups == groups


@pytest.mark.parametrize("error", [DatabaseUnavailable("gone", reason="database"), ValueError("bad")])
async def test_a_failure_leaves_no_cycle_behind(error: Exception) -> None:
    """C3: items whose group failed are freed with their tasks: no garbage collection is needed."""

    async def fail(_items: Sequence[Item]) -> Sequence[None]:
        raise type(error)(*error.args, **vars(error))

    async def add(item: Item) -> None:
        with pytest.raises(type(error)):
            await group.add(item)

    group = GroupCommit(fail, limit=10)
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
