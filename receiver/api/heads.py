"""Heads of requests: their faults, their size, and a second reading of those that the parser misunderstands.

httptools lets through some heads that RFC 9112 forbids. It skips the body of a request that offers an
upgrade, leaves white space at the end of header values, and does not see that a body is chunked if there is
some behind that word.
"""

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final, Protocol

import httptools

Headers = Sequence[tuple[bytes, bytes]]

_END: Final = b"\r\n\r\n"
_WHITE: Final = b" \t"
"""White space that may stand around a header value and is no part of it (RFC 9110, section 5.5)."""


class Parsing(Protocol):
    """A connection with a parser that calls it back."""

    parser: httptools.HttpRequestParser
    deaf: bool
    """Whether nothing more is to be parsed."""


class HeadRewriter:
    """Feeds the parser of a connection, and gives a new parser a clean copy of a head that needs one."""

    clean_head: bytes | None = None
    """The head that the parser has just read, as it is to be read again."""
    _tail: bytes = b""
    """The last bytes of the previous read, in which the end of a head may have begun."""

    def feed(self, connection: Parsing, data: bytes) -> None:
        """Feed the parser in pieces, of which each ends where a head may end.

        If a head offers an upgrade or has white space behind a value, a new parser reads it again without
        that. The first one would skip the body of such a request, or not see that it is chunked, and it does
        not tell where the head ended. With these pieces that is always at the end of one.
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
                # As uvicorn does: a pipelined request behind the last one is no reason to refuse that.
                connection.parser.set_dangerous_leniencies(lenient_data_after_close=True)
                connection.parser.feed_data(head)
            start = end
        self._tail = (self._tail + data)[-3:] if len(data) < len(_END) else data[-3:]

    def rewrite(self, parser: httptools.HttpRequestParser, url: bytes, headers: Headers) -> None:
        """Have the head read again with its values trimmed, and without its offer of an upgrade."""
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


def is_misread(parser: httptools.HttpRequestParser, headers: Headers) -> bool:
    """Tell whether the parser misunderstands a head: it offers an upgrade, or a value ends in white space."""
    if parser.should_upgrade():
        return True
    for _, value in headers:  # noqa: SIM110 - done for each request, and a generator is slower
        if value and value[-1:] in _WHITE:
            return True
    return False


def find_fault(
    parser: httptools.HttpRequestParser, headers: Headers, *, too_large: bool
) -> HTTPStatus | None:
    """Return the status for a head that httptools lets through although no server may serve the request."""
    version = parser.get_http_version()
    if version not in {"1.0", "1.1"}:
        return HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
    if too_large:
        return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
    names = [name for name, _ in headers]
    hosts = names.count(b"host")
    if hosts > 1 or (not hosts and version == "1.1"):
        return HTTPStatus.BAD_REQUEST
    codings = _codings(headers) if b"transfer-encoding" in names else []
    if codings and (codings != [b"chunked"] or version == "1.0"):
        return HTTPStatus.BAD_REQUEST
    # The parser takes the bytes that follow for a tunnel's, whatever the headers say.
    if parser.get_method() == b"CONNECT":
        return HTTPStatus.BAD_REQUEST
    return None


def head_size(url: bytes, headers: Headers) -> int:
    """Return the bytes of a head, or of trailers."""
    return len(url) + sum(len(name) + len(value) + len(b": \r\n") for name, value in headers)


def _codings(headers: Headers) -> list[bytes]:
    return [value.strip(_WHITE).lower() for name, value in headers if name == b"transfer-encoding"]
