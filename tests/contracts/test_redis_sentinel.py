"""Redis behind sentinels: the current primary gets the events."""

import asyncio
import contextlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import redis
from support.kinds_base import make_event, open_url
from support.servers import free_port
from support.servers_redis_nats import Redis, RedisSentinel

from receiver.destinations import Destination
from receiver.destinations import redis as redis_module
from receiver.errors import PublishFailed, SettingsError
from receiver.masking import mask

PASSWORD, SENTINEL_PASSWORD = "pr1mary-canary", "s3ntinel-canary"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A primary and its replica, in this order at first, and their sentinel."""

    servers: tuple[Redis, Redis]
    sentinel: RedisSentinel

    def url(self, *, name: str = "main", password: str = SENTINEL_PASSWORD) -> str:
        """Return a URL in which the first sentinel is down."""
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{self.sentinel.port}"
        login = f"sentinel={name}&sentinel_password={password}"
        return f"redis://:{PASSWORD}@{hosts}/0?stream=events&{login}"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary that the sentinel knows, and a replica that is up to date."""
    with ExitStack() as stack:
        login = ["--requirepass", PASSWORD, "--masterauth", PASSWORD, "--repl-diskless-sync-delay", "0"]
        primary = stack.enter_context(Redis(*login))
        replica = stack.enter_context(Redis(*login, "--replicaof", "127.0.0.1", str(primary.port)))
        sentinel = RedisSentinel(primary, password=SENTINEL_PASSWORD, primary_password=PASSWORD)
        until_says(primary, "state=online")
        yield Pair(servers=(primary, replica), sentinel=stack.enter_context(sentinel))


def replication(server: Redis) -> str:
    """Return a server's role and the number of its replicas."""
    with redis.Redis(port=server.port, password=PASSWORD) as client:
        return str(client.info("replication")).replace("'state': 'online'", "state=online")


def until_says(server: Redis, expected: str) -> None:
    """Wait until a server has this role and number of replicas."""
    deadline = time.monotonic() + 30
    while expected not in replication(server):
        assert time.monotonic() < deadline, replication(server)
        time.sleep(0.05)


def ids(server: Redis) -> set[str]:
    """Return the ids of the events in a server's stream."""
    with redis.Redis(port=server.port, password=PASSWORD, decode_responses=True) as client:
        entries: list[tuple[str, dict[str, str]]] = client.xrange("events")
        return {fields["id"] for _, fields in entries}


async def until_delivered(destination: Destination, server: Redis) -> None:
    """Publish events until a server has one that was confirmed.

    While sentinels change the roles the old primary confirms entries that are lost with its role.
    """
    async with asyncio.timeout(30):
        while True:
            event = make_event()
            with contextlib.suppress(PublishFailed):
                await destination.publish(event)
                if event.get_id() in await asyncio.to_thread(ids, server):
                    return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("cause", ["planned", "death"])
async def test_failover(pair: Pair, cause: str) -> None:
    """E4: after a planned failover, and after a primary's death, events go to the new primary."""
    destination = open_url(pair.url())
    await destination.check()
    first, second = pair.servers
    await until_delivered(destination, first)
    if cause == "planned":
        await asyncio.to_thread(pair.sentinel.fail_over)
    else:
        first.crash()
    await asyncio.to_thread(until_says, second, "'master'")
    await until_delivered(destination, second)
    await destination.close()


async def test_sentinels_that_are_away(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """E4: if no sentinel answers, a primary that works still gets events."""
    monkeypatch.setattr(redis_module, "PRIMARY_SECONDS", 0.0)
    destination = open_url(pair.url())
    await destination.publish(make_event())
    pair.sentinel.crash()
    await destination.publish(make_event())
    await destination.close()
    assert len(ids(pair.servers[0])) == 2


async def test_errors_of_sentinels(pair: Pair) -> None:
    """G8: an unknown name or a wrong password of the sentinel is reported, and no password is shown."""
    for url in (pair.url(name="other"), pair.url(password="wr0ng-canary")):
        destination = open_url(url)
        with pytest.raises(PublishFailed, match="no sentinel answers with a primary") as caught:
            await destination.check()
        assert "canary" not in str(caught.value)
        await destination.close()
    assert "wr0ng-canary" not in mask("the password wr0ng-canary")


@pytest.mark.parametrize(
    "url",
    [
        "redis://a,b/0?stream=s",
        "redis://a/0?stream=s&sentinel=",
        "redis://a/0?sentinel=main",
        "redis://a/0?stream=s&sentinel_password=canary",
    ],
)
def test_unusable_url(url: str) -> None:
    """G8: several hosts without a primary's name, or an empty name, are a mistake in the URL."""
    with pytest.raises(SettingsError, match="host:26379/0\\?stream=name&sentinel=primary") as caught:
        open_url(url)
    assert "canary" not in str(caught.value)
