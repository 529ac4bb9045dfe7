"""`http:` and `https:`: POST, signed according to Standard Webhooks if there is a secret."""

import asyncio
import base64
import re
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Final

import httpx
import structlog
from cloudevents.core.bindings.http import to_binary
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from standardwebhooks import Webhook

from receiver import __version__
from receiver.core.retry import longest_wait
from receiver.destination_settings import DestinationSettings
from receiver.destinations.answers import RawAnswer
from receiver.destinations.base import (
    MAX_READ_ANSWER,
    answer_text,
    attempt_timeout,
    closed_failure,
    encode,
    timeout_failure,
)
from receiver.destinations.tls import open_tls
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected, SettingsError
from receiver.http_transport import HttpTransport

MAX_ANSWER_BYTES: Final = 64 * 1024
"""How much of an answer's body is read, so that its connection can be used again."""
DRAIN_SECONDS: Final = 1.0
"""Seconds for reading that body: the status has arrived, and an endless body would keep a slot."""
MAX_CONNECTIONS: Final = 32
MIN_SECRET_BYTES: Final = 24
"""The minimum of Standard Webhooks."""

MAX_PORT: Final = 65_535

_HOST: Final = re.compile(rb"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_REJECTED: Final = {
    HTTPStatus.BAD_REQUEST,
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    HTTPStatus.UNPROCESSABLE_ENTITY,
}
"""Statuses that reject this message. All others are about the destination, such as 404 during a deploy."""

log = structlog.get_logger()


class HttpDestination:
    """Posts events to a URL."""

    concurrency = MAX_CONNECTIONS

    def __init__(self, settings: DestinationSettings) -> None:
        self._name = settings.name
        self._url = url = _parse(settings)
        self._origin = f"{url.scheme}://{url.netloc.decode('ascii')}"
        self._binary = settings.binary
        self._headers = {
            "user-agent": f"clipia-receiver/{__version__}",
            # The answer's body is not used, so its decompression would be a waste.
            "accept-encoding": "identity",
            **_authorization(url),
            **{name.lower(): value.get_secret_value() for name, value in settings.headers.items()},
        }
        secrets = () if settings.secret is None else settings.secrets or ("",)
        self._signers = [_open_signer(settings.name, secret) for secret in secrets]
        self._timeout = settings.timeout
        # A client on top of the transport would follow redirects, keep cookies, take proxies from the
        # environment and log the URL.
        self._transport = HttpTransport(
            tls=open_tls(settings, default=httpx.create_ssl_context),
            proxy=None if settings.proxy is None else httpx.Proxy(settings.proxy.get_secret_value()),
        )
        self._concurrency = settings.concurrency or MAX_CONNECTIONS
        self._slots = asyncio.Semaphore(self._concurrency)
        self._closing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Return at once: connections are opened when they are needed."""

    async def check(self) -> None:
        """Request OPTIONS, and warn if the answer suggests that the URL takes no events."""
        reply = await self._exchange(httpx.Request("OPTIONS", self._url, headers=self._headers))
        if reply.status >= HTTPStatus.INTERNAL_SERVER_ERROR and reply.status != HTTPStatus.NOT_IMPLEMENTED:
            raise PublishFailed(
                f"{self._origin} answers {reply.status} to OPTIONS: is the service behind it up?",
                reason="status",
            )
        if not _takes_post(reply):
            log.warning(
                "the destination may take no events",
                destination=self._name,
                problem=f"{self._origin} answers {reply.status} to OPTIONS: if it answers events like that, "
                f"none is delivered; check the URL's path and credentials{_hint(reply.status)}",
            )

    async def publish(self, event: CloudEvent) -> None:
        """Post the event and return when the status line of a 2xx answer has arrived."""
        body = encode(event)
        fields = {"content-type": "application/cloudevents+json"}
        if self._binary:
            message = to_binary(event, JSONFormat())
            fields, body = message.headers, message.body
        headers = self._headers | fields | _trace_headers(event) | self._sign(event, body)
        reply = await self._exchange(httpx.Request("POST", self._url, headers=headers, content=body))
        if not httpx.codes.is_success(reply.status):
            raise _status_failure(self._origin, reply)

    async def close(self) -> None:
        """Let the exchanges under way end, which the timeout bounds, and close all connections."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        for _ in range(self._concurrency):
            await self._slots.acquire()
        await self._transport.aclose()

    def _sign(self, event: CloudEvent, body: bytes) -> dict[str, str]:
        if not self._signers:
            return {}
        # The delivery's id, not the event's: consumers drop messages with an id that they have seen, so a
        # replay under the event's id would be lost.
        message_id = str(event.get_extension("deliveryid") or event.get_id())
        now = datetime.now(UTC)
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            # One for each secret: during a rotation a consumer may know only the old or only the new one.
            "webhook-signature": " ".join(
                signer.sign(message_id, now, body.decode("utf-8")) for signer in self._signers
            ),
        }

    async def _exchange(self, request: httpx.Request) -> RawAnswer:
        """Return the answer. Raises PublishFailed if no status has arrived."""
        if self._closing is not None:
            raise closed_failure()
        raw = RawAnswer()
        request.extensions = {"answer": raw}
        try:
            async with asyncio.timeout(attempt_timeout(self._timeout)), self._slots:
                await _finish(await self._transport.handle_async_request(request), raw)
        except TimeoutError:
            # A status counts even if the rest of the answer is late or invalid.
            if not raw.status or _is_partial(raw):
                raise timeout_failure(self._origin, self._timeout) from None
        except httpx.TransportError as error:
            if not raw.status:
                prefix = "no final status line in the answer: " if raw.has_begun else ""
                text = f"{self._origin}: {prefix}{cause(error)}"
                raise PublishFailed(text, reason="connection") from error
        if _is_partial(raw):
            early = f"{self._origin} answered {raw.status} before it had read the event"
            raise PublishFailed(f"{early}, and the answer is invalid", reason="protocol")
        return raw


def _trace_headers(event: CloudEvent) -> dict[str, str]:
    """Return the headers by which HTTP servers continue a trace: they do not look into the event."""
    attributes = event.get_attributes()
    return {name: attributes[name] for name in ("traceparent", "tracestate") if name in attributes}


def _is_partial(reply: RawAnswer) -> bool:
    """Return whether an event was confirmed, but not sent to its end."""
    return reply.is_cut and httpx.codes.is_success(reply.status)


def _status_failure(origin: str, reply: RawAnswer) -> PublishFailed | PublishRejected:
    text = f"{origin} answered {reply.status}{_hint(reply.status)}"
    answer = answer_text(reply.text) or None
    if reply.status in _REJECTED:
        return PublishRejected(text, reason="status", answer=answer)
    after = longest_wait(reply.headers.get_list("retry-after"), now=datetime.now(UTC))
    return PublishFailed(text, reason="status", retry_after=after, answer=answer)


def _hint(status: int) -> str:
    is_redirect = httpx.codes.is_redirect(status)
    return "; redirects are not followed, configure the final URL" if is_redirect else ""


def _takes_post(reply: RawAnswer) -> bool:
    """Return whether an answer to OPTIONS allows POST."""
    allowed = {method.upper() for method in reply.headers.get_list("allow", split_commas=True) if method}
    is_allowed = bool({"POST", "*"} & allowed)
    # An empty Allow allows any method, except with a 405, which must list the methods.
    if (allowed and not is_allowed) or reply.status == HTTPStatus.METHOD_NOT_ALLOWED:
        return is_allowed
    # Servers without OPTIONS answer 501.
    return httpx.codes.is_success(reply.status) or reply.status == HTTPStatus.NOT_IMPLEMENTED


async def _finish(response: httpx.Response, answer: RawAnswer) -> None:
    """Read a 2xx answer to its end, if that is near, so that its connection can be used again.

    Of any other answer keep the start, which may tell the reason.
    """
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            if response.is_success:
                await _drain(response)
            else:
                await _keep_start(response, answer)
    finally:
        # This closes the connection unless the answer was read to its end.
        await response.aclose()


async def _keep_start(response: httpx.Response, answer: RawAnswer) -> None:
    async for chunk in response.aiter_raw():
        answer.text += chunk[: MAX_READ_ANSWER - len(answer.text)]
        if len(answer.text) == MAX_READ_ANSWER:
            return


async def _drain(response: httpx.Response) -> None:
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            return


def _parse(settings: DestinationSettings) -> httpx.URL:
    wrong = f"destination {settings.name!r}: write https://host/path"
    try:
        url = httpx.URL(settings.url.get_secret_value())
    except httpx.InvalidURL:
        # The error would quote the URL.
        raise SettingsError(wrong) from None
    port = 1 if url.port is None else url.port
    if not _HOST.fullmatch(url.raw_host) or not 0 < port <= MAX_PORT:
        raise SettingsError(wrong)
    return url


def _authorization(url: httpx.URL) -> dict[str, str]:
    """Return the URL's credentials as a header: proxies and servers log URLs, but not this header."""
    if not url.userinfo:
        return {}
    credentials = f"{url.username}:{url.password}".encode()
    return {"authorization": "Basic " + base64.b64encode(credentials).decode("ascii")}


def _open_signer(name: str, secret: str) -> Webhook:
    encoded = secret.removeprefix("whsec_")
    try:
        # The library would skip characters that are not base64, and sign with the rest.
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        key = b""
    if encoded == secret or len(key) < MIN_SECRET_BYTES:
        raise SettingsError(
            f"destination {name!r}: each secret must be whsec_ and the base64 of at least "
            f"{MIN_SECRET_BYTES} random bytes, such as from: echo whsec_$(openssl rand -base64 32)"
        )
    return Webhook(key)
