"""Bearer tokens: their storage, their comparison, and rejected requests."""

import hmac
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr
from starlette.datastructures import Headers

from receiver.api.answers import status_of
from receiver.api.auth import Caller, Tokens
from receiver.errors import RequestError
from receiver.setting_fields import ApiToken

FIRST, LAST = "token-of-first-0123456789", "token-of-last-0123456789"
TOKENS = Tokens(
    [
        ApiToken(name="first", token=SecretStr(FIRST), scopes=frozenset({"read"})),
        ApiToken(name="middle", token=SecretStr("token-of-middle-0123456789"), scopes=frozenset()),
        ApiToken(name="last", token=SecretStr(LAST), scopes=frozenset({"submit", "operate"})),
    ]
)


def headers(authorization: str) -> Headers:
    """Return the headers of a request as the server decodes them: bytes, read as Latin-1."""
    return Headers(raw=[(b"authorization", authorization.encode("latin-1"))])


def test_a_token_leads_to_its_caller() -> None:
    """Each token stands for one name and its scopes."""
    assert TOKENS.caller(headers(f"Bearer {FIRST}")) == Caller(name="first", scopes=frozenset({"read"}))
    assert TOKENS.caller(headers(f"bearer  {LAST} ")) == Caller(
        name="last", scopes=frozenset({"submit", "operate"})
    )
    assert TOKENS.caller(Headers(raw=[])) is None


@given(st.text(st.characters(max_codepoint=255)), st.sampled_from(["", "Bearer ", "bearer ", "Basic "]))
def test_no_other_text_is_a_token(text: str, scheme: str) -> None:
    """G1: only a known token has a caller; no bytes in a header raise an exception."""
    found = TOKENS.caller(headers(scheme + text))
    assert found is None or text.strip() in (FIRST, LAST)


@pytest.mark.parametrize("token", [FIRST, LAST, "token-of-nobody-0123456789", FIRST[:-1], "x"])
def test_every_token_is_compared(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    """G1: the number and length of the comparisons do not depend on the token; each is constant-time."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def noting(known: bytes, given: bytes) -> bool:
        compared.append((len(known), len(given)))
        return compare(known, given)

    monkeypatch.setattr("receiver.api.auth.hmac.compare_digest", noting)
    TOKENS.caller(headers(f"Bearer {token}"))
    assert compared == [(32, 32)] * 3


def test_tokens_are_not_kept() -> None:
    """G1, G8: memory has the tokens' digests only, which cannot be used as tokens."""
    kept = pickle.dumps(vars(TOKENS))
    assert b"first" in kept
    assert FIRST.encode() not in kept
    assert FIRST not in repr(TOKENS)


def test_a_scope_has_to_be_there() -> None:
    """G1: 401 without a caller, 403 without the scope; a scope contains no other scope."""
    assert TOKENS.require(headers(f"Bearer {FIRST}"), "read").name == "first"
    with pytest.raises(RequestError) as without_token:
        TOKENS.require(headers("Bearer x"), "read")
    assert (status_of(without_token.value), without_token.value.type, without_token.value.code) == (
        401,
        "authentication_error",
        "invalid_token",
    )
    with pytest.raises(RequestError) as without_scope:
        TOKENS.require(headers(f"Bearer {LAST}"), "read")
    assert (status_of(without_scope.value), without_scope.value.type, without_scope.value.code) == (
        403,
        "permission_error",
        "insufficient_scope",
    )
    assert "last" not in str(without_scope.value)


def test_without_tokens_every_request_is_rejected() -> None:
    """G1: if no token is configured, every request is rejected, and the answer names the setting."""
    empty = Tokens([])
    assert not empty
    assert TOKENS
    with pytest.raises(RequestError, match="RECEIVER_API_TOKENS"):
        empty.require(headers(f"Bearer {FIRST}"), "read")
