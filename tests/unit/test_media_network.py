"""The guarded network: resolution, checks and connections."""

import asyncio
import socket
from collections.abc import Iterable
from typing import Any

import httpcore
import pytest

from receiver.errors import MediaBlocked
from receiver.media import MediaHosts
from receiver.media.network import GuardedNetwork, system_resolve

HOSTS = MediaHosts.parse(["media.clipia.ai", "http://localhost:9000"])
PUBLIC, OTHER_PUBLIC = "93.184.215.14", "2606:4700::1111"


class Resolver:
    """Gives each lookup the next answer, and records it."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.lookups: list[tuple[str, int]] = []

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the next answer."""
        self.lookups.append((host, port))
        return self.answers.pop(0)


class Stream(httpcore.AsyncNetworkStream):
    """An open connection whose other end has the address `peer`."""

    def __init__(self, peer: str) -> None:
        self.peer = peer
        self.is_closed = False

    def get_extra_info(self, info: str) -> Any:
        """Return the peer's address."""
        return (self.peer, 443) if info == "server_addr" else None

    async def aclose(self) -> None:
        """Record that it was closed."""
        self.is_closed = True


class Dial(httpcore.AsyncNetworkBackend):
    """Records the connects; `dead` addresses refuse them, `hijacked` ones have another peer."""

    def __init__(self, *, dead: Iterable[str] = (), hijacked: dict[str, str] | None = None) -> None:
        self.dead = set(dead)
        self.hijacked = hijacked or {}
        self.connects: list[tuple[str, int, float | None]] = []
        self.streams: list[Stream] = []

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect, or fail."""
        self.connects.append((host, port, timeout))
        if host in self.dead:
            raise httpcore.ConnectError("refused")
        self.streams.append(Stream(self.hijacked.get(host, host)))
        return self.streams[-1]


async def test_connects_to_the_address_that_was_vetted() -> None:
    """D3: the connection goes to the vetted address, and the name is looked up once."""
    resolver, dial = Resolver([PUBLIC], ["127.0.0.1"]), Dial()
    stream = await GuardedNetwork(HOSTS, resolve=resolver, dial=dial).connect_tcp("media.clipia.ai", 443, 8.0)
    assert stream is dial.streams[0]
    assert resolver.lookups == [("media.clipia.ai", 443)]
    assert dial.connects == [(PUBLIC, 443, 8.0)]


@pytest.mark.parametrize(
    "answer", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], [OTHER_PUBLIC, "::ffff:169.254.169.254"]]
)
async def test_one_forbidden_address_blocks_the_name(answer: list[str]) -> None:
    """D2: every address must pass, also those that would not be used."""
    dial = Dial()
    with pytest.raises(MediaBlocked) as caught:
        await GuardedNetwork(HOSTS, resolve=Resolver(answer), dial=dial).connect_tcp("media.clipia.ai", 443)
    assert caught.value.reason == "address"
    assert dial.connects == []


@pytest.mark.parametrize("spelling", ["127.1", "0177.0.0.1", "2130706433", "0x7f.0.0.1", "127.0.0.1", "::1"])
async def test_no_spelling_of_loopback_passes_the_systems_resolver(spelling: str) -> None:
    """D2: if getaddrinfo turns a spelling into loopback, the result is checked, and not the spelling."""
    dial = Dial()
    with pytest.raises((MediaBlocked, httpcore.ConnectError)):
        await GuardedNetwork(HOSTS, dial=dial).connect_tcp(spelling, 443)
    assert dial.connects == []


async def test_a_connection_to_another_peer_is_blocked() -> None:
    """D3: the peer of the open connection must be the vetted address."""
    dial = Dial(hijacked={PUBLIC: "127.0.0.1"})
    with pytest.raises(MediaBlocked) as caught:
        await GuardedNetwork(HOSTS, resolve=Resolver([PUBLIC]), dial=dial).connect_tcp("media.clipia.ai", 443)
    assert caught.value.reason == "address"
    assert dial.streams[0].is_closed


async def test_tries_the_next_vetted_address() -> None:
    """D3: a dead address is skipped, and the addresses share the time to connect."""
    dial = Dial(dead={OTHER_PUBLIC})
    network = GuardedNetwork(HOSTS, resolve=Resolver([OTHER_PUBLIC, PUBLIC]), dial=dial)
    await network.connect_tcp("media.clipia.ai", 443, 8.0)
    assert dial.connects == [(OTHER_PUBLIC, 443, 4.0), (PUBLIC, 443, 4.0)]


@pytest.mark.parametrize("count", [4, 5, 9])
@pytest.mark.parametrize("dead_family", ["IPv4", "IPv6"])
async def test_tries_both_families(count: int, dead_family: str) -> None:
    """D3: if many addresses of a broken family come first, one of the other family is still tried."""
    families = {
        "IPv4": [f"93.184.215.{number}" for number in range(1, count + 1)],
        "IPv6": [f"2606:4700::{number}" for number in range(1, count + 1)],
    }
    dead = families.pop(dead_family)
    (alive,) = families.values()
    dial = Dial(dead=dead)
    network = GuardedNetwork(HOSTS, resolve=Resolver([*dead, *alive]), dial=dial)
    stream = await network.connect_tcp("media.clipia.ai", 443, 8.0)
    assert stream is dial.streams[0]
    assert [host for host, _, _ in dial.connects] == [dead[0], alive[0]]


async def test_gives_up_after_the_last_address() -> None:
    """D3: if no address answers, the error is one that the downloader retries."""
    dial = Dial(dead={OTHER_PUBLIC, PUBLIC})
    with pytest.raises(httpcore.ConnectError):
        await GuardedNetwork(HOSTS, resolve=Resolver([OTHER_PUBLIC, PUBLIC]), dial=dial).connect_tcp(
            "media.clipia.ai", 443
        )


async def test_a_name_without_addresses_is_unavailable() -> None:
    """D3: an unknown or empty name is a failed connection, not a crash."""

    async def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, f"no {host}:{port}")

    with pytest.raises(httpcore.ConnectError):
        await GuardedNetwork(HOSTS, resolve=unknown, dial=Dial()).connect_tcp("media.clipia.ai", 443)
    with pytest.raises(httpcore.ConnectError):
        await GuardedNetwork(HOSTS, resolve=Resolver([]), dial=Dial()).connect_tcp(
            "media.clipia.ai", 443, 5.0
        )


async def test_a_slow_resolver_runs_out_of_time() -> None:
    """D7: resolving counts against the time to connect."""

    async def hang(_host: str, _port: int) -> list[str]:
        await asyncio.Event().wait()
        return []

    with pytest.raises(httpcore.ConnectTimeout):
        await GuardedNetwork(HOSTS, resolve=hang, dial=Dial()).connect_tcp("media.clipia.ai", 443, 0.01)


async def test_a_development_origin_is_not_vetted() -> None:
    """D2: exactly the development origin skips the check; the same host on another port does not."""
    resolver, dial = Resolver(["127.0.0.1"]), Dial()
    network = GuardedNetwork(HOSTS, resolve=resolver, dial=dial)
    await network.connect_tcp("localhost", 9000, 5.0)
    assert dial.connects == [("localhost", 9000, 5.0)]
    with pytest.raises(MediaBlocked):
        await network.connect_tcp("localhost", 9001)


async def test_the_system_resolver_lists_each_address_once() -> None:
    """D2: the answer has plain addresses, for every spelling."""
    assert await system_resolve("127.1", 443) == ["127.0.0.1"]
