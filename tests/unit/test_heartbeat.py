"""The health check: the addresses at which it requests a web process."""

import http.server
import socket
import threading
from pathlib import Path

import pytest

from receiver import heartbeat
from receiver.heartbeat import Heartbeat


class Alive(http.server.BaseHTTPRequestHandler):
    """Answers 200."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's signature
        """Log no request."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of heartbeat files."""
    monkeypatch.setattr(heartbeat, "_folders", lambda: [tmp_path])
    return tmp_path


@pytest.mark.usefixtures("folder")
def test_any_address_is_asked_without_ipv6() -> None:
    """A process on `::` is healthy if only 127.0.0.1 answers: a container may have no IPv6."""
    with http.server.HTTPServer(("127.0.0.1", 0), Alive) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        beat = Heartbeat("serve", address=("::", server.server_port), path="/livez")
        try:
            works, said = heartbeat.check()
        finally:
            beat.close()
            server.shutdown()
            thread.join(10)
    assert works
    assert said == [f"serve: http://127.0.0.1:{server.server_port}/livez answers HTTP/1.0 200 OK"]


@pytest.mark.usefixtures("folder")
def test_a_process_that_hangs_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a process on `::` accepts and does not answer, only one address is tried: time is short."""
    asked: list[str] = []

    def request(host: str, _port: int, _path: str) -> bytes:
        asked.append(host)
        raise TimeoutError

    monkeypatch.setattr(heartbeat, "_request", request)
    beat = Heartbeat("serve", address=("::", 1), path="/livez")
    try:
        assert heartbeat.check() == (False, ["serve: http://[::1]:1/livez does not answer (TimeoutError)"])
    finally:
        beat.close()
    assert asked == ["::1"]


@pytest.mark.usefixtures("folder")
def test_a_process_that_answers_nowhere_is_not_healthy() -> None:
    """If no address of a process on `::` answers, the check fails and names the last one."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    beat = Heartbeat("serve", address=("::", port), path="/livez")
    try:
        works, [said] = heartbeat.check()
    finally:
        beat.close()
    assert not works
    assert said.startswith(f"serve: http://127.0.0.1:{port}/livez does not answer")
