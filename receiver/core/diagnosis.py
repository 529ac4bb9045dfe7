"""Why a request to the callback was rejected, in words; pure.

The words are for the operator alone: they would tell a forger how close a forgery was. They quote nothing of
the request but its times and sizes, and nothing of a secret but its id.
"""

import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, Literal, NamedTuple, get_args

from receiver.core.signature import MAX_HEADER_BYTES, SIGNATURE_HEADER, Secret, read_header
from receiver.core.signing_mistakes import Mistake, original_bodies, secret_spellings
from receiver.errors import SignatureError, SignatureReason

Cause = Literal[
    Mistake,
    "clock",
    "other_source",
    "retired_secret",
    "no_signature",
    "no_timestamp",
    "two_signatures",
    "malformed",
    "empty_body",
    "large_body",
    "unknown_secret",
    "wrong_url",
    "encoding",
    "too_large",
    "too_slow",
]
CAUSES: Final[tuple[Cause, ...]] = get_args(Cause)

MAX_SECRETS: Final = 4
"""Secrets of a source that are tried with other spellings of the secret and of the body."""
MAX_OTHERS: Final = 32
"""Retired secrets, and secrets of other sources, that are tried with the body as it was received."""

_TIMESTAMP_HEADER: Final = b"x-clipia-timestamp"
_CLIPIA_HEADERS: Final = (_TIMESTAMP_HEADER, b"x-clipia-webhook-id")
_HEX: Final = re.compile(rb"[0-9a-fA-F]{64}")
_BODY_ALONE: Final = "The signature is for the body alone (secret {}): the sender must sign the time, too."
_SIGNATURE_REASONS: Final = get_args(SignatureReason)


class RejectedRequest(NamedTuple):
    """A rejected request, as far as it is kept."""

    source: str
    reason: str
    received_at: float
    """In unix seconds of this machine's clock."""
    path: str
    peer: str | None
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes | None
    """None if it was not read."""
    body_size: int | None
    """Of the whole body, in bytes; `body` may be cut off."""

    @property
    def size(self) -> int:
        """The bytes that it takes in memory or in the database, about."""
        return len(self.body or b"") + sum(len(name) + len(value) for name, value in self.headers) + 512

    def values(self, name: bytes) -> list[bytes]:
        """Return the values of a header."""
        return [value for each, value in self.headers if each == name]


@dataclass(frozen=True, kw_only=True)
class Known:
    """The secrets that a diagnosis may try, by source."""

    secrets: Mapping[str, Sequence[Secret]]
    retired: Mapping[str, Sequence[Secret]] = field(default_factory=dict)
    tolerance: int

    @property
    def current_ids(self) -> set[tuple[str, str]]:
        """The sources and the ids of the secrets that are accepted."""
        return {(source, secret.id) for source, each in self.secrets.items() for secret in each}


LastUsed = Mapping[tuple[str, str], datetime]
"""The time of the last webhook that a secret verified, by source and the secret's id."""


class Diagnosis(NamedTuple):
    """A cause, and its explanation in a few sentences."""

    cause: Cause
    text: str


_BEFORE_THE_SIGNATURE: Final[Mapping[str, Diagnosis]] = {
    "encoding": Diagnosis(
        "encoding",
        "The body is compressed (Content-Encoding). Clipia signs and sends it as it is, so a proxy has "
        "compressed it.",
    ),
    "too_large": Diagnosis(
        "too_large", "The body is larger than RECEIVER_MAX_BODY_BYTES, and was not read to its end."
    ),
    "too_slow": Diagnosis(
        "too_slow",
        "The body did not arrive in time: the connection or a proxy is slow, or the sender holds connections "
        "open on purpose.",
    ),
}


class _Signed(NamedTuple):
    """The time and the signatures of a header."""

    t: bytes
    signatures: Sequence[bytes]

    def is_by(self, secret: Secret, body: bytes) -> bool:
        digest = secret.hex_digest(self.t, body)
        return any(hmac.compare_digest(digest, each) for each in self.signatures)


def diagnose(request: RejectedRequest, known: Known, last_used: LastUsed) -> Diagnosis:
    """Return why a request was rejected.

    The time is bounded: a body that was cut off is not tried, and a whole one with a few hundred digests.
    """
    if request.reason in _SIGNATURE_REASONS:
        return _explain_signature(request, known, last_used)
    return _explain_request(request, known)


def _explain_request(request: RejectedRequest, known: Known) -> Diagnosis:
    """Explain a rejection before the signature was verified."""
    if request.reason in {"unknown_path", "unknown_source"}:
        return _explain_url(request, known)
    return _BEFORE_THE_SIGNATURE[request.reason]


def _explain_url(request: RejectedRequest, known: Known) -> Diagnosis:
    names = ", ".join(sorted(known.secrets))
    wrong = (
        "The path is none of the callback" if request.reason == "unknown_path" else "No source has this name"
    )
    paths = "/clipia/webhook (source clipia) and /clipia/webhook/<source>"
    if request.values(SIGNATURE_HEADER):
        likely = "It has a Clipia signature, so it is probably a webhook with a wrong URL: correct the URL"
    else:
        likely = "It has no Clipia signature, so it is probably a scanner or another program"
    return Diagnosis(
        "wrong_url",
        f"{wrong}; the callback is {paths}, the sources are: {names}. {likely}. The body was not read.",
    )


def _explain_signature(request: RejectedRequest, known: Known, last_used: LastUsed) -> Diagnosis:
    if request.reason == "missing":
        return _explain_missing(request)
    signed = _read_signature(request, known)
    if isinstance(signed, Diagnosis):
        return signed
    if request.body is None or request.body_size != len(request.body):
        return _explain_large(request, signed, known)
    return _explain_mismatch(request, request.body, signed, known, last_used)


def _read_signature(request: RejectedRequest, known: Known) -> _Signed | Diagnosis:
    """Return the signature, or the mistake in its header."""
    values = request.values(SIGNATURE_HEADER)
    if not values:
        return _explain_missing(request)
    if len(values) > 1:
        return Diagnosis(
            "two_signatures", "It has several X-Clipia-Signature headers: a proxy repeats or adds one."
        )
    if len(values[0]) > MAX_HEADER_BYTES:
        return Diagnosis("malformed", f"X-Clipia-Signature has more than {MAX_HEADER_BYTES} bytes.")
    try:
        return _Signed(*read_header(values[0]))
    except SignatureError as error:
        if error.reason == "ambiguous":
            return Diagnosis(
                "two_signatures", "X-Clipia-Signature has several times `t`: a proxy has joined two headers."
            )
        return _explain_malformed(request, values[0], known)


def _explain_missing(request: RejectedRequest) -> Diagnosis:
    if any(request.values(name) for name in _CLIPIA_HEADERS):
        text = "It has other headers of Clipia, but no X-Clipia-Signature: a proxy removes this header."
    else:
        text = "It has no X-Clipia-Signature: it is not from Clipia, or a proxy removes Clipia's headers."
    return Diagnosis("no_signature", text)


def _explain_malformed(request: RejectedRequest, value: bytes, known: Known) -> Diagnosis:
    """Explain a header that is not `t=…,v1=…`."""
    elements = [element.strip() for element in value.split(b",")]
    times = [element.partition(b"=")[2].strip() for element in elements if re.match(rb"t\s*=", element)]
    digests = _HEX.findall(value)
    if not times:
        return Diagnosis("no_timestamp", _explain_no_time(request, digests, known))
    if re.fullmatch(rb"[0-9]{13}", times[0]):
        return Diagnosis(
            "malformed", "The time `t` of X-Clipia-Signature is in milliseconds, not in seconds."
        )
    if not digests:
        return Diagnosis("malformed", "X-Clipia-Signature has no `v1` of 64 hexadecimal digits.")
    if any(digest != digest.lower() for digest in digests):
        return Diagnosis(
            "malformed", "The `v1` of X-Clipia-Signature has capital letters: Clipia sends small ones."
        )
    return Diagnosis(
        "malformed", "X-Clipia-Signature is not of the form t=<unix seconds>,v1=<64 hexadecimal digits>."
    )


def _explain_no_time(request: RejectedRequest, digests: Sequence[bytes], known: Known) -> str:
    """Explain a header without `t`; the time may be in a header of its own, or may not be signed."""
    text = "X-Clipia-Signature has no time `t`."
    body = request.body
    if body is None or request.body_size != len(body):
        return text
    signatures = [digest.lower() for digest in digests[:MAX_SECRETS]]
    for secret in known.secrets.get(request.source, ())[:MAX_SECRETS]:
        if _signs_body_alone(secret, signatures, body):
            return f"{text} {_BODY_ALONE.format(secret.id)}"
        for t in request.values(_TIMESTAMP_HEADER)[:1]:
            if _Signed(t, signatures).is_by(secret, body):
                return (
                    f"{text} With the time of X-Clipia-Timestamp the signature is right (secret "
                    f"{secret.id}): a proxy cuts `t` off."
                )
    return text


def _signs_body_alone(secret: Secret, signatures: Sequence[bytes], body: bytes) -> bool:
    digest = hmac.digest(secret.value, body, "sha256").hex().encode()
    return any(hmac.compare_digest(digest, each) for each in signatures)


def _explain_large(request: RejectedRequest, signed: _Signed, known: Known) -> Diagnosis:
    size = f"has {request.body_size} bytes" if request.body_size is not None else "was not kept"
    if request.reason in {"stale", "future"}:
        return Diagnosis("clock", _clock_text(request, signed, known))
    return Diagnosis(
        "large_body",
        f"No known secret made this signature. The body {size} and only its start is kept, so neither other "
        "secrets nor changes of the body were tried.",
    )


def _explain_mismatch(
    request: RejectedRequest, body: bytes, signed: _Signed, known: Known, last_used: LastUsed
) -> Diagnosis:
    own = known.secrets.get(request.source, ())
    signer = next((secret for secret in own if signed.is_by(secret, body)), None)
    if signer is not None:
        return Diagnosis(
            "clock", f"{_clock_text(request, signed, known)} It was signed with the secret {signer.id}."
        )
    found = (
        _find_other_secret(request.source, body, signed, known, last_used)
        or _find_spelling(own[:MAX_SECRETS], body, signed)
        or _find_change(own[:MAX_SECRETS], body, signed)
    )
    if found is None:
        return _explain_unknown(request, body, known, last_used)
    if abs(request.received_at - int(signed.t)) > known.tolerance:
        return found._replace(text=f"{found.text} {_clock_text(request, signed, known)}")
    return found


def _clock_text(request: RejectedRequest, signed: _Signed, known: Known) -> str:
    """Say by how much the time of a signature differs from this machine's clock."""
    off = round(request.received_at - int(signed.t))
    side = "after" if off > 0 else "before"
    return (
        f"Clock off by {off:+d} s: this machine's clock shows {abs(off)} s {side} the signature's time, and "
        f"{known.tolerance} s are allowed. If other webhooks are off by as much, correct this machine's "
        "clock; if not, the request was held up on its way, or was captured and sent again."
    )


def _find_other_secret(
    source: str, body: bytes, signed: _Signed, known: Known, last_used: LastUsed
) -> Diagnosis | None:
    """Try the retired secrets of the source and all secrets of other sources."""
    for secret in known.retired.get(source, ())[:MAX_OTHERS]:
        if signed.is_by(secret, body):
            last = last_used.get((source, secret.id))
            when = "" if last is None else f"; the last webhook with it was accepted at {_moment(last)}"
            return Diagnosis(
                "retired_secret",
                f"It was signed with the retired secret {secret.id}{when}. Clipia still uses it: let Clipia "
                "sign with a current secret, or accept the retired one again until it does.",
            )
    others = [(name, each) for name, secrets in known.secrets.items() if name != source for each in secrets]
    for name, secret in others[:MAX_OTHERS]:
        if signed.is_by(secret, body):
            return Diagnosis(
                "other_source",
                f"It was signed with the secret {secret.id} of the source {name!r}: its URL is that of "
                f"the source {source!r}, or the two secrets are mixed up.",
            )
    return None


def _find_spelling(secrets: Sequence[Secret], body: bytes, signed: _Signed) -> Diagnosis | None:
    """Try other spellings of each secret, and a signature without the time."""
    for secret in secrets:
        for cause, value, text in secret_spellings(secret):
            if signed.is_by(Secret(id=secret.id, value=value), body):
                return Diagnosis(cause, f"The configured secret {secret.id} {text}.")
        if _signs_body_alone(secret, signed.signatures, body):
            return Diagnosis("no_timestamp", _BODY_ALONE.format(secret.id))
    return None


def _find_change(secrets: Sequence[Secret], body: bytes, signed: _Signed) -> Diagnosis | None:
    """Try bodies that a proxy may have turned into this one."""
    for cause, form, text in original_bodies(body):
        for secret in secrets:
            if signed.is_by(secret, form):
                return Diagnosis(
                    cause,
                    f"{text} on its way: Clipia signed other bytes (secret {secret.id}). Let the proxy in "
                    "front pass the body on unchanged.",
                )
    return None


def _explain_unknown(request: RejectedRequest, body: bytes, known: Known, last_used: LastUsed) -> Diagnosis:
    if not body:
        return Diagnosis(
            "empty_body",
            "The body is empty, and no known secret signed an empty one: a proxy drops the body, or it is "
            "forged.",
        )
    text = (
        "No known secret made this signature, and no known change of the body explains it: it is forged or "
        "foreign."
    )
    used = [(at, secret_id) for (source, secret_id), at in last_used.items() if source == request.source]
    if not used:
        return Diagnosis(
            "unknown_secret",
            f"{text} No webhook of this source was accepted lately: is its secret right?",
        )
    at, secret_id = max(used)
    if (request.source, secret_id) in known.current_ids:
        text += (
            f" The last webhook of this source was accepted at {_moment(at)}, with the secret {secret_id}."
        )
    else:
        text += (
            f" The last webhook of this source was accepted at {_moment(at)}, with the secret {secret_id}, "
            "which is not configured any more: if Clipia still signs with it, configure it again."
        )
    return Diagnosis("unknown_secret", text)


def _moment(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")
