"""Circuit breakers of the delivery lanes, on both databases: a destination that is down delays no other."""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast

import pytest
from cloudevents.core.v1.event import CloudEvent
from prometheus_client import REGISTRY
from support.events import Recorder, World, opened, plain, until

from receiver.core import circuit_breaker
from receiver.core.circuit_breaker import FAILURES_TO_OPEN
from receiver.core.retry import RetryPolicy
from receiver.db import inbox
from receiver.db.clock import db_time
from receiver.db.database import Database
from receiver.db.rows import DeliveryClaim
from receiver.db.tables import attempts, deliveries
from receiver.errors import PublishFailed, PublishRejected
from receiver.lanes.attempts import StartedAttempt
from receiver.lanes.delivery_results import Result

WIDTH = 32
"""In-flight limit of the lanes."""


@dataclass(frozen=True, kw_only=True)
class Publish:
    """The start of one publish."""

    at: float
    under_way: int
    """Other publishes that were under way."""
    succeeded_before: int
    failed_before: int


class Switchable:
    """A destination that can be switched off, and records the publishes that reach it."""

    def __init__(self, recorder: Recorder) -> None:
        self.is_up = False
        self.recorder = recorder
        self.publishes: list[Publish] = []
        self.failed = 0
        recorder.behave = self._answer

    @property
    def probes(self) -> list[Publish]:
        """The attempts that began after the circuit breaker had opened."""
        return [tried for tried in self.publishes if tried.failed_before >= circuit_breaker.FAILURES_TO_OPEN]

    async def _answer(self, _event: CloudEvent) -> None:
        self.publishes.append(
            Publish(
                at=time.monotonic(),
                under_way=self.recorder.under_way - 1,
                succeeded_before=len(self.recorder.published),
                failed_before=self.failed,
            )
        )
        is_up = self.is_up
        await asyncio.sleep(0.005)
        if not is_up:
            self.failed += 1
            raise PublishFailed("nobody is there", reason="connect")


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> AsyncIterator[World]:
    """Return a world without a web server."""
    async with opened(database, tmp_path / "media") as made:
        yield made


@pytest.fixture
def quick_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make probes ten times as frequent."""
    monkeypatch.setattr(circuit_breaker, "FIRST_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(circuit_breaker, "MAX_PROBE_SECONDS", 0.4)


def is_shown_open(name: str) -> bool:
    """Return whether the metrics show the circuit breaker as open."""
    return REGISTRY.get_sample_value("receiver_circuit_open", {"destination": name}) == 1.0


@pytest.mark.usefixtures("quick_probes")
async def test_a_dead_destination_gets_probes_only(world: World) -> None:
    """E4, E6: after the failures of the first batch a dead destination is probed, one attempt at a time."""
    fine = world.add_destination("fine")
    dead = Switchable(world.add_destination("dead"))
    for number in range(100):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until_states(deliveries, deliveries.c.destination == "fine", delivered=100)

        async def probed() -> bool:
            return len(dead.probes) >= 4

        await until(probed)
        assert is_shown_open("dead")
    assert not is_shown_open("fine")
    assert sorted(fine.subjects) == sorted(f"r-{number}" for number in range(100))
    assert max(tried.under_way for tried in dead.publishes) < WIDTH
    assert {tried.under_way for tried in dead.probes} == {0}
    pauses = [after.at - before.at for before, after in pairwise(dead.probes)]
    assert min(pauses) >= 0.2, "the second pause must be twice the first one"
    assert await world.states(deliveries, deliveries.c.destination == "dead") == {"pending": 100}


@pytest.mark.usefixtures("quick_probes")
async def test_recovery_ramps_up_and_drains(world: World) -> None:
    """E5: with each probe that succeeds the number under way doubles, and the backlog is delivered."""
    back = Switchable(world.add_destination("back"))
    for number in range(150):
        await world.add(plain(f"r-{number}"))
    async with world.working():

        async def probed() -> bool:
            return bool(back.probes)

        await until(probed)
        down = len(back.publishes)
        back.is_up = True
        await world.until_states(deliveries, delivered=150)
    assert not is_shown_open("back")
    assert len(set(back.recorder.subjects)) == len(back.recorder.subjects) == 150
    for tried in back.publishes[down:]:
        ramp = 2 ** max(0, tried.succeeded_before - 1)
        assert tried.under_way + 1 <= min(WIDTH, ramp), tried
    assert max(tried.under_way for tried in back.publishes[down:]) >= WIDTH // 4, (
        "the number under way must grow again"
    )


@pytest.mark.usefixtures("quick_probes")
async def test_a_second_outage_is_met_like_the_first(world: World) -> None:
    """E4: two outages in a row lose no event, and each of them opens the circuit breaker."""
    shaky = Switchable(world.add_destination("shaky"))
    shaky.is_up = True
    for outage in range(2):
        for number in range(40):
            await world.add(plain(f"r-{outage}-{number}"))
        async with world.working():
            shaky.is_up = False

            async def opened_again() -> bool:
                return is_shown_open("shaky")

            await until(opened_again)
            shaky.is_up = True
            await world.until_states(deliveries, delivered=40 * (outage + 1))
            assert not is_shown_open("shaky")
    assert len(set(shaky.recorder.subjects)) == 80


async def test_each_claimed_delivery_begins_at_once(world: World) -> None:
    """E16: a lane claims as many deliveries as it has free places, so that no claimed one waits."""
    main = Switchable(world.add_destination("main"))
    for number in range(40):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    lane = world.delivery_lane(concurrency=6)
    works = await lane.claim(lane.concurrency)
    assert len(works) == len(await world.rows(deliveries, deliveries.c.lease.is_not(None))) == 6
    await asyncio.gather(*(work.run() for work in works))
    assert max(tried.under_way for tried in main.publishes) == 5


async def test_a_few_failures_slow_nothing_down(world: World) -> None:
    """E7: occasional failures are retried, and the circuit breaker stays closed."""
    mixed = world.add_destination("mixed")
    seen: set[str] = set()

    def fail_some_once(event: CloudEvent) -> None:
        subject = str(event.get_subject())
        if subject.endswith("3") and subject not in seen:
            seen.add(subject)
            raise PublishFailed("not now", reason="status")

    mixed.behave = fail_some_once
    for number in range(60):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until_states(deliveries, delivered=60)
    assert len(seen) == 6
    assert not is_shown_open("mixed")
    assert len(await world.rows(attempts, attempts.c.outcome == "retry")) == 6


async def test_rejected_messages_are_no_outage(world: World) -> None:
    """E7: a destination that rejects each message is healthy: all become dead letters at once."""
    strict = world.add_destination("strict")

    def reject(_event: CloudEvent) -> None:
        assert not is_shown_open("strict")
        raise PublishRejected("422 from the destination", reason="status")

    strict.behave = reject
    for number in range(80):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until_states(deliveries, dead=80)
    assert len(await world.rows(attempts)) == 80
    assert not is_shown_open("strict")


async def test_a_bug_in_a_destination_opens_no_circuit(world: World) -> None:
    """E7: an unexpected exception is recorded and retried, with all places of the destination."""
    buggy = world.add_destination("buggy", retry=RetryPolicy(initial=0.1, cap=0.1))

    def break_early(event: CloudEvent) -> None:
        if event.get_extension("attempt") == 1:
            raise ZeroDivisionError("bug")

    buggy.behave = break_early
    for number in range(8):
        await world.add(plain(f"r-{number}"))
    async with world.working():
        await world.until_states(deliveries, delivered=8)
    assert len(await world.rows(attempts)) == 16
    assert not is_shown_open("buggy")


@pytest.mark.usefixtures("quick_probes")
async def test_a_dead_destination_loses_nothing_by_restarts(world: World) -> None:
    """E4, E16: a new process does not know of the outage, opens its circuit breaker, and drops no event."""
    dead = Switchable(world.add_destination("dead"))
    for number in range(50):
        await world.add(plain(f"r-{number}"))
    for restart in range(1, 3):
        async with world.working():

            async def has_tried(count: int = restart * 5) -> bool:
                return len(dead.publishes) >= count

            await until(has_tried)
    rows = await world.rows(deliveries)
    assert {(row["state"], row["lease"]) for row in rows} == {("pending", None)}
    dead.is_up = True
    await world.change(deliveries, next_attempt_at=db_time(0.0))
    async with world.working():
        await world.until_states(deliveries, delivered=50)


async def test_a_lane_claims_no_row_while_its_circuit_is_open(world: World) -> None:
    """E4: while the circuit breaker is open, the lane claims no row: attempts and due times stay the same."""
    dead = Switchable(world.add_destination("dead", retry=RetryPolicy(initial=0.001, cap=0.001)))
    for number in range(10):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    lane = world.delivery_lane(concurrency=5)
    works = await lane.claim(5)
    assert len(works) == 5
    for work in works:
        await work.run()
    assert len(dead.publishes) == 5
    before = await world.rows(deliveries)
    assert await lane.claim(5) == []
    assert await world.rows(deliveries) == before


@pytest.mark.parametrize("width", [1, 3])
async def test_one_lane_takes_no_more_than_its_width(world: World, width: int) -> None:
    """E5: deliveries under way count against the in-flight limit, even if the lane is asked for more."""
    world.add_destination("narrow")
    for number in range(10):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    lane = world.delivery_lane(concurrency=width)
    works = await lane.claim(width)
    assert len(works) == width
    for work in works:
        await work.run()
    assert await world.states(deliveries) == {"delivered": width, "pending": 10 - width}


@pytest.mark.parametrize("error", [None, PublishFailed("x", reason="x"), PublishRejected("x", reason="x")])
async def test_a_result_that_comes_too_late_changes_nothing(world: World, error: Exception | None) -> None:
    """E10: if the lease was lost meanwhile, a worker records neither success nor failure nor rejection."""
    main = world.add_destination("main")

    def behave(_event: CloudEvent) -> None:
        if error is not None:
            raise error

    main.behave = behave
    await world.add(plain("r-1"))
    await world.fan_out()
    (late,) = await world.delivery_lane().claim(1)
    await world.change(deliveries, next_attempt_at=db_time(0.0))
    (other,) = await world.delivery_lane().claim(1)
    before = await world.rows(deliveries)
    await late.run()
    assert await world.rows(deliveries) == before
    assert await world.rows(attempts) == []
    main.behave = lambda _event: None
    await other.run()
    assert await world.states(deliveries) == {"delivered": 1}


async def test_errors_of_no_known_kind_open_the_circuit_too(world: World) -> None:
    """E6: a client library's own error counts as a failure; a message that cannot be built does not."""
    main = world.add_destination("odd")

    def reset(_event: CloudEvent) -> None:
        raise ConnectionResetError

    main.behave = reset
    for number in range(FAILURES_TO_OPEN):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    lane = world.delivery_lane()
    for work in await lane.claim(FAILURES_TO_OPEN):
        await work.run()
    assert is_shown_open("odd")
    await world.change(deliveries, next_attempt_at=db_time(0.0))
    assert await lane.claim(32) == []


async def test_renewals_and_results_do_not_lock_each_other_out(world: World) -> None:
    """E9: leases are renewed while a batch is recorded; the order of its rows leads to no deadlock."""
    main = world.add_destination("main")

    def fail(event: CloudEvent) -> None:
        if str(event.get_subject()).endswith("0"):
            raise PublishFailed("down", reason="connect")

    main.behave = fail
    for number in range(100):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    lane = world.delivery_lane(concurrency=100)
    works = await lane.claim(100)
    by_chance = random.Random(7)
    async with world.database.read() as connection:
        (event,) = (await inbox.load_events(connection, [1])).values()
    for _ in range(4):
        claims = [cast("DeliveryClaim", work.claim) for work in works]
        results = [
            Result(
                claim=claim,
                event=event,
                attempt=StartedAttempt.of(claim).end("retry", f"error {index}"),
                state=None if index % 3 else "delivered",
            )
            for index, claim in enumerate(claims)
        ]
        by_chance.shuffle(results)
        by_chance.shuffle(claims)
        recording = asyncio.create_task(lane._write(results))
        # Let the recording begin first.
        await asyncio.sleep(0.03)
        await lane.renew(claims)
        held = await recording
        assert len(held) == len(works)
        await world.change(deliveries, state="pending", lease=None, next_attempt_at=db_time(0.0))
        works = await lane.claim(100)
