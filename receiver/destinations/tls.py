"""TLS of destinations: whom to trust, and the certificate to show, from the files that `tls` names."""

import os
import ssl
from collections.abc import Callable
from pathlib import Path

from receiver.destination_settings import DestinationSettings
from receiver.errors import UnusableFileError
from receiver.masking import register_secret


def open_tls(
    settings: DestinationSettings, *, usual: Callable[[], ssl.SSLContext] = ssl.create_default_context
) -> ssl.SSLContext:
    """Return a context that checks the server's certificate and host name.

    Without `ca` it trusts the authorities of the `usual` one: the system's, unless the client has a list.
    Raises UnusableFileError, which names the setting and never the path: a key may have been pasted there.
    """
    files = settings.tls
    ca, certificate, key = (files.ca, files.certificate, files.key) if files else (None, None, None)
    for path in {certificate, key} - {None}:
        _hold_key(str(path))
    name, setting = f"destination {settings.name!r}", "tls.ca"
    try:
        context = usual() if ca is None else ssl.create_default_context(cafile=ca)
        setting = "tls.key" if key else "tls.certificate"
        if certificate is not None:
            # Without an answer of ours OpenSSL asks at the terminal for an encrypted key's passphrase.
            context.load_cert_chain(certificate, key, password=_refuse_passphrase)
    except _EncryptedKeyError:
        raise UnusableFileError(
            f"{name}: {setting} is encrypted: write the key without a passphrase"
        ) from None
    except ssl.SSLError:
        wanted = "certificates in PEM" if setting == "tls.ca" else "a certificate and its own key in PEM"
        raise UnusableFileError(f"{name}: {setting} does not hold {wanted}") from None
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        why = f": {os.strerror(number)}" if number else ""
        where = setting if setting == "tls.ca" or not key else "tls.certificate or tls.key"
        raise UnusableFileError(f"{name}: {where} cannot be read{why}") from None
    return context


class _EncryptedKeyError(Exception):
    """The key's file asks for a passphrase."""


def _refuse_passphrase() -> str:
    raise _EncryptedKeyError


def _hold_key(path: str) -> None:
    """Remember the lines of a private key."""
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
