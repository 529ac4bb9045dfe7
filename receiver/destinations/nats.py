"""`nats:`: one JetStream message per event, a CloudEvent in binary mode.

`nats://user:password@host:4222?subject=clipia.events&stream=CLIPIA`; several servers of a cluster are
separated by commas, and a user without a password is a token. With `stream` that stream is made where it is
missing, and no other will do; without it some stream must take the subject. TLS is used where the server asks
for it.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

import nats.errors
import structlog
from cloudevents.core.bindings.http import to_binary_event
from cloudevents.core.v1.event import CloudEvent
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.transport import TcpTransport
from nats.js.api import StorageType, StreamInfo
from nats.js.errors import APIError, NotFoundError

from receiver.destinations.base import closed
from receiver.errors import PublishFailed, PublishRejected, SettingsError
from receiver.settings import DestinationSettings

TIMEOUT: Final = 15.0
"""Seconds for a whole publish: its turn, a connection and the acknowledgement."""
CONNECT_TIMEOUT: Final = 6.0
"""Seconds to find a server that answers, and the stream."""
ANSWER_TIMEOUT: Final = 8.0
API_TIMEOUT: Final = 2.5
"""Seconds for a question about streams; to who may not ask, the server says nothing."""
CLOSE_TIMEOUT: Final = 2.0
PING_INTERVAL: Final = 20
NEVER: Final = 86_400.0
"""Seconds until the client itself would connect again; it is closed long before."""
MAX_IN_FLIGHT: Final = 256
DEFAULT_PORT: Final = 4222
MAX_PORT: Final = 65_535

_SERVER: Final = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?", re.ASCII)
_SUBJECT: Final = re.compile(r"(?!\$)[^\s\x00-\x1f\x7f.*>]+(\.[^\s\x00-\x1f\x7f.*>]+)*")
_STREAM: Final = re.compile(r"[^\s\x00-\x1f\x7f.*>/\\]+")
_NO_RESPONDERS: Final = "503"
# JetStream's error codes.
_TOO_LARGE: Final = frozenset({10054, 10097})
_REASONS: Final[Mapping[int, str]] = MappingProxyType(
    {
        10023: "full",
        10028: "full",
        10039: "no_jetstream",
        10047: "full",
        10060: "wrong_stream",
        10065: "wrong_stream",
        10076: "no_jetstream",
        10077: "full",
    }
)
# After these the next publish makes a new connection, and looks after the stream again.
_STALE: Final = frozenset({"connection", "no_stream", "permission", "timeout"})

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What a URL says."""

    servers: tuple[str, ...]
    user: str | None
    password: str | None = field(repr=False)
    token: str | None = field(repr=False)
    subject: str
    stream: str | None

    @property
    def shown(self) -> str:
        """The servers, for messages."""
        return " ".join(self.servers)


class NatsDestination:
    """Publishes events to a JetStream subject, many at once over one connection.

    A connection that breaks is thrown away, and the next publish makes a new one: the client's own
    reconnecting would keep messages for later whose publishers have long been told that they failed.
    """

    concurrency = 128

    def __init__(self, settings: DestinationSettings) -> None:
        self._name = settings.name
        self._place = _parse(settings)
        self._turns = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._connection: _Connection | None = None
        self._opening: asyncio.Task[_Connection | PublishFailed] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    async def start(self) -> None:
        """Check, and only warn: the server may come later."""
        try:
            await self.check()
        except PublishFailed as error:
            log.warning("destination is not ready", destination=self._name, error=str(error))

    async def check(self) -> None:
        """See whether a stream takes the subject, and warn where it may lose events."""
        connection = await self._connect()
        try:
            info = await connection.find_stream()
        except PublishFailed as failure:
            self._reconsider(connection, failure)
            raise
        problem = "the user may not look at the stream" if info is None else _describe_losses(info)
        if problem:
            log.warning("the destination may lose events", destination=self._name, problem=problem)

    async def publish(self, event: CloudEvent) -> None:
        """Publish the event and return when the stream has acknowledged it, be it as a duplicate."""
        headers, body = _encode(event, self._place.stream)
        try:
            async with asyncio.timeout(TIMEOUT), self._turns:
                connection = await self._connect()
                try:
                    await connection.publish(headers, body)
                except PublishFailed as failure:
                    self._reconsider(connection, failure)
                    raise
        except TimeoutError:
            raise PublishFailed(
                f"{self._place.shown} did not answer within {TIMEOUT:g} s", reason="timeout"
            ) from None

    async def close(self) -> None:
        """Wait for what is under way, which the timeouts bound, and close the connection."""
        self._closed = True
        if self._opening is not None:
            await asyncio.wait([self._opening])
        if self._connection is not None:
            await self._connection.wait_for_answers()
        if self._connection is not None:
            self._drop(self._connection, closed())
        if self._closing:
            await asyncio.wait(self._closing)

    async def _connect(self) -> "_Connection":
        """Return the connection, a new one where there is none. Raises PublishFailed."""
        if self._closed:
            raise closed()
        if self._connection is not None:
            return self._connection
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        # Shielded: others wait for it, too.
        outcome = await asyncio.shield(self._opening)
        if isinstance(outcome, PublishFailed):
            raise _copy(outcome)
        return outcome

    async def _open(self) -> "_Connection | PublishFailed":
        """Return a failure instead of raising it: nobody may be left to take it."""
        connection = _Connection(self._place, self._name, self._drop)
        failure: PublishFailed | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                await connection.open()
        except (TimeoutError, OSError, RuntimeError, ValueError, nats.errors.Error) as error:
            failure = connection.failed(error)
        self._opening = None
        failure = failure or (closed() if self._closed else connection.lost)
        if failure is not None:
            self._drop(connection, failure)
            return failure
        self._connection = connection
        return connection

    def _reconsider(self, connection: "_Connection", failure: PublishFailed) -> None:
        if failure.reason in _STALE:
            self._drop(connection, failure)

    def _drop(self, connection: "_Connection", failure: PublishFailed) -> None:
        if self._connection is connection:
            self._connection = None
        if connection.lost is None:
            connection.lose(failure)
            task = asyncio.create_task(connection.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


class _Client(Client):
    """The library's client, which can be cut off besides."""

    def abort(self) -> None:
        """Drop what is not sent: `close` would wait for a server that does not read, maybe for ever."""
        self._pending.clear()
        self._pending_data_size = 0
        if isinstance(self._transport, TcpTransport) and self._transport._io_writer is not None:  # noqa: SLF001
            self._transport._io_writer.transport.abort()  # noqa: SLF001


class _Connection:
    """One connection from its making to its loss, and the publishes that wait on it."""

    def __init__(
        self, place: _Place, name: str, drop: Callable[["_Connection", PublishFailed], None]
    ) -> None:
        self.lost: PublishFailed | None = None
        self._place = place
        self._name = name
        self._drop = drop
        self._client = _Client()
        self._streams = self._client.jsm(timeout=API_TIMEOUT)
        self._inbox = self._client.new_inbox()
        self._numbers = count()
        self._answers: dict[str, asyncio.Future[Msg | PublishFailed]] = {}
        self._last_error: Exception | None = None
        self._open = False
        self._may_ask = True

    async def open(self) -> None:
        """Connect, and make the stream where it is missing."""
        await self._client.connect(
            list(self._place.servers),
            name="clipia-receiver",
            user=self._place.user,
            password=self._place.password,
            token=self._place.token,
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
        self._open = True
        await self._client.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        if self._place.stream is not None:
            await self._make_stream(self._place.stream)

    async def publish(self, headers: dict[str, str], body: bytes) -> None:
        """Publish a message and return when it is acknowledged. Raises PublishFailed and PublishRejected."""
        # The client counts the body alone, and for one that is too large the server hangs up on all.
        size = len(body) + sum(len(name) + len(value) + 4 for name, value in headers.items()) + 12
        if size > self._client.max_payload:
            raise _too_large(f"{size} bytes are more than the max_payload of {self._place.shown}")
        inbox = f"{self._inbox}.{next(self._numbers)}"
        answer = self._answers[inbox] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._client.publish(self._place.subject, body, reply=inbox, headers=headers)
                outcome = await answer
        except (TimeoutError, OSError, RuntimeError, nats.errors.Error) as error:
            raise self.failed(error) from error
        finally:
            del self._answers[inbox]
        if isinstance(outcome, PublishFailed):
            raise _copy(outcome)
        self._confirm(outcome)

    async def find_stream(self) -> StreamInfo | None:
        """Return the stream that takes the subject, None where the user may not ask. Raises PublishFailed."""
        try:
            name = await self._streams.find_stream_name_by_subject(self._place.subject)
            info = await self._streams.stream_info(name)
        except NotFoundError:
            raise self._no_stream() from None
        except (TimeoutError, OSError, RuntimeError, nats.errors.Error) as error:
            if not self._may_ask:
                return None
            raise self.failed(error) from error
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

    async def wait_for_answers(self) -> None:
        """Let what is under way end."""
        if self._answers:
            await asyncio.wait(self._answers.values(), timeout=ANSWER_TIMEOUT)

    def lose(self, failure: PublishFailed) -> None:
        """End all that waits for an answer."""
        self.lost = failure
        for answer in self._answers.values():
            if not answer.done():
                answer.set_result(failure)

    async def close(self) -> None:
        """Cut the connection and end the client's tasks."""
        self._client.abort()
        with contextlib.suppress(TimeoutError, OSError, RuntimeError, nats.errors.Error):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await self._client.close()

    def failed(self, error: Exception) -> PublishFailed:
        """Return what an error of the client means."""
        shown = self._place.shown
        if isinstance(error, APIError):
            return self._refused(error)
        if self.lost is not None:
            return _copy(self.lost)
        if not self._open and self._last_error is not None:
            # What the client says in the end is only that it has tried, or how long.
            error = self._last_error
        if isinstance(error, TimeoutError):
            return PublishFailed(f"{shown} did not answer in time", reason="timeout")
        text = str(error) or type(error).__name__
        if "authorization" in text.lower():
            return PublishFailed(f"{shown} refuses the user, password or token of the URL", reason="auth")
        return PublishFailed(f"{shown}: {text}", reason="connection")

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

    def _confirm(self, answer: Msg) -> None:
        """Raise what keeps an answer from being an acknowledgement."""
        if (answer.headers or {}).get("Status") == _NO_RESPONDERS:
            raise self._no_stream()
        try:
            content = json.loads(answer.data)
            if "error" in content:
                raise APIError.from_error(content["error"])
            if content["stream"] and content["seq"] > 0:
                return
        except APIError as error:
            if error.err_code in _TOO_LARGE:
                raise _too_large(f"the stream refuses it: {error.description}") from error
            raise self._refused(error) from error
        except (ValueError, TypeError, KeyError):
            pass
        raise PublishFailed(
            f"something else than a stream answers on the subject {self._place.subject}", reason="protocol"
        )

    def _no_stream(self) -> PublishFailed:
        return PublishFailed(
            f"no stream takes the subject {self._place.subject}: make one, or add it to one's subjects",
            reason="no_stream",
        )

    def _refused(self, error: APIError) -> PublishFailed:
        reason = "no_jetstream" if error.err_code is None else _REASONS.get(error.err_code, "refused")
        text = {
            "no_jetstream": "has no JetStream for this account, or no quorum for it",
            "wrong_stream": f"gives the subject to another stream than the URL's ({error.description})",
            "full": f"cannot store the message ({error.description}): see the limits of stream and account",
        }.get(reason, f"refuses: {error.description} ({error.err_code})")
        return PublishFailed(f"{self._place.shown} {text}", reason=reason)

    async def _on_answer(self, message: Msg) -> None:
        answer = self._answers.get(message.subject)
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def _on_disconnected(self) -> None:
        self._drop(self, PublishFailed(f"{self._place.shown}: the connection is lost", reason="connection"))

    async def _on_error(self, error: Exception) -> None:
        if not self._open and not isinstance(self._last_error, nats.errors.Error):
            # What the server has said tells more than that it has hung up.
            self._last_error = error
        if not self._open or self.lost is not None:
            return
        text = str(error)
        log.warning("the client of a destination reports", destination=self._name, error=text)
        if "permissions violation" not in text:
            return
        if '"$js.api.' in text:
            self._may_ask = False
        else:
            self._drop(self, PublishFailed(f"{self._place.shown}: {text}", reason="permission"))


def _copy(failure: PublishFailed) -> PublishFailed:
    """Return one exception per publisher: each gets a traceback of its own."""
    return PublishFailed(str(failure), reason=failure.reason)


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


def _describe_losses(info: StreamInfo) -> str | None:
    if info.config.storage == StorageType.MEMORY:
        return "the stream is kept in memory: make one with file storage"
    if (info.config.num_replicas or 1) == 1:
        return "a power cut may lose minutes: the stream has one replica; or is sync_interval always there?"
    return None


def _parse(settings: DestinationSettings) -> _Place:
    wrong = SettingsError(
        f"destination {settings.name!r}: write nats://user:password@host:4222?subject=clipia.events or, "
        "to have the stream made, &stream=CLIPIA; in a password @ : / % are written as %40 %3A %2F %25"
    )
    try:
        parts = urlsplit(settings.url.get_secret_value())
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
    except ValueError:
        # The error would quote the URL.
        raise wrong from None
    login, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = (unquote(part) for part in login.partition(":"))
    servers = [_SERVER.fullmatch(host) for host in hosts.split(",")]
    query = dict(pairs)
    stream = query.get("stream")
    if (
        parts.path not in {"", "/"}
        or parts.fragment
        or (at and not user)
        or len(query) != len(pairs)
        or not query.keys() <= {"subject", "stream"}
        or not _SUBJECT.fullmatch(query.get("subject", ""))
        or not (stream is None or _STREAM.fullmatch(stream))
    ):
        raise wrong
    found = []
    for server in servers:
        port = int((server and server["port"]) or DEFAULT_PORT)
        if server is None or not 0 < port <= MAX_PORT:
            raise wrong
        found.append(f"nats://{server['host']}:{port}")
    return _Place(
        servers=tuple(found),
        user=user if colon else None,
        password=password if colon else None,
        token=user if at and not colon else None,
        subject=query["subject"],
        stream=stream,
    )
