"""The network under the downloads, which connects to vetted addresses only.

A name is resolved once, all of its addresses must be public, and the connection goes to one of the addresses
that were checked; TLS and the Host header keep the name. A second DNS answer (DNS rebinding) has no effect.
"""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import chain, zip_longest
from typing import Any, TypeAlias

import httpcore

from receiver.errors import MediaBlocked
from receiver.media.addresses import forbidden
from receiver.media.hosts import MediaHosts
from receiver.media.streams import LargeReads

_MAX_ATTEMPTS = 4

Resolve: TypeAlias = Callable[[str, int], Awaitable[list[str]]]


async def system_resolve(host: str, port: int) -> list[str]:
    """Return every address that the system knows for `host`. Raises OSError if there is none."""
    infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(info[4][0]) for info in infos))


def interleave(addresses: Sequence[IPv4Address | IPv6Address]) -> list[IPv4Address | IPv6Address]:
    """Return the addresses with both families in alternation, the resolver's first one first (RFC 8305).

    Resolvers often list all IPv6 addresses first; if IPv6 is broken, these would use up all attempts.
    """
    first = [address for address in addresses if address.version == addresses[0].version]
    second = [address for address in addresses if address.version != addresses[0].version]
    alternating = chain.from_iterable(zip_longest(first, second))
    return [address for address in alternating if address is not None]


class GuardedNetwork(httpcore.AsyncNetworkBackend):
    """Opens the connections of httpcore. Raises MediaBlocked if an address is not public."""

    def __init__(
        self,
        hosts: MediaHosts,
        *,
        resolve: Resolve = system_resolve,
        dial: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        self._hosts = hosts
        self._resolve = resolve
        self._dial = dial or LargeReads()

    async def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, *args: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        """Connect to a vetted address of `host`; a development origin is not vetted."""
        if self._hosts.is_development(host, port):
            return await self._dial.connect_tcp(host, port, timeout, *args, **options)
        try:
            async with asyncio.timeout(timeout):
                addresses = [ip_address(address) for address in await self._resolve(host, port)]
        except TimeoutError as error:
            raise httpcore.ConnectTimeout(f"{host} was not resolved in time") from error
        except OSError as error:
            raise httpcore.ConnectError(f"{host} cannot be resolved") from error
        for address in addresses:
            if why := forbidden(address):
                raise MediaBlocked(f"{host} has the address {address} ({why})", reason="address")
        attempts = interleave(addresses)[:_MAX_ATTEMPTS]
        share = timeout and timeout / max(1, len(attempts))
        return await self._connect(attempts, port, share, *args, **options)

    async def _connect(
        self, addresses: list[IPv4Address | IPv6Address], *args: Any, **options: Any
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError("No address")
        for address in addresses:
            try:
                stream = await self._dial.connect_tcp(str(address), *args, **options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            peer = ip_address(stream.get_extra_info("server_addr")[0])
            if peer != address:
                await stream.aclose()
                raise MediaBlocked(f"Connected to {peer} instead of {address}", reason="address")
            return stream
        raise failure
