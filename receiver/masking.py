"""Masks secrets in quoted text.

Messages, log records, rows and answers consist of our own words. If they quote Clipia's error, a broker's
reply or a traceback, the quoted text goes through `mask` first: a peer may repeat the header or the password
that it was sent.
"""

import base64
import contextlib
import json
import re
from collections.abc import Iterator
from typing import Final
from urllib.parse import quote, quote_plus, unquote

MASK: Final = "[masked]"

_PIECE: Final = 8
"""A run of this many characters is masked if it occurs in a secret, so half a secret is masked too."""
_SHORTEST: Final = 4
"""A secret with fewer characters is not masked, because ordinary words may contain it."""

_PUBLIC: Final = re.compile(r"clipia_(?:live|test)_|whsec_")
"""The public start of Clipia's secrets."""
_SECRET_FORMS: Final = (
    (re.compile(r"(clipia_(?:live|test)_|whsec_)[A-Za-z0-9+/=_-]{6,}"), rf"\1{MASK}"),
    (re.compile(r"(\b(?:bearer|basic) +)(?=[^\s'\",]*[0-9])[^\s'\",]{6,}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(://)[^\s/@'\"]+@"), rf"\1{MASK}@"),
)
"""Patterns of secrets that are masked even if they were never registered."""
_SECRET_OPTION: Final = re.compile(
    r"[?&](?![^=&]*(?:file|path|ur[il]|passive|version)=)"
    r"(?:key|sig|[^=&]*(?:pass|secret|token|api_?key|access_?key|signature)[^=&]*)=([^&#]+)",
    re.IGNORECASE,
)
_SECRET_HEADER: Final = re.compile(
    r"(?:key|token|secret|password|passphrase|cookie|authorization|authentication|credentials?|signature|session|"
    r"jwt|(?:^|[-_.])(?:auth|pass|pwd|pin|sig))(?:$|[-_.])",
    re.IGNORECASE,
)
"""Names of headers with secret values."""
_HARMLESS_HEADER: Final = re.compile(
    "accept|accept-language|cache-control|content-language|date|from|host|origin|pragma|prefer|priority|referer|"
    "user-agent|via",
    re.IGNORECASE,
)
"""Names of headers with harmless values, unless a value comes from a variable."""
_SEPARATORS: Final = re.compile(r"[ ,;:/=._+*()-]+")
_PLAIN: Final = re.compile(r"[A-Z]?[a-z]{1,12}|[A-Z]{1,12}|v?[0-9]{1,4}|")
"""A word or a small number. Random text is longer, or mixes letters and digits."""
_NEXT_URL: Final = re.compile(r",\s*(?=[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
"""A comma between two URLs; any other comma may be part of a password."""
_WELL_KNOWN: Final = re.compile(
    "receiver|clipia|webhooks?|guest|postgres|postgresql|rabbitmq|redis|kafka|nats|minio|minioadmin|"
    "admin|root|user|username|default|public|test|password|secret|changeme|localhost",
    re.IGNORECASE,
)
"""Default passwords that are also ordinary words of messages."""

_pieces: set[str] = set()
_short: set[str] = set()


def register_secret(secret: str) -> None:
    """Let `mask` find a secret of this process: whole, encoded or cut in two."""
    if _WELL_KNOWN.fullmatch(secret):
        return
    for form in _forms(secret):
        for part in _PUBLIC.split(form):
            if len(part) >= _PIECE:
                pieces = (part[at : at + _PIECE] for at in range(len(part) - _PIECE + 1))
                _pieces.update(piece for piece in pieces if not _WELL_KNOWN.fullmatch(piece))
            elif len(part) >= _SHORTEST:
                _short.add(part)


def register_url(text: str) -> None:
    """Register the secrets of a URL, or of several that commas separate; they need not be valid.

    The secrets are its password, secret options, and a user without a password, which is a token for some
    brokers.
    """
    for url in _NEXT_URL.split(text):
        scheme, _, rest = url.partition("://")
        login, at, _ = rest.rpartition("@")
        user, colon, password = login.partition(":")
        # A PostgreSQL user without a password is not a token: pg_hba.conf or a password file lets it in.
        has_token = not colon and not scheme.strip(" '\"`").lower().startswith("postgres")
        # A text with a slash and without a colon is a host and a path that contains an @.
        if at and (colon or (has_token and "/" not in user)):
            # If user and password are the same, a masked user would reveal the password.
            if password != user:
                register_secret(password if colon else user)
            register_secret(base64.b64encode(unquote(login).encode(errors="replace")).decode())
        for found in _SECRET_OPTION.finditer(url):
            register_secret(found[1])


def register_header(name: str, value: str, *, is_given: bool = False) -> None:
    """Register the value of a header that we send, and the credentials in it, if it may be secret.

    `is_given` says that the value comes from a variable.
    """
    if not _may_be_secret(name, value, is_given=is_given):
        return
    register_secret(value)
    scheme, _, credentials = value.partition(" ")
    register_secret(credentials.strip())
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            login = base64.b64decode(credentials.strip(), validate=True).decode(errors="replace")
            register_secret(login.partition(":")[2])


def _may_be_secret(name: str, value: str, *, is_given: bool) -> bool:
    is_short = len(value) < _PIECE
    if _SECRET_HEADER.search(name):
        return not (is_short and value.isalpha())
    if is_short and (value.isalpha() or value.isdigit()):
        return False
    # One sign alone is not enough: if an ordinary word were registered, each message with it would be masked.
    is_plain = all(_PLAIN.fullmatch(part) for part in _SEPARATORS.split(value))
    is_harmless = _HARMLESS_HEADER.fullmatch(name) is not None
    return [not is_plain, is_given, not is_harmless].count(True) >= 2


def mask(text: str) -> str:
    """Return the text with each registered secret, and each text in the form of one, replaced by MASK."""
    for pattern, replacement in _SECRET_FORMS:
        text = pattern.sub(replacement, text)
    for secret in _short:
        text = text.replace(secret, MASK)
    kept, end = [], 0
    for start, stop in _runs(text):
        kept += [text[end:start], MASK]
        end = stop
    return "".join(kept) + text[end:]


def _runs(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and the end of each longest run made of pieces of secrets."""
    start = stop = -1
    for at in range(len(text) - _PIECE + 1):
        if text[at : at + _PIECE] not in _pieces:
            continue
        if at > stop >= 0:
            yield start, stop
            start = at
        elif stop < 0:
            start = at
        stop = at + _PIECE
    if stop >= 0:
        yield start, stop


def _forms(secret: str) -> Iterator[str]:
    """Yield the spellings of a secret: plain, escaped, percent-encoded and in base64."""
    raw = secret.encode("utf-8", "surrogateescape")
    plain = unquote(secret)
    yield secret
    yield plain
    yield quote(raw, safe="")
    yield quote_plus(raw)
    yield json.dumps(secret)[1:-1]
    yield repr(secret)[1:-1]
    yield repr(raw)[2:-1]
    for before in range(3):
        # Base64 depends on the secret's offset in the encoded bytes, modulo 3. The characters at its edges
        # also encode neighboring bytes, so they are cut off.
        encoded = base64.b64encode(bytes(before) + raw).decode().rstrip("=")
        yield encoded[(0, 2, 3)[before] : len(encoded) - 1]
