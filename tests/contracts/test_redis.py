"""The Redis destination: the content of an entry, the meaning of each error, and recovery."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.asyncio import SSLConnection
from redis.asyncio.client import Pipeline
from structlog.testing import capture_logs
from support.certificates import make_certificate
from support.kinds_base import make_event, open_url, outcome, until, verdict
from support.kinds_redis_nats import read_redis
from support.servers import free_port
from support.servers_redis_nats import Redis

from receiver.destinations import Destination
from receiver.destinations import redis as redis_module
from receiver.destinations.base import encode
from receiver.destinations.redis import RedisDestination
from receiver.errors import PublishFailed, PublishRejected, SettingsError

CANARY = "s3cr3t-canary"
numbers = count()
SHORT_DEADLINES = {"base.TIMEOUT_SECONDS": 1.0, "redis.ROUND_TRIP_SECONDS": 0.4, "redis.CONNECT_SECONDS": 0.3}


@pytest.fixture(scope="module")
def shared() -> Iterator[Redis]:
    """One server for the tests that undo their changes."""
    with Redis() as server:
        yield server


@pytest.fixture
def server() -> Iterator[Redis]:
    """A server of the test's own."""
    with Redis() as running:
        yield running


@pytest.fixture
def stream() -> str:
    """A name that no other test uses."""
    return f"events-{next(numbers)}"


@pytest.fixture
def admin(shared: Redis) -> Iterator[redis.Redis]:
    """An independent client of the shared server; its configuration is undone."""
    with redis.Redis(port=shared.port) as client:
        yield client
        client.replicaof("NO", "ONE")
        for name, value in {
            "maxmemory": "0",
            "maxmemory-policy": "noeviction",
            "min-replicas-to-write": "0",
            "replica-read-only": "yes",
            "replica-serve-stale-data": "yes",
            "save": "",
            "appendonly": "yes",
            "appendfsync": "always",
        }.items():
            client.config_set(name, value)


@pytest.fixture
async def destination(shared: Redis, stream: str) -> AsyncIterator[Destination]:
    """A destination on the shared server."""
    opened = open_url(shared.url(f"stream={stream}"))
    yield opened
    await opened.close()


async def test_entry(shared: Redis, destination: Destination, stream: str) -> None:
    """E1: an entry holds the whole event as one line of JSON, and both ids for deduplication."""
    event = make_event({"text": "Zürich 東京"}, deliveryid="delivery-1", replayid="replay-1")
    await destination.publish(event)
    with redis.Redis(port=shared.port) as client:
        entries: Any = client.xrange(stream)
    assert [fields for _, fields in entries] == [
        {b"event": encode(event), b"id": str(event.get_id()).encode(), b"deliveryid": b"delivery-1"}
    ]


async def test_database_of_the_url(shared: Redis, stream: str) -> None:
    """E1: the number at the end of the URL's path chooses the database."""
    destination = open_url(f"redis://127.0.0.1:{shared.port}/3?stream={stream}")
    await destination.publish(make_event())
    await destination.close()
    with redis.Redis(port=shared.port, db=3) as third, redis.Redis(port=shared.port) as first:
        assert (third.xlen(stream), first.xlen(stream)) == (1, 0)


async def test_maxlen_trims_roughly(shared: Redis, stream: str) -> None:
    """E1: with maxlen the stream is trimmed, roughly; the newest entries are there."""
    destination = open_url(shared.url(f"stream={stream}&maxlen=200"))
    events = [make_event({"number": number}) for number in range(1000)]
    await asyncio.gather(*(destination.publish(event) for event in events))
    await destination.close()
    kept = [event["data"]["number"] for event in read_redis(shared, stream)]
    assert 200 <= len(kept) <= 400
    assert kept == list(range(1000 - len(kept), 1000))


async def test_without_maxlen_the_stream_is_not_trimmed(
    shared: Redis, destination: Destination, stream: str
) -> None:
    """E1: without maxlen the stream keeps every entry."""
    await asyncio.gather(*(destination.publish(make_event()) for _ in range(1000)))
    assert len(read_redis(shared, stream)) == 1000


async def test_publishes_travel_together(admin: redis.Redis, destination: Destination, stream: str) -> None:
    """E6: events that are published at once take a few round trips, in the order of the calls."""
    await destination.publish(make_event({"number": -1}))

    def reads() -> int:
        return int(admin.info("stats")["total_reads_processed"])

    before = reads()
    await asyncio.gather(*(destination.publish(make_event({"number": n})) for n in range(300)))
    assert reads() - before <= 30
    entries: Any = admin.xrange(stream)
    assert [json.loads(fields[b"event"])["data"]["number"] for _, fields in entries] == list(range(-1, 300))


async def test_batches_are_bounded(shared: Redis, stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E6: one round trip carries a limited number of entries and bytes, however many wait; all arrive."""
    sizes: list[int] = []
    execute = Pipeline.execute

    async def spy(self: Pipeline, **options: Any) -> Any:
        sizes.append(len(self))
        return await execute(self, **options)

    monkeypatch.setattr(Pipeline, "execute", spy)
    monkeypatch.setattr(redis_module, "MAX_BATCH", 7)
    monkeypatch.setattr(redis_module, "MAX_BATCH_BYTES", 250_000)
    destination = open_url(shared.url(f"stream={stream}"))
    await asyncio.gather(*(destination.publish(make_event()) for _ in range(30)))
    await asyncio.gather(*(destination.publish(make_event({"fill": "x" * 100_000})) for _ in range(6)))
    await destination.close()
    assert sizes == [7, 7, 7, 7, 2, 2, 2, 2]
    assert len(read_redis(shared, stream)) == 36


async def test_a_pipeline_takes_the_entries_that_fit(
    destination: RedisDestination, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C13: a group is cut at the bytes and at the entries of a pipeline; rejected events take no space."""
    large, poison = make_event({"fill": "x" * 1500}), make_event({"set": {1, 2}})
    monkeypatch.setattr(redis_module, "MAX_BATCH_BYTES", 4000)
    [none, rejected, last] = await destination.publish_first([large, poison, large, large])
    assert (none, last) == (None, None)
    assert isinstance(rejected, PublishRejected)
    assert await destination.publish_first([make_event({"fill": "x" * 5000}), large]) == [None]
    monkeypatch.setattr(redis_module, "MAX_BATCH", 2)
    assert await destination.publish_first([make_event() for _ in range(5)]) == [None] * 2


async def test_each_entry_has_a_reply_of_its_own(
    admin: redis.Redis, destination: Destination, stream: str
) -> None:
    """E1: if the server takes one entry of a pipeline and rejects the next, only the latter fails."""
    admin.xadd(stream, {"last": "but one"}, id="18446744073709551615-18446744073709551614")
    outcomes = await asyncio.gather(*(outcome(destination) for _ in range(3)))
    assert outcomes == ["delivered", "refused", "refused"]
    assert admin.xlen(stream) == 2


def set_user(admin: redis.Redis, user: str, *rules: str) -> None:
    """Give a user these rights and no others."""
    admin.execute_command("ACL", "SETUSER", user, "reset", *rules)  # redis


def break_disk(admin: redis.Redis, shared: Redis) -> None:
    """Let a snapshot fail; then the server rejects writes."""
    (shared.directory / "dump.rdb").mkdir(exist_ok=True)
    admin.config_set("save", "3600 1")
    admin.bgsave()
    deadline = time.monotonic() + 10
    while admin.info("persistence")["rdb_last_bgsave_status"] == "ok":
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("settings", "reason", "hint"),
    [
        ({"replicaof": "yes"}, "read_only", "primary"),
        (
            {"replicaof": "yes", "replica-read-only": "no", "replica-serve-stale-data": "no"},
            "no_primary",
            "primary",
        ),
        ({"maxmemory": "1"}, "full", "maxmemory"),
        ({"min-replicas-to-write": "1"}, "no_replicas", "min-replicas-to-write"),
        ({"disk": "broken"}, "disk", "log"),
    ],
    ids=["READONLY", "MASTERDOWN", "OOM", "NOREPLICAS", "MISCONF"],
)
async def test_rejecting_server(
    shared: Redis,
    admin: redis.Redis,
    destination: Destination,
    stream: str,
    settings: dict[str, str],
    reason: str,
    hint: str,
) -> None:
    """E1: if a server rejects writes publish and check say how to repair it; once repaired, both work."""
    for name, value in settings.items():
        if name == "replicaof":
            admin.replicaof("127.0.0.1", str(free_port()))
        elif name == "disk":
            break_disk(admin, shared)
        else:
            admin.config_set(name, value)
    assert await outcome(destination) == reason
    with pytest.raises(PublishFailed, match=hint) as caught:
        await destination.check()
    assert caught.value.reason == reason
    admin.replicaof("NO", "ONE")
    admin.config_set("maxmemory", "0")
    admin.config_set("min-replicas-to-write", "0")
    admin.config_set("save", "")
    admin.config_set("replica-serve-stale-data", "yes")
    assert await verdict(destination) == "fine"
    assert await outcome(destination) == "delivered"
    assert len(read_redis(shared, stream)) == 1


async def test_name_of_a_replica_is_looked_up_again(admin: redis.Redis, destination: Destination) -> None:
    """E4: after a failover the name may mean another server: the connection to a read-only one is closed."""
    await destination.publish(make_event())
    admin.replicaof("127.0.0.1", str(free_port()))
    before = admin.info("stats")["total_connections_received"]
    assert [await outcome(destination) for _ in range(3)] == ["read_only"] * 3
    assert admin.info("stats")["total_connections_received"] == before + 2


async def test_key_of_another_type(admin: redis.Redis, destination: Destination, stream: str) -> None:
    """E1: a key with a value of another type is reported, and left unchanged."""
    admin.set(stream, "precious")
    assert await outcome(destination) == "wrong_type"
    assert await verdict(destination) == "wrong_type"
    assert admin.get(stream) == b"precious"


@pytest.mark.parametrize(
    ("rules", "login", "reason"),
    [
        (["on", f">{CANARY}", "~*", "+xadd", "+type"], f"writer:wrong-{CANARY}@", "auth"),
        (["on", f">{CANARY}", "~*", "+@all", "-xadd"], f"writer:{CANARY}@", "permission"),
        (["on", f">{CANARY}", "~other*", "+@all"], f"writer:{CANARY}@", "permission"),
        (["off", f">{CANARY}", "~*", "+@all"], f"writer:{CANARY}@", "auth"),
    ],
    ids=["wrong password", "no XADD", "other keys", "disabled"],
)
async def test_rejected_user(
    shared: Redis, admin: redis.Redis, stream: str, rules: list[str], login: str, reason: str
) -> None:
    """E1: publish and check report a user without the permission; the password is in no message."""
    set_user(admin, "writer", *rules)
    destination = open_url(shared.url(f"stream={stream}", login=login))
    assert await outcome(destination) == reason
    with pytest.raises(PublishFailed) as caught:
        await destination.check()
    assert caught.value.reason == reason
    assert CANARY not in f"{caught.value} {caught.value.__cause__!r} {vars(destination)!r}"
    set_user(admin, "writer", "on", f">{CANARY}", f">wrong-{CANARY}", "~*", "+@all")
    assert await outcome(destination) == "delivered"
    await destination.close()


async def test_a_database_takes_the_right_to_select_it(
    shared: Redis, admin: redis.Redis, stream: str
) -> None:
    """E1: a user who may XADD but not SELECT is told to get SELECT, not XADD."""
    set_user(admin, "writer", "on", f">{CANARY}", "~*", "+xadd", "+type")
    destination = open_url(shared.url(f"stream={stream}", login=f"writer:{CANARY}@").replace("/0?", "/3?"))
    for action in (destination.check(), destination.publish(make_event())):
        with pytest.raises(
            PublishFailed, match=r"SELECT the database 3: allow \+select, or use /0"
        ) as caught:
            await action
        assert caught.value.reason == "permission"
    set_user(admin, "writer", "on", f">{CANARY}", "~*", "+xadd", "+type", "+select")
    assert await outcome(destination) == "delivered"
    await destination.close()


async def test_missing_password() -> None:
    """E1: if a server requires a password and the URL has none, the failure says so."""
    with Redis("--requirepass", CANARY) as server:
        destination = open_url(server.url("stream=events"))
        assert await outcome(destination) == "auth"
        assert await verdict(destination) == "auth"
        await destination.close()
        admitted = open_url(server.url("stream=events", login=f":{CANARY}@"))
        assert await outcome(admitted) == "delivered"
        await admitted.close()


async def test_user_with_xadd_only(shared: Redis, admin: redis.Redis, stream: str) -> None:
    """E1: a user with no right but XADD, and with any password, passes the check and publishes."""
    set_user(admin, "adder", "on", ">p@ss:w/rd%", "~*", "+xadd")
    destination = open_url(shared.url(f"stream={stream}", login="adder:p%40ss%3Aw%2Frd%25@"))
    with capture_logs() as logs:
        await destination.start()
    assert logs == []
    await destination.publish(make_event())
    await destination.close()
    assert admin.xlen(stream) == 1


async def test_check_leaves_no_trace(admin: redis.Redis, destination: Destination, stream: str) -> None:
    """E1: neither start nor check makes the stream or adds to it."""
    await destination.start()
    await destination.check()
    assert admin.exists(stream) == 0
    await destination.publish(make_event())
    await destination.check()
    assert admin.xlen(stream) == 1


async def test_check_sees_a_server_without_the_command() -> None:
    """E4: the check fails if the server rejects XADD, and no message repeats the command."""
    with Redis("--rename-command", "XADD", "") as server:
        destination = open_url(server.url("stream=events"))
        event = make_event({"prompt": CANARY}, id=CANARY)
        for call in (destination.check, lambda: destination.publish(event)):
            with pytest.raises(PublishFailed, match="unknown command") as caught:
                await call()
            assert caught.value.reason == "refused"
            assert not [word for word in ("events", "specversion", "{", CANARY) if word in str(caught.value)]
        await destination.close()


REPEATING = [
    "ERR unknown command `XADD`, with args beginning with: `events`, `*`, `event`, `{}`, ",
    "ERR unknown command 'XADD' with args beginning with: 'events' 'event' '{}'",
    "ERR wrong number of arguments near '{}'",
    'ERR Protocol error: "{}"',
    'ERR near "{escaped}"',
]


@pytest.mark.parametrize("line", REPEATING)
async def test_an_error_that_repeats_the_event_is_cut(line: str) -> None:
    """E4: other servers and proxies repeat the command in another form; the event is left out."""

    async def reject(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            begin = data.find(b'{"')
            head = data[begin : begin + 100].decode()
            text = line.replace("{}", head).replace("{escaped}", head.replace('"', '\\"'))
            text = text if b"XADD" in data else ""
            writer.write(f"-{text}\r\n".encode() if text else b"+OK\r\n" * data.count(b"*"))
        writer.close()

    server = await asyncio.start_server(reject, "127.0.0.1", 0)
    destination = open_url(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}?stream=events")
    with pytest.raises(PublishFailed) as caught:
        await destination.publish(make_event(id=CANARY))
    assert caught.value.reason == "refused"
    assert "specversion" not in str(caught.value)
    assert CANARY not in str(caught.value)
    await destination.close()
    server.close()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({}, None),
        ({"appendonly": "no"}, "appendonly yes"),
        ({"appendfsync": "everysec"}, "appendfsync always"),
        ({"maxmemory": "1gb", "maxmemory-policy": "allkeys-lru"}, "noeviction"),
        ({"maxmemory": "1gb", "maxmemory-policy": "volatile-lru"}, None),
    ],
    ids=["durable", "no file", "every second", "evicting", "evicting others"],
)
async def test_check_warns_of_losses(
    admin: redis.Redis, destination: Destination, settings: dict[str, str], problem: str | None
) -> None:
    """E2: the check warns if a server's replies are not durable, and names the setting to change."""
    for name, value in settings.items():
        admin.config_set(name, value)
    with capture_logs() as logs:
        await destination.check()
    assert len(logs) == (problem is not None)
    assert all(entry["log_level"] == "warning" for entry in logs)
    assert all(problem and problem in entry["problem"] for entry in logs)


@pytest.mark.usefixtures("no_stray_failures")
async def test_restart_while_idle(server: Redis) -> None:
    """E4: after a restart of the server, the first publish works, on a new connection."""
    destination = open_url(server.url("stream=events"))
    for _ in range(3):
        assert await outcome(destination) == "delivered"
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
    await destination.close()
    assert len(read_redis(server, "events")) == 3


@pytest.mark.usefixtures("no_stray_failures")
async def test_confirmed_events_survive_crashes(server: Redis) -> None:
    """E1: every confirmed event is there after the server was killed and restarted."""
    destination = open_url(server.url("stream=events"))
    confirmed: set[str] = set()
    stop = asyncio.Event()

    async def publish_on() -> None:
        while not stop.is_set():
            event = make_event()
            try:
                await destination.publish(event)
            except PublishFailed:
                await asyncio.sleep(0.01)
            else:
                confirmed.add(event.get_extension("deliveryid"))

    publishers = [asyncio.create_task(publish_on()) for _ in range(16)]
    for _ in range(4):
        size = len(confirmed)
        deadline = time.monotonic() + 15
        while len(confirmed) < size + 100:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        await asyncio.to_thread(server.crash)
        await asyncio.to_thread(server.start)
    stop.set()
    await asyncio.gather(*publishers)
    await destination.close()
    arrived = [event["deliveryid"] for event in read_redis(server, "events")]
    assert confirmed <= set(arrived)
    assert len(arrived) == len(set(arrived))


@pytest.mark.usefixtures("impatient", "no_stray_failures")
@pytest.mark.parametrize("size", [10, 2_000_000], ids=["small", "larger than all buffers"])
async def test_frozen_server(server: Redis, size: int) -> None:
    """E4: if a server hangs every publish fails in time; once it answers, the same destination works."""
    destination = open_url(server.url("stream=events"))
    assert await outcome(destination) == "delivered"
    server.freeze()
    started = time.monotonic()
    outcomes = await asyncio.gather(*(outcome(destination, {"fill": "x" * size}) for _ in range(12)))
    assert outcomes == ["timeout"] * 12
    assert await verdict(destination) == "timeout"
    assert time.monotonic() - started < 4
    server.thaw()
    assert await outcome(destination) == "delivered"
    await destination.close()


@pytest.mark.usefixtures("impatient", "no_stray_failures")
async def test_start_and_close_at_a_frozen_server(server: Redis) -> None:
    """E16: neither start nor close waits for a server that does not answer."""
    destination = open_url(server.url("stream=events"))
    await destination.publish(make_event())
    server.freeze()
    started = time.monotonic()
    other = open_url(server.url("stream=events"))
    with capture_logs() as logs:
        await other.start()
    assert [entry["log_level"] for entry in logs] == ["warning"]
    publishes = [asyncio.create_task(outcome(destination)) for _ in range(5)]
    await asyncio.sleep(0)
    await destination.close()
    await other.close()
    assert await asyncio.gather(*publishes) == ["timeout"] * 5
    assert time.monotonic() - started < 4
    server.thaw()


async def test_given_up_before_its_turn(server: Redis) -> None:
    """E16: an event is not sent if its publish was cancelled before its batch."""
    destination = open_url(server.url("stream=events"))
    assert isinstance(destination, redis_module.RedisDestination)
    await destination.publish(make_event({"number": 0}))
    server.freeze()
    first = asyncio.create_task(outcome(destination, {"number": 1}))
    senders, waiting = destination._batches._batcher._senders, destination._batches._batcher._waiting
    await until(lambda: bool(senders) and not waiting)
    second = asyncio.create_task(destination.publish(make_event({"number": 2})))
    third = asyncio.create_task(outcome(destination, {"number": 3}))
    await until(lambda: len(waiting) == 2)
    second.cancel()
    server.thaw()
    assert [await first, await third] == ["delivered", "delivered"]
    await destination.close()
    assert [event["data"]["number"] for event in read_redis(server, "events")] == [0, 1, 3]


async def answer_all(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes | None, seen: list[bytes]
) -> None:
    """Answer every command with the same bytes, or hang up if there are none."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
        while head := await reader.readline():
            parts = []
            for _ in range(int(head[1:])):
                size = int((await reader.readline())[1:])
                parts.append((await reader.readexactly(size + 2))[:-2])
            seen.append(parts[0])
            if answer is None and parts[0] == b"XADD":
                break
            writer.write(answer if answer and parts[0] == b"XADD" else b"+OK\r\n")
    writer.close()


@pytest.mark.usefixtures("no_stray_failures")
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "connection"),
        (b"-LOADING later\r\n", "loading"),
        (b"-CLUSTERDOWN The cluster is down\r\n", "cluster"),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", "cluster"),
        (b"-ERR max number of clients reached\r\n", "connection"),
        (b"-ERR unknown command\r\n", "refused"),
        (b"-SOMETHING new\r\n", "refused"),
        (b"+OK\r\n", "protocol"),
        (b"$-1\r\n", "protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "connection"),
    ],
)
async def test_strange_replies(answer: bytes | None, reason: str) -> None:
    """E1: only the id of an entry confirms, and an event is sent only once per publish."""
    seen: list[bytes] = []
    serving: list[asyncio.Task[None]] = []

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.create_task(answer_all(reader, writer, answer, seen)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    destination = open_url(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0?stream=events")
    assert await outcome(destination) == reason
    assert seen.count(b"XADD") == 1
    await destination.close()
    server.close()
    await server.wait_closed()
    await asyncio.gather(*serving)


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E1: rediss: checks the certificate; a server with an untrusted one gets no event."""
    certificate = make_certificate(tmp_path / "server.pem")
    with Redis(tls=certificate) as server:
        distrustful = open_url(server.url("stream=events"))
        assert await outcome(distrustful) == "connection"
        await distrustful.close()
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        trusting = open_url(server.url("stream=events"))
        assert await outcome(trusting) == "delivered"
        await trusting.close()


async def test_ids_that_are_no_text(destination: Destination) -> None:
    """E7: an event is rejected if its ids cannot be written."""
    with pytest.raises(PublishRejected) as caught:
        await destination.publish(make_event(deliveryid="\ud800"))
    assert caught.value.reason == "encoding"
    assert await outcome(destination) == "delivered"


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "//",
        "//host",
        "//host/0",
        "//host/0?stream=",
        "//host/0?maxlen=5",
        "//host/0?stream=a&stream=b",
        "//host/0?stream=a&maxlen=0",
        "//host/0?stream=a&maxlen=-1",
        "//host/0?stream=a&maxlen=",
        "//host/0?stream=a&maxlen=²",
        "//host/0?stream=a&maxlen=99999999999999999999",
        f"//host/0?stream=a&{CANARY}=1",
        f"//host/0?stream=a#{CANARY}",
        f"//host/{CANARY}?stream=a",
        "//host/0/1?stream=a",
        "//host/-1?stream=a",
        f"//user:{CANARY}@/0?stream=a",
        f"//user:{CANARY}@:6379/0?stream=a",
        f"//user:{CANARY}@ho st/0?stream=a",
        f"//user:{CANARY}@host:port/0?stream=a",
        f"//user:{CANARY}@host:0/0?stream=a",
        f"//user:{CANARY}@host:65536/0?stream=a",
        f"//user:{CANARY}/x@host/0?stream=a",
        f"//[{CANARY}/0?stream=a",
        "host/0?stream=a",
    ],
)
@pytest.mark.parametrize("scheme", ["redis", "rediss"])
def test_unusable_url(scheme: str, rest: str) -> None:
    """G8: an invalid URL is rejected with a valid example, and is not quoted."""
    with pytest.raises(SettingsError) as caught:
        open_url(f"{scheme}:{rest}")
    assert "'test'" in str(caught.value)
    assert "write redis://" in str(caught.value)
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host?stream=a", ("host", 6379, None, None, 0, False, "a", None)),
        ("redis://host/?stream=a", ("host", 6379, None, None, 0, False, "a", None)),
        ("REDIS://:pw@Host:1/7?maxlen=9&stream=a%20b", ("host", 1, None, "pw", 7, False, "a b", 9)),
        ("rediss://u:p%40@[::1]:2/0?stream=a:b", ("::1", 2, "u", "p@", 0, True, "a:b", None)),
    ],
)
async def test_parts_of_the_url(url: str, expected: tuple[Any, ...]) -> None:
    """E1: each part of the URL reaches the client, unquoted."""
    destination = open_url(url)
    assert isinstance(destination, redis_module.RedisDestination)
    address, pool = destination._address, destination._client.connection_pool
    options = [pool.connection_kwargs[name] for name in ("host", "port", "username", "password", "db")]
    is_tls = issubclass(pool.connection_class, SSLConnection)
    assert (*options, is_tls, address.stream, address.maxlen) == expected
    await destination.close()
