"""TLS of destinations: trusted authorities and the client's certificate, from the files that `tls` names."""

import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

from receiver.destination_settings import DestinationSettings
from receiver.errors import UnusableFileError
from receiver.masking import register_secret


def open_tls(
    settings: DestinationSettings, *, default: Callable[[], ssl.SSLContext] = ssl.create_default_context
) -> ssl.SSLContext:
    """Return a context that checks the server's certificate and host name.

    Without `ca` it trusts the authorities of `default`: the system's, unless the client has a list.
    Raises UnusableFileError, which names the setting and never the path: a key may have been pasted there.
    """
    files = settings.tls
    ca, certificate, key = (files.ca, files.certificate, files.key) if files else (None, None, None)
    for path in {certificate, key} - {None}:
        _hold_key(str(path))
    prefix = f"destination {settings.name!r}: "
    with _usable(f"{prefix}tls.ca", content="certificates in PEM"):
        context = default() if ca is None else ssl.create_default_context(cafile=ca)
    if certificate is not None:
        setting, readable = ("tls.key", "tls.certificate or tls.key") if key else ("tls.certificate",) * 2
        with _usable(
            prefix + setting, content="a certificate and its own key in PEM", readable=prefix + readable
        ):
            # Without a callback OpenSSL would prompt on the terminal for an encrypted key's passphrase.
            context.load_cert_chain(certificate, key, password=_reject_passphrase)
    return context


class _EncryptedKeyError(Exception):
    """The key's file asks for a passphrase."""


def _reject_passphrase() -> str:
    raise _EncryptedKeyError


@contextlib.contextmanager
def _usable(setting: str, *, content: str, readable: str | None = None) -> Iterator[None]:
    """Raise UnusableFileError if a file cannot be read or lacks this content; `readable` names all files."""
    try:
        yield
    except _EncryptedKeyError:
        raise UnusableFileError(f"{setting} is encrypted: write the key without a passphrase") from None
    except ssl.SSLError:
        raise UnusableFileError(f"{setting} does not hold {content}") from None
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        reason = f": {os.strerror(number)}" if number else ""
        raise UnusableFileError(f"{readable or setting} cannot be read{reason}") from None


def _hold_key(path: str) -> None:
    """Mask the lines of a private key in logs and errors from now on."""
    try:
        text = Path(path).read_text(errors="replace")
    except (OSError, ValueError):
        return
    is_private = False
    for line in text.splitlines():
        if line.startswith("-----"):
            is_private = line.startswith("-----BEGIN") and "PRIVATE KEY" in line
        elif is_private:
            register_secret(line.strip())
