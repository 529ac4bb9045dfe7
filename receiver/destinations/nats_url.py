"""The URL of a NATS destination, and the files of its login."""

import os
import re
import ssl
from dataclasses import dataclass, field
from typing import Final

from receiver.destination_settings import DestinationSettings
from receiver.destinations.nkeys import Identity, read_identity
from receiver.destinations.tls import open_tls
from receiver.destinations.urls import BrokerUrl, split_url, usable_url

_SUBJECT: Final = re.compile(r"(?!\$)[^\s\x00-\x1f\x7f.*>]+(\.[^\s\x00-\x1f\x7f.*>]+)*")
_STREAM: Final = re.compile(r"[^\s\x00-\x1f\x7f.*>/\\]+")


class UnusableIdentityError(ValueError):
    """The file of the login cannot be used; the message names the setting and no path."""


@dataclass(frozen=True, kw_only=True)
class Login:
    """A user and password, a token, or a file; all of them may be missing."""

    user: str | None
    password: str | None = field(repr=False)
    token: str | None = field(repr=False)
    credentials: str | None
    """The path of a `.creds` file."""
    nkey: str | None
    """The path of a file with an NKey seed."""

    @property
    def shown(self) -> str:
        """The kind of login, for messages."""
        if self.credentials or self.nkey:
            return "creds file" if self.credentials else "nkey file"
        return "user, password or token"

    def read_identity(self) -> Identity | None:
        """Read the file, if the URL names one. Raises UnusableIdentityError."""
        path = self.credentials or self.nkey
        if path is None:
            return None
        try:
            return read_identity(path, with_jwt=self.credentials is not None)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UnusableIdentityError(f"the {self.shown} of the URL cannot be read: {reason}") from None
        except ValueError:
            content = "a user's JWT and seed" if self.credentials else "a user's seed (SU…)"
            raise UnusableIdentityError(f"the {self.shown} of the URL does not hold {content}") from None


@dataclass(frozen=True, kw_only=True)
class Address:
    """The servers, the login and the subject of a URL."""

    servers: tuple[str, ...]
    login: Login
    subject: str
    stream: str | None
    requires_tls: bool
    tls: ssl.SSLContext | None
    """None for the library's own context, which trusts the system's authorities."""
    timeout: float | None

    @property
    def shown(self) -> str:
        """The servers, for messages."""
        return " ".join(self.servers)


def read_url(settings: DestinationSettings) -> Address:
    """Read a destination's URL. Raises SettingsError."""
    with usable_url(
        settings,
        "nats://user:password@host:4222?subject=clipia.events or, to have the stream made, &stream=CLIPIA; "
        "with creds=file or nkey=file in place of user and password; in a password write @ : / % as "
        "%40 %3A %2F %25",
    ) as text:
        url = split_url(text, port=4222, options={"subject", "stream", "creds", "nkey"})
        subject, stream = url.options.get("subject", ""), url.options.get("stream")
        if url.path not in {"", "/"} or not _SUBJECT.fullmatch(subject):
            raise ValueError("no subject, or a path before it")
        if stream is not None and not _STREAM.fullmatch(stream):
            raise ValueError("not the name of a stream")
        return Address(
            servers=tuple(f"{url.scheme}://{host}:{port}" for host, port in url.hosts),
            login=_read_login(url),
            subject=subject,
            stream=stream,
            requires_tls=url.scheme == "tls" or settings.tls is not None,
            tls=open_tls(settings) if settings.tls else None,
            timeout=settings.timeout,
        )


def _read_login(url: BrokerUrl) -> Login:
    credentials, nkey = url.options.get("creds"), url.options.get("nkey")
    if [url.user, credentials, nkey].count(None) < 2 or "" in {url.user, credentials, nkey}:
        raise ValueError("more than one login, or an empty one")
    is_token = url.password is None
    return Login(
        user=None if is_token else url.user,
        password=url.password,
        token=url.user if is_token else None,
        credentials=credentials,
        nkey=nkey,
    )
