"""The Clipia API through its official SDK.

The SDK makes the requests and parses the answers. Its transport is ours, for two reasons: a submission is
sent as the bytes that were frozen when the job was made, and the `RateLimit-*` headers of the answer are
needed. The SDK does not retry (`max_retries=0`): retries are rows in the database, so that they survive a
crash.
"""

import asyncio
import hashlib
import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, NotRequired, TypedDict, cast
from urllib.parse import unquote
from uuid import UUID

import httpcore
import httpx
import orjson
from clipia import AsyncClipia, ClipiaApiError

from receiver.clipia.errors import quoted, translate
from receiver.core.lenient_json import REPLACEMENT, clean_body
from receiver.core.payload import MAX_ID_LENGTH, is_request_id
from receiver.core.quota import RateHeaders
from receiver.core.retry import longest_wait
from receiver.error_texts import cause
from receiver.errors import ClipiaUnavailable, RefusedByClipia, RequestError, SettingsError, UnrecognizedBody
from receiver.masking import mask, register_secret
from receiver.price import Credits, read_credits
from receiver.settings import Settings

CALL_TIMEOUT_SECONDS: Final = 30.0
"""A whole call may take this long; it must be well below the duration of a lease."""
TERMINAL_STATUSES: Final = ("COMPLETED", "FAILED", "CANCELED")
OPEN_STATUSES: Final = ("IN_QUEUE", "IN_PROGRESS")
MAX_ANSWER_BYTES: Final = 16 * 1024 * 1024
"""The largest body of an answer, decompressed."""
UNUSABLE_ID: Final = "request_id_unusable"
"""The error code of a job that Clipia accepted with a request id that cannot be stored."""

_SENDABLE: Final = re.compile(r"[!-~]+")
_NEVER_ARRIVED: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


@dataclass(kw_only=True)
class Call:
    """One call: the request's bytes in place of the SDK's, and data of the answer that the SDK drops."""

    body: bytes | None = None
    may_have_left: bool = False
    """Whether a byte of the request may have left this process."""
    not_after: float = math.inf
    """The time of `boot_clock` after which it must not be sent."""
    headers: RateHeaders = field(default_factory=RateHeaders)
    answer: bytes = b""
    """The body of the answer, byte for byte."""

    async def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """Record the progress of the request; httpcore calls this at each step."""
        if event.endswith("send_request_headers.started"):
            # A CONNECT to the proxy comes first. It contains no part of the request.
            self.may_have_left |= info["request"].method != b"CONNECT"
        # h11 raises for an invalid header before it sends the first byte.
        elif event.endswith("send_request_headers.failed"):
            self.may_have_left &= not isinstance(info["exception"], httpcore.LocalProtocolError)


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """Clipia's answer to a submission."""

    request_id: str
    cost: Credits | None
    warnings: list[dict[str, Any]]
    """One for each key of the input that the model ignores: `code`, `parameter`, `message`."""


class Estimate(TypedDict):
    """Clipia's answer with the price of an input."""

    credits: Credits
    warnings: NotRequired[Any]


@dataclass(frozen=True, kw_only=True)
class Status:
    """The state of a generation."""

    status: str
    """One of `OPEN_STATUSES` or `TERMINAL_STATUSES`, or an unknown word, masked and cut."""
    progress: int | None
    """Percent."""

    @property
    def terminal(self) -> bool:
        """Whether the status is final."""
        return self.status in TERMINAL_STATUSES

    @property
    def known(self) -> bool:
        """Whether Clipia documents this status."""
        return self.status in OPEN_STATUSES or self.terminal


def boot_clock() -> float:
    """Return seconds of a monotonic clock that, if the system has one, counts while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


_call: ContextVar[Call] = ContextVar("call")


class _Transport(httpx.AsyncBaseTransport):
    def __init__(self, proxy: str | None) -> None:
        self._inner = httpx.AsyncHTTPTransport(proxy=None if proxy is None else httpx.Proxy(proxy))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        call = _call.get()
        if boot_clock() > call.not_after:
            raise httpx.ConnectTimeout("the deadline for sending this has passed", request=request)
        if call.body is not None:
            headers = {name: value for name, value in request.headers.items() if name != "content-length"}
            request = httpx.Request(
                request.method, request.url, headers=headers, content=call.body, extensions=request.extensions
            )
        request.extensions = {**request.extensions, "trace": call.trace}
        response = await self._inner.handle_async_request(request)
        call.headers = _rate_headers(response.headers)
        _normalize_retry_after(response.headers)
        call.answer = await _read_answer(response)
        return _with_clean_body(response, call.answer)

    async def aclose(self) -> None:
        await self._inner.aclose()


def open_client(settings: Settings) -> "ClipiaClient | None":
    """Return the client of the configured account; None without CLIPIA_KEY."""
    if settings.clipia_key is None:
        return None
    key, base_url = settings.clipia_key.get_secret_value(), settings.clipia_base_url
    proxy = settings.clipia_proxy.get_secret_value() if settings.clipia_proxy else None
    return ClipiaClient(key, base_url=base_url, proxy=proxy)


class ClipiaClient:
    """The API for one account. All methods raise RequestError and ClipiaUnavailable.

    Each takes a `Call`. Its `headers` are set after any answer, even an error.
    """

    def __init__(self, key: str, *, base_url: str, proxy: str | None = None) -> None:
        """Raise SettingsError if the key is invalid, or if the base URL would send it unencrypted.

        Plain http is allowed for this machine only, and does not use the `proxy`.
        """
        register_secret(key)
        if not _SENDABLE.fullmatch(key):
            raise SettingsError("CLIPIA_KEY: write the key in ASCII and without white space")
        try:
            self._sdk = AsyncClipia(
                key,
                base_url=base_url,
                timeout=httpx.Timeout(CALL_TIMEOUT_SECONDS, connect=5.0),
                transport=_Transport(proxy if base_url.lower().startswith("https:") else None),
                max_retries=0,
            )
        except (ValueError, httpx.InvalidURL):
            raise SettingsError(
                "CLIPIA_BASE_URL: write https://…; plain http is for localhost and 127.0.0.1 only, "
                "because the key travels with every call"
            ) from None
        environment = "test" if key.startswith("clipia_test_") else "live"
        digest = hashlib.sha256(f"{self._sdk.base_url}\n{key}".encode()).hexdigest()
        self.account: Final = f"{environment}-{digest[:16]}"
        """An id for the key and its API; the key cannot be derived from it."""

    async def close(self) -> None:
        """Close its connections."""
        await self._sdk.close()

    async def submit(self, model: str, body: bytes, *, key: UUID, call: Call) -> Accepted:
        """Submit a generation: exactly the bytes of `body`, with the idempotency key `key`."""
        call.body = body
        async with _translated(call):
            answer = await self._sdk.submit(model, {}, idempotency_key=str(key))
            if not is_request_id(answer.request_id):
                raise _unusable_id(answer.request_id)
            warnings = [
                {name: mask(value) if isinstance(value, str) else value for name, value in each.items()}
                for each in _objects(answer.data.get("warnings"))
            ]
            cost = read_credits(answer.cost)
            return Accepted(request_id=answer.request_id, cost=cost, warnings=warnings)

    async def status(self, request_id: str, *, call: Call) -> Status:
        """Return the state of a generation."""
        _check_id(request_id)
        async with _translated(call):
            answer = await self._sdk.status(request_id)
            status: Any = answer.status
            if not isinstance(status, str):
                raise TypeError("status")
            return Status(status=quoted(status, 64), progress=_percent(answer.progress))

    async def result(self, request_id: str, *, call: Call) -> bytes | None:
        """Return the answer for a finished generation, byte for byte; None if it is not finished."""
        _check_id(request_id)
        async with _translated(call):
            answer = await self._sdk.result(request_id)
            return None if answer.pending else call.answer

    async def models(self, *, call: Call) -> list[dict[str, Any]]:
        """Return all models."""
        async with _translated(call):
            listing: Any = await self._sdk.models.list()
            return _objects(listing["data"])

    async def model(self, slug: str, *, call: Call) -> dict[str, Any]:
        """Return one model with its `input_schema`."""
        async with _translated(call):
            return dict[str, Any](await self._sdk.models.get(slug))

    async def estimate(self, slug: str, given: Mapping[str, Any], *, call: Call) -> Estimate:
        """Return the price of an input; no job is queued."""
        async with _translated(call):
            answer = await self._sdk.models.estimate(slug, dict(given))
            credits_ = read_credits(answer.credits)
            if credits_ is None:
                raise TypeError("credits")
            return cast("Estimate", answer.data | {"credits": credits_})

    async def balance(self, *, call: Call) -> dict[str, Any]:
        """Return the account: `account_id`, `balance`, `usage_30d`."""
        async with _translated(call):
            return dict[str, Any](await self._sdk.account.get())


@asynccontextmanager
async def _translated(call: Call) -> AsyncIterator[None]:
    """Bind the call to the transport, limit its time, and translate exceptions into ours."""
    token = _call.set(call)
    try:
        async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
            yield
    except ClipiaApiError as error:
        raise translate(error) from error
    except _NEVER_ARRIVED as error:
        raise _unreachable(cause(error)) from error
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise _unanswered(error, call) from error
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        message = f"the answer is not in Clipia's format ({type(error).__name__})"
        arrived = call.may_have_left
        raise ClipiaUnavailable(message, reason="unreadable", may_have_arrived=arrived) from error
    finally:
        _call.reset(token)


def _unanswered(error: Exception, call: Call) -> ClipiaUnavailable:
    # httpx's own text may contain a header, and with it the key.
    if call.may_have_left:
        return ClipiaUnavailable(f"no answer from Clipia: {cause(error)}", reason="no_answer")
    if isinstance(error, httpx.RemoteProtocolError):
        # The request was not sent, so this is a proxy's answer to CONNECT.
        return _unreachable("the proxy of CLIPIA_PROXY closed the connection, or its answer is not HTTP")
    if isinstance(error, (TimeoutError, httpx.TimeoutException, httpx.NetworkError)):
        return _unreachable(cause(error))
    message = f"the request is invalid and was not sent to Clipia ({type(error).__name__})"
    return ClipiaUnavailable(message, reason="not_sent", may_have_arrived=False)


def _unreachable(why: str) -> ClipiaUnavailable:
    message = f"Clipia cannot be reached: {why}; check CLIPIA_BASE_URL, the network and CLIPIA_PROXY"
    return ClipiaUnavailable(message, reason="unreachable", may_have_arrived=False)


async def _read_answer(response: httpx.Response) -> bytes:
    """Return the body. Raises ValueError if it is too large: a small gzip stream may hold gigabytes."""
    body = bytearray()
    try:
        async for chunk in response.aiter_bytes():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                raise ValueError("too large")
    finally:
        await response.aclose()
    return bytes(body)


def _with_clean_body(response: httpx.Response, content: bytes) -> httpx.Response:
    """Return an answer with a clean copy of its body, or an empty body if it is not JSON.

    The SDK parses it with `json.loads`, which rejects imperfect JSON and accepts values that databases cannot
    store.
    """
    try:
        content = orjson.dumps(clean_body(content)[0])
    except UnrecognizedBody:
        content = b""
    status, extensions = response.status_code, response.extensions
    headers = response.headers.copy()
    # A cookie would be sent with the calls that follow.
    for name in ("content-encoding", "content-length", "transfer-encoding", "set-cookie"):
        headers.pop(name, None)
    return httpx.Response(status, headers=headers, content=content, extensions=extensions)


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _unusable_id(request_id: object) -> Exception:
    """Return the exception for an accepted submission without a usable id."""
    if not isinstance(request_id, str) or not request_id or len(request_id) > MAX_ID_LENGTH:
        return TypeError("request_id")
    if REPLACEMENT in request_id:
        return TypeError("request_id")
    # Permanent: another attempt would get the same answer.
    message = (
        f"Clipia accepted the job as {quoted(request_id, MAX_ID_LENGTH)!a}, an id that cannot be queried."
    )
    return RefusedByClipia(message, code=UNUSABLE_ID, status=502)


def _check_id(request_id: str) -> None:
    """Raise RequestError if the id has a segment `.` or `..`: some servers resolve these after decoding."""
    parts = re.split(r"[/\\]", unquote(unquote(request_id)))
    if any(part.strip() in (".", "..") for part in parts):
        raise RequestError("The id cannot be queried.", code="not_found")


def _percent(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(min(max(value, 0), 100))


def _rate_headers(headers: httpx.Headers) -> RateHeaders:
    names = ("limit", "remaining", "reset")
    return RateHeaders(**{name: _number(headers.get(f"ratelimit-{name}")) for name in names})


def _normalize_retry_after(headers: httpx.Headers) -> None:
    """Replace a date in Retry-After by its seconds: if it is absurd, the SDK raises OverflowError."""
    values = headers.get_list("retry-after")
    if len(" ".join(values).split()) > 1:
        wait = longest_wait(values, now=datetime.fromtimestamp(time.time(), UTC))
        headers["retry-after"] = "" if wait is None else str(wait)


def _number(text: str | None) -> int | None:
    text = (text or "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None
