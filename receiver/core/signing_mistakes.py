"""Mistakes that spoil a signature: other spellings of a secret, and changes of a body on its way; pure."""

import base64
import binascii
from collections.abc import Iterator
from typing import Final, Literal

from receiver.core.json_forms import json_forms
from receiver.core.signature import Secret

Mistake = Literal[
    "secret_prefix",
    "secret_spelling",
    "newline_added",
    "newline_removed",
    "newlines_changed",
    "json_rewritten",
]

_PREFIX: Final = "whsec_"
_AROUND: Final = ("{}\n", "{}\r\n", " {}", "{} ", '"{}"', "'{}'")


def secret_spellings(secret: Secret) -> Iterator[tuple[Mistake, bytes, str]]:
    """Yield other spellings of a configured secret, with the mistake that each would explain."""
    text = secret.value.decode(errors="replace")
    bare = text.removeprefix(_PREFIX)
    if bare == text:
        yield "secret_prefix", f"{_PREFIX}{text}".encode(), f"was pasted without its prefix {_PREFIX}: add it"
    elif bare.strip():
        yield (
            "secret_prefix",
            bare.encode(),
            f"has the prefix {_PREFIX}, but the sender signs without it: remove it here, or add it there",
        )
    for around in _AROUND:
        yield (
            "secret_spelling",
            around.format(text).encode(),
            "is right, but the sender's copy of it has white space or quotes around it",
        )
    decoded = _decode(bare)
    if decoded.strip():
        yield (
            "secret_spelling",
            decoded,
            "is right, but the sender decodes its base64, as in Standard Webhooks; Clipia uses its text",
        )


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return b""


def original_bodies(body: bytes) -> Iterator[tuple[Mistake, bytes, str]]:
    """Yield bodies that may have become this one, with the change that each would explain."""
    for end in (b"\r\n", b"\n"):
        if body.endswith(end):
            yield "newline_added", body[: -len(end)], "A newline was appended to the body"
        yield "newline_removed", body + end, "A newline at the end of the body was removed"
    if body.strip() != body:
        yield "newline_added", body.strip(), "White space was added around the body"
    unix = body.replace(b"\r\n", b"\n")
    for form in (unix, unix.replace(b"\n", b"\r\n")):
        if form != body:
            yield "newlines_changed", form, "The line ends of the body were changed"
    for form in json_forms(body):
        for end in (b"", b"\n"):
            yield "json_rewritten", form + end, "A proxy re-encoded the JSON"
