"""One call of the internal API: it is sent, and its answer becomes an object or an error."""

import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Final, Generic, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import orjson
from pydantic import TypeAdapter, ValidationError

from receiver.client.errors import error_of, is_foreign, unavailable
from receiver.core.request_values import check_key
from receiver.errors import ReceiverUnavailable, SettingsError
from receiver.masking import mask, register_secret, register_url

T = TypeVar("T")

MAX_PAGE_ROWS: Final = 200
"""The API's largest page."""
MAX_ANSWER_BYTES: Final = 256 * 1024 * 1024
"""A larger answer is not read to its end."""
MAX_LINE_BYTES: Final = 1024 * 1024
"""The longest line of a stream."""
CONNECT_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 120.0
"""How long the receiver may be silent, besides the time for which a call asks it to wait."""
_HIDDEN: Final = frozenset(" \t\"'<>\\^`{|}@?#")


class Answer(NamedTuple):
    """A successful answer."""

    content: bytes
    headers: httpx.Headers


@dataclass(frozen=True, kw_only=True)
class Page(Generic[T]):
    """A page of a list."""

    data: list[T]
    next: str | None
    """The `cursor` of the following page; None on the last one."""


class Calls:
    """Sends calls to a receiver; classes over it have the methods."""

    def __init__(self, url: str, token: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        """`url` is that of the listener with the internal API. Raises SettingsError for a wrong URL or token.

        Over plain http the token and the answers are readable on the way: use it on trusted networks alone.
        `transport` takes the place of the network.
        """
        register_url(url)
        register_secret(token)
        self._origin: Final = _read_origin(url)
        if not (token.isascii() and token.isprintable()) or " " in token or not token:
            raise SettingsError("the receiver's token: it has a character that no token has; copy it again")
        headers = {"authorization": f"Bearer {token}", "accept-encoding": "identity"}
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS, pool=None)
        try:
            self._http: Final = httpx.AsyncClient(
                base_url=url, headers=headers, timeout=timeout, transport=transport
            )
        except (OSError, ValueError, ssl.SSLError, httpx.InvalidURL):
            raise SettingsError(
                "the client cannot be made: check SSL_CERT_FILE, and the proxy variables such as HTTPS_PROXY"
            ) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _get(
        self, type_: Any, path: str, query: Mapping[str, object] | None = None, *, wait: float = 0.0
    ) -> Any:
        """Return the answer to a GET."""
        return self._parsed(type_, await self._send("GET", path, query=query, wait=wait), path)

    async def _list(self, type_: Any, path: str, query: Mapping[str, object], *, limit: int) -> Page[Any]:
        """Return a page of a list. A page with more rows than the API's largest takes several calls."""
        rows: list[Any] = []
        more = dict(query)
        while True:
            more["limit"] = min(limit - len(rows), MAX_PAGE_ROWS)
            page = await self._get(Page[type_], path, more)
            rows += page.data
            if page.next is None or len(rows) >= limit:
                return Page(data=rows, next=page.next)
            more["cursor"] = page.next

    async def _act(
        self,
        type_: Any,
        method: str,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        key: str | None = None,
        reason: str | None = None,
        wait: float = 0.0,
    ) -> Any:
        """Return the answer to a call that changes something; `key` is its Idempotency-Key.

        The `reason` goes on record with an action of an operator.
        """
        sent = self._send(method, path, query={"reason": reason}, body=body, key=key, wait=wait)
        return self._parsed(type_, await sent, path)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, object] | None = None,
        body: Mapping[str, object] | None = None,
        key: str | None = None,
        wait: float = 0.0,
    ) -> Answer:
        headers = [] if key is None else [(b"idempotency-key", check_key(key).encode())]
        if body is not None:
            headers.append((b"content-type", b"application/json"))
        request = self._http.build_request(
            method,
            path,
            params=tuple(_texts(query or {})),
            content=None if body is None else orjson.dumps(_given(body)),
            headers=headers,
            timeout=httpx.Timeout(ANSWER_SECONDS + wait, connect=CONNECT_SECONDS, pool=None),
        )
        try:
            response = await self._http.send(request, stream=True, follow_redirects=False)
            try:
                content = await self._read(response)
            finally:
                await response.aclose()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise unavailable(self._origin, method, error) from None
        if response.is_success:
            return Answer(content, response.headers)
        raise error_of(self._origin, method, path, response, content)

    async def _lines(
        self, path: str, query: Mapping[str, object], *, silent_for: float
    ) -> AsyncGenerator[bytes]:
        """Iterate over the lines of an answer; it may be silent for so many seconds."""
        timeout = httpx.Timeout(silent_for, connect=CONNECT_SECONDS, pool=None)
        request = self._http.build_request("GET", path, params=tuple(_texts(query)), timeout=timeout)
        rest = b""
        try:
            response = await self._http.send(request, stream=True, follow_redirects=False)
            try:
                if not response.is_success:
                    raise error_of(self._origin, "GET", path, response, await self._read(response))
                # httpx would also end a line at characters that JSON leaves as they are, such as U+2028.
                async for chunk in response.aiter_bytes():
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        yield line
                    if len(rest) > MAX_LINE_BYTES:
                        raise is_foreign(self._origin, path)
            finally:
                await response.aclose()
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise unavailable(self._origin, "GET", error) from None

    async def _read(self, response: httpx.Response) -> bytes:
        content = bytearray()
        async for chunk in response.aiter_bytes():
            content += chunk
            if len(content) > MAX_ANSWER_BYTES:
                raise ReceiverUnavailable(
                    f"the receiver at {self._origin} sent more than {MAX_ANSWER_BYTES} bytes: ask for less",
                    reason="too_large",
                )
        return bytes(content)

    def _parsed(self, type_: Any, answer: Answer, path: str) -> Any:
        try:
            return _adapter(type_).validate_json(answer.content)
        except ValidationError:
            raise is_foreign(self._origin, path) from None


@cache
def _adapter(type_: Any) -> TypeAdapter[Any]:
    return TypeAdapter(type_)


def escaped(key: object) -> str:
    """Return an id as one segment of a path."""
    text = quote(str(key), safe="")
    # httpx removes these segments, and the call would be another one.
    return text.replace(".", "%2E") if text in (".", "..") else text


def _given(values: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in values.items() if value is not None}


def _texts(query: Mapping[str, object]) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for name, value in _given(query).items():
        text = value.isoformat() if isinstance(value, datetime) else str(value)
        found.append((name, text))
    return found


def by_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    """Return the parameters that filter by the metadata of jobs."""
    return {f"metadata.{name}": value for name, value in (metadata or {}).items()}


def _read_origin(url: str) -> str:
    """Return the scheme, host and port of a URL. Raises SettingsError, without a secret of it."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    is_plain = url.isascii() and url.isprintable() and not set(url) & _HIDDEN
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == 0 or not is_plain:
        raise SettingsError(
            f"the receiver's URL {mask(url)[:100]!r}: write http:// or https://, a host, and a port if it "
            "needs one; the token has its own place"
        )
    return f"{parts.scheme}://{parts.netloc}"
