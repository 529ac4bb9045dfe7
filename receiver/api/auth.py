"""Bearer tokens of the internal API."""

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from starlette.datastructures import Headers

from receiver.errors import RequestError
from receiver.setting_fields import ApiToken, Scope


@dataclass(frozen=True, kw_only=True)
class Caller:
    """The internal service that makes a request, and its scopes."""

    name: str
    scopes: frozenset[Scope]


class Callers(Protocol):
    """Finds the caller of a request."""

    def require(self, headers: Headers, scope: Scope) -> Caller:
        """Return the caller. Raises RequestError if it is unknown or lacks the scope."""


class OneCaller:
    """Answers each request as one caller's: for calls inside a process, without a token."""

    def __init__(self, caller: Caller) -> None:
        self._caller: Final = caller

    def require(self, _headers: Headers, scope: Scope) -> Caller:
        """Return the caller. Raises RequestError if it lacks the scope."""
        return _with_scope(self._caller, scope)


@dataclass(frozen=True, kw_only=True)
class KnownToken:
    """A token of the settings: its digest alone, so that a memory dump shows no token."""

    digest: bytes
    caller: Caller


class Tokens:
    """Finds the caller of a token."""

    def __init__(self, tokens: Sequence[ApiToken]) -> None:
        self._known = [
            KnownToken(
                digest=_digest(token.token.get_secret_value()),
                caller=Caller(name=token.name, scopes=token.scopes),
            )
            for token in tokens
        ]

    def __bool__(self) -> bool:
        return bool(self._known)

    def find(self, token: str) -> KnownToken | None:
        """Return a token of the settings; None if it is unknown."""
        digest = _digest(token.strip())
        found = None
        for known in self._known:
            # A break after the match would make the time of an answer depend on the token.
            if hmac.compare_digest(known.digest, digest):
                found = known
        return found

    def __iter__(self) -> Iterator[KnownToken]:
        """Iterate over the tokens of the settings."""
        return iter(self._known)

    def caller(self, headers: Headers) -> Caller | None:
        """Return the caller that a request's token belongs to; None if the token is missing or unknown."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            return None
        known = self.find(token)
        return None if known is None else known.caller

    def require(self, headers: Headers, scope: Scope) -> Caller:
        """Return the caller. Raises RequestError without a known token (401) or without the scope (403)."""
        return _with_scope(self.identify(headers), scope)

    def identify(self, headers: Headers) -> Caller:
        """Return the caller, whatever its scopes. Raises RequestError without a known token (401)."""
        caller = self.caller(headers)
        if caller is None:
            hint = "" if self else " No token is configured yet: set RECEIVER_API_TOKENS."
            raise RequestError(
                f"Send Authorization: Bearer <token>.{hint}",
                code="invalid_token",
                type_="authentication_error",
            )
        return caller


def _with_scope(caller: Caller, scope: Scope) -> Caller:
    """Return the caller. Raises RequestError if it lacks the scope."""
    if scope not in caller.scopes:
        raise RequestError(
            f"This needs the scope `{scope}`.", code="insufficient_scope", type_="permission_error"
        )
    return caller


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
