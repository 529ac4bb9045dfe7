"""`http:` and `https:`: POST, signed after Standard Webhooks where a secret is given."""

import asyncio
import base64
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Final

import anyio
import httpx
from cloudevents.core.bindings.http import to_binary
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from standardwebhooks import Webhook

from receiver import __version__
from receiver.causes import cause
from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import closed, encode
from receiver.errors import PublishFailed, PublishRejected, SettingsError

TIMEOUT: Final = 15.0
"""Seconds for a whole exchange, from waiting for a free connection to the end of the answer."""
MAX_ANSWER: Final = 64 * 1024
"""Bytes of an answer's body that are read; nobody looks at them."""
MAX_RETRY_AFTER: Final = 86_400.0
MAX_CONNECTIONS: Final = 32
MAX_IDLE_CONNECTIONS: Final = 8
MIN_SECRET: Final = 24
"""Bytes that Standard Webhooks asks for at least."""

MAX_PORT: Final = 65_535

_HOST: Final = re.compile(rb"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_SECONDS: Final = re.compile(r"[0-9]+", re.ASCII)
_TRANSIENT: Final = frozenset(
    {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS}
)


class HttpDestination:
    """Posts events to a URL."""

    concurrency = MAX_CONNECTIONS

    def __init__(self, settings: DestinationSettings) -> None:
        self._url = url = _parse(settings)
        self._origin = f"{url.scheme}://{url.netloc.decode('ascii')}"
        self._binary = settings.binary
        self._headers = {
            "user-agent": f"clipia-receiver/{__version__}",
            # Nobody looks at the answer's body; nobody should have to inflate it.
            "accept-encoding": "identity",
            **_authorization(url),
        }
        self._signer = _open_signer(settings)
        # The bare transport has what a client would have to be talked out of: no redirects, no cookies, no
        # proxies from the environment, no log line with the URL.
        self._transport = httpx.AsyncHTTPTransport(
            verify=httpx.create_ssl_context(),
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=MAX_IDLE_CONNECTIONS),
        )
        # Not the pool's own limit: a request that is cancelled in the moment in which the pool gives it a
        # connection takes that place with it for ever, and after enough timeouts there is none left.
        self._places = asyncio.Semaphore(MAX_CONNECTIONS)
        self._closed = False
        self._exchanges: set[asyncio.Task[httpx.Response | PublishFailed]] = set()

    async def start(self) -> None:
        """Do nothing: connections are opened as they are needed."""

    async def check(self) -> None:
        """Ask for OPTIONS: whatever answers is there, unless it says that it is not well."""
        response = await self._exchange(httpx.Request("OPTIONS", self._url, headers=self._headers))
        if response.is_server_error and response.status_code != HTTPStatus.NOT_IMPLEMENTED:
            raise PublishFailed(
                f"{self._origin} answers {response.status_code} to OPTIONS: is the service behind it up?",
                reason="status",
            )

    async def publish(self, event: CloudEvent) -> None:
        """Post the event and return when a 2xx answer has arrived whole."""
        body = encode(event)
        fields = {"content-type": "application/cloudevents+json"}
        if self._binary:
            message = to_binary(event, JSONFormat())
            fields, body = message.headers, message.body
        headers = self._headers | fields | self._sign(event, body)
        response = await self._exchange(httpx.Request("POST", self._url, headers=headers, content=body))
        if not response.is_success:
            raise _refusal(self._origin, response)

    async def close(self) -> None:
        """Let what is under way end, which the timeout bounds, and close all connections."""
        self._closed = True
        if self._exchanges:
            # The pool does not close connections that are being made when it is closed.
            await asyncio.wait(self._exchanges)
        await self._transport.aclose()

    def _sign(self, event: CloudEvent, body: bytes) -> dict[str, str]:
        if self._signer is None:
            return {}
        # The delivery's id, not the event's: receivers drop an id that they have seen, and with it a replay.
        message_id = str(event.get_extension("deliveryid") or event.get_id())
        now = datetime.now(UTC)
        return {
            "webhook-id": message_id,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": self._signer.sign(message_id, now, body.decode("utf-8")),
        }

    async def _exchange(self, request: httpx.Request) -> httpx.Response:
        """Return an answer whose body is read as far as needed and gone. Raises PublishFailed."""
        if self._closed:
            raise closed()
        # In a task of its own, which only its scope cancels: httpcore shields its tidying up from scopes, but
        # not from `Task.cancel`, and would lose the connection.
        scope = anyio.CancelScope()
        exchange = asyncio.create_task(self._run(request, scope))
        self._exchanges.add(exchange)
        exchange.add_done_callback(self._exchanges.discard)
        try:
            outcome = await asyncio.shield(exchange)
        except asyncio.CancelledError:
            scope.cancel()
            raise
        if isinstance(outcome, PublishFailed):
            raise outcome
        return outcome

    async def _run(self, request: httpx.Request, scope: anyio.CancelScope) -> httpx.Response | PublishFailed:
        """Return a failure instead of raising it: nobody may be left to take it."""
        scope.deadline = anyio.current_time() + TIMEOUT
        with scope:
            try:
                async with self._places:
                    return await self._send(request)
            except httpx.TransportError as error:
                return PublishFailed(f"{self._origin}: {cause(error)}", reason="connection")
        return PublishFailed(f"{self._origin} did not answer within {TIMEOUT:g} s", reason="timeout")

    async def _send(self, request: httpx.Request) -> httpx.Response:
        response = await self._transport.handle_async_request(request)
        try:
            if response.is_success:
                await _drain(response)
        finally:
            await response.aclose()
        return response


def parse_retry_after(value: str, *, now: datetime) -> float | None:
    """Return the seconds that a Retry-After header asks for (0 to a day), None where it says nothing."""
    if _SECONDS.fullmatch(value):
        seconds = float(value)
    else:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _refusal(origin: str, response: httpx.Response) -> PublishFailed | PublishRejected:
    status = response.status_code
    if status in _TRANSIENT or response.is_server_error:
        after = None
        if status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
            after = parse_retry_after(response.headers.get("retry-after", ""), now=datetime.now(UTC))
        return PublishFailed(f"{origin} answered {status}", reason="status", retry_after=after)
    hint = "; redirects are not followed, configure the final URL" if response.is_redirect else ""
    return PublishRejected(f"{origin} answered {status}{hint}", reason="status")


async def _drain(response: httpx.Response) -> None:
    """Read what there is, so that the connection can be used again and a cut answer does not count."""
    size = 0
    async for chunk in response.aiter_raw():
        size += len(chunk)
        if size > MAX_ANSWER:
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
    """Move credentials from the URL, where everybody logs them, to the header that they are meant for."""
    if not url.userinfo:
        return {}
    credentials = f"{url.username}:{url.password}".encode()
    return {"authorization": "Basic " + base64.b64encode(credentials).decode("ascii")}


def _open_signer(settings: DestinationSettings) -> Webhook | None:
    if settings.secret is None:
        return None
    text = settings.secret.get_secret_value()
    encoded = text.removeprefix("whsec_")
    try:
        # The library would skip what is not base64 and sign with the rest.
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except ValueError:
        key = b""
    if encoded == text or len(key) < MIN_SECRET:
        raise SettingsError(
            f"destination {settings.name!r}: the secret must be whsec_ and the base64 of at least "
            f"{MIN_SECRET} random bytes, such as from: echo whsec_$(openssl rand -base64 32)"
        )
    return Webhook(key)
