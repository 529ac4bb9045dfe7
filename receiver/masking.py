"""Masks secrets in the words of others.

Messages, log records, rows and answers hold our own words. Where they quote somebody else's (Clipia's error,
a broker's reply, a traceback), the words go through `mask` first: a peer may repeat the header or the
password that it was sent.
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
"""Characters: a run of so many that also stands in a secret is masked, be it a half of the secret."""
_SHORTEST: Final = 4
"""Characters of a secret that can be told from ordinary words; a shorter one is masked nowhere."""

_PUBLIC: Final = re.compile(r"clipia_(?:live|test)_|whsec_")
"""How secrets of a kind start; no secret in itself."""
_KINDS: Final = (
    (re.compile(r"(clipia_(?:live|test)_|whsec_)[A-Za-z0-9+/=_-]{6,}"), rf"\1{MASK}"),
    (re.compile(r"(\b(?:bearer|basic) +)(?=[^\s'\",]*[0-9])[^\s'\",]{6,}", re.IGNORECASE), rf"\1{MASK}"),
    (re.compile(r"(://)[^\s/@'\"]+@"), rf"\1{MASK}@"),
)
"""Secrets that show by their form, whether they are ours or not."""
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
"""Names of headers whose values are secrets."""
_HARMLESS_HEADER: Final = re.compile(
    "accept|accept-language|cache-control|content-language|date|from|host|origin|pragma|prefer|priority|referer|"
    "user-agent|via",
    re.IGNORECASE,
)
"""Names of headers whose values are none, unless they come from a variable."""
_SEPARATORS: Final = re.compile(r"[ ,;:/=._+*()-]+")
_PLAIN: Final = re.compile(r"[A-Z]?[a-z]{1,12}|[A-Z]{1,12}|v?[0-9]{1,4}|")
"""A word or a small number; what is random is longer, or mixes them."""
_NEXT_URL: Final = re.compile(r",\s*(?=[a-z][a-z0-9+.-]*://)", re.IGNORECASE)
"""A comma between two URLs; any other one may stand in a password."""
_KNOWN_TO_ALL: Final = re.compile(
    "receiver|clipia|webhooks?|guest|postgres|postgresql|rabbitmq|redis|kafka|nats|minio|minioadmin|"
    "admin|root|user|username|default|public|test|password|secret|changeme|localhost",
    re.IGNORECASE,
)
"""Passwords that protect nothing, and that messages hold as words."""

_pieces: set[str] = set()
_short: set[str] = set()


def hold(secret: str) -> None:
    """Remember a secret of this process, so that `mask` finds it, encoded or cut in two."""
    if _KNOWN_TO_ALL.fullmatch(secret):
        return
    for form in _forms(secret):
        for part in _PUBLIC.split(form):
            if len(part) >= _PIECE:
                pieces = (part[at : at + _PIECE] for at in range(len(part) - _PIECE + 1))
                _pieces.update(piece for piece in pieces if not _KNOWN_TO_ALL.fullmatch(piece))
            elif len(part) >= _SHORTEST:
                _short.add(part)


def hold_url(text: str) -> None:
    """Remember the secrets of a URL, well-formed or not, or of several that commas separate.

    They are its password, or a user without one (which is a token for some brokers), and options.
    """
    for url in _NEXT_URL.split(text):
        scheme, _, rest = url.partition("://")
        login, at, _ = rest.rpartition("@")
        user, colon, password = login.partition(":")
        # PostgreSQL has no tokens: its users without a password are let in by their name or a file.
        has_token = not colon and not scheme.strip(" '\"`").lower().startswith("postgres")
        # Without a colon, and with a slash, it may as well be a host and a path with an @.
        if at and (colon or (has_token and "/" not in user)):
            if password != user:
                # Masked, a name that is no secret would tell that it is the password, too.
                hold(password if colon else user)
            hold(base64.b64encode(unquote(login).encode(errors="replace")).decode())
        for found in _SECRET_OPTION.finditer(url):
            hold(found[1])


def hold_header(name: str, value: str, *, is_given: bool = False) -> None:
    """Remember the value of a header that we send, and the credentials in it, if it may be secret.

    It may be if the header's name says so, if the value is `is_given` by a variable, or if the value consists
    of more than words and small numbers: every message that holds those words would be masked.
    """
    is_short = len(value) < _PIECE and (value.isalpha() or value.isdigit())
    is_plain = all(_PLAIN.fullmatch(part) for part in _SEPARATORS.split(value))
    is_harmless = _HARMLESS_HEADER.fullmatch(name) is not None
    if not _SECRET_HEADER.search(name):
        if is_short or (is_plain and not is_given) or (is_harmless and (is_plain or not is_given)):
            return
    elif is_short and value.isalpha():
        return
    hold(value)
    scheme, _, credentials = value.partition(" ")
    hold(credentials.strip())
    if scheme.lower() == "basic":
        with contextlib.suppress(ValueError):
            login = base64.b64decode(credentials.strip(), validate=True).decode(errors="replace")
            hold(login.partition(":")[2])


def mask(text: str) -> str:
    """Return the text without the secrets that are held, and without what looks like one."""
    for pattern, replacement in _KINDS:
        text = pattern.sub(replacement, text)
    for secret in _short:
        text = text.replace(secret, MASK)
    kept, end = [], 0
    for start, stop in _runs(text):
        kept += [text[end:start], MASK]
        end = stop
    return "".join(kept) + text[end:]


def _runs(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each stretch whose pieces all stand in a secret."""
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
    """Yield the secret as it may stand in a text: plain, escaped, percent-encoded and in base64."""
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
        # In base64 the characters depend on the secret's place in what was encoded; its edges do on others.
        encoded = base64.b64encode(bytes(before) + raw).decode().rstrip("=")
        yield encoded[(0, 2, 3)[before] : len(encoded) - 1]
