"""The sockets that a web process listens on."""

import errno
import socket
from collections.abc import Sequence

from receiver.errors import SettingsError

_REASONS = {
    errno.EADDRINUSE: "something listens there already",
    errno.EACCES: "this user may not listen on that port",
    errno.EADDRNOTAVAIL: "no network interface has this address",
    errno.EAFNOSUPPORT: "this machine has no such network",
}


def bind(host: str, port: int) -> list[socket.socket]:
    """Bind all addresses of a host. `::` takes IPv4 as well as IPv6. Raises SettingsError.

    Nothing listens yet: before the application has started, clients should be refused rather than wait.
    """
    name = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise SettingsError(f"--host {host}: there is no such address") from None
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    families = {family for family, _ in addresses}
    listeners: list[socket.socket] = []
    for family, address in addresses:
        try:
            listener = _bind_one(family, (address[0], port, *address[2:]), alone=len(families) == 1)
        except OSError as error:
            # A name such as localhost may have an IPv6 address on a machine without IPv6.
            if error.errno in {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT} and len(families) > 1:
                continue
            _close(listeners)
            reason = _REASONS.get(error.errno or 0, f"the system refuses it ({error.errno})")
            raise SettingsError(f"cannot listen on {host}, port {port}: {reason}") from None
        listeners.append(listener)
        port = listener.getsockname()[1]
    if not listeners:
        raise SettingsError(f"cannot listen on {host}, port {port}: {_REASONS[errno.EADDRNOTAVAIL]}")
    return listeners


def _bind_one(family: int, address: tuple[object, ...], *, alone: bool) -> socket.socket:
    # With the protocol, because asyncio sets TCP_NODELAY only for sockets that name it.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # Beside a socket for IPv4 one that takes both could not be bound.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not alone)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _close(listeners: Sequence[socket.socket]) -> None:
    for listener in listeners:
        listener.close()
