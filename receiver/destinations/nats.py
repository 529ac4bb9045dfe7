"""`nats:`: one JetStream message per event, a CloudEvent in binary mode.

`nats://user:password@host:4222?subject=clipia.events&stream=CLIPIA`; several servers of a cluster are
separated by commas, and a user without a password is a token. With `stream` the stream is made if it is
missing, and no other stream may take the subject; without it any stream may. TLS is used if the server asks
for it; with `tls://` in place of `nats://` no login or event is sent to a server without TLS.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Final

import nats.errors
import structlog
from cloudevents.core.bindings.http import to_binary
from cloudevents.core.v1.event import CloudEvent
from nats.aio.msg import Msg
from nats.js.api import ConsumerInfo, StorageType, StreamInfo
from nats.js.errors import APIError, NoStreamResponseError, NotFoundError

from receiver.core.retry import DAY
from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import JSON, CheckedDestination, Failure, copy_failure, quoted, step_timeout
from receiver.destinations.connections import Connection, SharedConnection
from receiver.destinations.jetstream import loss_warning
from receiver.destinations.nats_client import NatsClient
from receiver.destinations.nats_url import Address, UnusableIdentityError, read_url
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected

OPEN_SECONDS: Final = 6.0
"""Seconds to find a server that answers, and the stream."""
API_SECONDS: Final = 2.5
"""Seconds for a request about streams; the server does not answer a user without the permission."""
CLOSE_SECONDS: Final = 2.0
PING_SECONDS: Final = 20
RECONNECT_SECONDS: Final = 86_400.0
"""Seconds until the client itself would reconnect; it is closed long before."""
MAX_IN_FLIGHT: Final = 256

_NO_RESPONDERS: Final = "503"
# JetStream's error codes.
_TOO_LARGE: Final = frozenset({10054, 10097})
_NO_JETSTREAM: Final = ("no_jetstream", "has no JetStream for this account, or no quorum for it")
_WRONG_STREAM: Final = ("wrong_stream", "has the subject in another stream than the URL's")
_FULL: Final = ("full", "cannot store the message: see the limits of the stream and of the account")
_API_ERRORS: Final[Mapping[int | None, tuple[str, str]]] = {
    **dict.fromkeys((None, 10039, 10076), _NO_JETSTREAM),
    **dict.fromkeys((10060, 10065), _WRONG_STREAM),
    **dict.fromkeys((10023, 10028, 10047, 10077), _FULL),
}
# After these failures the next publish opens a new connection, and makes the stream again if it is gone.
_STALE: Final = frozenset({"connection", "no_stream", "permission", "timeout"})

_ERRORS: Final = (OSError, RuntimeError, ValueError, nats.errors.Error)

log = structlog.get_logger()


class NatsDestination(CheckedDestination):
    """Publishes events to a JetStream subject, many at once over one connection."""

    concurrency = 256

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._address = address = read_url(settings)
        self._connections = SharedConnection(
            lambda: _Connection(address, settings.name),
            shown=address.shown,
            max_users=settings.concurrency or MAX_IN_FLIGHT,
            timeout=settings.timeout,
        )

    async def check(self) -> None:
        """Check that a stream takes the subject, and warn if it may lose events."""
        info = await self._connections.run(_Connection.find_stream)
        problem: str | None = "the user has no permission to see the stream"
        if info is not None:
            consumers = await self._connections.run(lambda each: each.list_consumers(info))
            problem = loss_warning(info, self._address.subject, consumers)
            if (age := info.config.max_age or 0.0) >= DAY:
                log.info(
                    "the stream deletes events by age, even if they are unread",
                    destination=self._name,
                    seconds=age,
                )
        if problem:
            self._warn_of_losses(problem)

    async def publish(self, event: CloudEvent) -> None:
        """Publish the event and return when the stream has acknowledged it, possibly as a duplicate."""
        headers, body = _encode(event, self._address.stream)
        await self._connections.run(lambda connection: connection.publish(headers, body))

    async def close(self) -> None:
        """Let the publishes under way end, which the timeout bounds, and disconnect."""
        await self._connections.close()


class _Connection(Connection):
    """A client that never reconnects, and the publishes that wait on it. Methods raise PublishFailed.

    If the client reconnected by itself, it would later send messages of publishes that have already failed.
    """

    def __init__(self, address: Address, name: str) -> None:
        self._address = address
        self._name = name
        self._client = NatsClient(requires_tls=address.requires_tls)
        self._streams = self._client.jsm(timeout=API_SECONDS)
        self._inbox = self._client.new_inbox()
        self._numbers = count()
        self._answers: dict[str, asyncio.Future[Msg | PublishFailed]] = {}
        self._has_begun = False
        self._connected = False
        self._first_error: Exception | None = None
        self._lost: PublishFailed | None = None
        self._may_read_streams = True

    @property
    def is_open(self) -> bool:
        return self._connected and self._lost is None

    async def open(self) -> None:
        """Connect, and make the stream if it is missing."""
        try:
            async with asyncio.timeout(step_timeout(OPEN_SECONDS, self._address.timeout)):
                await self._connect()
                # One subscription for the answers to all publishes: one each would cost two more commands.
                await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)
                if self._address.stream is not None:
                    await self._make_stream(self._address.stream)
        except _ERRORS as error:
            raise self._failure_from(error) from error
        if self._lost is not None:
            raise self._lost

    async def publish(self, headers: dict[str, str], body: bytes) -> None:
        """Publish a message and return when it is acknowledged. Also raises PublishRejected."""
        # The client checks the size of the body alone. If headers and body are too large for the server, it
        # closes the connection, and all other publishes fail, too.
        size = len(body) + sum(len(name) + len(value) + 4 for name, value in headers.items()) + 12
        if size > self._client.max_payload:
            raise _too_large(f"{size} bytes are more than the max_payload of {self._address.shown}")
        inbox = f"{self._inbox}.{next(self._numbers)}"
        answer = self._answers[inbox] = asyncio.get_running_loop().create_future()
        try:
            await self._client.publish(self._address.subject, body, reply=inbox, headers=headers)
            self._confirm(await answer)
        except _ERRORS as error:
            raise self._failure_from(error) from error
        finally:
            del self._answers[inbox]

    async def find_stream(self) -> StreamInfo | None:
        """Return the stream that takes the subject, or None if the user has no permission to ask."""
        try:
            name = await self._streams.find_stream_name_by_subject(self._address.subject)
            info = await self._streams.stream_info(name)
        except _ERRORS as error:
            if isinstance(error, TimeoutError) and not self._may_read_streams:
                return None
            raise self._failure_from(error) from error
        if self._address.stream not in {None, name}:
            raise PublishFailed(
                f"the subject {self._address.subject} belongs to {name}, not to {self._address.stream}",
                reason="wrong_stream",
            )
        if info.config.no_ack:
            raise PublishFailed(
                f"the stream {name} acknowledges no message: make it without no_ack", reason="no_ack"
            )
        return info

    async def list_consumers(self, info: StreamInfo) -> Sequence[ConsumerInfo] | None:
        """Return the consumers of a stream, or None if the user has no permission to ask."""
        found: list[ConsumerInfo] = []
        try:
            # An answer holds up to 256 of them.
            while len(found) < info.state.consumer_count:
                page = await self._streams.consumers_info(info.config.name or "", offset=len(found))
                if not page:
                    break
                found += page
        except _ERRORS as error:
            if isinstance(error, TimeoutError) and not self._may_read_streams:
                return None
            raise self._failure_from(error) from error
        return found

    def survives(self, failure: Failure) -> bool:
        """Return False if the next publish needs a new connection, or the stream has to be made again."""
        return failure.reason not in _STALE

    async def close(self) -> None:
        """Cut the connection and end the client's tasks."""
        self._lose(PublishFailed(f"{self._address.shown}: the connection was closed", reason="connection"))
        if not self._has_begun:
            # The client's `close` fails if `connect` was never called.
            return
        self._client.abort()
        with contextlib.suppress(OSError, RuntimeError, nats.errors.Error):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._client.close()

    async def _connect(self) -> None:
        # Read the file each time: short-lived credentials are replaced while the process runs.
        login = self._address.login
        identity = login.read_identity()
        jwt = identity.jwt if identity else None
        self._client.identify(identity)
        self._has_begun = True
        await self._client.connect(
            list(self._address.servers),
            name="clipia-receiver",
            user=login.user,
            password=login.password,
            token=login.token,
            signature_cb=identity.sign if identity else None,
            user_jwt_cb=None if jwt is None else lambda: bytearray(jwt),
            tls=self._address.tls,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnected,
            # Two attempts at each server now, and none later.
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            reconnect_to_server_handler=lambda _servers, _info: (None, RECONNECT_SECONDS),
            ping_interval=PING_SECONDS,
            # Keep no messages for later.
            pending_size=0,
        )
        if not self._client.is_connected:
            # The client reports no error if the server closes the connection right after its greeting.
            raise ConnectionResetError("the server has closed the connection")
        self._connected = True

    async def _make_stream(self, name: str) -> None:
        try:
            try:
                await self._streams.stream_info(name)
            except NotFoundError:
                await self._streams.add_stream(
                    name=name, subjects=[self._address.subject], storage=StorageType.FILE
                )
                log.info("made a stream", destination=self._name, stream=name)
        except TimeoutError:
            # A user without permission to ask may still be allowed to publish.
            if self._may_read_streams:
                raise

    def _confirm(self, answer: Msg | PublishFailed) -> None:
        """Raise an error unless the answer is an acknowledgement."""
        if isinstance(answer, PublishFailed):
            raise copy_failure(answer)
        if (answer.headers or {}).get("Status") == _NO_RESPONDERS:
            raise NoStreamResponseError
        # Any client may answer on the subject, but only a stream sends its name and a sequence number.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            content = json.loads(answer.data)
            if "error" in content:
                raise APIError.from_error(content["error"])
            if content["stream"] and content["seq"] > 0:
                return
        raise PublishFailed(
            f"the answer on the subject {self._address.subject} is not a stream's", reason="protocol"
        )

    def _failure_from(self, error: Exception) -> Failure:
        if isinstance(error, NotFoundError | NoStreamResponseError):
            return PublishFailed(
                f"no stream takes the subject {self._address.subject}: make one, or add it to a stream",
                reason="no_stream",
            )
        if isinstance(error, APIError):
            return self._api_failure(error)
        if self._lost is not None:
            return copy_failure(self._lost)
        if not self._connected and self._first_error is not None:
            # The client's last error only says that it has tried, or for how long.
            error = self._first_error
        reason, text = self._explain(error)
        return PublishFailed(self._address.shown + text, reason=reason)

    def _explain(self, error: Exception) -> tuple[str, str]:
        """Return the reason of a failed connection, and the text that follows the servers' names."""
        if isinstance(error, TimeoutError):
            return "timeout", " did not answer in time"
        if isinstance(error, nats.errors.SecureConnRequiredError):
            return "tls", " does not offer TLS, which `tls:` or the table `tls` asks for"
        if isinstance(error, UnusableIdentityError):
            return "auth", f": {error}"
        if "authorization" in str(error).lower() or "authentication" in str(error).lower():
            return "auth", f" rejects the {self._address.login.shown} of the URL"
        return "connection", f": {_server_text(error)}"

    def _api_failure(self, error: APIError) -> Failure:
        if error.err_code in _TOO_LARGE:
            return _too_large(f"the stream rejects it: {quoted(error.description)}")
        reason, text = _API_ERRORS.get(error.err_code, ("refused", "rejects the message"))
        return PublishFailed(
            f"{self._address.shown} {text}: {quoted(error.description)} ({error.err_code})", reason=reason
        )

    def _lose(self, failure: PublishFailed) -> None:
        """Fail all publishes that wait for an answer."""
        self._lost = self._lost or failure
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(failure)

    async def _on_answer(self, message: Msg) -> None:
        answer = self._answers.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def _on_disconnected(self) -> None:
        self._lose(PublishFailed(f"{self._address.shown}: the connection is lost", reason="connection"))

    async def _on_error(self, error: Exception) -> None:
        if not self._connected:
            # An error from the server explains more than the closed connection that follows.
            if not isinstance(self._first_error, nats.errors.Error):
                self._first_error = error
            return
        if self._lost is not None:
            return
        text = str(error)
        log.warning(
            "the client of a destination reported an error", destination=self._name, error=_server_text(error)
        )
        if '"$js.api.' in text:
            self._may_read_streams = False
        elif "permissions violation" in text:
            self._lose(PublishFailed(f"{self._address.shown}: {quoted(text)}", reason="permission"))


def _server_text(error: Exception) -> str:
    """Return the server's error, or the reason why the connection failed."""
    return quoted(error) if isinstance(error, nats.errors.Error) and str(error) else cause(error)


def _too_large(text: str) -> PublishRejected:
    return PublishRejected(f"the message is too large: {text}", reason="too_large")


def _encode(event: CloudEvent, stream: str | None) -> tuple[dict[str, str], bytes]:
    """Return headers and body according to the CloudEvents binding for NATS.

    It writes values like the binding for HTTP, and has a `ce-` header for the type of the data, too.
    """
    try:
        message = to_binary(event, JSON)
    except (TypeError, ValueError, RecursionError) as error:
        raise PublishRejected("the event cannot be written as JSON", reason="encoding") from error
    headers = {
        "ce-datacontenttype" if name == "content-type" else name: value
        for name, value in message.headers.items()
    }
    # The delivery's id, not the event's: the stream drops messages with an id that it has seen, so a replay
    # under the event's id would be lost.
    headers["Nats-Msg-Id"] = headers.get("ce-deliveryid") or headers["ce-id"]
    if stream is not None:
        headers["Nats-Expected-Stream"] = stream
    return headers, message.body
