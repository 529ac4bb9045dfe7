"""Sessions of the dashboard: a signed cookie, so that each process knows the logins of the others.

The key of the signature is the digest of the login's token: if the token leaves the settings, its sessions
end. The cookie holds no token.
"""

import secrets
from dataclasses import dataclass, replace
from typing import Final

from itsdangerous import BadData, URLSafeSerializer

from receiver.api.auth import KnownToken, Tokens

COOKIE: Final = "__Host-receiver-session"
"""With this prefix a browser takes the cookie only over HTTPS or from loopback, and for no other host."""
IDLE_SECONDS: Final = 60 * 60
"""A session without a visit for so long ends. A page that reads itself again makes no visit."""
LONGEST_SECONDS: Final = 12 * 60 * 60
_RENEW_SECONDS: Final = 60
_MAX_LENGTH: Final = 2048


@dataclass(frozen=True, kw_only=True)
class Session:
    """A login. Times are seconds since the epoch."""

    token: KnownToken
    started: int
    seen: int
    nonce: str
    """Makes each login's cookie another one."""

    @property
    def cookie(self) -> str:
        """The value of its cookie."""
        fields = [self.token.caller.name, self.started, self.seen, self.nonce]
        return _serializer(self.token).dumps(fields)

    def renewed(self, now: float) -> "Session | None":
        """Return the session with a visit now; None if the last one was just before."""
        return replace(self, seen=int(now)) if now - self.seen > _RENEW_SECONDS else None


class Sessions:
    """Begins sessions, and reads them from cookies."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    def begin(self, token: str, *, now: float) -> Session | None:
        """Return a new session; None if the token is unknown."""
        known = self._tokens.find(token)
        if known is None:
            return None
        return Session(token=known, started=int(now), seen=int(now), nonce=secrets.token_urlsafe(16))

    def read(self, cookie: str, *, now: float) -> Session | None:
        """Return the session of a cookie; None if it is not one of ours, or has ended."""
        if len(cookie) > _MAX_LENGTH:
            return None
        for token in self._tokens:
            # The signature comes first: the payload of a stranger may unpack to megabytes.
            try:
                name, started, seen, nonce = _serializer(token).loads(cookie)
            except BadData:
                continue
            if name == token.caller.name:
                is_live = now - seen <= IDLE_SECONDS and now - started <= LONGEST_SECONDS
                return Session(token=token, started=started, seen=seen, nonce=nonce) if is_live else None
        return None


def _serializer(token: KnownToken) -> URLSafeSerializer:
    return URLSafeSerializer(token.digest, salt="receiver dashboard session")
