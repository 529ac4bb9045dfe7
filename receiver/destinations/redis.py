"""`redis:` and `rediss:`: one entry per event, at the end of a stream.

`redis://user:password@host:6379/0?stream=clipia-events&maxlen=100000`; `rediss:` is the same over TLS.
Without `maxlen` the stream is never trimmed. With `&sentinel=name` the hosts, separated by commas, are
sentinels, and the server is the primary that they know by that name.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from cloudevents.core.v1.event import CloudEvent
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from receiver.destination_settings import DestinationSettings
from receiver.destinations.base import (
    CheckedDestination,
    Failure,
    closed_failure,
    encode,
    quoted,
    step_timeout,
)
from receiver.destinations.batches import BatchPublisher
from receiver.destinations.tls import open_tls
from receiver.destinations.urls import BrokerUrl, split_url, usable_url
from receiver.error_texts import cause
from receiver.errors import PublishFailed, PublishRejected
from receiver.masking import mask

ROUND_TRIP_SECONDS: Final = 7.0
"""Seconds for one round trip: if an event waits for the one before, it has time left for its own."""
CONNECT_SECONDS: Final = 4.0
SENTINEL_SECONDS: Final = 1.0
"""Seconds for one sentinel to answer, before the next one is queried."""
PRIMARY_SECONDS: Final = 1.0
"""Seconds between two queries for the primary, while sentinels answer."""
REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26_379
MAX_BATCH: Final = 512
"""Entries in flight at once."""
MAX_BATCH_BYTES: Final = 4 * 1024 * 1024
MAX_LENGTH: Final = 2**63 - 1

_ENTRY_ID: Final = re.compile(rb"[0-9]+-[0-9]+")
_NOT_AN_ID: Final = "check"
_INVALID_ID: Final = "invalid stream id"
_OUR_COMMAND: Final = re.compile(r",? *with args beginning")
"""The part of an error at which the server repeats the command and its arguments."""
_NUMBER: Final = re.compile(r"[0-9]{1,19}", re.ASCII)
# A transport that was closed meanwhile raises RuntimeError.
_ERRORS: Final = (RedisError, OSError, RuntimeError)
_ERROR_CODES: Final[Mapping[str, tuple[str, str]]] = {
    "READONLY": ("read_only", "is a read-only replica: name the primary in the URL"),
    "MASTERDOWN": ("no_primary", "is a replica that has lost its primary: name the primary in the URL"),
    "NOREPLICAS": ("no_replicas", "has fewer replicas than min-replicas-to-write asks for"),
    "OOM": ("full", "is out of memory: raise its maxmemory or trim the stream with maxlen= in the URL"),
    "MISCONF": ("disk", "cannot save to its disk: its log says why"),
    "LOADING": ("loading", "is still loading its data"),
    "NOAUTH": ("auth", "requires a password: add it to the URL"),
    "WRONGPASS": ("auth", "rejects the user or the password of the URL"),
    "NOPERM": ("permission", "does not let this user XADD to the stream: see ACL SETUSER"),
    "WRONGTYPE": ("wrong_type", "has a value of another type under this key: choose another stream="),
    "CLUSTERDOWN": ("cluster", "is in a cluster that is down"),
    "MOVED": ("cluster", "is in a cluster and does not hold the stream: name the node that does"),
}
# The host name may belong to another server by now: the next attempt resolves it again.
_WRONG_SERVER: Final = frozenset({"READONLY", "MASTERDOWN"})


@dataclass(frozen=True, kw_only=True)
class _Address:
    """The server of a URL, its login and its stream."""

    url: BrokerUrl = field(repr=False)
    """It names the server, or the sentinels that know it."""
    primary: str | None
    """The name by which sentinels know the server."""
    database: int
    stream: str
    maxlen: int | None

    @property
    def shown(self) -> str:
        """The server, for messages."""
        hosts = self.url.shown
        return f"redis at {hosts}" if self.primary is None else f"redis {self.primary} (sentinels {hosts})"


class RedisDestination(CheckedDestination):
    """Appends events to a Redis stream; events that arrive together share a pipeline.

    An entry has the field `event`, the whole event in structured JSON, and the fields `id` and `deliveryid`,
    so that a consumer can deduplicate without parsing.
    """

    concurrency = 2 * MAX_BATCH

    def __init__(self, settings: DestinationSettings) -> None:
        super().__init__(settings)
        self._address = address = _parse(settings)
        self._round_trip = step_timeout(ROUND_TRIP_SECONDS, settings.timeout)
        self._sentinels: Sentinel | None = None
        self._next_query_at = 0.0
        self._client = self._open_client(settings)
        self._batches = BatchPublisher(
            self._send,
            shown=address.shown,
            max_in_flight=1,
            max_messages=MAX_BATCH,
            max_bytes=MAX_BATCH_BYTES,
            timeout=settings.timeout,
        )

    async def check(self) -> None:
        """Check that an entry would be taken, and warn if the server may lose it."""
        if self._batches.closed:
            raise closed_failure()
        try:
            async with asyncio.timeout(self._batches.timeout):
                await self._check_type()
                await self._check_write()
                problem = _loss_warning(await self._get_config())
        except _ERRORS as error:
            raise self._failure_from(error) from error
        if problem:
            self._warn_of_losses(problem)

    async def publish(self, event: CloudEvent) -> None:
        """Append the event and return when the server has replied with the entry's id."""
        fields = _encode(event)
        await self._batches.publish(fields, len(fields["event"]))

    async def publish_first(self, events: Sequence[CloudEvent]) -> Sequence[Failure | None]:
        """Append the events that fit into one pipeline; see `GroupDestination`."""
        entries, rejections, size = list[dict[str, bytes]](), list[Failure | None](), 0
        for event in events:
            try:
                fields = _encode(event)
            except PublishRejected as rejection:
                rejections.append(rejection)
                continue
            more = len(fields["event"])
            if entries and (len(entries) == MAX_BATCH or size + more > MAX_BATCH_BYTES):
                break
            entries.append(fields)
            rejections.append(None)
            size += more
        failures = iter(await self._batches.publish_together(entries, size) if entries else ())
        return [rejection or next(failures) for rejection in rejections]

    async def close(self) -> None:
        """Send the events that wait, which the timeouts bound, and close the connections."""
        await self._batches.close()
        for client in (self._client, self._sentinels):
            if client is not None:
                with contextlib.suppress(*_ERRORS):
                    await client.aclose()

    def _open_client(self, settings: DestinationSettings) -> Redis:
        """Return a client of the server, or of the primary that sentinels name for each new connection."""
        address, url = self._address, self._address.url
        tls = _tls_options(settings, is_tls=url.scheme == "rediss")
        # If the client retried by itself, it would add entries a second time.
        common: dict[str, Any] = {**tls, "protocol": 2, "retry": Retry(NoBackoff(), 0)}
        options: dict[str, Any] = {
            **common,
            "db": address.database,
            "username": url.user or None,
            "password": url.password or None,
            "socket_timeout": self._round_trip,
            "socket_connect_timeout": step_timeout(CONNECT_SECONDS, settings.timeout),
        }
        hosts = [(host.strip("[]"), port) for host, port in url.hosts]
        if address.primary is None:
            [(host, port)] = hosts
            return Redis(host=host, port=port, **options)
        timeout = step_timeout(SENTINEL_SECONDS, settings.timeout)
        user, password = (url.options.get(f"sentinel_{name}") or None for name in ("user", "password"))
        login = {"username": user, "password": password}
        sentinel_options = {**common, **login, "socket_timeout": timeout, "socket_connect_timeout": timeout}
        self._sentinels = Sentinel(hosts, sentinel_kwargs=sentinel_options, **options)
        client: Redis = self._sentinels.master_for(address.primary)
        return client

    async def _send(self, batch: Sequence[dict[Any, Any]]) -> list[PublishFailed | None]:
        """Append a batch, and return a failure or None for each entry."""
        pipeline = self._client.pipeline(transaction=False)
        for fields in batch:
            pipeline.xadd(self._address.stream, fields, maxlen=self._address.maxlen, approximate=True)
        try:
            async with asyncio.timeout(self._round_trip):
                await self._query_primary()
                # Without raising: the error of one entry must not hide the ids of the others.
                replies = await pipeline.execute(raise_on_error=False)
                if any(_code(reply) in _WRONG_SERVER for reply in replies):
                    await self._client.connection_pool.disconnect()
        except _ERRORS as error:
            return [self._failure_from(error)] * len(batch)
        return [self._failure_of(reply) for reply in replies]

    async def _query_primary(self) -> None:
        """Query the sentinels for the primary from time to time; the next command goes to it.

        After a planned failover the old primary learns of it only seconds later. Until then it confirms
        entries that are lost.
        """
        pool, now = self._client.connection_pool, time.monotonic()
        if isinstance(pool, SentinelConnectionPool) and now >= self._next_query_at:
            self._next_query_at = now + PRIMARY_SECONDS
            try:
                await pool.get_master_address()
            except MasterNotFoundError:
                # If the sentinels are down, keep the primary as long as it works, and query them less often.
                self._next_query_at = time.monotonic() + 10 * PRIMARY_SECONDS

    def _failure_of(self, reply: object) -> PublishFailed | None:
        if isinstance(reply, bytes) and _ENTRY_ID.fullmatch(reply):
            return None
        if isinstance(reply, Exception):
            return self._failure_from(reply)
        return PublishFailed(
            f"{self._address.shown} replies without the id of an entry: is it Redis?", reason="protocol"
        )

    async def _check_type(self) -> None:
        with contextlib.suppress(NoPermissionError):
            found = await self._client.type(self._address.stream)
            if found not in {b"stream", b"none"}:
                raise ResponseError("WRONGTYPE")

    async def _check_write(self) -> None:
        """Send an entry with an invalid id: the server checks rights, memory, disk and role before the id."""
        try:
            await self._client.xadd(self._address.stream, {"event": ""}, id=_NOT_AN_ID)
        except ResponseError as error:
            # Any other error, such as an unknown command, would fail an event, too.
            if _INVALID_ID not in str(error).lower():
                raise

    async def _get_config(self) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        # Managed servers and cautious operators forbid this command.
        with contextlib.suppress(ResponseError):
            for pattern in ("append*", "maxmemory*"):
                found |= await self._client.config_get(pattern)
        return found

    def _failure_from(self, error: Exception) -> PublishFailed:
        shown, code = self._address.shown, _code(error)
        if code == "NOPERM" and "'select'" in str(error).lower():
            number = self._address.database
            return PublishFailed(
                f"{shown} does not let this user SELECT the database {number}: allow +select, or use /0",
                reason="permission",
            )
        if code in _ERROR_CODES:
            reason, text = _ERROR_CODES[code]
            return PublishFailed(f"{shown} {text}", reason=reason)
        if isinstance(error, AuthenticationError):
            return PublishFailed(f"{shown} rejects the login: {quoted(error)}", reason="auth")
        if isinstance(error, ResponseError):
            text = _OUR_COMMAND.split(str(error), maxsplit=1)[0]
            return PublishFailed(
                f"{shown} rejects the command: {mask(code)} {quoted(text)}", reason="refused"
            )
        reason, text = "connection", f": {cause(error)}"
        if isinstance(error, MasterNotFoundError):
            reason, text = "no_primary", ": no sentinel answers with a primary"
        elif isinstance(error, TimeoutError | RedisTimeoutError):
            reason, text = "timeout", " did not reply in time"
        return PublishFailed(shown + text, reason=reason)


def _code(reply: object) -> str:
    """Return the code that an error of the server starts with; the client removes the codes that it knows."""
    if not isinstance(reply, RedisError):
        return ""
    return reply.status_code or str(reply).partition(" ")[0]


def _encode(event: CloudEvent) -> dict[str, bytes]:
    ids = {"id": event.get_id(), "deliveryid": event.get_extension("deliveryid")}
    try:
        return {"event": encode(event)} | {name: str(value).encode() for name, value in ids.items() if value}
    except UnicodeEncodeError as error:
        raise PublishRejected("the event's ids cannot be written as UTF-8", reason="encoding") from error


def _loss_warning(found: Mapping[str, str]) -> str | None:
    if found.get("appendonly") == "no":
        return "appendonly is off: a crash loses all entries since the last snapshot; set appendonly yes"
    if found.get("appendfsync", "always") != "always":
        return "a power cut may lose the last second; set appendfsync always"
    if found.get("maxmemory", "0") != "0" and found.get("maxmemory-policy", "").startswith("allkeys"):
        return "the whole stream may be evicted if memory is short; set maxmemory-policy noeviction"
    return None


def _parse(settings: DestinationSettings) -> _Address:
    with usable_url(
        settings,
        "redis://user:password@host:6379/0?stream=name or, to trim it, &maxlen=100000; "
        "redis://host:26379,host:26379/0?stream=name&sentinel=primary; "
        "in a password write @ : / % as %40 %3A %2F %25",
    ) as text:
        url = _split(text)
        maxlen = url.options.get("maxlen")
        if not url.options.get("stream"):
            raise ValueError("no stream")
        return _Address(
            url=url,
            primary=url.options.get("sentinel"),
            database=_read_number(url.path.removeprefix("/") or "0", least=0),
            stream=url.options["stream"],
            maxlen=None if maxlen is None else _read_number(maxlen, least=1),
        )


def _split(text: str) -> BrokerUrl:
    """Split a URL; the default port is that of a sentinel if the URL names a primary."""
    options = {"stream", "maxlen", "sentinel", "sentinel_user", "sentinel_password"}
    url = split_url(text, port=REDIS_PORT, options=options)
    primary = url.options.get("sentinel")
    if primary == "":
        raise ValueError("the name of the primary is empty")
    if primary is not None:
        return split_url(text, port=SENTINEL_PORT, options=options)
    if len(url.hosts) > 1 or url.options.keys() & {"sentinel_user", "sentinel_password"}:
        raise ValueError("several servers, or a login for sentinels, without the name of a primary")
    return url


def _tls_options(settings: DestinationSettings, *, is_tls: bool) -> dict[str, Any]:
    """Return the client's options. Raises SettingsError for files that cannot be used."""
    files = settings.tls
    if not is_tls or files is None:
        return {"ssl": is_tls}
    # The client takes paths, not a context. Open them now, so that an unusable file is an error at start.
    open_tls(settings)
    key = files.key or files.certificate
    return {"ssl": True, "ssl_ca_certs": files.ca, "ssl_certfile": files.certificate, "ssl_keyfile": key}


def _read_number(text: str, *, least: int) -> int:
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= MAX_LENGTH:
        raise ValueError("not a number, or out of range")
    return int(text)
