"""The diagnosis of rejected requests: each cause in words, within a bounded number of digests."""

import base64
import hashlib
import hmac
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from receiver.core import diagnosis
from receiver.core.diagnosis import CAUSES, Diagnosis, Known, LastUsed, RejectedRequest, diagnose
from receiver.core.json_forms import MAX_DEPTH, MAX_FORM_BYTES, MAX_TOKENS, json_forms
from receiver.core.remedies import REMEDIES
from receiver.core.signature import Secret, verify
from receiver.errors import SignatureError
from receiver.settings import Settings

NOW = 1_790_000_000
TEXT = "whsec_bG9uZyBlbm91Z2ggdG8gYmUgYSBzZWNyZXQ="
BARE = "c2VjcmV0IHdpdGhvdXQgaXRzIHByZWZpeA"
SECRET, UNPREFIXED = Secret.from_text(TEXT), Secret.from_text(BARE)
RETIRED, OTHER = Secret.from_text("whsec_retired-0123456789"), Secret.from_text("whsec_other-0123456789abcd")
KNOWN = Known(
    secrets={"clipia": [SECRET, UNPREFIXED], "staging": [OTHER]}, retired={"clipia": [RETIRED]}, tolerance=300
)
CONTENT = {"request_id": "r-1", "status": "OK", "note": "grün 😀 a/b", "n": [1, 2.50, {}, []], "cost": 12}
BODY = json.dumps(CONTENT).encode()
LAST: LastUsed = {
    ("clipia", RETIRED.id): datetime(2026, 9, 20, 14, 2, tzinfo=UTC),
    ("staging", OTHER.id): datetime(2026, 9, 21, 6, 0, tzinfo=UTC),
}


def mac(secret: str | bytes, signed: bytes) -> str:
    """Return the HMAC of bytes."""
    key = secret.encode() if isinstance(secret, str) else secret
    return hmac.new(key, signed, hashlib.sha256).hexdigest()


def header(body: bytes = BODY, *, secret: str | bytes = TEXT, at: int = NOW) -> str:
    """Return the signature header of a body."""
    return f"t={at},v1={mac(secret, b'%d.%b' % (at, body))}"


def judge(
    *signatures: str,
    body: bytes = BODY,
    others: Mapping[str, str] | None = None,
    last_used: LastUsed = LAST,
    known: Known = KNOWN,
    kept: int | None = None,
) -> Diagnosis:
    """Diagnose a request that `verify` rejects; fail if it accepts the request."""
    values = [value.encode() for value in signatures]
    with pytest.raises(SignatureError) as caught:
        verify(values, body, secrets=known.secrets["clipia"], now=NOW, tolerance=known.tolerance)
    headers = [(b"x-clipia-signature", value) for value in values]
    headers += [(name.encode(), value.encode()) for name, value in (others or {}).items()]
    request = RejectedRequest(
        "clipia", caught.value.reason, NOW, "/clipia/webhook", "192.0.2.7", headers, body[:kept], len(body)
    )
    return diagnose(request, known, last_used)


ALONE = mac(TEXT, BODY)
CASES: dict[str, tuple[str, str, Callable[[], Diagnosis]]] = {
    name: (cause, words, judged)
    for name, cause, words, judged in (
        (
            "ahead",
            "clock",
            "Clock off by +413 s: this machine's clock shows 413 s after",
            partial(judge, header(at=NOW - 413)),
        ),
        (
            "behind",
            "clock",
            "Clock off by -301 s: this machine's clock shows 301 s before",
            partial(judge, header(at=NOW + 301)),
        ),
        ("ahead, cut off", "clock", "Clock off by +999 s", partial(judge, header(at=NOW - 999), kept=10)),
        (
            "retired",
            "retired_secret",
            f"{RETIRED.id}; the last webhook with it was accepted at 2026-09-20 14:02:00Z",
            partial(judge, header(secret=RETIRED.value)),
        ),
        (
            "retired long ago",
            "retired_secret",
            f"the retired secret {RETIRED.id}. Clipia still uses it",
            partial(judge, header(secret=RETIRED.value), last_used={}),
        ),
        (
            "of another source",
            "other_source",
            f"the secret {OTHER.id} of the source 'staging'",
            partial(judge, header(secret=OTHER.value)),
        ),
        (
            "without prefix",
            "secret_prefix",
            f"{UNPREFIXED.id} was pasted without its prefix whsec_",
            partial(judge, header(secret=f"whsec_{BARE}")),
        ),
        (
            "with prefix",
            "secret_prefix",
            f"{SECRET.id} has the prefix whsec_, but",
            partial(judge, header(secret=TEXT[6:])),
        ),
        *(
            (
                f"around {around!r}",
                "secret_spelling",
                f"{SECRET.id} is right, but the sender's copy",
                partial(judge, header(secret=around.format(TEXT))),
            )
            for around in ("{}\n", "{}\r\n", " {}", "{} ", '"{}"', "'{}'")
        ),
        (
            "decoded",
            "secret_spelling",
            f"{SECRET.id} is right, but the sender decodes",
            partial(judge, header(secret=base64.b64decode(TEXT[6:]))),
        ),
        *(
            (
                f"appended {end!r}",
                "newline_added",
                "A newline was appended to the body on its way",
                partial(judge, header(), body=BODY + end),
            )
            for end in (b"\n", b"\r\n")
        ),
        *(
            (
                f"removed {end!r}",
                "newline_removed",
                "A newline at the end of the body was removed",
                partial(judge, header(BODY + end)),
            )
            for end in (b"\n", b"\r\n")
        ),
        (
            "white space",
            "newline_added",
            "White space was added around the body",
            partial(judge, header(), body=b" " + BODY + b" \n"),
        ),
        (
            "to CRLF",
            "newlines_changed",
            "The line ends",
            partial(judge, header(b"{\n}\n"), body=b"{\r\n}\r\n"),
        ),
        ("to LF", "newlines_changed", "The line ends", partial(judge, header(b"{\r\n}\r\n"), body=b"{\n}\n")),
        (
            "re-encoded and late",
            "json_rewritten",
            "Clock off by +400 s",
            partial(judge, header(at=NOW - 400), body=json.dumps(CONTENT, indent=2).encode()),
        ),
        (
            "alone",
            "no_timestamp",
            f"has no time `t`. The signature is for the body alone (secret {SECRET.id})",
            partial(judge, f"v1={ALONE}"),
        ),
        ("bare digest", "no_timestamp", "for the body alone", partial(judge, ALONE)),
        ("other scheme", "no_timestamp", "for the body alone", partial(judge, f"sha256={ALONE.upper()}")),
        ("alone beside a time", "no_timestamp", "for the body alone", partial(judge, f"t={NOW},v1={ALONE}")),
        (
            "time elsewhere",
            "no_timestamp",
            "With the time of X-Clipia-Timestamp the signature is right",
            partial(judge, f"v1={header()[-64:]}", others={"x-clipia-timestamp": str(NOW)}),
        ),
        ("no time", "no_timestamp", "X-Clipia-Signature has no time `t`.", partial(judge, "v1=" + "0" * 64)),
        ("missing", "no_signature", "it is not from Clipia", partial(judge)),
        (
            "removed",
            "no_signature",
            "a proxy removes this header",
            partial(judge, others={"x-clipia-webhook-id": "1"}),
        ),
        (
            "two headers",
            "two_signatures",
            "several X-Clipia-Signature headers",
            partial(judge, header(), header()),
        ),
        ("two times", "two_signatures", "several times `t`", partial(judge, f"{header()},{header()}")),
        ("milliseconds", "malformed", "in milliseconds", partial(judge, f"t={NOW}000,v1={ALONE}")),
        ("capitals", "malformed", "capital letters", partial(judge, f"t={NOW},v1={'A' * 64}")),
        ("short", "malformed", "no `v1` of 64", partial(judge, f"t={NOW},v1=abc")),
        ("long", "malformed", "more than 1024 bytes", partial(judge, f"{header()},{'x' * 1024}")),
        ("odd time", "malformed", "not of the form", partial(judge, f"t=+{NOW},v1={ALONE}")),
        ("empty", "empty_body", "The body is empty", partial(judge, header(), body=b"")),
        (
            "cut off",
            "large_body",
            f"The body has {len(BODY)} bytes and only its start is kept",
            partial(judge, "t=1790000000,v1=" + "0" * 64, kept=10),
        ),
        (
            "forged",
            "unknown_secret",
            f"at 2026-09-20 14:02:00Z, with the secret {RETIRED.id}, which is not configured",
            partial(judge, header(secret="forged")),
        ),
        (
            "foreign",
            "unknown_secret",
            f"at 2026-09-21 00:00:00Z, with the secret {SECRET.id}.",
            partial(
                judge,
                header(secret="x"),
                last_used={**LAST, ("clipia", SECRET.id): datetime(2026, 9, 21, tzinfo=UTC)},
            ),
        ),
        (
            "never used",
            "unknown_secret",
            "No webhook of this source was accepted lately",
            partial(judge, header(secret="x"), last_used={}),
        ),
        (
            "no json",
            "unknown_secret",
            "forged or foreign",
            partial(judge, header(secret="x"), body=b'{"a": nonsense'),
        ),
        (
            "no text",
            "unknown_secret",
            "forged or foreign",
            partial(judge, header(secret="x"), body=b"\xff\x00"),
        ),
        (
            "half an emoji",
            "unknown_secret",
            "forged or foreign",
            partial(judge, header(secret="x"), body=b'["\\ud800"]'),
        ),
        (
            "deep",
            "unknown_secret",
            "forged or foreign",
            partial(judge, header(secret="x"), body=b"[" * 16_000),
        ),
    )
}


@pytest.mark.parametrize("name", CASES)
def test_each_mistake_has_its_words(name: str) -> None:
    """G14: each cause of a rejection is named in words, with the id of the secret and the seconds."""
    cause, words, judged = CASES[name]
    found = judged()
    assert found.cause == cause, found
    assert words in found.text


@pytest.mark.parametrize("name", CASES)
def test_no_diagnosis_quotes_a_secret_or_the_request(name: str) -> None:
    """G8, G14: a diagnosis has neither a secret nor a digest nor a part of the body."""
    text = CASES[name][2]().text
    secrets = (SECRET, UNPREFIXED, RETIRED, OTHER)
    quoted = [*(secret.value.decode() for secret in secrets), TEXT[6:], ALONE, header()[-64:], "r-1", "grün"]
    assert [each for each in quoted if each in text] == []


DUMPS: list[dict[str, Any]] = [{}, {"separators": (",", ":")}, {"indent": 2}, {"indent": 4}]
WRITERS = list(itertools.product(DUMPS, (True, False)))


@pytest.mark.parametrize("made", WRITERS, ids=str)
@pytest.mark.parametrize("sent", WRITERS, ids=str)
def test_json_that_was_written_anew_is_recognized(made: Any, sent: Any) -> None:
    """A2, G14: if a proxy has written the JSON anew, compact, spaced or indented, the diagnosis says so."""
    original, received = (
        json.dumps(CONTENT, ensure_ascii=each[1], **each[0]).encode() for each in (made, sent)
    )
    if original == received:
        return
    for before, after in itertools.product((b"", b"\n"), repeat=2):
        found = judge(header(original + before), body=received + after)
        assert (found.cause, "A proxy re-encoded the JSON on its way" in found.text) == (
            "json_rewritten",
            True,
        )


def test_escaped_slashes_are_recognized() -> None:
    """G14: a sender may escape slashes, and the proxy does not."""
    original = json.dumps(CONTENT, separators=(",", ":")).replace("/", r"\/").encode()
    assert judge(header(original), body=BODY).cause == "json_rewritten"


def test_the_forms_keep_the_order_the_numbers_and_doubled_names() -> None:
    """G14: only white space and escapes differ between the forms of a JSON text."""
    body = b'{"b": 1.50, "a": 1E2, "b": -0, "c": 12345678901234567890}'
    forms = set(json_forms(body))
    assert b'{"b":1.50,"a":1E2,"b":-0,"c":12345678901234567890}' in forms
    assert body not in forms


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[1,]", b"\xff", b'{"a": 1} x', b"[" + b"0," * MAX_TOKENS + b"0]"),
        *(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), b'{"a":' * 3000, b"[" * 16_000),
    ],
)
def test_no_forms(body: bytes) -> None:
    """G14: bytes that are no JSON have no other forms, and JSON with too many values is left out."""
    assert list(json_forms(body)) == []


def test_the_forms_are_bounded() -> None:
    """G11: brackets in strings are no depth, and forms that grow too much are left out."""
    assert len(set(json_forms(b'["\\"' + b"[" * 100 + b'", 1]'))) == 3
    deep = b"[" * MAX_DEPTH + b"0," * 1000 + b"0" + b"]" * MAX_DEPTH
    forms = list(json_forms(deep))
    assert forms
    assert max(map(len, forms)) <= MAX_FORM_BYTES


BEFORE = {
    ("unknown_path", True): ("wrong_url", "The path is none of the callback"),
    ("unknown_path", False): ("wrong_url", "probably a scanner"),
    ("unknown_source", True): ("wrong_url", "the sources are: clipia, staging. It has a Clipia signature"),
    ("encoding", True): ("encoding", "a proxy has compressed it"),
    ("too_large", True): ("too_large", "larger than RECEIVER_MAX_BODY_BYTES"),
    ("too_slow", True): ("too_slow", "did not arrive in time"),
}


@pytest.mark.parametrize("case", BEFORE, ids=str)
def test_rejections_before_the_signature(case: tuple[str, bool]) -> None:
    """G14: a request whose body was not read is explained by its reason."""
    reason, is_signed = case
    headers = [(b"x-clipia-signature", header().encode())] if is_signed else []
    request = RejectedRequest("-", reason, NOW, "/x", None, headers, None, None)
    found = diagnose(request, KNOWN, {})
    assert (found.cause, BEFORE[case][1] in found.text) == (BEFORE[case][0], True), found


def test_each_cause_is_in_a_table() -> None:
    """No cause is left without a test."""
    assert {case[0] for case in (*CASES.values(), *BEFORE.values())} == set(CAUSES)


def test_each_cause_has_a_remedy() -> None:
    """Each cause has a sentence on what to do, and the settings in it exist."""
    assert REMEDIES.keys() == set(CAUSES)
    named = set(re.findall(r"\b(?:RECEIVER|CLIPIA)_[A-Z_]+", " ".join(REMEDIES.values())))
    known = {f"RECEIVER_{name}".upper() for name in Settings.model_fields}
    known |= {str(field.validation_alias) for field in Settings.model_fields.values()}
    assert named <= known


def test_the_number_of_digests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """G14: a diagnosis computes a few hundred digests at most, however many secrets there are."""
    computed = []
    real = Secret.hex_digest

    def count(secret: Secret, t: bytes, body: bytes) -> bytes:
        computed.append(len(body))
        return real(secret, t, body)

    monkeypatch.setattr(Secret, "hex_digest", count)
    many: Sequence[Secret] = [Secret.from_text(f"whsec_{number:032x}") for number in range(100)]
    known = Known(secrets={"clipia": many, "other": many}, retired={"clipia": many}, tolerance=300)
    large = json.dumps({"request_id": "r-1", "note": "ä/" * 2000}, ensure_ascii=False).encode()
    computed.clear()
    headers = [(b"x-clipia-signature", header(secret="x").encode())]
    request = RejectedRequest("clipia", "mismatch", NOW, "/", None, headers, large, len(large))
    assert diagnose(request, known, {}).cause == "unknown_secret"
    others = 2 * diagnosis.MAX_OTHERS
    assert 0 < len(computed) <= len(many) + others + diagnosis.MAX_SECRETS * 50
