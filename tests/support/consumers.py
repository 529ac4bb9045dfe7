"""Consumers: HTTP servers in a thread of the test that take messages."""

import http.server
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Self, TypeVar

import orjson

T = TypeVar("T")

SECONDS: Final = 150.0
"""The most time for anything to come, the end of an alert among it."""


class Answer(NamedTuple):
    """An answer of a consumer."""

    status: int
    content: bytes = b"{}"
    content_type: str = "application/json"


class Consumer:
    """Takes each message. A subclass rejects some, or has files to download."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        consumer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                self._send(consumer.take(self.path, orjson.loads(content)))

            def do_GET(self) -> None:
                self._send(consumer.serve(self.path))

            def _send(self, answer: Answer) -> None:
                self.send_response(answer.status)
                self.send_header("content-type", answer.content_type)
                self.send_header("content-length", str(len(answer.content)))
                self.end_headers()
                self.wfile.write(answer.content)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its base
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def take(self, path: str, message: dict[str, Any]) -> Answer:
        """Take a message that was posted to a path."""
        self.messages.append(message)
        return Answer(200)

    def serve(self, path: str) -> Answer:
        """Return a file."""
        return Answer(404, path.encode())

    def __enter__(self) -> Self:
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def wait_until(found: Callable[[], T | None], wanted: str) -> T:
    """Return the first true result of `found`."""
    deadline = time.monotonic() + SECONDS
    while not (result := found()):
        assert time.monotonic() < deadline, wanted
        time.sleep(0.05)
    return result
