"""The URL of a RabbitMQ destination: its nodes, its exchange and its queue."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass

from aiormq import spec
from pydantic import SecretStr
from yarl import URL

from receiver.destination_settings import DestinationSettings
from receiver.destinations.tls import open_tls
from receiver.destinations.urls import BrokerUrl, split_url, usable_url


@dataclass(frozen=True, kw_only=True)
class Node:
    """One server of a cluster."""

    url: SecretStr
    shown: str
    """Its address, for messages."""


@dataclass(frozen=True, kw_only=True)
class Address:
    """The nodes of a URL, the exchange and routing key of messages, and the queue to declare."""

    nodes: tuple[Node, ...]
    """Nodes of one cluster, in the order in which they are tried."""
    shown: str
    vhost: str
    exchange: str
    routing_key: str
    queue: str
    tls: ssl.SSLContext | None
    """None for the library's own context, which trusts the system's authorities."""
    timeout: float | None


def read_url(settings: DestinationSettings) -> Address:
    """Read a destination's URL. Raises SettingsError."""
    with usable_url(
        settings,
        "amqp://user:password@host/vhost?queue=name or …?exchange=name&routing_key=key, with both for a "
        "queue to declare and bind; several nodes as host:5672,host:5672",
    ) as text:
        default = 5671 if text.lower().startswith("amqps:") else 5672
        url = split_url(text, port=default, options={"exchange", "queue", "routing_key"})
        exchange, queue, routing_key = _read_names(url.options)
        # The library checks names when it encodes them; a name that is too long raises TypeError.
        vhost = url.path[1:] or "/"
        spec.Connection.Open(virtual_host=vhost).marshal()
        spec.Queue.Declare(queue=queue if exchange else routing_key).marshal()
        spec.Basic.Publish(exchange=exchange, routing_key=routing_key).marshal()
        return Address(
            nodes=tuple(_node(url, host, port) for host, port in url.hosts),
            shown=f"{url.scheme}://{url.shown}",
            vhost=vhost,
            exchange=exchange,
            routing_key=routing_key,
            queue=queue,
            tls=open_tls(settings) if settings.tls else None,
            timeout=settings.timeout,
        )


def _node(url: BrokerUrl, host: str, port: int) -> Node:
    target = URL.build(
        scheme=url.scheme, user=url.user, password=url.password, host=host.strip("[]"), port=port
    )
    return Node(url=SecretStr(str(target)), shown=f"{url.scheme}://{host}:{port}")


def _read_names(options: Mapping[str, str]) -> tuple[str, str, str]:
    """Return the exchange, the queue and the routing key; without an exchange the key is a queue's name."""
    exchange, queue, routing_key = (options.get(name, "") for name in ("exchange", "queue", "routing_key"))
    if exchange:
        return exchange, queue, routing_key
    if not queue and not routing_key:
        raise ValueError("no exchange and no queue")
    if queue and routing_key not in {"", queue}:
        raise ValueError("messages would go to another queue than the declared one")
    return "", queue, routing_key or queue
