"""Rows B7 to B9 and C9 of the fault catalogue: JSON in any spelling, its clean copy, and changed places."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from receiver.core import lenient_json
from receiver.core.lenient_json import (
    MAX_ALTERED,
    Cleaner,
    Document,
    clean_body,
    decode,
    display_fields,
    same_json,
)
from receiver.errors import UnrecognizedBody

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("written", "read", "pointers"),
    [
        # integers
        (b"15860307465884635512", 15860307465884635512, ()),
        (b"18446744073709551615", 2**64 - 1, ()),
        (b"18446744073709551616", "18446744073709551616", ("",)),
        (b"-9223372036854775808", -(2**63), ()),
        (b"-9223372036854775809", "-9223372036854775809", ("",)),
        (b"1" * 4301, "1" * 4301, ("",)),
        (b"-" + b"9" * 200_000, "-" + "9" * 200_000, ("",)),
        (b"-0", 0, ()),
        # fractions
        (b"12.0", 12.0, ()),
        (b"1e-400", 0.0, ()),
        (b"1.7e308", 1.7e308, ()),
        (b"0." + b"1" * 100_000, 0.1111111111111111, ()),
        (b"1.8e308", None, ("",)),
        (b"[1e400,-1e400]", [None, None], ("/0", "/1")),
        (b"1e" + b"9" * 100_000, None, ("",)),
        (b"1" * 400 + b".5", None, ("",)),
        (b"[NaN,Infinity,-Infinity]", [None] * 3, ("/0", "/1", "/2")),
        # text
        (b'"a\\u0000b"', "a\ufffdb", ("",)),
        (b'"a\x00b"', "a\ufffdb", ("",)),
        (b'"\\ud83d"', "\ufffd", ("",)),
        (b'"\\uDFFF x"', "\ufffd x", ("",)),
        (b'"\\ude00\\ud83d"', "\ufffd\ufffd", ("",)),
        (b'"\\ud83d\\ude00"', "\U0001f600", ()),
        (b'"\\\\ud83d \\\\u0000"', "\\ud83d \\u0000", ()),
        (b'"\xff"', "\ufffd", ("",)),
        (b'"caf\xe9 \xc3"', "caf\ufffd \ufffd", ("",)),
        (b'"\xf0\x9f\x98"', "\ufffd", ("",)),
        (b'"\xc0\x80 \xf4\x90\x80\x80"', "\ufffd\ufffd \ufffd\ufffd\ufffd\ufffd", ("",)),
        (b'"\xed\xa0\x80"', "\ufffd\ufffd\ufffd", ("",)),
        (b'"\xff\\ud83d\\u00e9"', "\ufffd\ufffd\u00e9", ("",)),
        ('"\ufffd \uffff \u0085"'.encode(), "\ufffd \uffff \u0085", ()),
        (b'"a\tb\nc\x01\x7f"', "a\tb\nc\x01\x7f", ()),
        # names
        (b'{"\\u0000":{"\\ud83d":1}}', {"\ufffd": {"\ufffd": 1}}, ("/\ufffd", "/\ufffd/\ufffd")),
        (b'{"\xff":NaN}', {"\ufffd": None}, ("/\ufffd",)),
        (b'{"a":1,"a":2}', {"a": 2}, ("/a",)),
        (b'{"a":1,"\\u0061":1}', {"a": 1}, ("/a",)),
        (b'{"":1,"":2,"":3}', {"": 3}, ("/",)),
        (b'[[{"a":1,"b":2,"a":[NaN]}]]', [[{"a": [None], "b": 2}]], ("/0/0/a", "/0/0/a/0")),
        (b'{"\\ud800":1,"\\ud801":2}', {"\ufffd": 2}, ("/\ufffd",)),
        (b'{"a/b":NaN,"c~d":NaN,"~1":NaN}', dict.fromkeys(["a/b", "c~d", "~1"]), ("/a~1b", "/c~0d", "/~01")),
        # around the document
        (BOM + b"{}", {}, ()),
        (BOM + b" \r\n\t[1]\n", [1], ()),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_changed_places_are_listed(written: bytes, read: Any, pointers: tuple[str, ...]) -> None:
    """B7, B8, B9: values that readers reject are replaced in the copy and listed; the rest is unchanged."""
    copy, altered = clean_body(written)
    assert (repr(copy), altered) == (repr(read), pointers)
    assert orjson.loads(orjson.dumps(copy)) == copy


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":'])
@pytest.mark.parametrize("levels", [64, 65, 1000, 100_000])
def test_nesting(opening: str, levels: int) -> None:
    """B9: if a value is inside 64 lists and objects, it becomes its JSON text, in linear time."""
    each = opening.count("[") + opening.count("{")
    closing = {"[": "]", '{"a":': "}", '[{"a":': "}]"}[opening]
    times = levels // each
    raw = (opening * times + "1" + closing * times).encode()
    copy, altered = clean_body(raw)
    depth = 0
    while isinstance(copy, list | dict):
        copy = copy[0] if isinstance(copy, list) else copy["a"]
        depth += 1
    assert depth == min(times * each, 64)
    if times * each <= 64:
        assert (copy, altered) == (1, ())
    else:
        assert copy == (opening * times)[64 // each * len(opening) :] + "1" + closing * (times - 64 // each)
        assert len(altered) == 1


def test_several_values_are_nested_too_deeply() -> None:
    """B9: each changed place is listed, and its neighbours are unchanged."""
    inner = '[NaN,"]\\ud83d",{"a":1,"a":2}]'
    raw = "[" * 63 + f'[1,{inner},2,{{"[":"{{"}},"[]",[],"\\"[["]' + "]" * 63
    copy, altered = clean_body(raw.encode())
    for _ in range(63):
        (copy,) = copy
    assert copy == [1, inner, 2, '{"[":"{"}', "[]", "[]", '"[[']
    assert {pointer.rpartition("/")[2] for pointer in altered} >= {"1", "3", "5"}
    assert "/0" * 63 + "/0" not in altered


def test_bytes_that_are_no_utf8_deep_inside() -> None:
    """B8, B9: bad characters are replaced in the text of a value that is nested too deeply, too."""
    copy, altered = clean_body(b"[" * 65 + b'"\xff\x00"' + b"]" * 65)
    assert "\ufffd\ufffd" in repr(copy)
    assert len(altered) == 1


def test_the_list_of_places_is_bounded() -> None:
    """B9: if there are too many places, the first ones are listed, and the last pointer is empty."""
    for places, expected in (
        (MAX_ALTERED - 1, MAX_ALTERED - 1),
        (MAX_ALTERED, MAX_ALTERED),
        (30_000, MAX_ALTERED),
    ):
        _, altered = clean_body(b"[" + b",".join([b"NaN"] * places) + b"]")
        assert len(altered) == expected
        assert ("" in altered) == (places >= MAX_ALTERED)


def test_pointers_are_short() -> None:
    """B9: if a pointer is too long, the enclosing value is listed, even with very many such places."""
    _, altered = clean_body(b'{"a":{"%b":[%b1]}}' % (b"k" * 100_000, b"NaN," * 30_000))
    assert altered == ("/a",)


def test_a_part_of_a_document() -> None:
    """B9: pointers begin with the place in the message; depth counts from the document."""
    document = decode(b'{"a":{"b":[1,NaN]}}')
    cleaner = Cleaner(document)
    assert cleaner.clean(document.members()["a"], "output", depth=1) == {"b": [1, None]}
    cleaner.note("model")
    assert cleaner.altered == ("/output/b/1", "/model")


def test_display_fields() -> None:
    """B8: a body is shown as its copy; if the copy differs or is missing, the exact bytes are shown too."""
    assert display_fields(b' {"a": 1}') == {"body": {"a": 1}}
    assert display_fields(b"[NaN]") == {"body": [None], "altered": ("/0",), "body_base64": "W05hTl0="}
    assert display_fields(b"\xff") == {"body_base64": "/w=="}


# --- any bytes ---

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=8),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("ab~/é", max_size=2), inner, max_size=4)
    ),
    max_leaves=8,
)
TOKENS = st.lists(
    st.sampled_from(
        [
            *[
                b"{",
                b"}",
                b"[",
                b"]",
                b",",
                b":",
                b'"',
                b'"a":',
                b'"a"',
                b"\\",
                b"\\u0000",
                b"\\ud83d",
                b"\\ude00",
            ],
            *[
                b"NaN",
                b"-Infinity",
                b"1e400",
                b"-",
                b"0",
                b"9" * 20,
                b"1.5",
                b"true",
                b"null",
                b" ",
                b"\xff",
                b"\x00",
            ],
            *[
                b"[" * 70,
                b"]" * 70,
                b'{"a":' * 70,
                b"}" * 70,
                BOM,
                b"\xed\xa0\x80",
                b'{"a":1,"a":',
                b"\xf0\x9f",
            ],
        ]
    ),
    max_size=30,
).map(b"".join)
ODD = st.recursive(
    st.sampled_from(
        [b"1", b"NaN", b"1e400", b"9" * 30, b'"\\ud83d"', b'"\xff"', b'"\x00"', b'"a"', b"[" * 70 + b"]" * 70]
    ),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: b"[" + b",".join(items) + b"]")
        | st.lists(
            st.tuples(st.sampled_from([b'"a"', b'"b"', b'"\\ud83d"', b'"\xfe"']), inner), max_size=4
        ).map(lambda items: b"{" + b",".join(b":".join(item) for item in items) + b"}")
    ),
    max_leaves=12,
)


@given(raw=st.binary(max_size=200) | TOKENS | ODD)
@settings(max_examples=4000, deadline=None)
def test_any_bytes(raw: bytes) -> None:
    """B7, B8, B9: any bytes are JSON or not; if they are, all encoders accept the copy, which is plain."""
    assert same_json(raw, raw)
    try:
        copy, altered = clean_body(raw)
    except UnrecognizedBody:
        return
    encoded = orjson.dumps(copy)
    assert b"\\u0000" not in encoded.replace(b"\\\\", b"")
    assert orjson.loads(encoded) == copy == json.loads(json.dumps(copy))
    assert clean_body(encoded)[1] == () or b"[[[" in raw or b'{"a":{"a":' in raw
    for pointer in altered:
        resolve(copy, pointer)


@given(raw=ODD)
@settings(max_examples=500, deadline=None)
def test_odd_json_is_read(raw: bytes) -> None:
    """B8, B9: if any value is odd in one of these ways, the body is still read."""
    copy, altered = clean_body(BOM + raw)
    assert same_json(raw, b" " + raw)
    assert altered or orjson.loads(raw) == copy


def resolve(value: Any, pointer: str) -> Any:
    """Follow a JSON pointer; fail if it points to no value."""
    for token in pointer.split("/")[1:]:
        name = token.replace("~1", "/").replace("~0", "~")
        value = value[int(name)] if isinstance(value, list) else value[name]
    return value


@given(value=VALUES, indent=st.sampled_from([None, 1]), ensure_ascii=st.booleans())
@settings(deadline=None)
def test_usual_json_is_unchanged(*, value: Any, indent: int | None, ensure_ascii: bool) -> None:
    """B9: usual JSON is read exactly, with the type of each number, in any spelling."""
    copy, altered = clean_body(json.dumps(value, indent=indent, ensure_ascii=ensure_ascii).encode())
    assert (repr(copy), altered) == (repr(value), ())


# --- equal as JSON ---


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (b"{}", b" { }\n"),
        (b'{"a":1,"b":[1,2]}', b'{"b": [1, 2], "a": 1}'),
        (b"1", b"1.0"),
        (b"[100]", b"[1e2]"),
        (b"0", b"-0.0"),
        (b'"\\u00e9"', '"é"'.encode()),
        (b'"\\/"', b'"/"'),
        (b'"\\ud83d\\ude00"', '"😀"'.encode()),
        (b"null", b" null"),
        (b"[true,false]", b"[true, false]"),
        # not JSON, but the same bytes
        (b"", b""),
        (b"\xff", b"\xff"),
        (b"NaN", b"NaN"),
        (b'{"a":1,"a":1}', b'{"a":1,"a":1}'),
        # altered alike
        (b"NaN", b" NaN"),
        (b"{}", b"\xef\xbb\xbf{}"),
        (b'{"a":1,"a":1}', b'{"a":1, "a":1}'),
        (b'{"a":NaN,"b":1e400}', b'{"b":1e400, "a":NaN}'),
        (b"[" * 70 + b"]" * 70, b"[ " * 64 + b"[[[[[[]]]]]]" + b"]" * 64),
    ],
)
def test_same_json(a: bytes, b: bytes) -> None:
    """C9: bodies that differ only in order, white space or spelling are equal, and no conflict."""
    assert same_json(a, b)
    assert same_json(b, a)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (b"{}", b"[]"),
        (b"[1,2]", b"[2,1]"),
        (b"[1]", b"[1,1]"),
        (b"[]", b"[null]"),
        (b"true", b"1"),
        (b"false", b"0"),
        (b"[true]", b"[1.0]"),
        (b"true", b"false"),
        (b'{"a":true}', b'{"a":1}'),
        (b"null", b"0"),
        (b"null", b"false"),
        (b'"1"', b"1"),
        (b'""', b"null"),
        (b'{"a":null}', b"{}"),
        (b'{"a":1}', b'{"b":1}'),
        (b'{"a":1}', b'{"a":1,"b":1}'),
        (b'{"a":{"b":[1]}}', b'{"a":{"b":[2]}}'),
        (b'"a"', b'"A"'),
        ('"é"'.encode(), '"e\u0301"'.encode()),
        (b"9007199254740993", b"9007199254740992"),
        # not JSON: only the same bytes are equal
        (b"", b" "),
        (b"\xff", b"\xfe"),
        (b'{"a":1,"a":1}', b'{"a":1}'),
        (b'{"a":1,"a":2}', b'{"a":2}'),
        (b"[1e400]", b"[null]"),
        (b'"\\ud83d"', '"\ufffd"'.encode()),
        (b"18446744073709551616", b'"18446744073709551616"'),
        (b"{}", b""),
        (b"[" * 65 + b"]" * 65, b"[" * 64 + b'"[]"' + b"]" * 64),
        (b"[" * 100 + b"1" + b"]" * 100, b"[" * 100 + b"2" + b"]" * 100),
    ],
)
def test_different_json(a: bytes, b: bytes) -> None:
    """C9: bodies with different JSON values differ: true is not 1; a body without JSON equals only itself."""
    assert not same_json(a, b)
    assert not same_json(b, a)


@given(value=VALUES)
@settings(deadline=None)
def test_spelling_does_not_matter(value: Any) -> None:
    """Each JSON value equals itself in another spelling, and differs from itself inside a list."""
    compact, spaced = orjson.dumps(value), json.dumps(value, indent=2, sort_keys=True).encode()
    assert same_json(compact, spaced)
    assert not same_json(compact, b"[%b]" % spaced)


NESTED = "[" * 32 + "]" * 32


@given(st.one_of(VALUES.map(orjson.dumps), st.binary(max_size=24), st.text(max_size=24).map(str.encode)))
@example(b'{"a":1,"a":1}')
@example(b"9007199254740993")
@example(b"18446744073709551615")
@example(b"9223372036854775809")
@example(b"1e400")
@example(b"-0")
@example(b"1.0")
@example(b'"\\u0000"')
@example(b'"\\ud800"')
@example(b"\xef\xbb\xbf1")
@example(f"[{NESTED},{NESTED}]".encode())
@example(b"NaN")
@settings(max_examples=1000)
def test_the_fast_reader_equals_the_lenient_one(raw: bytes) -> None:
    """B8: if a body needs no second pass, the lenient reader returns the same, with all types of numbers."""
    value = lenient_json._decode_plain(raw)
    if value is not lenient_json._NOT_PLAIN:
        assert Document(value, plain=True) == _exactly(lenient_json._decode_leniently(raw))


def _exactly(document: Document) -> Document:
    """Return a document for comparison; fail if it has a replaced value."""
    assert document.plain
    return document


@given(value=VALUES)
@settings(deadline=None)
def test_both_ways_read_the_same_to_the_type(value: Any) -> None:
    """B9: the fast reader and the lenient one return the same value, with the type of each number."""
    raw = orjson.dumps(value)
    fast = lenient_json._decode_plain(raw)
    if fast is not lenient_json._NOT_PLAIN:
        assert repr(fast) == repr(lenient_json._decode_leniently(raw).value)
