"""Why a connection or a file failed, in our own words.

A library's exception text may quote a password, a header or a whole statement, so no message of ours repeats
it. It tells the exception's class and what an error number or a certificate's verdict means.
"""

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

_WORDS: Final[Mapping[int, str]] = MappingProxyType(
    {
        errno.ECONNREFUSED: "connection refused: does anything listen there?",
        errno.ECONNRESET: "the other side has cut the connection",
        errno.EPIPE: "the other side has cut the connection",
        errno.EHOSTUNREACH: "no route to the host",
        errno.ENETUNREACH: "no route to the network",
        errno.ETIMEDOUT: "no answer in time",
        errno.EACCES: "access denied",
        errno.EPERM: "access denied",
        errno.ENOSPC: "the disk is full",
        errno.EMFILE: "this process has too many open files",
    }
)
# OpenSSL's verdicts (X509_verify_cert_error_string).
_CERTIFICATES: Final[Mapping[int, str]] = MappingProxyType(
    {
        9: "is not valid yet",
        10: "has expired",
        18: "is self-signed and not trusted",
        19: "is signed by an authority that is not trusted here",
        20: "is signed by an authority that is not trusted here",
        62: "is for another host name",
        64: "is for another address",
    }
)
# asyncio and redis-py keep the numbers of several failed addresses in a text only.
_NUMBER: Final = re.compile(r"\[?Err(?:no|or) ([0-9]{1,4})\b")
_CLASSES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ConnectionError": "the connection was closed or not made",
        "ProxyError": "the proxy makes no connection to the host",
        "ReadError": "the connection was cut",
        "WriteError": "the connection was cut",
        "RemoteProtocolError": "the other side has hung up or does not speak the protocol",
    }
)
_OPENSSL: Final = re.compile(r"[A-Z0-9_]{1,64}")
_LONGEST_CHAIN: Final = 20


def cause(error: BaseException) -> str:
    """Return why something failed: what an exception, or one that it comes from, says by class and number."""
    name = type(error).__name__
    for each in _chain(error):
        if words := _words(each):
            return f"{name}: {words}"
    is_late = any(type(each).__name__.endswith(("Timeout", "TimeoutError")) for each in _chain(error))
    words = "no answer in time" if is_late else _CLASSES.get(name)
    return f"{name}: {words}" if words else name


def _chain(error: BaseException) -> Iterator[BaseException]:
    each: BaseException | None = error
    for _ in range(_LONGEST_CHAIN):
        if each is None:
            return
        yield each
        if isinstance(each, BaseExceptionGroup):
            each = each.exceptions[0]
        else:
            # Suppressed contexts, too: httpcore hides the socket's error in one.
            each = each.__cause__ or each.__context__


def _words(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        verdict = _CERTIFICATES.get(error.verify_code, f"is not trusted (verdict {error.verify_code})")
        return f"the TLS certificate {verdict} (CERTIFICATE_VERIFY_FAILED)"
    if isinstance(error, ssl.SSLError):
        reason = str(error.reason or "")
        return "TLS failed" + (f" ({reason})" if _OPENSSL.fullmatch(reason) else "")
    if isinstance(error, socket.gaierror):
        return "the host name was not found"
    if not isinstance(error, OSError):
        return None
    number = error.errno
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1])
    return None if number is None else _WORDS.get(number) or os.strerror(number)
