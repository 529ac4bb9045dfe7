"""`redis:` and `rediss:`: one entry per event, at the end of a stream.

`redis://user:password@host:6379/0?stream=clipia-events&maxlen=100000`; `rediss:` is the same over TLS.
Without `maxlen` nothing is ever trimmed.
"""

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import structlog
from cloudevents.core.v1.event import CloudEvent
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from receiver.destinations.base import closed, encode
from receiver.errors import PublishFailed, PublishRejected, SettingsError
from receiver.settings import DestinationSettings

TIMEOUT: Final = 15.0
"""Seconds for a whole publish: its turn, a connection and the reply."""
BATCH_TIMEOUT: Final = 7.0
"""Seconds for one round trip, so that an event that waits for another's still has time for its own."""
CONNECT_TIMEOUT: Final = 4.0
MAX_BATCH: Final = 128
"""Entries in flight at once."""
MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
DEFAULT_PORT: Final = 6379
MAX_LENGTH: Final = 2**63 - 1

_HOST: Final = re.compile(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+")
_ENTRY_ID: Final = re.compile(rb"[0-9]+-[0-9]+")
_NOT_AN_ID: Final = "check"
_REFUSALS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "READONLY": ("read_only", "is a read-only replica: name the primary in the URL"),
        "MASTERDOWN": ("no_primary", "is a replica that has lost its primary: name the primary in the URL"),
        "NOREPLICAS": ("no_replicas", "has fewer replicas than min-replicas-to-write asks for"),
        "OOM": ("full", "is out of memory: raise its maxmemory or trim the stream with maxlen= in the URL"),
        "MISCONF": ("disk", "cannot save to its disk: its log says why"),
        "LOADING": ("loading", "is still loading its data"),
        "NOAUTH": ("auth", "asks for a password: put it into the URL"),
        "WRONGPASS": ("auth", "refuses the user or the password of the URL"),
        "NOPERM": ("permission", "does not let this user XADD to the stream: see ACL SETUSER"),
        "WRONGTYPE": ("wrong_type", "has something under this key that is no stream: choose another stream="),
        "CLUSTERDOWN": ("cluster", "is in a cluster that is down"),
        "MOVED": ("cluster", "is in a cluster and does not hold the stream: name the node that does"),
    }
)
# A name may belong to another server by now: the next try looks it up again.
_ELSEWHERE: Final = frozenset({"READONLY", "MASTERDOWN"})

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class _Place:
    """What a URL says."""

    host: str
    port: int
    user: str | None
    password: str | None = field(repr=False)
    tls: bool
    database: int
    stream: str
    maxlen: int | None

    @property
    def shown(self) -> str:
        """The server, for messages."""
        return f"redis at {self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One event on its way; `outcome` is what `publish` has to raise, or None."""

    fields: dict[Any, Any]
    size: int
    outcome: asyncio.Future[PublishFailed | None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class RedisDestination:
    """Appends events to a Redis stream.

    An entry has the fields `event`, the whole event in structured JSON, and `id` and `deliveryid` for who
    deduplicates without parsing. Events that come while others are on their way go together next, in one
    pipeline; each has a reply of its own.
    """

    concurrency = MAX_BATCH

    def __init__(self, settings: DestinationSettings) -> None:
        self._name = settings.name
        self._place = place = _parse(settings)
        self._client = Redis(
            host=place.host,
            port=place.port,
            db=place.database,
            username=place.user,
            password=place.password,
            ssl=place.tls,
            protocol=2,
            socket_timeout=BATCH_TIMEOUT,
            socket_connect_timeout=CONNECT_TIMEOUT,
            # The client's own retries would add entries a second time behind our back.
            retry=Retry(NoBackoff(), 0),
        )
        self._waiting: deque[_Entry] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Check, and only warn: the server may come later."""
        try:
            await self.check()
        except PublishFailed as error:
            log.warning("destination is not ready", destination=self._name, error=str(error))

    async def check(self) -> None:
        """See whether an entry would be taken, and warn where the server may lose it."""
        if self._closed:
            raise closed()
        try:
            async with asyncio.timeout(TIMEOUT):
                await self._check_type()
                await self._check_write()
                await self._warn_of_losses()
        except (TimeoutError, RedisError, OSError, RuntimeError) as error:
            raise self._failed(error) from error

    async def publish(self, event: CloudEvent) -> None:
        """Append the event and return when the server has replied with the entry's id."""
        if self._closed:
            raise closed()
        entry = _make_entry(event)
        self._waiting.append(entry)
        if self._sender is None:
            self._sender = asyncio.create_task(self._send_waiting())
        try:
            async with asyncio.timeout(TIMEOUT):
                failure = await entry.outcome
        except TimeoutError:
            failure = self._late(TIMEOUT)
        if failure is not None:
            raise failure

    async def close(self) -> None:
        """Send what waits, which the timeouts bound, and close the connections."""
        self._closed = True
        if self._sender is not None:
            await asyncio.wait([self._sender])
        with contextlib.suppress(RedisError, OSError, RuntimeError):
            await self._client.aclose()

    async def _send_waiting(self) -> None:
        try:
            while batch := self._take():
                for entry, outcome in zip(batch, await self._send(batch), strict=True):
                    if not entry.outcome.done():
                        entry.outcome.set_result(outcome)
        finally:
            self._sender = None

    def _take(self) -> list[_Entry]:
        """Take the next entries from the queue, without those that nobody waits for any more."""
        batch: list[_Entry] = []
        size = 0
        while self._waiting and len(batch) < MAX_BATCH and size < MAX_BATCH_BYTES:
            entry = self._waiting.popleft()
            if not entry.outcome.done():
                batch.append(entry)
                size += entry.size
        return batch

    async def _send(self, batch: list[_Entry]) -> list[PublishFailed | None]:
        """Return one outcome per entry."""
        try:
            async with asyncio.timeout(BATCH_TIMEOUT):
                replies = await self._execute(batch)
        except (TimeoutError, RedisError, OSError, RuntimeError) as error:
            return [self._failed(error) for _ in batch]
        return [self._judge(reply) for reply in replies]

    def _judge(self, reply: object) -> PublishFailed | None:
        if isinstance(reply, bytes) and _ENTRY_ID.fullmatch(reply):
            return None
        return self._failed(reply)

    async def _execute(self, batch: list[_Entry]) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for entry in batch:
            pipeline.xadd(self._place.stream, entry.fields, maxlen=self._place.maxlen, approximate=True)
        replies = await pipeline.execute(raise_on_error=False)
        if any(_code(reply) in _ELSEWHERE for reply in replies):
            await self._client.connection_pool.disconnect()
        return replies

    async def _check_type(self) -> None:
        with contextlib.suppress(NoPermissionError):
            found = await self._client.type(self._place.stream)
            if found not in {b"stream", b"none"}:
                raise ResponseError("WRONGTYPE")

    async def _check_write(self) -> None:
        """Send what the server refuses for its id, once it has seen to rights, memory, disk and role."""
        try:
            await self._client.xadd(self._place.stream, {"event": ""}, id=_NOT_AN_ID)
        except ResponseError as error:
            if _code(error) != "ERR":
                raise

    async def _warn_of_losses(self) -> None:
        found: dict[Any, Any] = {}
        # Managed servers and careful operators forbid this command.
        with contextlib.suppress(ResponseError):
            for pattern in ("append*", "maxmemory*"):
                found |= await self._client.config_get(pattern)
        problem = _describe_losses(found)
        if problem:
            log.warning("the destination may lose events", destination=self._name, problem=problem)

    def _failed(self, error: object) -> PublishFailed:
        shown = self._place.shown
        if isinstance(error, TimeoutError | RedisTimeoutError):
            return self._late(BATCH_TIMEOUT)
        code = _code(error)
        if code in _REFUSALS:
            reason, text = _REFUSALS[code]
            return PublishFailed(f"{shown} {text}", reason=reason)
        if isinstance(error, AuthenticationError):
            return PublishFailed(f"{shown} refuses the login: {error}", reason="auth")
        if isinstance(error, ResponseError):
            return PublishFailed(f"{shown} refuses: {code} {error}", reason="refused")
        if not isinstance(error, Exception):
            return PublishFailed(f"{shown} replies with no entry's id: is it Redis?", reason="protocol")
        return PublishFailed(f"{shown}: {error}", reason="connection")

    def _late(self, seconds: float) -> PublishFailed:
        return PublishFailed(f"{self._place.shown} did not reply within {seconds:g} s", reason="timeout")


def _code(reply: object) -> str:
    """Return the word that an error of the server starts with; the client cuts off those that it knows."""
    if not isinstance(reply, RedisError):
        return ""
    return reply.status_code or str(reply).partition(" ")[0]


def _make_entry(event: CloudEvent) -> _Entry:
    body = encode(event)
    fields = {"event": body, "id": event.get_id(), "deliveryid": event.get_extension("deliveryid")}
    try:
        encoded = {
            name: value if isinstance(value, bytes) else str(value).encode()
            for name, value in fields.items()
            if value is not None
        }
    except UnicodeEncodeError as error:
        raise PublishRejected("the event's ids cannot be written as UTF-8", reason="encoding") from error
    return _Entry(fields=encoded, size=len(body))


def _describe_losses(found: Mapping[str, str]) -> str | None:
    if found.get("appendonly") == "no":
        return "appendonly is off: a crash loses all since the last snapshot; set appendonly yes"
    if found.get("appendfsync", "always") != "always":
        return "a power cut may lose the last second; appendfsync always would not"
    if found.get("maxmemory", "0") != "0" and found.get("maxmemory-policy", "").startswith("allkeys"):
        return "when memory is short the whole stream may be evicted; set maxmemory-policy noeviction"
    return None


def _parse(settings: DestinationSettings) -> _Place:
    wrong = SettingsError(
        f"destination {settings.name!r}: write redis://user:password@host:6379/0?stream=name or, to have it "
        "trimmed, &maxlen=100000; in a password @ : / % are written as %40 %3A %2F %25"
    )
    try:
        parts = urlsplit(settings.url.get_secret_value())
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True)
        port = DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:
        # The error would quote the URL.
        raise wrong from None
    query = dict(pairs)
    database, maxlen = parts.path.removeprefix("/") or "0", query.get("maxlen")
    if (
        not _HOST.fullmatch(parts.hostname or "")
        or not port
        or parts.fragment
        or len(query) != len(pairs)
        or not query.keys() <= {"stream", "maxlen"}
        or not query.get("stream")
        or not _is_number(database)
        or not (maxlen is None or (_is_number(maxlen) and 0 < int(maxlen) <= MAX_LENGTH))
    ):
        raise wrong
    return _Place(
        host=parts.hostname or "",
        port=port,
        user=unquote(parts.username) if parts.username else None,
        password=unquote(parts.password) if parts.password else None,
        tls=parts.scheme == "rediss",
        database=int(database),
        stream=query["stream"],
        maxlen=None if maxlen is None else int(maxlen),
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(MAX_LENGTH))
