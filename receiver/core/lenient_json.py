"""Reads imperfect JSON, and makes a clean copy of it that all readers accept; pure.

A webhook is authentic, and Clipia will not send a better one. So a single bad character does not invalidate
the whole body: half an emoji, NaN, a number of 30 digits, a duplicate name, endless nesting, a byte order
mark, or bytes that are not UTF-8. Databases, brokers and consumers reject these. `Cleaner` makes the copy for
them, and lists the changed places as JSON pointers (RFC 6901):

- Integers from -2^63 to 2^64-1 are exact; a larger one becomes the text of its digits.
- NaN, Infinity, and numbers beyond the range of a double become null.
- NUL, half of a surrogate pair, and bytes that are not UTF-8 become U+FFFD.
- If an object has a name twice, its last value is kept.
- A list or object inside `MAX_DEPTH` others becomes its JSON text, unparsed.
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
"""Nested lists and objects, the outermost included."""
MAX_ALTERED: Final = 100
"""Changed places in a list. If there are more, the last pointer is empty: it means the whole document."""
MAX_POINTER: Final = 255
"""Characters of a pointer. If it is longer, it is cut to the pointer of an enclosing value."""
REPLACEMENT: Final = "\ufffd"

_LEAST, _GREATEST = -(2**63), 2**64 - 1
_MOST_DIGITS: Final = len(str(_LEAST))
_SURROGATE: Final = "\ud800"
_UNSTORABLE: Final = re.compile("[\x00\ud800-\udfff]")
_ESCAPED: Final = re.compile(r"\\u(?:0000|[dD][89a-fA-F])")
# Possessive quantifiers do not backtrack, so that the time stays linear.
_TO_BRACKETS: Final = re.compile(r'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+")*+([\[{]++|[\]}]++)', re.DOTALL)


@dataclass(frozen=True, slots=True)
class _StandIn:
    """A replaced number: the value of the copy, and the original text."""

    value: str | None
    text: str


@dataclass(frozen=True, slots=True)
class _Repeated:
    """The values of a duplicate name in one object."""

    values: list[Any]


class Document(NamedTuple):
    """A parsed body. Its values may contain stand-ins; a `Cleaner` returns the usable ones."""

    value: Any
    plain: bool
    """Whether the value is its own clean copy."""
    folded: frozenset[str] = frozenset()
    """Texts of values that are nested too deeply."""

    def members(self) -> dict[str, Any]:
        """Return the members of the outermost object.

        Raises UnrecognizedBody if the body is not an object, or if a name has two different values in it:
        either could be the right one.
        """
        if not isinstance(self.value, dict):
            raise UnrecognizedBody("not_object")
        if self.plain:
            return self.value
        return {name: _one_value(value) for name, value in self.value.items()}


def decode(raw: bytes) -> Document:
    """Parse a body. Raises UnrecognizedBody with the reason `not_json`, and no other exception."""
    value = _decode_plain(raw)
    return Document(value, True) if value is not _NOT_PLAIN else _decode_leniently(raw)  # noqa: FBT003


_NOT_PLAIN: Final = object()


def _decode_plain(raw: bytes) -> Any:
    """Decode a body in the usual format at a third of the cost; else return `_NOT_PLAIN`.

    If orjson encodes its result to the same bytes, the body had no duplicate name, rounded number or repaired
    text, and `_decode_leniently` would return the same value.
    """
    # Most bodies have no backslash, and finding one byte takes a tenth of the time of finding two.
    if raw.count(b"[") + raw.count(b"{") > MAX_DEPTH or (b"\\" in raw and b"\\u" in raw):
        return _NOT_PLAIN
    try:
        value = orjson.loads(raw)
        same = orjson.dumps(value) == raw
    except ValueError:
        return _NOT_PLAIN
    return value if same else _NOT_PLAIN


def _decode_leniently(raw: bytes) -> Document:
    # json.loads(raw) would guess the encoding; UTF-16 and UTF-32 are not valid JSON here.
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
    """Tell whether a JSON text may have characters that must be replaced."""
    # Three searches: finding a single character takes a tenth of the time of a pattern.
    return "\0" in text or _SURROGATE in text or ("\\u" in text and _ESCAPED.search(text) is not None)


def _mark(error: UnicodeError) -> tuple[str, int]:
    """Decode bytes that are not UTF-8 as half a surrogate pair, which valid UTF-8 cannot contain."""
    if isinstance(error, UnicodeDecodeError):
        return _SURROGATE, error.end
    raise error


_MARK: Final = "receiver.core.lenient_json"
codecs.register_error(_MARK, _mark)


# One reader per thread, because it has state. A new one per body would double the time of a small body.
_local: Final = threading.local()


class _Reader:
    """A decoder of the standard library that makes stand-ins, and remembers if it made any.

    orjson cannot do this: it rejects these values, silently keeps the last of duplicate names, and reads
    2**64 as a float.
    """

    def __init__(self) -> None:
        self.made_stand_ins = False
        self.decode = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._integer,
            parse_float=self._real,
            parse_constant=self._constant,
            strict=False,  # allow control characters in strings
        ).decode

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            self.made_stand_ins = True
            grouped: dict[str, list[Any]] = {}
            for name, value in pairs:
                grouped.setdefault(name, []).append(value)
            result = {
                name: values[0] if len(values) == 1 else _Repeated(values) for name, values in grouped.items()
            }
        return result

    def _integer(self, text: str) -> int | _StandIn:
        # The length first, because int() raises for thousands of digits.
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
    """Replace values that are nested too deeply by strings with their text; return these texts, too.

    The decoder is recursive and could not read them. Raises UnrecognizedBody if brackets are not closed.
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


def _one_value(value: Any) -> Any:
    if not isinstance(value, _Repeated):
        return value
    first, *others = value.values
    if not all(equal(first, other) for other in others):
        raise UnrecognizedBody("duplicate_key")
    return first


class Cleaner:
    """Makes clean copies of a document's values, and lists the changed places."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._altered: dict[str, None] = {}
        self._path: list[str] = []

    @property
    def altered(self) -> tuple[str, ...]:
        """Pointers to the changed places, at most `MAX_ALTERED`."""
        return tuple(self._altered)

    def clean(self, value: Any, *place: str, depth: int) -> Any:
        """Return the clean copy of a value that is inside `depth` objects and lists of the document.

        All pointers begin with `place`, the path of the copy in the message.
        """
        if self._document.plain:
            return value
        self._path = [*place]
        return self._clean(value, depth)

    def note(self, *place: str) -> None:
        """List a place that the caller has changed."""
        self._path = [*place]
        self._note()

    def _clean(self, value: Any, depth: int) -> Any:
        if isinstance(value, str):
            text = clean_text(value)
            if text != value or (depth == MAX_DEPTH and value in self._document.folded):
                self._note()
            return text
        if isinstance(value, dict):
            return self._clean_object(value, depth)
        if isinstance(value, list):
            result = []
            for index, item in enumerate(value):
                self._path.append(str(index))
                result.append(self._clean(item, depth + 1))
                self._path.pop()
            return result
        if isinstance(value, _Repeated):
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
            if name != key or name in named:  # two names may differ only in replaced characters
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

    def _note(self) -> None:
        if len(self._altered) >= MAX_ALTERED:
            return
        pointer = ""
        for name in self._path:
            # Checked before the name is escaped, because it may be as long as the body.
            if len(pointer) + len(name) >= MAX_POINTER:
                break
            pointer += "/" + name.replace("~", "~0").replace("/", "~1")
        if len(self._altered) == MAX_ALTERED - 1 and pointer not in self._altered:
            pointer = ""
        self._altered[pointer] = None


def clean_text(text: str) -> str:
    """Return a text with U+FFFD in place of each NUL and each half of a surrogate pair."""
    return _UNSTORABLE.sub(REPLACEMENT, text)


def same_json(a: bytes, b: bytes) -> bool:
    """Tell whether two bodies are equal as JSON values.

    1 equals 1.0 but not true, and the order of names is ignored. Both must be altered at the same places. If
    one is not JSON, only the same bytes are equal.
    """
    if a == b:
        return True
    try:
        (one, altered_in_one), (other, altered_in_other) = clean_body(a), clean_body(b)
    except UnrecognizedBody:
        return False
    return set(altered_in_one) == set(altered_in_other) and equal(one, other)


def clean_body(raw: bytes) -> tuple[Any, tuple[str, ...]]:
    """Return the clean copy of a body, and pointers to the changed places. Raises UnrecognizedBody."""
    document = decode(raw)
    cleaner = Cleaner(document)
    return cleaner.clean(document.value, depth=0), cleaner.altered


def display_fields(raw: bytes) -> dict[str, Any]:
    """Return the fields that show a body: `body` is the clean copy.

    If the copy differs from the body, `altered` has the places and `body_base64` the exact bytes. If the body
    is not JSON, only `body_base64` is present.
    """
    exact = {"body_base64": base64.b64encode(raw).decode("ascii")}
    try:
        copy, altered = clean_body(raw)
    except UnrecognizedBody:
        return exact
    return {"body": copy} | ({"altered": altered} | exact if altered else {})


def equal(a: Any, b: Any) -> bool:
    """Tell whether two values are equal as JSON."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)
