"""A receiver for the tests of the dashboard: a consumer that rejects on demand, and a person's clicks."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import httpx
from playwright.sync_api import Locator, Page
from sqlalchemy import Table, update

from receiver.db.database import Database
from receiver.db.tables import jobs
from support.browser import Window
from support.commands import ReceiverProcess
from support.consumers import SECONDS, Answer, Consumer, wait_until
from support.jobs import IMAGE, TOKEN, Sandbox, job_receiver, run
from support.payloads import body, signed

MARKUP: Final = "<img src=x onerror=alert(1)><script>alert(2)</script>'\"&amp;{{7*7}}"
"""Text that would run, or load something, if a page did not escape it."""

_CONFIGURATION: Final = """
[[destinations]]
name = "orders"
url = "{consumer}/orders"
retry = {{ initial = 0.2, cap = 0.5 }}

[[destinations]]
name = "ledger"
url = "file:{folder}/ledger.jsonl"
filter = {{ status = "OK" }}
"""


class PickyConsumer(Consumer):
    """Rejects events by their `request_id`, and all while it is down."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[str, str] = {}
        """What it answers, with 422, to which events."""
        self.is_down = False

    def take(self, path: str, message: dict[str, Any]) -> Answer:
        """Take a message, or reject it."""
        answer = self.answers.get(str(message.get("subject")))
        if self.is_down:
            return Answer(503)
        return super().take(path, message) if answer is None else Answer(422, answer.encode())

    def got(self, request_id: str) -> int:
        """Return how often it got an event."""
        return sum(each.get("subject") == request_id for each in self.messages)


class Desk:
    """A running receiver, and its API to check what a click did."""

    def __init__(self, receiver: ReceiverProcess, consumer: PickyConsumer, sandbox: Sandbox) -> None:
        self.receiver, self.consumer, self.sandbox = receiver, consumer, sandbox
        self.url = receiver.url
        self._api = httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30, trust_env=False
        )

    def close(self) -> None:
        """Close the connections."""
        self._api.close()

    def get(self, path: str, **query: Any) -> Any:
        """Return the answer to a GET of the API; of a list its rows."""
        response = self._api.get(path, params=query)
        assert response.is_success, response.text
        found = response.json()
        return found["data"] if isinstance(found, dict) and "data" in found and "next" in found else found

    def post(self, path: str, content: Any = None) -> Any:
        """Return the answer to a POST of the API."""
        response = self._api.post(path, json=content)
        assert response.is_success, response.text
        return response.json()

    def webhook(self, request_id: str, **changes: Any) -> None:
        """Send the webhook of a generation that failed, and so has no files."""
        content = body(request_id, **{"status": "ERROR", "payload": None, "error": {"code": "X"}, **changes})
        answer = httpx.post(f"{self.url}/clipia/webhook", content=content, headers=signed(content))
        assert answer.status_code == 200, answer.text

    def submit(self, key: str, **values: Any) -> None:
        """Submit a job."""
        content = {"model": IMAGE[0], "input": IMAGE[1], **values}
        response = self._api.post("/v1/jobs", json=content, headers={"Idempotency-Key": key})
        assert response.is_success, response.text

    def unsure_job(self, key: str) -> dict[str, Any]:
        """Make a job whose submission may have reached Clipia, and which no webhook will settle."""
        self.sandbox.change(duration=3600.0)
        self.submit(key)
        job = self.wait_for_job(key, "submitted")
        self.sandbox.change(duration=0.0)
        self.change(jobs, job["id"], state="unsure", request_id=None)
        return job

    def wait_for_job(self, key: str, state: str = "completed") -> dict[str, Any]:
        """Wait until the job of a key is in a state."""

        def find() -> dict[str, Any] | None:
            rows = self.get("/v1/jobs", state=state, limit=200)
            return next((row for row in rows if row["idempotency_key"] == key), None)

        return wait_until(find, f"{key} is {state}")

    def dead_letter(self, request_id: str, answer: str = "no such order") -> dict[str, Any]:
        """Let the consumer reject an event, and return its dead letter."""
        self.consumer.answers[request_id] = answer
        self.webhook(request_id)
        return self.wait_for_delivery(request_id, "dead")

    def delivery(self, request_id: str) -> dict[str, Any]:
        """Return the newest delivery of an event; it is empty if there is none."""
        rows = self.get("/v1/deliveries", limit=200)
        return next((row for row in rows if row["request_id"] == request_id), {})

    def wait_for_delivery(self, request_id: str, state: str) -> dict[str, Any]:
        """Wait until the delivery of an event is in a state."""

        def find() -> dict[str, Any] | None:
            found = self.delivery(request_id)
            return found if found.get("state") == state else None

        return wait_until(find, f"{request_id} is {state}")

    def change(self, table: Table, row_id: str, **values: Any) -> None:
        """Change a row of the receiver's database."""

        async def work(database: Database) -> None:
            async with database.write() as connection:
                await connection.execute(update(table).where(table.c.id == UUID(row_id)).values(values))

        # Playwright's own event loop runs in this thread.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(run, self.receiver.settings["RECEIVER_DATABASE_URL"], work).result(SECONDS)

    def last_action(self, operation: str) -> dict[str, Any]:
        """Return the newest record of an operation."""
        found: dict[str, Any] = self.get("/v1/audit", operation=operation, limit=1)[0]
        return found

    def assert_on_record(self, operation: str, reason: str | None, target: str | None = None) -> None:
        """The last action of this kind was done by the session's token, with this reason."""
        found = self.last_action(operation)
        shown = {name: found[name] for name in ("by", "reason", "target", "dry_run", "code")}
        wanted = {"by": "tests", "reason": reason, "target": target, "dry_run": False, "code": None}
        assert shown == wanted


@contextmanager
def desk(folder: Path, **settings: str) -> Iterator[Desk]:
    """Run a receiver with the destinations `orders`, the consumer, and `ledger`, a file."""
    with PickyConsumer() as consumer, Sandbox(folder) as sandbox:
        configuration = folder / "receiver.toml"
        configuration.write_text(_CONFIGURATION.format(consumer=consumer.url, folder=folder))
        receiver = job_receiver(folder / "receiver", sandbox, RECEIVER_CONFIG=str(configuration), **settings)
        with receiver:
            running = Desk(receiver, consumer, sandbox)
            try:
                yield running
            finally:
                running.close()


def act(within: Page | Locator, label: str, reason: str | None = None, button: str | None = None) -> None:
    """Open an action of a page or of a part of it, fill in its reason, and press its button."""
    summary = within.locator("details.action > summary").filter(has_text=label).first
    summary.click()
    form = summary.locator("xpath=..")
    if reason is not None:
        form.get_by_label("Reason").fill(reason)
    form.get_by_role("button", name=button or label).click()


def assert_inert(window: Window) -> None:
    """Nothing of a stranger became an element: the policy would stop it, but escaping must come first."""
    found = window.page.locator("main script, main img[src='x'], main [onerror]").count()
    assert found == 0, window.page.content()
