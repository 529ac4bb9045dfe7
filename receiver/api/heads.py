"""Heads of requests: faults, size, and a second parse of the heads that httptools misreads.

httptools accepts some heads that RFC 9112 forbids. It skips the body of a request that offers an upgrade,
keeps white space at the end of header values, and does not see that a body is chunked if white space follows
the word `chunked`.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final, Literal, Protocol

import httptools

Headers = Sequence[tuple[bytes, bytes]]

_END: Final = b"\r\n\r\n"
_LEAST_HOSTS: Final = {"1.0": 0, "1.1": 1}
"""The least number of `Host` in a head, by version of HTTP (RFC 9112, section 3.2)."""
_WHITE: Final = b" \t"
"""White space around a header value; it is not part of the value (RFC 9110, section 5.5)."""


class Parsing(Protocol):
    """A connection with a parser that calls its methods."""

    parser: httptools.HttpRequestParser
    deaf: bool
    """Whether further bytes of the connection are ignored."""


class HeadRewriter:
    """Feeds the parser of a connection, and gives a new parser a clean copy of a head that needs one."""

    clean_head: bytes | None = None
    """A copy of the head that the parser has just read, for a second parse."""
    _tail: bytes = b""
    """The last bytes of the previous read: the end of a head may be split between two reads."""

    def feed(self, connection: Parsing, data: bytes) -> None:
        """Feed the parser in pieces, each of which ends at a possible end of a head.

        If a head offers an upgrade or a value ends in white space, a new parser reads a clean copy of it. The
        first parser would skip the body of such a request, or not see that it is chunked, and it does not
        tell at which byte the head ended. With these pieces, a head always ends where a piece ends.
        """
        view = memoryview(data)
        start = 0
        while start < len(data) and not connection.deaf:
            end = self._next_cut(data, start)
            try:
                connection.parser.feed_data(view[start:end])
            except (httptools.HttpParserUpgrade, httptools.HttpParserError):
                if self.clean_head is None:
                    raise
            if self.clean_head is not None:
                head, self.clean_head = self.clean_head, None
                connection.parser = httptools.HttpRequestParser(connection)
                # Like uvicorn: bytes behind a request with `connection: close` do not make it invalid.
                connection.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                connection.parser.feed_data(head)
            start = end
        self._tail = (self._tail + data)[-3:] if len(data) < len(_END) else data[-3:]

    def rewrite(self, parser: httptools.HttpRequestParser, url: bytes, headers: Headers) -> None:
        """Have the head parsed again with trimmed values and without `Upgrade`."""
        lines = [b"%b %b HTTP/%b" % (parser.get_method(), url, parser.get_http_version().encode())]
        lines += [b"%b: %b" % (name, value.strip(_WHITE)) for name, value in headers if name != b"upgrade"]
        self.clean_head = b"\r\n".join([*lines, b"", b""])

    def _next_cut(self, data: bytes, start: int) -> int:
        if start == 0 and self._tail.endswith((b"\r", b"\n")):
            split = (self._tail + data[:3]).find(_END)
            if split >= 0:
                return split + len(_END) - len(self._tail)
        at = data.find(_END, start)
        return len(data) if at < 0 else at + len(_END)


def examine(
    parser: httptools.HttpRequestParser, headers: Headers, *, too_large: bool
) -> HTTPStatus | Literal["misread"] | None:
    """Find the faults of a head that httptools accepts.

    Return the status for a head that a server must reject; `misread` if it offers an upgrade or a value ends
    in white space; None if it is valid.
    """
    version = parser.get_http_version()
    least_hosts = _LEAST_HOSTS.get(version)
    if least_hosts is None:
        return HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
    if too_large:
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    hosts, is_coded, is_padded = _scan(headers)
    if not least_hosts <= hosts <= 1:
        return HTTPStatus.BAD_REQUEST
    if is_coded and not _is_chunked_once(headers, version):
        return HTTPStatus.BAD_REQUEST
    # After CONNECT the parser takes all further bytes for a tunnel, regardless of the headers.
    if parser.get_method() == b"CONNECT":
        return HTTPStatus.BAD_REQUEST
    return "misread" if is_padded or parser.should_upgrade() else None


def _scan(headers: Headers) -> tuple[int, bool, bool]:
    """Return the number of `Host`, whether there is a coding, and whether a value ends in white space."""
    hosts, is_coded, is_padded = 0, False, False
    # One loop for all: this runs for each request.
    for name, value in headers:
        if name == b"host":
            hosts += 1
        elif name == b"transfer-encoding":
            is_coded = True
        if value and value[-1] in _WHITE:
            is_padded = True
    return hosts, is_coded, is_padded


def head_size(url: bytes, headers: Headers) -> int:
    """Return the bytes of a head, or of trailers."""
    return len(url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in headers)


def _is_chunked_once(headers: Headers, version: str) -> bool:
    codings = [value.strip(_WHITE).lower() for name, value in headers if name == b"transfer-encoding"]
    return codings == [b"chunked"] and version == "1.1"
