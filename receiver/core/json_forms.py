"""Other spellings of a JSON text: the bytes that a sender may have signed before a proxy wrote it anew; pure.

Only white space and the escapes in strings are changed. A parser would be simpler, but it would also change
the spelling of numbers, and drop a name that occurs twice.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Final

MAX_TOKENS: Final = 4096
"""A text with more names, values and signs is left out: its forms would take tens of milliseconds."""
MAX_DEPTH: Final = 64
"""A text that nests deeper is left out: the parser recurses, and a thread's stack may be small."""
MAX_FORM_BYTES: Final = 128 * 1024
"""Longer forms are left out: with indents a small text may become megabytes."""

_TOKEN: Final = re.compile(r'[ \t\r\n]*("[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]:,]|[^\s{}\[\]:,"]+)[ \t\r\n]*')
_INDENTS: Final = (2, 4)


def json_forms(body: bytes) -> Iterator[bytes]:
    """Yield the other spellings of a JSON text, without a line feed at the end; none if it is no JSON."""
    try:
        text = body.decode()
        if _is_too_deep(text):
            return
        json.loads(text)
    except ValueError:
        return
    tokens = _split(text)
    if tokens is None:
        return
    layouts = [_separate(tokens, ",", ":"), _separate(tokens, ", ", ": ")]
    layouts += [_indent(tokens, width) for width in _INDENTS]
    seen = {_digest(body)}
    for spelled in _spellings(tokens):
        for layout in layouts:
            if sum(map(len, spelled)) + sum(map(len, layout)) > MAX_FORM_BYTES:
                continue
            # Half an emoji is no UTF-8.
            form = "".join(a + b for a, b in zip(spelled, layout, strict=True)).encode(errors="replace")
            if _digest(form) not in seen:
                seen.add(_digest(form))
                yield form


def _digest(form: bytes) -> bytes:
    return hashlib.blake2b(form, digest_size=16).digest()


def _is_too_deep(text: str) -> bool:
    depth = 0
    is_string = is_escaped = False
    for sign in text:
        if is_string:
            is_string = is_escaped or sign != '"'
            is_escaped = sign == "\\" and not is_escaped
        elif sign == '"':
            is_string = True
        elif sign in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                return True
        elif sign in "]}":
            depth -= 1
    return False


def _split(text: str) -> list[str] | None:
    found = [match[1] for match in _TOKEN.finditer(text)]
    return found if len(found) <= MAX_TOKENS else None


def _spellings(tokens: Sequence[str]) -> Iterator[list[str]]:
    """Yield the tokens as received, without escapes, in ASCII, and in ASCII with escaped slashes."""
    yield list(tokens)
    strings = {token: json.loads(token) for token in tokens if token[0] == '"'}
    plain = {token: json.dumps(value, ensure_ascii=False) for token, value in strings.items()}
    ascii_only = {token: json.dumps(value) for token, value in strings.items()}
    slashes = {token: text.replace("/", r"\/") for token, text in ascii_only.items()}
    for spelling in (plain, ascii_only, slashes):
        yield [spelling.get(token, token) for token in tokens]


def _separate(tokens: Sequence[str], comma: str, colon: str) -> list[str]:
    """Return the text that follows each token, apart from the sign itself."""
    after = {",": comma[1:], ":": colon[1:]}
    return [after.get(token, "") for token in tokens]


def _indent(tokens: Sequence[str], width: int) -> list[str]:
    """Return the text that follows each token if each value has a line of its own."""
    depth = 0
    made = []
    for sign, following in zip(tokens, [*tokens[1:], ""], strict=True):
        depth += (sign in {"{", "["}) - (following in {"}", "]"})
        opens_or_goes_on = sign in {"{", "[", ","} and following not in {"}", "]"}
        closes = following in {"}", "]"} and sign not in {"{", "["}
        if opens_or_goes_on or closes:
            made.append("\n" + " " * (width * depth))
        else:
            made.append(" " if sign == ":" else "")
    return made
