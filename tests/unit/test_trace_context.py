"""W3C Trace Context: which headers are valid, and the ids that every process computes."""

from uuid import UUID, uuid4

import pytest

from receiver.core.trace_context import TraceContext, computed_ids
from receiver.db.rows import event_id, new_id

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (PARENT, PARENT),
        (f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-00"),
        # The flag of random trace ids is passed on; unknown flags are not.
        (f"00-{TRACE}-{SPAN}-03", f"00-{TRACE}-{SPAN}-03"),
        (f"00-{TRACE}-{SPAN}-ff", f"00-{TRACE}-{SPAN}-03"),
        # A later version may have more fields; this one is written.
        (f"01-{TRACE}-{SPAN}-01-more", PARENT),
        (f"cc-{TRACE}-{SPAN}-01", PARENT),
        *(
            (wrong, None)
            for wrong in (
                None,
                "",
                "00",
                PARENT.upper(),
                f" {PARENT}",
                f"{PARENT}\n",
                f"{PARENT}-more",
                f"01-{TRACE}-{SPAN}-01more",
                f"ff-{TRACE}-{SPAN}-01",
                f"00-{'0' * 32}-{SPAN}-01",
                f"00-{TRACE}-{'0' * 16}-01",
                f"00-{TRACE[:-1]}-{SPAN}-01",
                f"00-{TRACE}-{SPAN}-1",
                f"00-{TRACE[:-1]}\N{ARABIC-INDIC DIGIT ONE}-{SPAN}-01",
            )
        ),
    ],
)
def test_traceparent_is_valid_or_ignored(given: str | None, parsed: str | None) -> None:
    """A valid `traceparent` is written in version 00 with the two flags that are known."""
    context = TraceContext.parse(given)
    assert (context and context.parent) == parsed


def test_two_traceparents_are_none() -> None:
    """A request with two `traceparent` names no caller; several `tracestate` are one list."""
    assert TraceContext.read([PARENT, PARENT], []) is None
    assert TraceContext.read([], ["a=1"]) is None
    assert TraceContext.read([PARENT], ["a=1", "b=2"]) == TraceContext(
        int(TRACE, 16), int(SPAN, 16), 1, "a=1,b=2"
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("a=1", "a=1"),
        (" a=1 ,\tb=2,,", "a=1,b=2"),
        ("tenant@system=x y", "tenant@system=x y"),
        ("", None),
        ("a", None),
        ("A=1", None),
        ("a=1,a=2", None),
        ("a=\N{SNOWMAN}", None),
        ("a=1\r\nx: y", None),
        (",".join(f"k{number}=1" for number in range(33)), None),
        # Long members go first, then the last ones.
        (f"first=1,long={'x' * 200},{'y' * 9}={'y' * 250},long2={'x' * 200},last=1", "first=1,last=1"),
        (f"a={'x' * 100},b={'x' * 100},c={'x' * 100},d={'x' * 100},e={'x' * 100},f={'x' * 100}", 4),
    ],
)
def test_tracestate_is_bounded(given: str, kept: str | int | None) -> None:
    """An invalid `tracestate` is dropped, a long one loses members; the trace goes on in either case."""
    context = TraceContext.parse(PARENT, given)
    assert context is not None
    if isinstance(kept, int):
        assert context.state == ",".join(given.split(",")[:kept])
    else:
        assert context.state == kept


@pytest.mark.parametrize("make", [new_id, lambda: event_id("clipia", str(uuid4()))], ids=["job", "event"])
def test_computed_trace_ids_are_spread_evenly(make: "type[UUID]") -> None:
    """Samplers by ratio compare the last eight bytes of a trace id, so these have to be spread evenly."""
    ids = [make() for _ in range(4000)]
    traces, spans = zip(*map(computed_ids, ids), strict=True)
    for quarter in range(4):
        share = sum(each % 2**64 >> 62 == quarter for each in traces) / len(ids)
        assert share == pytest.approx(0.25, abs=0.05)
    assert len(set(traces)) == len(set(spans)) == len(ids)
    assert (*map(computed_ids, ids),) == (*zip(traces, spans, strict=True),)
