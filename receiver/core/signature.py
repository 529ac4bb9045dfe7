"""Sign and verify the signature of Clipia's webhooks; pure.

The header is ``X-Clipia-Signature: t=<unix seconds>,v1=<hex>``. `v1` is the HMAC-SHA256 of ``<t>.<body>``. A
valid header has one `t` and 1 to 8 `v1` of lower-case hex. As in both official SDKs, spaces and tabs around a
name or a value are ignored, and so are empty and unknown elements. For `t` and `v1` themselves the grammar is
narrower than in other parsers: a second accepted spelling of a value is one that no test has seen.
"""

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, NamedTuple, Self

from receiver.errors import SignatureError

SIGNATURE_HEADER: Final = b"x-clipia-signature"
MAX_HEADER_BYTES: Final = 1024
MAX_SIGNATURES: Final = 8

_T = re.compile(rb"[ \t]*t[ \t]*=[ \t]*([1-9][0-9]{9,10})[ \t]*")
_V1 = re.compile(rb"[ \t]*v1[ \t]*=[ \t]*([0-9a-f]{64})[ \t]*")
# Matches malformed elements too, so that a bad `t` or `v1` is not ignored as an unknown element. Other
# parsers read the header as Latin-1 and strip more kinds of white space.
_T_OR_V1 = re.compile(rb"%b(?:(t)|v1)%b=" % ((rb"[\t-\r\x1c-\x20\x85\xa0]*",) * 2))

_ID_LABEL = b"clipia-receiver secret id"


@dataclass(frozen=True, kw_only=True)
class Secret:
    """One signing secret, compared by `id` alone; neither repr nor comparison uses `value`."""

    id: str
    value: bytes = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        # Any sender could sign with an empty key.
        if not self.value.strip():
            raise ValueError("a signing secret must not be empty")

    @cached_property
    def _keyed(self) -> "hmac.HMAC":
        return hmac.new(self.value, digestmod="sha256")

    def hex_digest(self, t: bytes, body: bytes) -> bytes:
        """Return the HMAC-SHA256 of ``<t>.<body>`` in hex; `t` is the text as received.

        If the number were formatted again, other spellings of it would be accepted.
        """
        # hmac.digest is simpler. It prepares the key each time, which costs each webhook a microsecond.
        keyed = self._keyed.copy()
        keyed.update(b"%b.%b" % (t, body))
        return keyed.hexdigest().encode()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Make a secret with a fingerprint as its `id`: the same in every process, and no help in guessing.

        Raises `ValueError` if the secret is empty or not valid Unicode.
        """
        value = text.encode()
        return cls(id=hmac.digest(value, _ID_LABEL, "sha256").hex()[:8], value=value)


class Verified(NamedTuple):
    """The time of a valid signature (unix seconds) and the secret that made it."""

    timestamp: int
    secret_id: str


def verify(
    header_values: Sequence[bytes], body: bytes, *, secrets: Sequence[Secret], now: float, tolerance: int
) -> Verified:
    """Verify all `X-Clipia-Signature` values of a request against its body, byte for byte as received.

    `now` is in unix seconds; `t` may be up to `tolerance` seconds older or newer. The signature is checked
    before the age, so that the work does not depend on `t`. The reasons `stale` and `future` therefore mean
    an authentic request: a clock is wrong, or the request was captured and sent again. Alert on these two; a
    forged request is always a `mismatch`.

    Raises `SignatureError`, and `ValueError` if there are no secrets.
    """
    if not secrets:
        raise ValueError("no signing secret is configured")
    if not header_values:
        raise SignatureError("missing")
    if len(header_values) > 1:
        raise SignatureError("ambiguous")
    if len(header_values[0]) > MAX_HEADER_BYTES:
        raise SignatureError("format")
    t, signatures = read_header(header_values[0])
    secret = _find_signer(t, signatures, body, secrets)
    if secret is None:
        raise SignatureError("mismatch")
    timestamp = int(t)
    # `> tolerance` would accept every request if the clock returned NaN.
    if not abs(now - timestamp) <= tolerance:
        raise SignatureError("stale" if timestamp < now else "future")
    return Verified(timestamp, secret.id)


def sign(secret: bytes, body: bytes, *, timestamp: int) -> str:
    """Return the header value that Clipia would send for `body` at `timestamp` (unix seconds)."""
    return f"t={timestamp},v1={hmac.digest(secret, b'%d.%b' % (timestamp, body), 'sha256').hex()}"


def read_header(header: bytes) -> tuple[bytes, list[bytes]]:
    """Return the text of `t` as received, and the `v1` values (1 to 8). Raises SignatureError."""
    times: list[bytes] = []
    signatures: list[bytes] = []
    malformed = False
    for element in header.split(b","):
        if match := _T.fullmatch(element):
            times.append(match[1])
        elif match := _V1.fullmatch(element):
            signatures.append(match[1])
        elif match := _T_OR_V1.match(element):
            malformed = True
            times += [element] if match[1] else []
    # Two `t` are possible if a proxy joined two headers with ", ".
    if len(times) > 1:
        raise SignatureError("ambiguous")
    if malformed or not times or not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise SignatureError("format")
    return times[0], signatures


def _find_signer(t: bytes, signatures: list[bytes], body: bytes, secrets: Sequence[Secret]) -> Secret | None:
    """Return the first secret that made one of the signatures.

    All pairs are compared, each in constant time, even after a match. Otherwise the response time would tell
    an attacker how much of a guess was right, or which secret matched.
    """
    signer = None
    for secret in secrets:
        digest = secret.hex_digest(t, body)
        for signature in signatures:
            if hmac.compare_digest(digest, signature):
                signer = signer or secret
    return signer
