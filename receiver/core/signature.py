"""Sign and verify Clipia's webhook signature; pure: bytes and `now` come in, a verdict goes out.

The header is ``X-Clipia-Signature: t=<unix seconds>,v1=<hex>``; `v1` is the HMAC-SHA256 of ``<t>.<body>``.
One field, one `t`, 1 to 8 `v1` of lower-case hex. As in both official SDKs, spaces and tabs around a name or
a value are no part of it, and empty and unknown elements mean nothing. Everything else about `t` and `v1` is
narrower than in other parsers: a second spelling of an accepted value is one that no test has seen.
"""

import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Self

from receiver.errors import SignatureError

SIGNATURE_HEADER: Final = b"x-clipia-signature"

REASONS: Final = ("missing", "ambiguous", "format", "mismatch", "stale", "future")
"""Every `SignatureError.reason`, in the order of the checks.

`stale` and `future` are only said of a signature that holds. They therefore mean a clock that is off or a
captured request sent again, and are worth an alarm; whatever a stranger makes up counts as `mismatch`.
"""

MAX_HEADER_BYTES: Final = 1024
MAX_SIGNATURES: Final = 8

_T = re.compile(rb"[ \t]*t[ \t]*=[ \t]*([1-9][0-9]{9,10})[ \t]*")
_V1 = re.compile(rb"[ \t]*v1[ \t]*=[ \t]*([0-9a-f]{64})[ \t]*")
_USUAL = re.compile(rb"%b,%b" % (_T.pattern, _V1.pattern))
# A `t` or `v1` of the wrong form must not pass for an unknown element. Other parsers read the header as
# Latin-1 and strip more kinds of white space than we do.
_SPACE = rb"[\t-\r\x1c-\x20\x85\xa0]*"
_LIKE_T = re.compile(rb"%bt%b=" % (_SPACE, _SPACE))
_LIKE_V1 = re.compile(rb"%bv1%b=" % (_SPACE, _SPACE))

_ID_LABEL = b"clipia-receiver secret id"


@dataclass(frozen=True, kw_only=True)
class Secret:
    """One signing secret. Two secrets are compared by `id`; `value` shows in neither repr nor comparison."""

    id: str
    value: bytes = field(repr=False, compare=False)
    _keyed: "hmac.HMAC" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Whoever signs with an empty key would be let in.
        if not self.value.strip():
            raise ValueError("a signing secret must not be empty")
        object.__setattr__(self, "_keyed", hmac.new(self.value, digestmod="sha256"))

    def hex_digest(self, t: bytes, body: bytes) -> bytes:
        """Return the HMAC-SHA256 of ``<t>.<body>`` in hex."""
        # A copy has the key's part of the work behind it. `t` is the received text: signing a number that is
        # formatted again would accept other spellings of it.
        keyed = self._keyed.copy()
        keyed.update(b"%b.%b" % (t, body))
        return keyed.hexdigest().encode()

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Make a secret whose `id` is a fingerprint: stable for ever, useless for finding the secret.

        Raises `ValueError` for an empty secret or one that is not valid Unicode.
        """
        value = text.encode()
        return cls(id=hmac.digest(value, _ID_LABEL, "sha256").hex()[:8], value=value)


class Verified(NamedTuple):
    """What a valid signature vouches for: when it was made (unix seconds) and with which secret."""

    timestamp: int
    secret_id: str


def verify(
    header_values: Sequence[bytes],
    body: bytes,
    *,
    secrets: Sequence[Secret],
    now: float,
    tolerance: int,
) -> Verified:
    """Check every `X-Clipia-Signature` field value of a request against its body, exactly as received.

    `now` is in unix seconds; `t` may differ from it by `tolerance` seconds either way, bounds included.
    The signature is checked before the age, so that the work done does not depend on `t`.

    Raises `SignatureError` with one of `REASONS`, and `ValueError` without secrets.
    """
    if not secrets:
        raise ValueError("no signing secret is configured")
    if not header_values:
        raise SignatureError("missing")
    if len(header_values) > 1:
        raise SignatureError("ambiguous")
    if len(header_values[0]) > MAX_HEADER_BYTES:
        raise SignatureError("format")
    # As Clipia writes it; the rest of the grammar is for the rare others.
    usual = _USUAL.fullmatch(header_values[0])
    t, signatures = (usual[1], [usual[2]]) if usual else _parse(header_values[0])
    secret = _find_signer(t, signatures, body, secrets)
    if secret is None:
        raise SignatureError("mismatch")
    timestamp = int(t)
    # Not `> tolerance`: a clock that says NaN would let everything in.
    if not abs(now - timestamp) <= tolerance:
        raise SignatureError("stale" if timestamp < now else "future")
    return Verified(timestamp, secret.id)


def sign(secret: bytes, body: bytes, *, timestamp: int) -> str:
    """Make the header value that Clipia would send for `body` at `timestamp` (unix seconds)."""
    t = b"%d" % timestamp
    return f"t={timestamp},v1={hmac.digest(secret, b'%b.%b' % (t, body), 'sha256').hex()}"


def _parse(header: bytes) -> tuple[bytes, list[bytes]]:
    """Split a header into the received text of `t` and its `v1` values (1 to 8)."""
    elements = header.split(b",")
    # A proxy may have joined two fields with ", ".
    if len([element for element in elements if _LIKE_T.match(element)]) > 1:
        raise SignatureError("ambiguous")
    t = None
    signatures = []
    for element in elements:
        if match := _V1.fullmatch(element):
            signatures.append(match[1])
        elif match := _T.fullmatch(element):
            t = match[1]
        elif _LIKE_T.match(element) or _LIKE_V1.match(element):
            raise SignatureError("format")
    if t is None or not 1 <= len(signatures) <= MAX_SIGNATURES:
        raise SignatureError("format")
    return t, signatures


def _find_signer(t: bytes, signatures: list[bytes], body: bytes, secrets: Sequence[Secret]) -> Secret | None:
    """Return the first secret that made one of the signatures.

    Every pair is compared, in constant time and without stopping at a match: the time taken tells neither how
    much of a guess was right nor which secret answered.
    """
    signer = None
    for secret in secrets:
        digest = secret.hex_digest(t, body)
        for signature in signatures:
            if hmac.compare_digest(digest, signature):
                signer = signer or secret
    return signer
