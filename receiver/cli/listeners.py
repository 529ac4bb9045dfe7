"""The sockets that a web process listens on."""

import errno
import os
import socket
from itertools import chain
from typing import Annotated, Any

import structlog
import typer

from receiver.cli.options import MAX_PORT
from receiver.errors import SettingsError

MetricsPort = Annotated[
    int | None,
    typer.Option(
        help="Serve /metrics on this port, too; with --workers each process has one: this port and the next "
        "ones. 0 takes free ones.",
        min=0,
        max=MAX_PORT,
    ),
]
MetricsHost = Annotated[str, typer.Option(help="Address for --metrics-port.")]

_REASONS = {
    errno.EADDRINUSE: "another program listens there already; stop it or choose another {}port",
    errno.EACCES: "this user may not listen on that port; choose 1024 or higher",
    errno.EADDRNOTAVAIL: "no network interface has this address",
    errno.EAFNOSUPPORT: "this machine does not support this kind of address",
}


log = structlog.get_logger()


def bind_metrics(host: str, port: int | None, *, count: int = 1) -> list[list[socket.socket]]:
    """Bind a port for the metrics of each of `count` processes, if there is a port. Raises SettingsError."""
    if port is None:
        return []
    if port + count - 1 > MAX_PORT:
        raise SettingsError(f"--metrics-port {port}: {count} processes need {count} ports from there")
    found: list[list[socket.socket]] = []
    try:
        for number in range(count):
            # On an error `found` has those that have to be closed.
            found.append(bind(host, port + number if port else 0, prefix="--metrics-"))  # noqa: PERF401
    except SettingsError:
        for listener in chain(*found):
            listener.close()
        raise
    for listener in chain(*found):
        log.info("metrics", url=f"{url_of(listener)}/metrics")
    return found


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listener's address."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def bind(host: str, port: int, *, prefix: str = "--") -> list[socket.socket]:
    """Bind all addresses of a host; `::` takes IPv4 as well as IPv6. Raises SettingsError.

    The sockets do not listen yet: until the application has started, a client is refused at once. `prefix` is
    that of the options' names.
    """
    addresses = _find_addresses(host, port, prefix)
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
            raise _not_bound(host, port, error.errno or 0, prefix) from None
        listeners.append(listener)
        port = listener.getsockname()[1]
    if not listeners:
        raise _not_bound(host, port, errno.EADDRNOTAVAIL, prefix)
    return listeners


def _find_addresses(host: str, port: int, prefix: str) -> list[tuple[int, tuple[Any, ...]]]:
    name = host.removeprefix("[").removesuffix("]")
    try:
        found = socket.getaddrinfo(name or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise SettingsError(f"{prefix}host {host}: there is no such address") from None
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _not_bound(host: str, port: int, number: int, prefix: str) -> SettingsError:
    reason = _REASONS.get(number, f"the system rejects it ({os.strerror(number)})").format(prefix)
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
