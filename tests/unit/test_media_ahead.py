"""Reading ahead while the storage writes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from receiver.media.storage.base import ahead


async def test_the_next_item_is_fetched_while_one_is_used() -> None:
    """D7: exactly one item is fetched ahead, so that the memory stays bounded."""
    fetched = []

    async def numbers() -> AsyncIterator[int]:
        for number in range(4):
            fetched.append(number)
            yield number

    used = []
    async with aclosing(ahead(numbers())) as items:
        async for item in items:
            for _ in range(5):
                await asyncio.sleep(0)
            assert fetched == list(range(min(item + 2, 4)))
            used.append(item)
    assert used == [0, 1, 2, 3]


async def test_an_error_of_the_source_comes_after_its_items() -> None:
    """D10: an error passes unchanged, and only after the items before it."""
    failure = ValueError("cut")

    async def cut() -> AsyncIterator[int]:
        yield 1
        raise failure

    used = []
    async with aclosing(ahead(cut())) as items:
        used.append(await anext(items))
        with pytest.raises(ValueError, match="cut") as caught:
            await anext(items)
    assert (used, caught.value) == ([1], failure)


async def test_closing_ends_the_fetch() -> None:
    """D10: if the storage fails, the fetch that is under way has ended when the error passes on."""
    ended = []

    async def stalling() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async with aclosing(ahead(stalling())) as items:
        await anext(items)
        await asyncio.sleep(0)
    assert ended == [True]
