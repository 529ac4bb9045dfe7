"""The memory budget: the connections that are shed if it is used up, and the return of memory."""

import asyncio

import pytest

from receiver.api import memory_budget
from receiver.api.memory_budget import BURST_BYTES, CONNECTION_BYTES, LARGE_BYTES, MIB, MemoryBudget

KIB = 1024


class Client:
    """A connection that may be shed."""

    def __init__(self, budget: MemoryBudget, size: int = 0, *, is_unfinished: bool = True) -> None:
        self.budget = budget
        self.held = 0
        self.is_unfinished = is_unfinished
        self.is_shed = False
        budget.accept(self)
        budget.add(self, size)

    def shed(self) -> None:
        """Free the buffers."""
        self.is_shed = True
        self.is_unfinished = False
        self.budget.release(self, self.held)


def shed(clients: list[Client]) -> list[int]:
    """Return the positions of the connections that were shed."""
    return [position for position, client in enumerate(clients) if client.is_shed]


def test_the_largest_unfinished_request_is_shed_first() -> None:
    """A10: small and complete requests are kept, no matter how many large ones there are."""
    budget = MemoryBudget(8 * MIB)
    clients = [Client(budget, size * KIB) for size in (1, 100, 700, 300, 5, 500)]
    served = Client(budget, 4 * MIB, is_unfinished=False)
    budget.grow(clients[4], 2 * MIB)
    assert shed(clients) == [2, 4]
    assert not served.is_shed
    assert budget.used <= 8 * MIB * 5 // 8


def test_of_equal_requests_the_oldest_is_shed_first() -> None:
    """A10: a webhook that takes milliseconds is kept, and waiting connections are shed."""
    budget = MemoryBudget(8 * MIB)
    clients = [Client(budget) for _ in range(8 * MIB // CONNECTION_BYTES)]
    assert shed(clients) == []
    newest = Client(budget)
    assert shed(clients) == [*range(65)]
    assert not newest.is_shed
    assert budget.used <= 8 * MIB


def test_the_last_quarter_is_for_small_requests() -> None:
    """A10: bodies that wait for the database do not shed a small webhook."""
    budget = MemoryBudget(8 * MIB)
    for _ in range(6):
        Client(budget, MIB - CONNECTION_BYTES, is_unfinished=False)
    large, small = Client(budget), Client(budget)
    budget.grow(small, LARGE_BYTES - CONNECTION_BYTES)
    assert not small.is_shed
    budget.grow(large, LARGE_BYTES)
    assert (large.is_shed, small.is_shed) == (True, False)


def test_nothing_is_left_for_the_last_one() -> None:
    """A10: if all others are being served, the new connection is rejected, and only its body counts."""
    budget = MemoryBudget(8 * MIB)
    for _ in range(9):
        Client(budget, MIB, is_unfinished=False)
    assert budget.is_used_up
    newcomer = Client(budget)
    budget.add(newcomer, 4 * KIB)
    assert not newcomer.is_shed
    budget.grow(newcomer, 1)
    assert newcomer.is_shed


async def test_memory_is_given_back_after_a_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    """A10: memory is returned once after a burst; small loads do not trigger it."""
    calls: list[None] = []
    monkeypatch.setattr(memory_budget, "REST_SECONDS", 0.01)
    monkeypatch.setattr(memory_budget, "give_memory_back", lambda: calls.append(None))
    budget = MemoryBudget(64 * MIB)
    for size, times in (
        (BURST_BYTES // 2, 0),
        (2 * BURST_BYTES, 1),
        (BURST_BYTES // 2, 1),
        (2 * BURST_BYTES, 2),
    ):
        clients = [Client(budget, size // 4) for _ in range(4)]
        for client in clients:
            budget.release(client, client.held)
        await asyncio.sleep(0.05)
        assert (len(calls), budget.used) == (times, 0)


def test_giving_back_works_with_this_c_library() -> None:
    """A10: an allocator without the function is no error."""
    memory_budget.give_memory_back()
    memory_budget.set_up_allocator()
