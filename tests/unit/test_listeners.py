"""The addresses of `serve`, and the errors if they cannot be bound."""

import socket

import pytest

from receiver.cli.listeners import bind, bind_metrics
from receiver.errors import SettingsError


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_all_addresses_of_a_host_share_one_port(host: str) -> None:
    """For port 0 the system chooses one port for all addresses; it is closed until the application starts."""
    listeners = bind(host, 0)
    try:
        (port,) = {listener.getsockname()[1] for listener in listeners}
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        for listener in listeners:
            listener.listen()
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", "cannot listen on 192.0.2.1, port 0: no network interface has this address"),
        ("no such host", "--host no such host: there is no such address"),
        ("é" * 70, f"--host {'é' * 70}: there is no such address"),
    ],
)
def test_an_address_that_cannot_be_bound(host: str, reason: str) -> None:
    """An address of another machine, or an invalid one, is an error of one sentence."""
    with pytest.raises(SettingsError) as error:
        bind(host, 0)
    assert str(error.value) == reason


def test_a_port_that_is_taken() -> None:
    """If a port is in use, the error has its number."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"port {port}: another program listens there already"):
            bind("127.0.0.1", port)


def test_each_process_has_a_port_for_its_metrics() -> None:
    """Without a port there are no metrics; from 0 on the system chooses, and otherwise the ports follow."""
    assert bind_metrics("127.0.0.1", None, count=2) == []
    chosen = [each for group in bind_metrics("127.0.0.1", 0, count=2) for each in group]
    assert len({each.getsockname() for each in chosen}) == 2
    for each in chosen:
        each.close()


def test_ports_of_metrics_that_cannot_be_had() -> None:
    """If a port of any process is taken, or there are too few, the error names the option."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=r"port \d+: .* choose another --metrics-port$"):
            bind_metrics("127.0.0.1", port - 1, count=2)
    with pytest.raises(SettingsError, match="--metrics-port 65535: 2 processes need 2 ports"):
        bind_metrics("127.0.0.1", 65535, count=2)
    with pytest.raises(SettingsError, match=r"^--metrics-host no such host"):
        bind_metrics("no such host", 9101)
