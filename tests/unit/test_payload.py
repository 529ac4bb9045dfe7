"""Rows B7 to B11 of the fault catalogue: valid bodies, and the values that are read from them."""

import dataclasses
import json
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, get_args

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from receiver.core import lenient_json
from receiver.core import payload as payload_module
from receiver.core.lenient_json import same_json
from receiver.core.output_files import FileRules, Listing
from receiver.core.payload import Generation, parse, result_body
from receiver.errors import BodyReason, UnrecognizedBody

REQUEST_ID = "3f0c9a52-7b1e-4c53-9a55-0f6a1f7f0001"
CDN = "https://media.clipia.ai/works"


def ok(output: Any = None, **payload: Any) -> bytes:
    """Encode a success as Clipia does."""
    payload = {"model": "flux-pro", "output": output, "cost": 12} | payload
    return json.dumps({"request_id": REQUEST_ID, "status": "OK", "payload": payload}).encode()


def rejection(raw: bytes) -> str:
    """Return the reason why a body is rejected; fail if it is not."""
    with pytest.raises(UnrecognizedBody) as caught:
        parse(raw)
    return caught.value.reason


def with_value(value: str) -> bytes:
    """Put raw JSON text into an undocumented field."""
    return b'{"request_id":"r-1","status":"OK","extra":%b}' % value.encode()


# --- what Clipia documents ---


def test_success() -> None:
    """A documented success is read completely."""
    output = {"images": [{"url": f"{CDN}/a.webp", "original_url": f"{CDN}/a.png", "width": 1, "height": 2}]}
    assert parse(ok(output)) == Generation(
        request_id=REQUEST_ID,
        status="OK",
        model="flux-pro",
        cost=12,
        output=output,
        error=None,
    )


def test_failure() -> None:
    """A documented failure is read completely, and has no media."""
    error = {"code": "GENERATION_FAILED", "message": "no luck"}
    body = {"request_id": REQUEST_ID, "status": "ERROR", "error": error}
    assert parse(json.dumps(body).encode()) == Generation(
        request_id=REQUEST_ID,
        status="ERROR",
        model=None,
        cost=None,
        output=None,
        error=error,
    )


def test_failure_with_a_payload() -> None:
    """If a generation failed, its output is kept, but no file is downloaded."""
    payload = {"model": "m", "cost": 0, "output": {"video": {"url": f"{CDN}/half.mp4"}, "images": ["x"]}}
    body = {"request_id": "r", "status": "ERROR", "payload": payload, "error": "broken"}
    generation = parse(json.dumps(body).encode())
    assert (generation.model, generation.cost, generation.error) == ("m", 0, "broken")
    assert generation.output == payload["output"]
    assert generation.list_files(FileRules()) == Listing(files=(), left_out=0)


def test_unknown_fields_are_kept() -> None:
    """B10: unknown fields of an output or an error are forwarded unchanged."""
    output = {"images": [{"url": "u", "seed": 7, "é": [None, True, 0.5]}], "later": {"deep": [{}]}}
    error = {"code": "X", "details": [1, {"a": "\u0001"}]}
    body = {"request_id": "r", "status": "OK", "payload": {"output": output, "new": 1}, "error": error}
    generation = parse(json.dumps(body).encode())
    assert (generation.output, generation.error) == (output, error)


# --- B10: strange shapes ---


@pytest.mark.parametrize("payload", ["null", "[]", "{}", '"x"', "0", "true", "[{}]", "1.5"])
@pytest.mark.parametrize("status", ["OK", "ERROR"])
def test_strange_payloads(payload: str, status: str) -> None:
    """B10: if the payload is not an object, the event has no fields."""
    generation = parse(b'{"request_id":"r","status":"%b","payload":%b}' % (status.encode(), payload.encode()))
    assert dataclasses.astuple(generation) == ("r", status, None, None, None, None, ())


def test_no_payload_and_no_error() -> None:
    """B10: an event may have only its id and its status."""
    assert parse(b'{"status":"OK","request_id":"r"}').output is None
    assert parse(b'{"status":"ERROR","request_id":"r"}').error is None


@pytest.mark.parametrize("output", [None, [], {}, "x", 0, True, [{"url": "u"}], {"image": {"url": "u"}}])
def test_strange_outputs(output: Any) -> None:
    """B10: if the form of an output is unknown, it is kept unchanged and lists no files."""
    generation = parse(ok(output))
    assert generation.output == output
    assert generation.list_files(FileRules()) == Listing(files=(), left_out=0)


@pytest.mark.parametrize("error", [None, [], {}, "x", 0, True])
def test_strange_errors(error: Any) -> None:
    """B10: an error of any form is kept unchanged."""
    assert parse(json.dumps({"request_id": "r", "status": "ERROR", "error": error}).encode()).error == error


@pytest.mark.parametrize(
    ("cost", "read"),
    [
        (12, 12),
        (0, 0),
        (12.5, 12.5),
        (0.1, 0.1),
        (10**12, 10**12),
        (10**12 + 1, None),
        (-1, None),
        (-0.5, None),
        (2**63, None),
        (True, None),
        (12.0, 12),
        (-0.0, 0),
        ("12", None),
        ([12], None),
        (None, None),
    ],
)
def test_cost(cost: Any, read: float | None) -> None:
    """B10: a cost is a number of credits; if it is negative, text, true or too large, it is null."""
    found = parse(ok(cost=cost)).cost
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("model", "read"),
    [("m", "m"), ("m" * 255, "m" * 255), ("m" * 256, None), ("", None), (1, None), ({}, None), (None, None)],
)
def test_model(model: Any, read: str | None) -> None:
    """B10: a model's name is a text of 1 to 255 characters."""
    assert parse(ok(model=model)).model == read


# --- B10, B11: id and status ---


@pytest.mark.parametrize(
    "request_id",
    [
        *["r", "a" * 255, "😀" * 255, REQUEST_ID, "A.b_C-9", "0", "-", ".", "../../x", "a/b", "a:b", "a%00"],
        *["é", "\uff11", "\u0661", "a'b", "a\\b", "a;b", "sha256:x", "SHA256:" + "0" * 64],
    ],
    ids=ascii,
)
@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_request_ids(request_id: str, *, ensure_ascii: bool) -> None:
    """B10: an id of 1 to 255 printable characters without white space is used unchanged."""
    raw = json.dumps({"request_id": request_id, "status": "OK"}, ensure_ascii=ensure_ascii).encode()
    assert parse(raw).request_id == request_id


@pytest.mark.parametrize(
    "request_id",
    [
        *[
            "",
            "a" * 256,
            "a" * 10_240,
            "a b",
            " a",
            "a\n",
            "a\u0001",
            "a\x7f",
            "a\u00a0",
            "a\u2028",
            "a\u200b",
        ],
        *["a\u0000", "a\ud83d", "\udc00a", "\ufffd", "sha256:" + "0" * 64],
        *[1, 0, -1, 1.5, True, None, [], {}, ["r"], {"r": 1}, 2**64, math.nan],
    ],
    ids=ascii,
)
def test_wrong_request_ids(request_id: Any) -> None:
    """B10: if an id has another form or type, bad characters, or the form of our own ids, it is not used."""
    assert rejection(json.dumps({"request_id": request_id, "status": "OK"}).encode()) == "request_id"


def test_bytes_that_are_no_utf8_in_an_id() -> None:
    """B8, B10: two ids that differ only in bytes that are not UTF-8 must not become one."""
    assert rejection(b'{"request_id":"r\xff","status":"OK"}') == "request_id"


def test_no_request_id() -> None:
    """B10: without an id, a body is not an event."""
    assert rejection(b'{"status":"OK","payload":{"request_id":"r"}}') == "request_id"


@pytest.mark.parametrize(
    "status",
    [
        *[
            "PENDING",
            "",
            "ok",
            "Ok",
            "OK ",
            " OK",
            "OK\n",
            "ERROR!",
            "error",
            "CANCELED",
            "COMPLETED",
            "\uff2fK",
        ],
        *[None, 0, 1, True, [], {}, ["OK"], {"OK": 1}],
    ],
    ids=ascii,
)
def test_unknown_status(status: Any) -> None:
    """B11: if the status is neither OK nor ERROR, it is not guessed."""
    assert rejection(json.dumps({"request_id": "r", "status": status}).encode()) == "status"


def test_no_status() -> None:
    """B11: without a status, a body is not an event."""
    assert rejection(b'{"request_id":"r"}') == "status"


# --- B7 to B9: bytes that are no usable JSON ---

PLAIN = '{"request_id":"r-1","status":"OK"}'

UNRECOGNIZED: list[tuple[str, bytes]] = [
    # Encoding, row B7
    ("not_json", b""),
    ("not_json", b" \r\n\t"),
    ("not_json", b"\xef\xbb\xbf"),
    ("not_json", b"\xef\xbb\xbf\xef\xbb\xbf" + PLAIN.encode()),
    ("not_json", PLAIN.encode("utf-16-le")),
    ("not_json", PLAIN.encode("utf-16-be")),
    ("not_json", PLAIN.encode("utf-16")),
    ("not_json", PLAIN.encode("utf-32-le")),
    ("not_json", PLAIN.encode("utf-32")),
    ("not_json", b"\x00"),
    ("not_json", b"\x00" + PLAIN.encode()),
    ("not_json", PLAIN.encode() + b"\x00"),
    # Bytes outside strings that are not UTF-8, row B8
    ("not_json", b"\xff"),
    ("not_json", b"\xff" + PLAIN.encode()),
    ("not_json", with_value("?").replace(b"?", b"\xc3")),
    # Another language
    ("not_json", b"x"),
    ("not_json", PLAIN.encode()[:-1]),
    ("not_json", PLAIN.encode() + b"x"),
    ("not_json", PLAIN.encode() * 2),
    ("not_json", PLAIN.replace('"', "'").encode()),
    ("not_json", PLAIN.replace("}", ",}").encode()),
    ("not_json", with_value("[1,]")),
    ("not_json", with_value("01")),
    ("not_json", with_value("+1")),
    ("not_json", with_value(".5")),
    ("not_json", with_value("1.")),
    ("not_json", with_value("0x10")),
    ("not_json", with_value("1_0")),
    ("not_json", with_value("\uff11")),
    ("not_json", with_value("nan")),
    ("not_json", with_value("undefined")),
    ("not_json", with_value('"\\x41"')),
    ("not_json", with_value('"\\u12"')),
    ("not_json", with_value("1 // no")),
    ("not_json", with_value("\u00a01")),
    ("not_json", b"request_id=r-1&status=OK"),
    # Depth, row B9
    ("not_json", b"[" * 100_000),
    ("not_json", b'{"a":' * 50_000),
    ("not_json", b"]" * 100_000),
    ("not_json", with_value("[" * 100_000 + "]" * 99_999)),
    ("not_json", with_value("[" * 100 + "]" * 101)),
    ("not_object", b"[" * 100_000 + b"]" * 100_000),
    # A duplicate name in the outermost object, row B9
    ("duplicate_key", b'{"request_id":"a","request_id":"b","status":"OK"}'),
    ("duplicate_key", b'{"request_id":"a","status":"OK","status":"ERROR"}'),
    ("duplicate_key", b'{"request_id":"a","request_i\\u0064":"b","status":"OK"}'),
    ("duplicate_key", b'{"request_id":"a","status":"OK","payload":{"output":1},"payload":{"output":2}}'),
    ("duplicate_key", b'{"request_id":"a","status":"OK","extra":1,"extra":true}'),
    ("duplicate_key", b'{"request_id":"a","status":"OK","extra":NaN,"extra":null}'),
    ("duplicate_key", b'{"request_id":"a","status":"OK","extra":{"a":1,"a":2},"extra":{"a":2}}'),
    # Form, row B10
    ("not_object", b"[]"),
    ("not_object", b"null"),
    ("not_object", b"true"),
    ("not_object", b"0"),
    ("not_object", b'"{}"'),
    ("not_object", b"[%b]" % PLAIN.encode()),
    ("request_id", b"{}"),
    ("status", b'{"request_id":"r"}'),
]


@pytest.mark.parametrize(("reason", "raw"), UNRECOGNIZED, ids=lambda value: ascii(value[-40:]))
def test_unrecognized(reason: str, raw: bytes) -> None:
    """B7, B8, B9, B10: if a body cannot be used, the error has a fixed word and no details."""
    assert rejection(raw) == reason


def test_reasons_are_complete() -> None:
    """The reasons are exactly those of the table above; metrics are labelled with them."""
    assert {reason for reason, _ in UNRECOGNIZED} == set(get_args(BodyReason))


@pytest.mark.parametrize(
    "raw",
    [
        b'{"request_id":"a","request_id":"a","status":"OK","status":"OK"}',
        b'{"status":"OK","request_id":"a","extra":[1,{"a":NaN}],"extra":[1.0,{"a":NaN}]}',
        b'{"status":"OK","request_id":"a","request_i\\u0064":"\\u0061"}',
    ],
)
def test_the_same_twice(raw: bytes) -> None:
    """B9: a duplicate name in the outermost object is accepted if both values are equal."""
    assert parse(raw).request_id == "a"


def test_the_three_fields_matter() -> None:
    """B7, B8, B9: an odd value elsewhere in a body does not invalidate it."""
    odd = b'"\xff\x00\t\\ud83d",NaN,-Infinity,1e400,18446744073709551616,{"a":1,"a":2},' + b"1" * 5000
    for value in (odd, b"[" * 100_000 + b"]" * 100_000, b'{"a":' * 50_000 + b"1" + b"}" * 50_000):
        generation = parse(b'\xef\xbb\xbf {"request_id":"r-1","status":"OK","extra":[%b]}\r\n' % value)
        assert (generation.request_id, generation.status) == ("r-1", "OK")


def test_altered_values_are_listed() -> None:
    """B8, B9: output, error and model are cleaned, and pointers into the message list the places."""
    raw = (
        b'{"request_id":"r-1","status":"OK","extra":NaN,"payload":{"model":"m\\u0000","cost":NaN,"new":NaN,'
        b'"output":{"images":[{"url":"u\\ud83d"}],"seed":15860307465884635512,"a/b~":1e400}},"error":"\xff"}'
    )
    content = parse(raw)
    output = {"images": [{"url": "u\ufffd"}], "seed": 15860307465884635512, "a/b~": None}
    pointers = ("/model", "/cost", "/output/images/0/url", "/output/a~1b~0", "/error")
    assert (content.model, content.cost) == ("m\ufffd", None)
    assert (content.output, content.error, content.altered) == (output, "\ufffd", pointers)
    assert [ref.url for ref in content.list_files(FileRules()).files] == ["u\ufffd"]


@pytest.mark.parametrize(
    ("payload", "pointers"),
    [
        ({"model": "x" * 256}, ("/model",)),
        ({"model": 5}, ("/model",)),
        ({"model": None, "cost": None}, ()),
        ({"cost": "12"}, ("/cost",)),
        ({"cost": True}, ("/cost",)),
        ({"cost": 2**70}, ("/cost",)),
        ({"cost": [1]}, ("/cost",)),
        ({"cost": 12.0}, ()),
        ({"cost": 12.5}, ()),
        ({"cost": -1}, ("/cost",)),
        ({"cost": 0.12345678}, ("/cost",)),
    ],
)
def test_a_field_that_is_left_out_is_named(payload: Any, pointers: tuple[str, ...]) -> None:
    """B10: if a model or a cost becomes null, it is listed."""
    assert parse(ok(**payload)).altered == pointers


def test_a_doubled_payload_name() -> None:
    """B9: below the outermost object the last of two values is used, and the place is listed."""
    payload = b'{"output":{"a":1},"output":{"a":2},"model":"a","model":"b"}'
    content = parse(b'{"request_id":"r","status":"OK","payload":%b}' % payload)
    assert (content.output, content.model, content.altered) == ({"a": 2}, "b", ("/model", "/output"))


@pytest.mark.parametrize("levels", [62, 63])
def test_depth_is_counted_from_the_body(levels: int) -> None:
    """B9: 64 nested lists and objects are kept, with the body and its payload included."""
    raw = b'{"request_id":"r","status":"OK","payload":{"output":%b}}' % (b"[" * levels + b"]" * levels)
    content = parse(raw)
    assert content.altered == (() if levels == 62 else ("/output" + "/0" * 62,))


# --- properties ---

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8),
)
KEYS = st.sampled_from(
    [
        "request_id",
        "status",
        "payload",
        "output",
        "images",
        "video",
        "audio",
        "audios",
        "url",
        "original_url",
        "é",
    ]
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)
URLS = st.one_of(SCALARS, st.sampled_from(["u", "v", "w", f"{CDN}/a.png"]))
FILES = SCALARS | st.dictionaries(st.sampled_from(["url", "original_url", "width"]), URLS, max_size=3)
OUTPUTS = SCALARS | st.dictionaries(
    st.sampled_from(["images", "video", "audio", "audios", "text"]),
    FILES | st.lists(FILES, max_size=5),
    max_size=4,
)
PAYLOADS = SCALARS | st.fixed_dictionaries(
    {}, optional={"model": SCALARS, "cost": SCALARS, "output": OUTPUTS, "extra": VALUES}
)
BODIES = st.fixed_dictionaries(
    {
        "request_id": st.from_regex(r"[A-Za-z0-9._-]{1,128}", fullmatch=True),
        "status": st.sampled_from(["OK", "ERROR"]),
    },
    optional={"payload": PAYLOADS, "error": VALUES, "extra": VALUES},
)


def attempt(raw: bytes) -> Generation | None:
    """Parse anything: return a generation, or None if the reason is a known one."""
    try:
        return parse(raw)
    except UnrecognizedBody as caught:
        reason = caught.reason
    assert reason in get_args(BodyReason)
    return None


@given(
    raw=st.binary(max_size=300)
    | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
@settings(max_examples=5000, deadline=None)
def test_any_bytes(raw: bytes) -> None:
    """B7, B8, T22: for any bytes, only the one error is raised."""
    attempt(raw)
    assert same_json(raw, raw)


@given(value=VALUES)
@settings(max_examples=750, deadline=None)
def test_any_json(value: Any) -> None:
    """B9, B10: for any JSON value, only the one error is raised."""
    attempt(json.dumps(value).encode())


DAMAGE = [
    b"",
    b"[",
    b"]",
    b'"',
    b",",
    b"0",
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"9" * 30,
    b"\xff",
]
ENCODED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
INTACT = [
    ok({"images": [{"url": "a", "original_url": "A", "width": 1}, {"url": "b"}], "s": "\u00e9\U0001f600"}),
    b'{"request_id":"r-1","status":"ERROR","error":{"code":"X","list":[1,-2.5e3,null,"\xc3\xa9",{"":[[]]}]}}',
]


@given(
    raw=st.sampled_from(INTACT), at=st.integers(0, 250), cut=st.integers(0, 3), put=st.sampled_from(DAMAGE)
)
@settings(max_examples=3500, deadline=None)
@example(raw=INTACT[0], at=0, cut=0, put=b"")
@example(raw=INTACT[1], at=0, cut=0, put=b"")
def test_any_damage(raw: bytes, at: int, cut: int, put: bytes) -> None:
    """B9, B10: if a damaged body is accepted, a strict encoder can encode it to the same value."""
    generation = attempt(raw[:at] + put + raw[at + cut :])
    if generation is not None:
        for value in (generation.output, generation.error):
            encoded = orjson.dumps(value)
            assert not ENCODED_NUL.search(encoded)
            assert same_json(json.dumps(value).encode(), encoded)


@given(body=BODIES)
@settings(max_examples=750, deadline=None)
def test_any_event(body: dict[str, Any]) -> None:
    """B10: a body with an id and a known status is an event, with any other content."""
    generation = parse(json.dumps(body).encode())
    assert generation == parse(json.dumps(body, ensure_ascii=False, indent=1).encode())
    assert (generation.request_id, generation.status) == (body["request_id"], body["status"])
    assert generation.error == body.get("error")
    payload = body.get("payload")
    assert generation.output == (payload.get("output") if isinstance(payload, dict) else None)
    files = generation.list_files(FileRules()).files
    keys = {(ref.position, ref.variant) for ref in files}
    urls = {ref.url for ref in files}
    assert len(keys) == len(urls) == len({ref.field for ref in files}) == len(files) <= 512
    if files:
        assert sorted({position for position, _ in keys}) == list(range(max(keys)[0] + 1))
    assert all(resolve(generation.output, ref.field) == ref.url for ref in files)


def resolve(output: Any, field: str) -> Any:
    """Follow a field such as "images[0].url" or "/a/0/b" in an output."""
    for step in _steps(field):
        output = output[int(step) if isinstance(output, list) else step]
    return output


def _steps(field: str) -> Iterator[str | int]:
    if field.startswith("/"):
        yield from (step.replace("~1", "/").replace("~0", "~") for step in field.split("/")[1:])
        return
    for name in field.split("."):
        key, _, index = name.rstrip("]").partition("[")
        yield key
        if index:
            yield int(index)


RESULTS = st.builds(
    lambda status, payload, error, rest: {"request_id": "r", "status": status, **payload, **error, **rest},
    st.sampled_from(["OK", "ERROR"]),
    st.one_of(st.just({}), st.fixed_dictionaries({"payload": VALUES})),
    st.one_of(st.just({}), st.fixed_dictionaries({"error": VALUES})),
    st.dictionaries(st.sampled_from(["a", "b"]), VALUES),
)


@given(value=RESULTS, ascii_only=st.booleans())
@example(
    value={"request_id": "r", "status": "OK", "payload": {"cost": 2**63, "output": [-(2**63), 1e16]}},
    ascii_only=True,
)
@example(value={"request_id": "r", "status": "ERROR", "error": {"a": "\U0001f600"}}, ascii_only=True)
@settings(deadline=None)
def test_a_summary_is_read_like_the_whole(*, value: dict[str, Any], ascii_only: bool) -> None:
    """`summarize` returns the same values as `parse`, with the type of each number."""
    raw = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    try:
        first = parse(raw)
    except UnrecognizedBody:
        return
    expected = (first.request_id, first.status, first.model, first.cost)
    assert repr(tuple(payload_module.summarize(raw))) == repr(expected)


@pytest.mark.parametrize("status", ["COMPLETED", "FAILED", "CANCELED"])
@pytest.mark.parametrize(
    "value",
    [
        "{}",
        "15860307465884635512",
        "18446744073709551616",
        "NaN",
        "-1e400",
        '"\\ud83d \\u0000"',
        '{"a":1,"a":[NaN]}',
        "[" * 62 + "]" * 62,
        "[" * 63 + "]" * 63,
        "[" * 10_000 + "]" * 10_000,
        '"?"',
    ],
    ids=lambda value: ascii(value[:24]),
)
def test_a_polled_result_is_read_as_a_webhook(
    value: str, status: Literal["COMPLETED", "FAILED", "CANCELED"]
) -> None:
    """B9: a webhook and a polled result give the same message, altered at the same places."""
    payload = b'"model":"m\\ud83d","output":%b,"cost":12' % value.encode().replace(b"?", b"\xff")
    answer = b'\xef\xbb\xbf\r\n{"request_id":"r","status":"%b",%b,"created_at":"2026"}\n' % (
        status.encode(),
        payload,
    )
    polled = parse(result_body("r", status, answer))
    webhooks = {"COMPLETED": b'"status":"OK"'}.get(status, b'"status":"ERROR"')
    came = parse(b'{"request_id":"r",%b,"payload":{%b}}' % (webhooks, payload))
    assert dataclasses.replace(polled, error=None) == came
    code = {"COMPLETED": None, "FAILED": "GENERATION_FAILED"}.get(status, status)
    assert (polled.error or {}).get("code") == code


@pytest.mark.parametrize("error", ['{"code":"X","n":NaN}', '"no luck\\ud83d"', "[1e400]"])
def test_a_polled_error_is_kept(error: str) -> None:
    """B9: if a generation failed, Clipia's error is forwarded, and cleaned like an output."""
    polled = parse(
        result_body("r", "FAILED", b'{"request_id":"r","status":"FAILED","error":%b}' % error.encode())
    )
    came = parse(b'{"request_id":"r","status":"ERROR","error":%b}' % error.encode())
    assert polled == came
    assert polled.altered


def test_usual_webhooks_take_the_fast_reader() -> None:
    """A usual webhook is parsed in one pass."""
    body = orjson.dumps(json.loads(ok({"images": [{"url": "u"}], "seed": 15860307465884635512})))
    assert lenient_json._decode_plain(body) is not lenient_json._NOT_PLAIN
