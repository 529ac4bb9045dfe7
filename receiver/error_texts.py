"""The text of an exception for messages and logs.

A library's exception text may quote a password, a header or a whole statement, so it is never repeated. The
text names the exception's class instead, and explains its error number or the verdict on a certificate.
"""

import errno
import os
import re
import socket
import ssl
import traceback
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Final

from receiver.errors import ReceiverError

_ERRNO_TEXTS: Final[Mapping[int, str]] = MappingProxyType(
    {
        errno.ECONNREFUSED: "connection refused: does a server listen there?",
        errno.ECONNRESET: "the other side cut the connection",
        errno.EPIPE: "the other side cut the connection",
        errno.EHOSTUNREACH: "no route to the host",
        errno.ENETUNREACH: "no route to the network",
        errno.ETIMEDOUT: "no answer in time",
        errno.EACCES: "access denied",
        errno.EPERM: "access denied",
        errno.ENOSPC: "the disk is full",
        errno.EMFILE: "this process has too many open files",
    }
)
# OpenSSL's verify codes (X509_verify_cert_error_string).
_VERDICT_TEXTS: Final[Mapping[int, str]] = MappingProxyType(
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
# If several addresses fail, asyncio and redis-py keep the error numbers in the text only.
_NUMBER: Final = re.compile(r"\[?Err(?:no|or) ([0-9]{1,4})\b")
_CLASS_TEXTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "ConnectionError": "the connection failed or was closed",
        "ProxyError": "the proxy did not connect to the host",
        "ReadError": "the connection was cut",
        "WriteError": "the connection was cut",
        "RemoteProtocolError": "the other side closed the connection or does not speak the protocol",
    }
)
_OPENSSL: Final = re.compile(r"[A-Z0-9_]{1,64}")


def error_text(error: BaseException) -> str:
    """Return one sentence for the operator: our own message, or the `cause` and the files of an OSError."""
    if isinstance(error, ReceiverError):
        return str(error)
    if isinstance(error, BaseExceptionGroup):
        return error_text(error.exceptions[0])
    if isinstance(error, OSError):
        files = [name for name in (error.filename, error.filename2) if isinstance(name, str)]
        return ": ".join([cause(error), *(name if name.isprintable() else ascii(name) for name in files)])
    return (
        f"unexpected {type(error).__name__}: set RECEIVER_LOG_LEVEL=DEBUG for a traceback, "
        "and report the error with it"
    )


def traceback_lines(error: BaseException) -> list[str]:
    """Return the tracebacks of a chain of exceptions, without the exceptions' texts."""
    lines = []
    for each in _chain(error):
        lines.append(f"{type(each).__module__}.{type(each).__qualname__} was raised at")
        lines += [line.rstrip("\n") for line in traceback.format_tb(each.__traceback__)]
    return lines


def cause(error: BaseException) -> str:
    """Return the exception's class, and the meaning of its type or number if we know it.

    The exceptions that it was raised from are searched, too.
    """
    name = type(error).__name__
    chain = list(_chain(error))
    text = next(filter(None, map(_type_text, chain)), None)
    if text is None:
        is_late = any(type(each).__name__.endswith(("Timeout", "TimeoutError")) for each in chain)
        text = "no answer in time" if is_late else _CLASS_TEXTS.get(name)
    return f"{name}: {text}" if text else name


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that led to it, the cause of the cause last."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        if isinstance(each, BaseExceptionGroup):
            each = each.exceptions[0]
        else:
            # Even a suppressed context counts: httpcore hides the socket's error in one.
            each = each.__cause__ or each.__context__


def _type_text(error: BaseException) -> str | None:
    if isinstance(error, ssl.SSLCertVerificationError):
        verdict = _VERDICT_TEXTS.get(error.verify_code, f"is not trusted (verify code {error.verify_code})")
        return f"the TLS certificate {verdict} (CERTIFICATE_VERIFY_FAILED)"
    if isinstance(error, ssl.SSLError):
        reason = str(error.reason or "")
        return "TLS failed" + (f" ({reason})" if _OPENSSL.fullmatch(reason) else "")
    if isinstance(error, socket.gaierror):
        return "the host name was not found"
    return _errno_text(error) if isinstance(error, OSError) else None


def _errno_text(error: OSError) -> str | None:
    number = error.errno
    if number is None and (found := _NUMBER.search(str(error))):
        number = int(found[1])
    return None if number is None else _ERRNO_TEXTS.get(number) or os.strerror(number)
