"""The spans of a worker, seen in memory: attempts that fail, replays, groups, files, callers' traces."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cloudevents.core.v1.event import CloudEvent
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.events import GroupRecorder, Recorder, World, opened, plain, until, with_files

from receiver.core.trace_context import TraceContext, computed_ids
from receiver.db.database import Database
from receiver.db.rows import event_id
from receiver.db.tables import deliveries, jobs, media
from receiver.errors import PublishFailed
from receiver.tracing.sdk import SdkTracer

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass(frozen=True)
class Traced:
    """A world with tracing into memory."""

    world: World
    exporter: InMemorySpanExporter

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans that have ended, in that order."""
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        """Return the spans of a name."""
        return [each for each in self.spans if each.name == name]


@pytest.fixture
async def traced(database: Database, tmp_path: Path) -> AsyncIterator[Traced]:
    """Return a worker's parts with tracing into memory; files come from a closed port."""
    exporter = InMemorySpanExporter()
    async with opened(database, tmp_path / "media", "http://127.0.0.1:9") as world:
        world.tracer = SdkTracer(SimpleSpanProcessor(exporter))
        yield Traced(world, exporter)
        await world.tracer.close()


def place(span: ReadableSpan) -> str:
    """Return a span's own place."""
    found = span.get_span_context()
    assert found is not None
    return TraceContext(found.trace_id, found.span_id, int(found.trace_flags)).parent


def parent(span: ReadableSpan) -> str:
    """Return the place of a span's parent; empty for a root."""
    found = span.parent
    return "" if found is None else TraceContext(found.trace_id, found.span_id, int(found.trace_flags)).parent


def attributes(spans: Sequence[ReadableSpan], name: str) -> list[object]:
    """Return the values of an attribute."""
    return [(each.attributes or {}).get(name) for each in spans]


@pytest.mark.parametrize("kind", [Recorder, GroupRecorder])
async def test_attempts_and_replays_belong_to_their_event(traced: Traced, kind: type[Recorder]) -> None:
    """Each attempt is a span of its own in the event's trace; its message has that span's place."""
    world, main, seen = traced.world, kind(), list[CloudEvent]()
    world.add_destination("main", recorder=main)

    def fail_once(event: CloudEvent) -> None:
        seen.append(event)
        if len(seen) == 1:
            raise PublishFailed("token=secret", reason="status")

    main.behave = fail_once
    await world.add(plain("r-1"))
    # The program around it may have a trace of its own.
    outer = trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=False, trace_flags=trace.TraceFlags(1)))
    with trace.use_span(outer):
        async with world.working():
            await world.until_states(deliveries, delivered=1)
            replay = await world.order(reason="again")
            await world.until_replayed(replay)
    trace_id, span_id = computed_ids(event_id("clipia", "r-1"))
    root = TraceContext(trace_id, span_id, 3).parent
    (received,), sends = traced.named("receive event"), traced.named("send main")
    assert (place(received), parent(received)) == (root, "")
    assert [parent(each) for each in (*sends, *traced.named("fan out"))] == [root] * 4
    assert [event.get_extension("traceparent") for event in seen] == [place(each) for each in sends]
    assert attributes(sends, "clipia.attempt") == [1, 2, 1]
    assert attributes(sends, "clipia.replay.id") == [None, None, str(replay["id"])]
    assert attributes(sends, "error.type") == ["status", None, None]
    assert [each.status.is_ok for each in sends] == [False, True, True]
    assert [parent(each) for each in traced.named("UPDATE deliveries")] == [place(each) for each in sends]
    assert "secret" not in repr([each.to_json() for each in traced.spans])
    # The global provider belongs to the program around the receiver.
    assert type(trace.get_tracer_provider()).__name__ == "ProxyTracerProvider"


async def test_a_group_is_recorded_in_the_trace_of_its_first_event(traced: Traced) -> None:
    """One transaction is one span, with the number of its rows."""
    world = traced.world
    world.add_destination("main", recorder=GroupRecorder())
    for number in range(5):
        await world.add(plain(f"r-{number}"))
    await world.fan_out()
    lane = world.worker()._runners[1]._lane
    [work] = await lane.claim(20)
    await work.run()
    sends, (recorded,) = traced.named("send main"), traced.named("UPDATE deliveries")
    assert len({place(each) for each in sends}) == len({parent(each) for each in sends}) == 5
    assert parent(recorded) == place(sends[0])
    assert attributes([recorded], "db.operation.batch.size") == [5]


@pytest.mark.parametrize("flags", ["00", "01", "02", "03"])
async def test_a_caller_decides_the_trace_and_its_sampling(traced: Traced, flags: str) -> None:
    """The event of a job belongs to its caller's trace; if that is not sampled, there are no spans."""
    world, main = traced.world, traced.world.add_destination("main")
    job_id = await world.add_job("job", request_id="r-1")
    await world.change(jobs, traceparent=f"00-{TRACE}-{SPAN}-{flags}", tracestate="a=1")
    await world.add(plain("r-1"))
    async with world.working():
        await world.until_states(deliveries, delivered=1)
    (message,) = main.published
    found = TraceContext.parse(message.get_extension("traceparent"))
    assert found is not None
    assert (f"{found.trace_id:032x}", f"{found.flags:02x}") == (TRACE, flags)
    assert message.get_extension("tracestate") == "a=1"
    is_sampled = flags in {"01", "03"}
    assert len(traced.spans) == (4 if is_sampled else 0)
    if is_sampled:
        (received,) = traced.named("receive event")
        assert parent(received) == f"00-{TRACE}-{computed_ids(job_id)[1]:016x}-{flags}"


async def test_a_failed_download_says_no_more_than_the_host(traced: Traced) -> None:
    """Spans of downloads have the host and the reason, and neither the path nor the query of the URL."""
    world = traced.world
    await world.add(with_files("http://127.0.0.1:9", "r-1", "/hidden/a.png?signature=hidden"))
    async with world.working():

        async def is_tried() -> bool:
            return any(row["attempts"] for row in await world.rows(media)) and bool(
                traced.named("UPDATE media")
            )

        await until(is_tried)
    download = traced.named("download file")[0]
    assert attributes([download], "server.address") == ["127.0.0.1"]
    assert attributes([download], "error.type") != [None]
    assert parent(traced.named("UPDATE media")[0]) == place(download)
    assert "hidden" not in repr([each.to_json() for each in traced.spans])
