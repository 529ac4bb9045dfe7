"""The sockets that a web process listens on."""

import errno
import os
import socket
from typing import Any

from receiver.errors import SettingsError

_REASONS = {
    errno.EADDRINUSE: "another program listens there already; stop it or choose another --port",
    errno.EACCES: "this user may not listen on that port; choose 1024 or higher",
    errno.EADDRNOTAVAIL: "no network interface has this address",
    errno.EAFNOSUPPORT: "this machine does not support this kind of address",
}


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind all addresses of a host; `::` takes IPv4 as well as IPv6. Raises SettingsError.

    The sockets do not listen yet: until the application has started, a client is refused at once.
    """
    addresses = _find_addresses(host, port)
    families = {family for family, _ in addresses}
    listeners: list[socket.socket] = []
    for family, address in addresses:
        try:
            listener = _bind_one(family, (address[0], port, *address[2:]), alone=len(families) == 1)
        except OSError as error:
            # A name such as localhost may have an IPv6 address on a machine without IPv6.
            if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT} and len(families) > 1:
                continue
            for each in listeners:
                each.close()
            raise _not_bound(host, port, error.errno or 0) from None
        listeners.append(listener)
        port = listener.getsockname()[1]
    if not listeners:
        raise _not_bound(host, port, errno.EADDRNOTAVAIL)
    return listeners


def _find_addresses(host: str, port: int) -> list[tuple[int, tuple[Any, ...]]]:
    name = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise SettingsError(f"--host {host}: there is no such address") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _not_bound(host: str, port: int, number: int) -> SettingsError:
    reason = _REASONS.get(number, f"the system rejects it ({os.strerror(number)})")
    return SettingsError(f"cannot listen on {host}, port {port}: {reason}")


def _bind_one(family: int, address: tuple[object, ...], *, alone: bool) -> socket.socket:
    # The protocol is given because asyncio sets TCP_NODELAY only on sockets with one.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # An IPv6 socket that also takes IPv4 cannot be bound to the port of an IPv4 socket.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not alone)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener
