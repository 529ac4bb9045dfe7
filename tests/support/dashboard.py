"""A receiver for the tests of pages, with a sandbox, a consumer that rejects events, and hostile texts."""

from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import httpx

from receiver.db.database import Database
from support.commands import ReceiverProcess
from support.consumers import Answer, Consumer, wait_until
from support.jobs import IMAGE, LIVE_KEY, TOKEN, Sandbox, run
from support.payloads import signed
from support.servers import free_port

HOSTILE: Final = (
    '<script>alert(1)</script><img src=x onerror="alert(2)"><svg onload=alert(3)>'
    '"\'><a href="javascript:alert(4)">x</a>{{ 7 * 7 }}\u202e</pre></textarea>'
)
"""A text that would run or break out of its place on a page that does not escape it."""

EVIL_SVG: Final = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(5)</script></svg>'

CONFIGURATION: Final = """
[[destinations]]
name = "orders"
url = "{consumer}/orders"
retry = {{ initial = 0.2, cap = 0.5 }}

[[destinations]]
name = "archive"
url = "file:{folder}/archive.jsonl"
"""


class PoisonedConsumer(Consumer):
    """Rejects events whose request id begins with `poison`.

    It also serves an SVG file with a script, and has no other file.
    """

    def __init__(self) -> None:
        super().__init__()
        self.takes_all = False

    def take(self, path: str, message: dict[str, Any]) -> Answer:
        """Take a message, or reject it."""
        if message["subject"].startswith("poison") and not self.takes_all:
            return Answer(422, HOSTILE.encode())
        return super().take(path, message)

    def serve(self, path: str) -> Answer:
        """Return the SVG file."""
        is_there = path.startswith("/files/evil.svg")
        return Answer(200, EVIL_SVG, "image/svg+xml") if is_there else Answer(503)

    @contextmanager
    def taking_all(self) -> Iterator[None]:
        """Reject nothing inside the block."""
        self.takes_all = True
        try:
            yield
        finally:
            self.takes_all = False


class Site:
    """A receiver with the destinations `orders` and `archive`, its sandbox and its API."""

    def __init__(self, receiver: ReceiverProcess, sandbox: Sandbox, consumer: PoisonedConsumer) -> None:
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
        wait_until(lambda: self.why(key)["state"] == state, f"{key}: {state}")
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
        consumer = stack.enter_context(PoisonedConsumer())
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
            RECEIVER_MEDIA_HOSTS=f"{sandbox.url},{consumer.url}",
            RECEIVER_API_TOKENS=f"tests:{TOKEN}",
            RECEIVER_PUBLIC_URL=f"http://127.0.0.1:{port}",
            **settings,
        )
        stack.enter_context(receiver)
        receiver.url = f"http://127.0.0.1:{port}"
        site = Site(receiver, sandbox, consumer)
        stack.callback(site.close)
        yield site
