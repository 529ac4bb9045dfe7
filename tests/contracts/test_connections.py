"""The connection that publishes share: opened once, replaced if it breaks, closed when it is unused."""

import asyncio
import gc
from collections.abc import AsyncIterator
from typing import Any

import pytest

from receiver.destinations import base
from receiver.destinations.base import Failure
from receiver.destinations.connections import Connection, SharedConnection
from receiver.errors import PublishFailed


class Broker:
    """A broker that opens at once and works, unless a test sets a failure."""

    def __init__(self) -> None:
        self.made: list[Link] = []
        self.opens = asyncio.Event()
        self.opens.set()
        self.failure: PublishFailed | None = None

    def make(self) -> "Link":
        """Make a connection and remember it."""
        self.made.append(Link(self))
        return self.made[-1]


class Link(Connection):
    """One connection to the broker."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.gate = asyncio.Event()
        self.closed = 0
        self.lost = False

    @property
    def is_open(self) -> bool:
        """Whether it is not lost."""
        return not self.lost

    async def open(self) -> None:
        """Wait until the broker opens, and raise its failure."""
        await self.broker.opens.wait()
        if self.broker.failure is not None:
            raise self.broker.failure

    async def close(self) -> None:
        """Count the calls."""
        self.closed += 1

    def survives(self, failure: Failure) -> bool:
        """Survive only failures that are called harmless."""
        return failure.reason == "harmless"

    async def wait(self) -> "Link":
        """Return once the gate is open."""
        await self.gate.wait()
        return self

    async def fail(self, reason: str) -> None:
        """Fail, once all publishes that have begun have a connection."""
        await asyncio.sleep(0)
        raise PublishFailed("as asked for", reason=reason)


@pytest.fixture
def broker() -> Broker:
    """A broker that opens."""
    return Broker()


@pytest.fixture
async def shared(broker: Broker) -> AsyncIterator[SharedConnection[Link]]:
    """The broker's shared connection; a test fails if it leaves an exception that no caller awaits."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reports.append(context))
    opened = SharedConnection(broker.make, shown="broker", max_users=10)
    yield opened
    await opened.close()
    gc.collect()
    assert reports == []
    assert [link.closed for link in broker.made] == [1] * len(broker.made)


async def failure_of(task: "asyncio.Task[Any]") -> PublishFailed:
    """Return the failure of the task."""
    with pytest.raises(PublishFailed) as caught:
        await task
    return caught.value


async def test_opened_once(broker: Broker, shared: SharedConnection[Link]) -> None:
    """E5: many publishes that need a connection at once open one, even if the first of them is cancelled."""
    broker.opens.clear()
    tasks = [asyncio.create_task(shared.run(Link.wait)) for _ in range(5)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.sleep(0)
    broker.opens.set()
    for _ in range(5):
        await asyncio.sleep(0)
    broker.made[0].gate.set()
    assert await asyncio.gather(*tasks[1:]) == [broker.made[0]] * 4


async def test_failure_to_open_is_shared(broker: Broker, shared: SharedConnection[Link]) -> None:
    """E4: if a connection cannot be opened, each publish that waits for it fails with an error of its own."""
    broker.failure = PublishFailed("refused", reason="auth")
    tasks = [asyncio.create_task(shared.run(Link.wait)) for _ in range(3)]
    failures = [await failure_of(task) for task in tasks]
    assert [failure.reason for failure in failures] == ["auth"] * 3
    assert len({id(failure) for failure in failures}) == 3
    assert len(broker.made) == 1


async def test_failure_to_open_after_cancellation(broker: Broker, shared: SharedConnection[Link]) -> None:
    """E16: if all publishes that wait for a connection are cancelled, asyncio does not report its failure."""
    broker.failure = PublishFailed("refused", reason="auth")
    broker.opens.clear()
    task = asyncio.create_task(shared.run(Link.wait))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    broker.opens.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert [link.closed for link in broker.made] == [1]


async def test_broken_connection_is_replaced(broker: Broker, shared: SharedConnection[Link]) -> None:
    """E4: a connection that does not survive a failure gets no new users; its present ones keep it."""
    old = asyncio.create_task(shared.run(Link.wait))
    harmless = asyncio.create_task(shared.run(lambda link: link.fail("harmless")))
    assert (await failure_of(harmless)).reason == "harmless"
    fatal = [asyncio.create_task(shared.run(lambda link: link.fail("fatal"))) for _ in range(2)]
    assert [(await failure_of(task)).reason for task in fatal] == ["fatal"] * 2
    assert len(broker.made) == 1
    new = asyncio.create_task(shared.run(Link.wait))
    for _ in range(3):
        await asyncio.sleep(0)
    for link in broker.made:
        assert not link.closed
        link.gate.set()
    assert [await old, await new] == broker.made
    await asyncio.sleep(0)
    assert [link.closed for link in broker.made] == [1, 0]


async def test_connection_that_fails_at_once(broker: Broker, shared: SharedConnection[Link]) -> None:
    """E4: a connection that fails for several users at once is closed once."""

    async def fail(_link: Link) -> None:
        raise PublishFailed("at once", reason="fatal")

    tasks = [asyncio.create_task(shared.run(fail)) for _ in range(3)]
    assert [(await failure_of(task)).reason for task in tasks] == ["fatal"] * 3
    await asyncio.sleep(0)
    assert [link.closed for link in broker.made] == [1]


async def test_lost_connection_is_replaced(shared: SharedConnection[Link]) -> None:
    """E4: a connection that turns out to be lost is closed and another one opened."""
    lost = await shared.run(lambda link: asyncio.sleep(0, link))
    lost.lost = True
    assert await shared.run(lambda link: asyncio.sleep(0, link)) is not lost
    assert lost.ended


async def test_slow_work_ends(
    broker: Broker, shared: SharedConnection[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    """E4: a publish that takes too long fails, and the next one gets another connection."""
    monkeypatch.setattr(base, "TIMEOUT_SECONDS", 0.05)
    for _ in range(2):
        failure = await failure_of(asyncio.create_task(shared.run(Link.wait)))
        assert (failure.reason, "broker did not answer" in str(failure)) == ("timeout", True)
    assert len(broker.made) == 2


async def test_close_waits(broker: Broker, shared: SharedConnection[Link]) -> None:
    """E16: closing lets publishes under way end, rejects new ones, and may be called again."""
    working = asyncio.create_task(shared.run(Link.wait))
    for _ in range(3):
        await asyncio.sleep(0)
    closing = [asyncio.create_task(shared.close()) for _ in range(2)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert not any(task.done() for task in closing)
    assert (await failure_of(asyncio.create_task(shared.run(Link.wait)))).reason == "closed"
    broker.made[0].gate.set()
    assert await working is broker.made[0]
    await asyncio.wait(closing)
    assert [link.closed for link in broker.made] == [1]


async def test_confirmed_messages_of_a_group_stay_confirmed(
    broker: Broker, shared: SharedConnection[Link], monkeypatch: pytest.MonkeyPatch
) -> None:
    """E6: if time runs out in a group, only messages without a confirmation fail."""
    monkeypatch.setattr(base, "TIMEOUT_SECONDS", 0.05)

    async def publish(link: Link, failures: list[Failure | None]) -> None:
        failures[0] = None
        failures[1] = PublishFailed("no", reason="harmless")
        await link.wait()

    late = await shared.run_all(4, publish)
    assert [each and each.reason for each in late] == [None, "harmless", "timeout", "timeout"]

    async def confirm(_link: Link, failures: list[Failure | None]) -> None:
        failures[:] = [None] * len(failures)

    assert await shared.run_all(3, confirm) == [None] * 3
    assert len(broker.made) == 2

    async def break_one(_link: Link, failures: list[Failure | None]) -> None:
        failures[:] = [None, PublishFailed("lost", reason="connection")]

    assert [each is None for each in await shared.run_all(2, break_one)] == [True, False]
    assert await shared.run_all(1, confirm) == [None]
    assert len(broker.made) == 3
