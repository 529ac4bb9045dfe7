"""JSON as somebody else wrote it, read as far as it can be, and a copy of it that every reader takes; pure.

What comes in is authentic and cannot be had in better words, so no character is a reason to refuse the whole:
not half an emoji, NaN, a number of 30 digits, a name that stands twice, nesting without end, a byte order
mark, or bytes that are no UTF-8. Databases, brokers and consumers do refuse them. `Cleaner` makes the copy
for those, and lists as JSON pointers (RFC 6901) the places where it differs from the original:

- Integers from -2^63 to 2^64-1 stay exact; one beyond becomes the text of its digits.
- NaN, Infinity, and numbers beyond the range of a double become null.
- NUL, half of a surrogate pair, and bytes that are no UTF-8 become U+FFFD.
- Of a name that stands twice in one object the last value stays.
- A list or object inside `MAX_DEPTH` others becomes its JSON text, which is not looked into.
"""

import base64
import codecs
import json
import math
import re
import threading
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import orjson

from receiver.errors import UnrecognizedBody

MAX_DEPTH: Final = 64
"""Lists and objects in each other, the outermost included."""
MAX_ALTERED: Final = 100
"""Places that a `Cleaner` lists. If there are more, the last one is the empty pointer: to the whole."""
MAX_POINTER: Final = 255
"""Characters of a pointer; a longer one is cut to the pointer of what the place is in."""
REPLACEMENT: Final = "\ufffd"

_LEAST, _GREATEST = -(2**63), 2**64 - 1
_MOST_DIGITS: Final = len(str(_LEAST))
_HALF: Final = "\ud800"
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
_ESCAPED: Final = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
# Possessive, so that no text makes it try again: it stays linear.
_TO_BRACKETS: Final = re.compile(r'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+([\[{]++|[\]}]++)', re.DOTALL)


@dataclass(frozen=True, slots=True)
class _StandIn:
    """The value for a number that no reader takes; `text` is how it was written."""

    value: str | None
    text: str


@dataclass(frozen=True, slots=True)
class _Doubled:
    """The values of a name that stands in one object more than once."""

    values: list[Any]


class Document(NamedTuple):
    """A body that is JSON. Its values may hold stand-ins: only a `Cleaner` returns what can be used."""

    value: Any
    plain: bool
    """Whether the value is its own clean copy."""
    folded: frozenset[str] = frozenset()
    """Texts of what is nested too deeply."""

    def members(self) -> dict[str, Any]:
        """Return the members of the outermost object.

        Raises UnrecognizedBody if it is none, or if a name stands twice in it with different values: then
        nobody can say which of them was meant.
        """
        if not isinstance(self.value, dict):
            raise UnrecognizedBody("not_object")
        if self.plain:
            return self.value
        return {name: _only(value) for name, value in self.value.items()}


def decode(raw: bytes) -> Document:
    """Read a body. Raises UnrecognizedBody with the reason `not_json`, and nothing else."""
    value = _decode_plain(raw)
    return Document(value, plain=True) if value is not _NOT_PLAIN else _decode_leniently(raw)


_NOT_PLAIN: Final = object()


def _decode_plain(raw: bytes) -> Any:
    """Decode what is written as most encoders write it, at a third of the cost; else return `_NOT_PLAIN`.

    Whatever comes out of orjson as the same bytes has nothing in it that `_decode_leniently` reads otherwise:
    no name twice, no number that is rounded, no text that is repaired.
    """
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH or b"\\u" in raw:
        return _NOT_PLAIN
    try:
        value = orjson.loads(raw)
        same = orjson.dumps(value) == raw
    except ValueError:
        return _NOT_PLAIN
    return value if same else _NOT_PLAIN


def _decode_leniently(raw: bytes) -> Document:
    # Not json.loads, which guesses the encoding of bytes: UTF-16 and UTF-32 are no JSON here.
    text = raw.removeprefix(codecs.BOM_UTF8).decode("utf-8", _MARK)
    folded: frozenset[str] = frozenset()
    if text.count("[") + text.count("{") > MAX_DEPTH:
        text, folded = _fold(text)
    if not hasattr(_local, "reader"):
        _local.reader = _Reader()
    reader: _Reader = _local.reader
    reader.made_stand_ins = False
    try:
        value = reader.decode(text)
    except (ValueError, RecursionError):
        raise UnrecognizedBody("not_json") from None
    return Document(value, not (reader.made_stand_ins or folded or _may_be_unstorable(text)), folded)


def _may_be_unstorable(text: str) -> bool:
    """Tell whether a string in a text of JSON may need mending; without looking at each if it cannot."""
    # Apart from each other: looking for one character takes a tenth of what a pattern takes.
    return "\0" in text or _HALF in text or ("\\u" in text and _ESCAPED.search(text) is not None)


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Put half a character in the place of bytes that are no UTF-8: UTF-8 itself cannot hold one."""
    if isinstance(error, UnicodeDecodeError):
        return _HALF, error.end
    raise error


_MARK: Final = "receiver.core.lenient_json"
codecs.register_error(_MARK, _mark)


# One for each thread, because it has state; to make one takes as long as to read a small body.
_local: Final = threading.local()


class _Reader:
    """A decoder of the standard library that makes stand-ins and notes whether it has made any.

    Not orjson: it refuses what is mended here, keeps the last of doubled names without a word, and makes a
    float of 2**64.
    """

    def __init__(self) -> None:
        self.made_stand_ins = False
        self.decode = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._integer,
            parse_float=self._real,
            parse_constant=self._constant,
            strict=False,  # control characters inside strings are no reason to refuse the rest
        ).decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            self.made_stand_ins = True
            grouped: dict[str, list[Any]] = {}
            for name, value in pairs:
                grouped.setdefault(name, []).append(value)
            result = {
                name: values[0] if len(values) == 1 else _Doubled(values) for name, values in grouped.items()
            }
        return result

    def _integer(self, text: str) -> int | _StandIn:
        # The length first: int() refuses thousands of digits.
        if len(text) <= _MOST_DIGITS and _LEAST <= (number := int(text)) <= _GREATEST:
            return number
        self.made_stand_ins = True
        return _StandIn(text, text)

    def _real(self, text: str) -> float | _StandIn:
        number = float(text)
        return number if math.isfinite(number) else self._constant(text)

    def _constant(self, text: str) -> _StandIn:
        self.made_stand_ins = True
        return _StandIn(None, text)


def _fold(text: str) -> tuple[str, frozenset[str]]:
    """Replace what is nested too deeply by strings that hold its text; return those texts, too.

    A decoder that calls itself cannot read it. Raises UnrecognizedBody if brackets stay open.
    """
    parts: list[str] = []
    folded: set[str] = set()
    copied = begin = position = depth = 0
    while found := _TO_BRACKETS.match(text, position):
        outer, position = depth, found.end()
        start, brackets = found.start(1), position - found.start(1)
        if text[start] in "[{":
            depth += brackets
            if outer <= MAX_DEPTH < depth:
                begin = start + MAX_DEPTH - outer
        else:
            depth -= brackets
            if depth <= MAX_DEPTH < outer:
                end = start + outer - MAX_DEPTH
                inner = text[begin:end]
                folded.add(inner)
                parts += text[copied:begin], json.dumps(inner)
                copied = end
    if depth > MAX_DEPTH:
        raise UnrecognizedBody("not_json")
    return "".join(parts) + text[copied:], frozenset(folded)


def _only(value: Any) -> Any:
    if not isinstance(value, _Doubled):
        return value
    first, *others = value.values
    if not all(equal(first, other) for other in others):
        raise UnrecognizedBody("duplicate_key")
    return first


class Cleaner:
    """Makes clean copies of a document's values, and lists where they differ from the original."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._altered: dict[str, None] = {}
        self._path: list[str] = []

    @property
    def altered(self) -> tuple[str, ...]:
        """Pointers to the places that differ, at most `MAX_ALTERED`."""
        return tuple(self._altered)

    def clean(self, value: Any, *place: str, depth: int) -> Any:
        """Return the clean copy of a value, which is inside `depth` objects and lists of the document.

        `place` says where the copy will stand; pointers begin with it.
        """
        if self._document.plain:
            return value
        self._path = [*place]
        return self._clean(value, depth)

    def note(self, *place: str) -> None:
        """List a place that the caller itself has changed."""
        self._path = [*place]
        self._note()

    def _clean(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            if depth == MAX_DEPTH and value in self._document.folded:
                self._note()
            return self._clean_text(value)
        if isinstance(value, dict):
            return self._clean_object(value, depth)
        if isinstance(value, list):
            result = []
            for index, item in enumerate(value):
                self._path.append(str(index))
                result.append(self._clean(item, depth + 1))
                self._path.pop()
            return result
        if isinstance(value, _Doubled):
            self._note()
            return self._clean(value.values[-1], depth)
        if isinstance(value, _StandIn):
            self._note()
            return value.value
        return value

    def _clean_object(self, value: dict[str, Any], depth: int) -> dict[str, Any]:
        named: dict[str, Any] = {}
        changed: set[str] = set()
        for key, item in value.items():
            name = clean_text(key)
            if name != key or name in named:  # two may differ only in characters that are replaced
                changed.add(name)
            named[name] = item
        result: dict[str, Any] = {}
        for name, item in named.items():
            self._path.append(name)
            if name in changed:
                self._note()
            result[name] = self._clean(item, depth + 1)
            self._path.pop()
        return result

    def _clean_text(self, text: str) -> str:
        if not _UNSTORABLE.search(text):
            return text
        self._note()
        return clean_text(text)

    def _note(self) -> None:
        if len(self._altered) >= MAX_ALTERED:
            return
        pointer = ""
        for name in self._path:
            # Before it is written: a name may have as many characters as the body.
            if len(pointer) + len(name) >= MAX_POINTER:
                break
            pointer += "/" + name.replace("~", "~0").replace("/", "~1")
        if len(self._altered) == MAX_ALTERED - 1 and pointer not in self._altered:
            pointer = ""
        self._altered[pointer] = None


def clean_text(text: str) -> str:
    """Return a text in which every NUL and every half of a surrogate pair is U+FFFD."""
    return _UNSTORABLE.sub(REPLACEMENT, text)


def same_json(a: bytes, b: bytes) -> bool:
    """Tell whether two bodies are equal as JSON values: 1 equals 1.0 but not true; order of names is nothing.

    What is mended in one has to be mended in the other. What is no JSON is equal only to the same bytes.
    """
    if a == b:
        return True
    try:
        documents = decode(a), decode(b)
    except UnrecognizedBody:
        return False
    (one, altered_in_one), (other, altered_in_other) = map(_clean_whole, documents)
    return set(altered_in_one) == set(altered_in_other) and equal(one, other)


def read_whole(raw: bytes) -> tuple[Any, tuple[str, ...]]:
    """Return the clean copy of a whole body, and pointers to where it differs. Raises UnrecognizedBody."""
    return _clean_whole(decode(raw))


def present(raw: bytes) -> dict[str, Any]:
    """Return what people are shown of a body: `body`, and if that is not all of it, what it says exactly.

    If the copy differs, `altered` says where, and `body_base64` has the exact bytes; if the body cannot be
    read, there are only those.
    """
    exact = {"body_base64": base64.b64encode(raw).decode("ascii")}
    try:
        copy, altered = read_whole(raw)
    except UnrecognizedBody:
        return exact
    return {"body": copy} | ({"altered": altered} | exact if altered else {})


def _clean_whole(document: Document) -> tuple[Any, tuple[str, ...]]:
    cleaner = Cleaner(document)
    return cleaner.clean(document.value, depth=0), cleaner.altered


def equal(a: Any, b: Any) -> bool:
    """Tell whether two values are equal as JSON."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
