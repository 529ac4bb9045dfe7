"""The official SDK accepts all that we accept: `verify` against `clipia.verify_signature`."""

import hashlib
import hmac
import re
from collections import Counter
from dataclasses import dataclass

import clipia
import pytest
from clipia.webhooks import _compute_signature
from hypothesis import given, settings
from hypothesis import strategies as st

from receiver.core.signature import Secret, sign, verify
from receiver.errors import SignatureError

NOW = 1_790_000_000
TOLERANCE = 300
KEY = "whsec_0123456789abcdef"
SECRET = Secret.from_text(KEY)
EXAMPLES = 1500
V1 = re.compile(rb"[ \t]*v1[ \t]*=")


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A header value and a body that are received at `now`."""

    header: bytes
    body: bytes
    now: float = NOW

    def we_accept(self) -> bool:
        """Return our verdict."""
        try:
            verify([self.header], self.body, secrets=[SECRET], now=self.now, tolerance=TOLERANCE)
        except SignatureError:
            return False
        return True

    def sdk_accepts(self) -> bool:
        """Return the SDK's verdict on the same header, which a server passes as Latin-1."""
        headers = {"X-Clipia-Signature": self.header.decode("latin-1")}
        return clipia.verify_signature(KEY, headers, self.body, tolerance_seconds=TOLERANCE, now=self.now)


def mac(t: bytes, body: bytes, key: bytes = SECRET.value) -> bytes:
    """Compute a signature over any bytes without the code of either side."""
    return hmac.new(key, t + b"." + body, hashlib.sha256).hexdigest().encode()


def with_one_v1(header: bytes) -> list[bytes]:
    """Return one header for each `v1`, without the other ones."""
    elements = header.split(b",")
    signatures = [element for element in elements if V1.match(element)]
    rest = [element for element in elements if not V1.match(element)]
    return [b",".join([*rest, signature]) for signature in signatures]


def is_utf8(body: bytes) -> bool:
    """Tell whether the SDK can decode the body; it does so before it verifies."""
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


BODIES = st.one_of(
    st.sampled_from(
        [b"", b"{}", b'{"request_id":"r-1","status":"OK"}', b"1790000000.{}", b"\xff", b'{"a":"\xe9"}']
    ),
    st.text(max_size=30).map(lambda text: text.encode("utf-8", "replace")),
    st.binary(max_size=30),
)
TIMES = st.one_of(
    st.sampled_from([NOW + late for late in (0, 1, -1, 299, -299, 300, -300, 301, -301)]),
    st.integers(NOW - 305, NOW + 305),
).map(lambda time: b"%d" % time)
SPELLINGS = st.sampled_from(
    [
        b"",
        b"+1790000000",
        b"-1790000000",
        b"01790000000",
        b"1_790_000_000",
        b"1790000000.0",
        b"1.79e9",
        b" 1790000000",
        b"1790000000\t",
        b"1790000000\n",
        b"1790000000\x1f",
        b"1790000000\x00",
        b"\xa01790000000",
        "\uff11790000000".encode(),
        "\u06611790000000".encode(),
        b"\xb21790000000",
    ]
)
FRAGMENTS = [
    *[b",", b", ", b" ", b"=", b"\t", b"\n", b"\x00", b"\xff", b";", b'"', b"t", b"v1", b"v1=", b"t="],
    *[b"t=1790000000", b",t=1790000001", b"v1=" + b"0" * 64, b",v2=x", b"v0=", b"0", b"A", b"_", b"."],
]


@st.composite
def mutated(draw: st.DrawFn, header: bytes) -> bytes:
    """Damage a header a little: cut, insert, double, swap case."""
    start = draw(st.sampled_from([0, len(header)]) | st.integers(0, len(header)))
    end = min(start + draw(st.sampled_from([0, 0, 0, 1, 1, 2, 12, 67])), len(header))
    part = header[start:end]
    fragment = draw(st.sampled_from(FRAGMENTS) | st.binary(min_size=1, max_size=2))
    replacement = draw(st.sampled_from([b"", fragment, part + part, part.swapcase(), part + fragment]))
    return header[:start] + replacement + header[end:]


@st.composite
def honest(draw: st.DrawFn, body: bytes) -> bytes:
    """Draw a header of well-formed elements; it may be stale, have other signers, or have two times."""
    t = draw(TIMES)
    right, wrong = b"v1=" + mac(t, body), b"v1=" + b"0" * 64
    extras = [wrong, wrong, wrong, right, b"v0=" + right[3:], b"v2=x", b"kid=a=b", b"T=1", b"t=1790000007"]
    extras += [
        b"",
        b" ",
        b"foo",
        b"t",
        b"\xa0t=1",
        b"\x1ft=" + t,
        b"\x85v1=" + right[3:],
        b"t\x0b=1",
        b"\xfft=1",
    ]
    elements = [
        b"t=" + t,
        draw(st.sampled_from([right, right, right, right, wrong])),
        *draw(st.lists(st.sampled_from(extras), max_size=2)),
    ]
    return draw(st.sampled_from([b",", b",", b", ", b"\t,", b",,"])).join(draw(st.permutations(elements)))


@st.composite
def strange(draw: st.DrawFn, body: bytes) -> bytes:
    """Draw a header of right and wrong elements in any number, order and punctuation."""
    t = draw(TIMES | SPELLINGS)
    right = mac(t, body)
    elements = [
        *[b"t=" + t, b"v1=" + right, b"t=" + t, b"t=1790000007", b"T=" + t, b"t", b"t="],
        *[b"v1=" + mac(t, body, b"another"), b"v1=" + right.upper(), b"v1=" + right[:-1], b"v1= " + right],
        *[b"v1=", b"v1", b"V1=" + right, b"v0=" + right, b"v2=x", b"kid=a=b", b"", b" ", b"="],
    ]
    chosen = [*elements[:2], *draw(st.lists(st.sampled_from(elements), max_size=3))]
    if draw(st.booleans()):
        chosen.reverse()
    return draw(st.sampled_from([b",", b",", b", ", b" ,", b";"])).join(chosen)


@st.composite
def deliveries(draw: st.DrawFn) -> Delivery:
    """Draw a request: a good one, a strange one, or one with damage to the header or another body."""
    body = draw(BODIES)
    header = draw(st.one_of(honest(body), honest(body), honest(body), strange(body)))
    damage = draw(st.sampled_from(["", "", "", "", "header", "header", "twice", "body"]))
    if damage in {"header", "twice"}:
        header = draw(mutated(header))
    if damage == "twice":
        header = draw(mutated(header))
    if damage == "body":
        body = draw(BODIES)
    return Delivery(header=header, body=body, now=NOW + draw(st.sampled_from([0, 0.5, -0.5])))


def test_we_are_as_strict_as_the_sdk() -> None:
    """A1, A3, A5, A8, A9, T22: except for several `v1` and bodies beyond UTF-8, we are at least as strict."""
    tally: Counter[str] = Counter()

    @given(delivery=deliveries())
    @settings(max_examples=EXAMPLES, deadline=None)
    def compare(delivery: Delivery) -> None:
        ours, theirs = delivery.we_accept(), delivery.sdk_accepts()
        if not ours or theirs:
            tally["both" if ours else "only theirs" if theirs else "neither"] += 1
        elif not is_utf8(delivery.body):
            (t,) = re.findall(rb"(?:^|,)[ \t]*t[ \t]*=[ \t]*([0-9]+)", delivery.header)
            assert mac(t, delivery.body) in delivery.header
            tally["not UTF-8"] += 1
        else:
            # The SDK reads the last `v1` only. If it gets the right one alone, it must agree.
            alone = [
                Delivery(header=header, body=delivery.body, now=delivery.now)
                for header in with_one_v1(delivery.header)
            ]
            assert len(alone) > 1
            assert any(single.sdk_accepts() for single in alone)
            tally["several v1"] += 1

    compare()
    # If nearly all requests were rejected, the comparison would prove too little.
    assert tally["both"] >= EXAMPLES / 10
    assert all(
        tally[kind] >= EXAMPLES / 200 for kind in ("neither", "only theirs", "several v1", "not UTF-8")
    )


@given(body=st.text(max_size=200), time=st.integers(NOW - TOLERANCE, NOW + TOLERANCE))
@settings(max_examples=500, deadline=None)
def test_signatures_are_the_sdks(body: str, time: int) -> None:
    """A1: both sides accept each other's signatures, which are the same text."""
    raw = body.encode("utf-8", "replace")
    header = sign(SECRET.value, raw, timestamp=time)
    assert header == f"t={time},v1={_compute_signature(KEY, str(time), raw.decode())}"
    delivery = Delivery(header=header.encode(), body=raw)
    assert delivery.we_accept()
    assert delivery.sdk_accepts()


GOOD = mac(b"1790000000", b"{}")


@pytest.mark.parametrize(
    "header",
    [
        b"t=1,t=1790000000,v1=" + GOOD,
        b"t=1790000000,v1=short,v1=" + GOOD,
        b"t=1790000000,v1=" + GOOD[:60] + b",v1=" + GOOD,
        b"t=1790000000\xa0,v1=" + GOOD,
        b"t=1790000000,v1=" + GOOD + b",x=" + b"a" * 1024,
        b"t=+1790000000,v1=" + mac(b"+1790000000", b"{}"),
        b"t=01790000000,v1=" + mac(b"01790000000", b"{}"),
        b"t=1_790_000_000,v1=" + mac(b"1_790_000_000", b"{}"),
    ],
)
def test_headers_that_only_the_sdk_accepts(header: bytes) -> None:
    """A3, A8, A9, A10: second spellings of a valid header are rejected, although the SDK accepts them."""
    delivery = Delivery(header=header, body=b"{}")
    assert delivery.sdk_accepts()
    assert not delivery.we_accept()


@pytest.mark.parametrize(
    "header",
    [
        b"t=1790000000, v1=" + GOOD,
        b"t=1790000000 ,\tv1=" + GOOD,
        b" t = 1790000000 , v1 = " + GOOD + b" ",
        b"t=1790000000,v1=" + GOOD + b",",
        b",, t=1790000000,,v1=" + GOOD + b", ,",
        b"t=1790000000,v1=" + GOOD + b",nonsense",
        b"v0=x, kid=a=b ,alg,v1=" + GOOD + b",t=1790000000",
        b"t=1790000000,v1=" + GOOD + b",v2=a b,\xff=\xff",
    ],
)
def test_headers_that_both_accept(header: bytes) -> None:
    """A7, A9: white space, empty and unknown elements are ignored by the SDK and by us."""
    delivery = Delivery(header=header, body=b"{}")
    assert delivery.sdk_accepts()
    assert delivery.we_accept()


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"t=1790000000,v1=" + GOOD + b",v1=" + b"0" * 64, b"{}"),
        (b"t=1790000000,v1=" + mac(b"1790000000", b"\xff"), b"\xff"),
    ],
)
def test_headers_that_only_we_accept(header: bytes, body: bytes) -> None:
    """A7, B8: only several `v1`, or a body that is not UTF-8, are accepted by us and not by the SDK."""
    delivery = Delivery(header=header, body=body)
    assert delivery.we_accept()
    assert not delivery.sdk_accepts()
