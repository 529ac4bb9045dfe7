"""`nats:`: one JetStream message per event, a CloudEvent in binary mode.

`nats://user:password@host:4222?subject=clipia.events&stream=CLIPIA`; several servers of a cluster are
separated by commas, and a user without a password is a token. With `stream` that stream is made where it is
missing, and no other will do; without it some stream must take the subject. TLS is used if the server asks
for it; with `tls://` in place of `nats://` a server without TLS gets nothing.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import count
from types import MappingProxyType
from typing import Any, Final

import nats.errors
import structlog
from cloudevents.core.bindings.http import to_binary_event
from cloudevents.core.v1.event import CloudEvent
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.js.api import ConsumerInfo, StorageType, StreamInfo
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from receiver.core.retry import DAY
from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import Broker, Failure, copy_failure, quoted, step_timeout
from receiver.destinations.connections import Connection, SharedConnection
from receiver.destinations.jetstream import describe_losses
from receiver.destinations.nats_url import Place, UnusableIdentityError, read_url
from receiver.destinations.nkeys import Identity
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected

OPEN_TIMEOUT: Final = 6.0
"""Seconds to find a server that answers, and the stream."""
API_TIMEOUT: Final = 2.5
"""Seconds for a question about streams; to who may not ask, the server says nothing."""
CLOSE_TIMEOUT: Final = 2.0
PING_INTERVAL: Final = 20
NEVER: Final = 86_400.0
"""Seconds until the client itself would connect again; it is closed long before."""
MAX_IN_FLIGHT: Final = 256

_NO_RESPONDERS: Final = "503"
# JetStream's error codes.
_TOO_LARGE: Final = frozenset({10054, 10097})
_NO_JETSTREAM: Final = ("no_jetstream", "has no JetStream for this account, or no quorum for it")
_WRONG_STREAM: Final = ("wrong_stream", "gives the subject to another stream than the URL's")
_FULL: Final = ("full", "cannot store the message: see the limits of stream and account")
_REFUSALS: Final[Mapping[int | None, tuple[str, str]]] = MappingProxyType(
    {
        None: _NO_JETSTREAM,
        10039: _NO_JETSTREAM,
        10076: _NO_JETSTREAM,
        10060: _WRONG_STREAM,
        10065: _WRONG_STREAM,
        10023: _FULL,
        10028: _FULL,
        10047: _FULL,
        10077: _FULL,
    }
)
# After these the next publish makes a new connection, and looks after the stream again.
_STALE: Final = frozenset({"connection", "no_stream", "permission", "timeout"})

_ERRORS: Final = (OSError, RuntimeError, ValueError, nats.errors.Error)

log = structlog.get_logger()


class NatsDestination(Broker):
    """Publishes events to a JetStream subject, many at once over one connection."""

    concurrency = 256

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._place = place = read_url(settings)
        self._connections = SharedConnection(
            lambda: _Connection(place, settings.name),
            shown=place.shown,
            max_users=settings.concurrency or MAX_IN_FLIGHT,
            timeout=settings.timeout,
        )

    async def check(self) -> None:
        """See whether a stream takes the subject, and warn where it may lose events."""
        info = await self._connections.run(_Connection.find_stream)
        problem: str | None = "the user may not look at the stream"
        if info is not None:
            consumers = await self._connections.run(lambda each: each.list_consumers(info))
            problem = describe_losses(info, self._place.subject, consumers)
            if (age := info.config.max_age or 0.0) >= DAY:
                log.info("the stream deletes events by age, read or not", destination=self._name, seconds=age)
        if problem:
            self._warn_of_losses(problem)

    async def publish(self, event: CloudEvent) -> None:
        """Publish the event and return when the stream has acknowledged it, be it as a duplicate."""
        headers, body = _encode(event, self._place.stream)
        await self._connections.run(lambda connection: connection.publish(headers, body))

    async def close(self) -> None:
        """Wait for what is under way, which the timeout bounds, and disconnect."""
        await self._connections.close()


class _Client(Client):
    """The library's client, which can also be cut off, and be told to send nothing without TLS."""

    def __init__(self, *, requires_tls: bool) -> None:
        super().__init__()
        self._requires_tls = requires_tls

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:  # noqa: FBT001, FBT002 - the library's signature
        # The library itself sends the login in plain text to a server that asks for no TLS, `tls:` or not.
        if initial_connection and self._requires_tls:
            if not (info.get("tls_required") or info.get("tls_available")):
                raise nats.errors.SecureConnRequiredError
            info["tls_required"] = True
        await super()._process_info(info, initial_connection)

    def identify(self, identity: Identity | None) -> None:
        """Tell the server which key signs; the library says so only of keys that it reads itself."""
        self._public_nkey = None if identity is None else identity.public_key

    def abort(self) -> None:
        """Drop what is not sent: `close` would wait for a server that does not read, maybe for ever."""
        self._pending.clear()
        self._pending_data_size = 0
        if isinstance(self._transport, TcpTransport) and self._transport._io_writer is not None:  # noqa: SLF001
            self._transport._io_writer.transport.abort()  # noqa: SLF001


class _Connection(Connection):
    """A client that never reconnects, and the publishes that wait on it. Methods raise PublishFailed.

    The client's own reconnecting would keep messages for later whose publishers have long been told that they
    failed.
    """

    def __init__(self, place: Place, name: str) -> None:
        self._place = place
        self._name = name
        self._client = _Client(requires_tls=place.requires_tls)
        self._streams = self._client.jsm(timeout=API_TIMEOUT)
        self._inbox = self._client.new_inbox()
        self._numbers = count()
        self._answers: dict[str, asyncio.Future[Msg | PublishFailed]] = {}
        self._began = False
        self._connected = False
        self._first_error: Exception | None = None
        self._lost: PublishFailed | None = None
        self._may_ask = True

    @property
    def is_open(self) -> bool:
        """Whether the server can be talked to."""
        return self._connected and self._lost is None

    async def open(self) -> None:
        """Connect, and make the stream where it is missing."""
        try:
            async with asyncio.timeout(step_timeout(OPEN_TIMEOUT, self._place.timeout)):
                await self._connect()
                await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)
                if self._place.stream is not None:
                    await self._make_stream(self._place.stream)
        except _ERRORS as error:
            raise self._failed(error) from error
        if self._lost is not None:
            raise self._lost

    async def publish(self, headers: dict[str, str], body: bytes) -> None:
        """Publish a message and return when it is acknowledged. Also raises PublishRejected."""
        # The client counts the body alone, and for one that is too large the server hangs up on all.
        size = len(body) + sum(len(name) + len(value) + 4 for name, value in headers.items()) + 12
        if size > self._client.max_payload:
            raise _too_large(f"{size} bytes are more than the max_payload of {self._place.shown}")
        inbox = f"{self._inbox}.{next(self._numbers)}"
        answer = self._answers[inbox] = asyncio.get_running_loop().create_future()
        try:
            await self._client.publish(self._place.subject, body, reply=inbox, headers=headers)
            self._confirm(await answer)
        except _ERRORS as error:
            raise self._failed(error) from error
        finally:
            del self._answers[inbox]

    async def find_stream(self) -> StreamInfo | None:
        """Return the stream that takes the subject, None where the user may not ask."""
        try:
            name = await self._streams.find_stream_name_by_subject(self._place.subject)
            info = await self._streams.stream_info(name)
        except _ERRORS as error:
            if isinstance(error, TimeoutError) and not self._may_ask:
                return None
            raise self._failed(error) from error
        if self._place.stream not in {None, name}:
            raise PublishFailed(
                f"the subject {self._place.subject} belongs to {name}, not to {self._place.stream}",
                reason="wrong_stream",
            )
        if info.config.no_ack:
            raise PublishFailed(
                f"the stream {name} acknowledges nothing: make it without no_ack", reason="no_ack"
            )
        return info

    async def list_consumers(self, info: StreamInfo) -> Sequence[ConsumerInfo] | None:
        """Return the consumers of a stream, None if the user may not ask."""
        found: list[ConsumerInfo] = []
        try:
            # The server names 256 of them at a time.
            while len(found) < info.state.consumer_count:
                page = await self._streams.consumers_info(info.config.name or "", offset=len(found))
                if not page:
                    break
                found += page
        except _ERRORS as error:
            if isinstance(error, TimeoutError) and not self._may_ask:
                return None
            raise self._failed(error) from error
        return found

    def survives(self, failure: Failure) -> bool:
        """Return whether the next publish would gain nothing from connecting and making the stream anew."""
        return failure.reason not in _STALE

    async def close(self) -> None:
        """Cut the connection and end the client's tasks."""
        self._lose(PublishFailed(f"{self._place.shown}: the connection was closed", reason="connection"))
        if not self._began:
            # The client's `close` fails for one that was never asked to connect.
            return
        self._client.abort()
        with contextlib.suppress(OSError, RuntimeError, nats.errors.Error):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._client.close()

    async def _connect(self) -> None:
        # Read each time: short-lived credentials are replaced while we run.
        identity = self._place.read_identity()
        jwt = identity.jwt if identity else None
        self._client.identify(identity)
        self._began = True
        await self._client.connect(
            list(self._place.servers),
            name="clipia-receiver",
            user=self._place.user,
            password=self._place.password,
            token=self._place.token,
            signature_cb=identity.sign if identity else None,
            user_jwt_cb=None if jwt is None else lambda: bytearray(jwt),
            tls=self._place.tls,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            # Two tries at each server now, and none on its own later.
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            reconnect_to_server_handler=lambda _servers, _info: (None, NEVER),
            ping_interval=PING_INTERVAL,
            # Nothing is kept for later.
            pending_size=0,
        )
        if not self._client.is_connected:
            # The client does not mind a server that hangs up after its greeting.
            raise ConnectionResetError("the server has hung up")
        self._connected = True

    async def _make_stream(self, name: str) -> None:
        try:
            try:
                await self._streams.stream_info(name)
            except NotFoundError:
                await self._streams.add_stream(
                    name=name, subjects=[self._place.subject], storage=StorageType.FILE
                )
                log.info("made a stream", destination=self._name, stream=name)
        except TimeoutError:
            # Who may not ask may still publish.
            if self._may_ask:
                raise

    def _confirm(self, answer: Msg | PublishFailed) -> None:
        """Raise what keeps an answer from being an acknowledgement."""
        if isinstance(answer, PublishFailed):
            raise copy_failure(answer)
        if (answer.headers or {}).get("Status") == _NO_RESPONDERS:
            raise NoStreamResponseError
        with contextlib.suppress(ValueError, TypeError, KeyError):
            content = json.loads(answer.data)
            if "error" in content:
                raise APIError.from_error(content["error"])
            if content["stream"] and content["seq"] > 0:
                return
        raise PublishFailed(
            f"something else than a stream answers on the subject {self._place.subject}", reason="protocol"
        )

    def _failed(self, error: Exception) -> Failure:
        if isinstance(error, NotFoundError | NoStreamResponseError):
            return PublishFailed(
                f"no stream takes the subject {self._place.subject}: make one, or add it to one's subjects",
                reason="no_stream",
            )
        if isinstance(error, APIError):
            return self._refused(error)
        if self._lost is not None:
            return copy_failure(self._lost)
        if not self._connected and self._first_error is not None:
            # What the client says in the end is only that it has tried, or how long.
            error = self._first_error
        reason, text = "connection", f": {_words(error)}"
        if isinstance(error, TimeoutError):
            reason, text = "timeout", " did not answer in time"
        elif isinstance(error, nats.errors.SecureConnRequiredError):
            reason, text = "tls", " does not offer TLS, which `tls:` or the table `tls` asks for"
        elif isinstance(error, UnusableIdentityError):
            reason, text = "auth", f": {error}"
        elif "authorization" in str(error).lower() or "authentication" in str(error).lower():
            reason, text = "auth", f" refuses the {self._place.login} of the URL"
        return PublishFailed(self._place.shown + text, reason=reason)

    def _refused(self, error: APIError) -> Failure:
        if error.err_code in _TOO_LARGE:
            return _too_large(f"the stream refuses it: {quoted(error.description)}")
        reason, text = _REFUSALS.get(error.err_code, ("refused", "refuses the message"))
        return PublishFailed(
            f"{self._place.shown} {text}: {quoted(error.description)} ({error.err_code})", reason=reason
        )

    def _lose(self, failure: PublishFailed) -> None:
        """End all that waits for an answer."""
        self._lost = self._lost or failure
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(failure)

    async def _on_answer(self, message: Msg) -> None:
        answer = self._answers.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def _on_disconnected(self) -> None:
        self._lose(PublishFailed(f"{self._place.shown}: the connection is lost", reason="connection"))

    async def _on_error(self, error: Exception) -> None:
        if not self._connected:
            # What the server has said tells more than that it has hung up.
            if not isinstance(self._first_error, nats.errors.Error):
                self._first_error = error
            return
        if self._lost is not None:
            return
        text = str(error)
        log.warning("the client of a destination reports", destination=self._name, error=_words(error))
        if '"$js.api.' in text:
            self._may_ask = False
        elif "permissions violation" in text:
            self._lose(PublishFailed(f"{self._place.shown}: {quoted(text)}", reason="permission"))


def _words(error: Exception) -> str:
    """Return what the server has said, or why the connection failed."""
    return quoted(error) if isinstance(error, nats.errors.Error) and str(error) else cause(error)


def _too_large(text: str) -> PublishRejected:
    return PublishRejected(f"the message is too large: {text}", reason="too_large")


def _encode(event: CloudEvent, stream: str | None) -> tuple[dict[str, str], bytes]:
    """Return headers and body after the CloudEvents binding for NATS.

    It writes values as the one for HTTP does, but has a header for the type of the data, too.
    """
    try:
        message = to_binary_event(event)
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as JSON", reason="encoding") from error
    headers = {
        "ce-datacontenttype" if name == "content-type" else name: value
        for name, value in message.headers.items()
    }
    # The delivery's id, not the event's: the stream drops an id that it has seen, and with it a replay.
    headers["Nats-Msg-Id"] = headers.get("ce-deliveryid") or headers["ce-id"]
    if stream is not None:
        headers["Nats-Expected-Stream"] = stream
    return headers, message.body
