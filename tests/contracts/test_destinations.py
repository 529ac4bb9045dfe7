"""The contract of every kind of destination."""

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.kinds import ALL_KINDS
from support.kinds_base import TRACE, Kind, make_event

from receiver.destinations import Destination
from receiver.destinations.base import GroupDestination, encode
from receiver.errors import PublishFailed, PublishRejected, SettingsError


@pytest.fixture(params=ALL_KINDS)
async def kind(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Kind]:
    """Each kind, with its server or file."""
    async with ALL_KINDS[request.param](tmp_path) as running:
        yield running


@pytest.fixture
async def destination(kind: Kind) -> AsyncIterator[Destination]:
    """A started destination."""
    opened = kind.open()
    await opened.start()
    yield opened
    await opened.close()


async def ids_received(kind: Kind) -> list[str]:
    """Return the delivery ids that have arrived, sorted."""
    return sorted(event["deliveryid"] for event in await kind.received())


async def test_confirmed_is_there(kind: Kind, destination: Destination) -> None:
    """E1: when publish returns, the event can be read at the destination."""
    for count in range(1, 4):
        event = make_event({"number": count})
        await destination.publish(event)
        received = await kind.received()
        assert len(received) == count
        assert received[-1] == json.loads(encode(event))


async def test_attributes_arrive_unchanged(kind: Kind, destination: Destination) -> None:
    """E3: the ids for deduplication, and all other attributes, arrive unchanged."""
    await destination.publish(
        make_event(
            {"cost": 12},
            id="8b1ee5b4-6b2c-5ed5-8f80-66d25a4e1d0b",
            subject="request-1",
            deliveryid="delivery-1",
            attempt=7,
            replayid="replay-1",
            **TRACE,
        )
    )
    assert await kind.received() == [
        {
            "specversion": "1.0",
            "id": "8b1ee5b4-6b2c-5ed5-8f80-66d25a4e1d0b",
            "source": "/clipia/webhook/clipia",
            "type": "ai.clipia.generation.completed",
            "subject": "request-1",
            "time": "2026-11-20T12:30:15.123456Z",
            "datacontenttype": "application/json",
            "deliveryid": "delivery-1",
            "attempt": 7,
            "replayid": "replay-1",
            **TRACE,
            "data": {"cost": 12},
        }
    ]


@pytest.mark.parametrize(
    "data",
    [
        {"prompt": "Zürich 東京 🎬 \u2028 \u0000 \\ \" \r\n\t '"},
        {"fill": "é" * 128 * 1024},
        {"fill": ["x" * 1024] * 256},
        {},
    ],
    ids=["unicode", "256 KiB in one string", "256 KiB in a list", "empty"],
)
async def test_content_arrives_unchanged(
    kind: Kind, destination: Destination, data: dict[str, object]
) -> None:
    """E1: any text and a message of a quarter megabyte arrive unchanged, and so does the next event."""
    await destination.publish(make_event(data))
    await destination.publish(make_event({"last": True}))
    assert [event["data"] for event in await kind.received()] == [data, {"last": True}]


@pytest.mark.parametrize("subject", ["r-é/😀:4", "../../x", "a%00'\"\\;=,", "😀" * 255], ids=ascii)
async def test_any_request_id_arrives_unchanged(kind: Kind, destination: Destination, subject: str) -> None:
    """B10, E3: a request_id is any 1 to 255 printable characters, also in headers and keys of brokers."""
    altered = {"seed": 2**64 - 1, "altered": ["/output/a~1b", "/output/\ufffd"]}
    await destination.publish(make_event(altered, subject=subject))
    (event,) = await kind.received()
    assert (event["subject"], event["data"]) == (subject, altered)


async def test_concurrent_publishes_arrive_once(kind: Kind, destination: Destination) -> None:
    """E1: 200 events that are published at once all arrive, each exactly once."""
    events = [make_event({"fill": "x" * number * 20}) for number in range(200)]
    await asyncio.gather(*(destination.publish(event) for event in events))
    assert await ids_received(kind) == sorted(event.get_extension("deliveryid") for event in events)


async def test_two_publishers_share_a_place(kind: Kind, destination: Destination) -> None:
    """E1: events that two workers publish at once all arrive whole, each exactly once."""
    other = kind.open()
    await other.start()
    events = [make_event({"fill": "x" * number * 100}) for number in range(100)]
    await asyncio.gather(
        *((other if number % 2 else destination).publish(event) for number, event in enumerate(events))
    )
    await other.close()
    assert await ids_received(kind) == sorted(event.get_extension("deliveryid") for event in events)


async def test_broken_place_is_a_transient_failure(kind: Kind, destination: Destination) -> None:
    """E4: while the destination is down publish fails; once it is up again the same object works again."""
    first, lost, last = (make_event() for _ in range(3))
    await destination.publish(first)
    await kind.break_down()
    for _ in range(2):
        with pytest.raises(PublishFailed) as caught:
            await destination.publish(lost)
        assert caught.value.reason
    await kind.mend()
    await destination.publish(last)
    confirmed = {first.get_extension("deliveryid"), last.get_extension("deliveryid")}
    assert confirmed <= set(await ids_received(kind))


async def test_many_publishes_fail_together(kind: Kind, destination: Destination) -> None:
    """E4: if many publishes fail together, each gets an error of its own."""
    await kind.break_down()
    results = await asyncio.gather(
        *(destination.publish(make_event()) for _ in range(50)), return_exceptions=True
    )
    assert [type(result) for result in results] == [PublishFailed] * 50
    await kind.mend()
    await destination.publish(make_event())


async def test_start_at_a_broken_place(kind: Kind) -> None:
    """E4: a destination that is down when it is opened works once it is up."""
    await kind.break_down()
    destination = kind.open()
    try:
        await destination.start()
    except SettingsError:
        destination = kind.open()
    await kind.mend()
    await destination.publish(make_event())
    await destination.close()
    assert len(await kind.received()) == 1


async def test_check_tells_whether_the_place_can_be_reached(kind: Kind, destination: Destination) -> None:
    """E1: the check sends no event, passes if publishing would work, and names the problem if not."""
    await destination.check()
    await kind.break_down()
    with pytest.raises((PublishFailed, SettingsError)) as caught:
        await destination.check()
    assert str(caught.value)
    await kind.mend()
    await destination.check()
    assert await kind.received() == []


async def test_event_that_is_no_json_is_rejected(kind: Kind, destination: Destination) -> None:
    """E7: an event that cannot be written is rejected and does not affect others."""
    poison = make_event({"set": {1, 2}})
    good = [make_event() for _ in range(3)]
    results = await asyncio.gather(
        *(destination.publish(event) for event in (good[0], poison, *good[1:])), return_exceptions=True
    )
    assert [type(result) for result in results] == [type(None), PublishRejected, type(None), type(None)]
    assert await ids_received(kind) == sorted(event.get_extension("deliveryid") for event in good)


async def test_events_of_a_group_are_confirmed_one_by_one(kind: Kind, destination: Destination) -> None:
    """E1, E7: a group arrives in order; one that is no JSON is rejected; a closed place takes none."""
    if not isinstance(destination, GroupDestination):
        return
    events = [make_event({"fill": "x" * number}) for number in range(700)]
    events[3] = make_event({"set": {1, 2}})
    kinds = list[type]()
    while len(kinds) < len(events):
        some = await destination.publish_first(events[len(kinds) :])
        assert some
        kinds += [type(failure) for failure in some]
    assert kinds == [PublishRejected if number == 3 else type(None) for number in range(700)]
    ids = [event.get_extension("deliveryid") for event in events if event is not events[3]]
    assert [event["deliveryid"] for event in await kind.received()] == ids
    assert await destination.publish_first([]) == []
    await kind.break_down()
    failures = await destination.publish_first(events[2:5])
    assert [type(failure) for failure in failures] == [PublishFailed, PublishRejected, PublishFailed]
    await kind.mend()
    assert await destination.publish_first(events[:1]) == [None]
    await destination.close()
    assert [type(failure) for failure in await destination.publish_first(events[:2])] == [PublishFailed] * 2


async def test_cancelled_publish_does_not_take_others_with_it(kind: Kind, destination: Destination) -> None:
    """E16: if a publish is cancelled at any moment, the others are confirmed and arrive."""
    for pauses in range(4):
        tasks = [asyncio.create_task(destination.publish(make_event())) for _ in range(6)]
        for _ in range(pauses):
            await asyncio.sleep(0)
        tasks[0].cancel()
        tasks[3].cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        kept = [result for number, result in enumerate(results) if number not in {0, 3}]
        assert kept == [None] * 4
    assert len(await kind.received()) >= 16


async def publish_and_cancel(destination: Destination, *, pauses: int) -> None:
    """Cancel some publishes after as many iterations of the event loop."""
    tasks = [asyncio.create_task(destination.publish(make_event())) for _ in range(4)]
    for _ in range(pauses):
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_cancelled_publish_fails_silently(kind: Kind, destination: Destination) -> None:
    """E16: if all publishes that wait are cancelled, asyncio does not report their failure."""
    reports: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reports.append(context))
    await kind.break_down()
    for pauses in range(1, 4):
        await publish_and_cancel(destination, pauses=pauses)
    await kind.mend()
    await destination.close()
    gc.collect()
    assert reports == []


async def test_close(kind: Kind) -> None:
    """E16: closing twice is fine; confirmed events stay, and publishing fails."""
    destination = kind.open()
    await destination.start()
    await destination.publish(make_event())
    await destination.close()
    await destination.close()
    with pytest.raises(PublishFailed):
        await destination.publish(make_event())
    assert len(await kind.received()) == 1


async def test_close_while_publishing(kind: Kind) -> None:
    """E16: a publish during the close either fails or arrives; no confirmed event is lost."""
    destination = kind.open()
    await destination.start()
    events = [make_event() for _ in range(20)]
    tasks = [asyncio.create_task(destination.publish(event)) for event in events]
    await asyncio.sleep(0)
    await destination.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(result) for result in results} <= {type(None), PublishFailed}
    confirmed = {
        event.get_extension("deliveryid")
        for event, result in zip(events, results, strict=True)
        if result is None
    }
    assert confirmed <= set(await ids_received(kind))


async def test_close_without_start(kind: Kind) -> None:
    """E16: a destination that was opened but never started can be closed."""
    destination = kind.open()
    await destination.close()
    with pytest.raises(PublishFailed):
        await destination.publish(make_event())
