"""A receiver for the tests of pages, with a sandbox, a consumer that rejects events, and hostile texts."""

import http.server
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import httpx
import orjson

from receiver.db.database import Database
from support.commands import ReceiverProcess
from support.jobs import IMAGE, LIVE_KEY, TOKEN, Sandbox, run
from support.payloads import signed
from support.servers import free_port

T = TypeVar("T")

HOSTILE: Final = (
    '<script>alert(1)</script><img src=x onerror="alert(2)"><svg onload=alert(3)>'
    '"\'><a href="javascript:alert(4)">x</a>{{ 7 * 7 }}\u202e</pre></textarea>'
)
"""A text that would run or break out of its place on a page that does not escape it."""

EVIL_SVG: Final = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(5)</script></svg>'

CONFIGURATION: Final = """
[[destinations]]
name = "orders"
url = "{consumer}"
retry = {{ initial = 0.2, cap = 0.5 }}

[[destinations]]
name = "archive"
url = "file:{folder}/archive.jsonl"
"""


class Consumer:
    """Takes messages over HTTP; it rejects events whose request id begins with `poison`.

    It also serves an SVG file with a script, and has no other file.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.takes_all = False
        self.answers = 422
        consumer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                message = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
                is_rejected = message["subject"].startswith("poison") and not consumer.takes_all
                if not is_rejected:
                    consumer.messages.append(message)
                answer = HOSTILE.encode() if is_rejected else b"{}"
                self.send_response(consumer.answers if is_rejected else 200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def do_GET(self) -> None:
                is_there = self.path.startswith("/files/evil.svg")
                self.send_response(200 if is_there else 503)
                self.send_header("content-type", "image/svg+xml")
                self.send_header("content-length", str(len(EVIL_SVG) if is_there else 0))
                self.end_headers()
                self.wfile.write(EVIL_SVG if is_there else b"")

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as its base
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.url = f"{self.origin}/orders"

    @contextmanager
    def taking_all(self) -> Iterator[None]:
        """Reject nothing inside the block."""
        self.takes_all = True
        try:
            yield
        finally:
            self.takes_all = False

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def wait_for(found: Callable[[], T], wanted: str, *, seconds: float = 60) -> T:
    """Return the first true result of `found`."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < deadline, wanted
        time.sleep(0.1)
    return result


class Site:
    """A receiver with the destinations `orders` and `archive`, its sandbox and its API."""

    def __init__(self, receiver: ReceiverProcess, sandbox: Sandbox, consumer: Consumer) -> None:
        self.receiver, self.sandbox, self.consumer = receiver, sandbox, consumer
        self.url = receiver.url
        self._http = httpx.Client(
            base_url=receiver.url,
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60,
            trust_env=False,
            verify=False,
        )

    def close(self) -> None:
        """Close the client's connections."""
        self._http.close()

    def get(self, path: str, **query: str) -> Any:
        """Return the answer to a GET of the API."""
        response = self._http.get(path, params=query)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, content: object = None, *, key: str | None = None) -> Any:
        """Return the answer to a POST of the API."""
        headers = {} if key is None else {"Idempotency-Key": key}
        response = self._http.post(path, json=content, headers=headers)
        assert response.is_success, response.text
        return response.json()

    def receive(self, content: bytes, **headers: str) -> str:
        """Send a webhook and return the event's id."""
        response = self._http.post("/clipia/webhook", content=content, headers=signed(content) | headers)
        assert response.status_code == 200, response.text
        return str(response.json()["event_id"])

    def submit_elsewhere(self) -> str:
        """Submit a job whose webhook goes to a path that no receiver has, and return its request id."""
        accepted = httpx.post(
            f"{self.sandbox.url}/v1/models/{IMAGE[0]}",
            headers={"X-Api-Key": LIVE_KEY},
            json={"input": IMAGE[1], "webhook_url": f"{self.url}/lost"},
            timeout=30,
        )
        return str(accepted.json()["request_id"])

    def why(self, key: str) -> dict[str, Any]:
        """Return the explanation of an id."""
        found: dict[str, Any] = self.get("/v1/explain/-", id=key)
        return found

    def event(self, key: str) -> dict[str, Any]:
        """Return the event of any id."""
        return dict(self.get(f"/v1/events/{self.why(key)['event_id']}"))

    def wait_for_state(self, key: str, state: str) -> dict[str, Any]:
        """Wait until an id is explained with a state, and return the event."""
        wait_for(lambda: self.why(key)["state"] == state, f"{key}: {state}")
        return self.event(key)

    def change(self, work: Callable[[Database], Awaitable[None]]) -> None:
        """Change the database, in a thread: a browser's thread has an event loop of its own."""
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run, self.receiver.settings["RECEIVER_DATABASE_URL"], work).result(60)

    def last_action(self) -> dict[str, Any]:
        """Return the newest action of the audit."""
        (action,) = self.get("/v1/audit", limit="1")["data"]
        return dict(action)


@contextmanager
def running_site(folder: Path, **settings: str) -> Iterator[Site]:
    """Run a receiver, a sandbox and a consumer inside the block."""
    with ExitStack() as stack:
        consumer = stack.enter_context(Consumer())
        sandbox = stack.enter_context(Sandbox(folder, duration=0))
        home = folder / "receiver"
        home.mkdir()
        configuration = folder / "receiver.toml"
        configuration.write_text(CONFIGURATION.format(consumer=consumer.url, folder=home))
        port = str(free_port())
        receiver = ReceiverProcess(
            home,
            *("serve", "--port", port),
            CLIPIA_KEY=LIVE_KEY,
            CLIPIA_BASE_URL=sandbox.url,
            RECEIVER_CONFIG=str(configuration),
            RECEIVER_MEDIA_HOSTS=f"{sandbox.url},{consumer.origin}",
            RECEIVER_API_TOKENS=f"tests:{TOKEN}",
            RECEIVER_PUBLIC_URL=f"http://127.0.0.1:{port}",
            **settings,
        )
        stack.enter_context(receiver)
        receiver.url = f"http://127.0.0.1:{port}"
        site = Site(receiver, sandbox, consumer)
        stack.callback(site.close)
        yield site
