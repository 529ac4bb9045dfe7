"""The five incidents, found and mended on the dashboard alone; the screenshots of the docs are made here.

With RECEIVER_TEST_SCREENSHOTS=docs/screenshots they are written into that folder.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import PHONE, Browser, Window
from support.consumers import wait_until
from support.incidents import (
    POISON,
    RETIRED,
    Service,
    fill_disk,
    lose_webhook,
    running_service,
)
from support.jobs import TOKEN
from support.payloads import SECRET, body

_FOLDER = os.environ.get("RECEIVER_TEST_SCREENSHOTS")
# Absolute now: a test runs in a folder of its own.
SCREENSHOTS = Path(_FOLDER).absolute() if _FOLDER else None


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """The layout, with servers of its own, which the test stops."""
    with running_service(tmp_path) as running:
        yield running


_REPLACE = """([from, to]) => {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) texts.currentNode.data = texts.currentNode.data.replaceAll(from, to);
}"""


class Desk:
    """An operator with a browser and nothing else."""

    def __init__(self, window: Window, folder: Path, folders: Path) -> None:
        self.window, self.page, self.folder, self.folders = window, window.page, folder, folders

    def shoot(self, name: str) -> None:
        """Take a screenshot for the docs, with a path of a server in the place of the test's own."""
        self.page.evaluate(_REPLACE, [str(self.folders), "/var/lib/receiver"])
        self.page.screenshot(path=self.folder / f"{name}.png", full_page=True)

    def problem(self, text: str) -> None:
        """Go to the overview and follow the link of a problem."""
        self.page.goto("/dashboard")
        item = self.page.locator(".problems li", has_text=text)
        item.wait_for(timeout=60_000)
        item.get_by_role("link").first.click()

    def find(self, key: str) -> str:
        """Look for an id, and return the verdict."""
        self.page.goto("/dashboard")
        self.page.get_by_label("Any id").fill(key)
        self.page.get_by_role("button", name="Why?").click()
        return self.page.locator(".verdict").inner_text()

    def wait_until_delivered(self, key: str) -> None:
        """Look for an id until it is delivered everywhere."""
        wait_until(lambda: "delivered to" in self.find(key), f"delivery of {key}")

    def act(self, summary: str, button: str, *, reason: str | None = None) -> None:
        """Open the form of an action and send it."""
        self.page.locator("details.action summary", has_text=summary).first.click()
        form = self.page.locator("details.action[open] form").first
        if reason is not None:
            form.get_by_label("Reason").fill(reason)
        form.get_by_role("button", name=button).click()
        self.page.wait_for_load_state()

    def read(self) -> str:
        """Return the text of the page."""
        return self.page.locator("main").inner_text()


def test_five_incidents(service: Service, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each incident is a problem on the first page; its link leads to the cause, and the page mends it."""
    folder = SCREENSHOTS or tmp_path
    service.rabbit.stop()
    waiting = service.submit()
    wait_until(lambda: len(service.consumer.messages) > 0, "the healthy destination")
    assert service.callback(body(POISON)) == 200
    lost = lose_webhook(service)
    unsigned = [body(f"rotated-{number}") for number in range(3)]
    assert [service.callback(each, secret=RETIRED) for each in unsigned] == [401] * 3
    filler = fill_disk(service)
    unstored = service.submit()

    with Browser(tmp_path_factory.getbasetemp()) as browser, browser.window(service.internal.url) as window:
        desk = Desk(window.log_in(TOKEN), folder, service.folder)
        desk.problem("rabbit is down since")
        dead_broker(desk, service, waiting)
        desk.problem("rejected requests in the last hour")
        wrong_secret(desk, service, unsigned)
        lost_webhook(desk, lost)
        desk.problem("orders: 1 dead")
        poison_event(desk, service)
        full_disk(desk, filler, unstored)
        for key in (waiting, unstored, lost, "rotated-0", "rotated-1", "rotated-2"):
            desk.wait_until_delivered(key)
        desk.page.goto(f"/dashboard/generations/{waiting}")
        desk.shoot("generation")
        stop_database(desk, service)
        looks(browser, service, folder)


def dead_broker(desk: Desk, service: Service, job: str) -> None:
    """The page of the destination has the error; a test after the fix shows that it answers."""
    assert "connection refused" in desk.read()
    desk.shoot("destination-down")
    assert "rabbit has failed since" in desk.find(job)
    service.rabbit.start()
    desk.page.goto("/dashboard/destinations/rabbit")
    desk.act("Test", "Test the connection")
    assert "The test succeeded" in desk.read()
    desk.wait_until_delivered(job)


def wrong_secret(desk: Desk, service: Service, unsigned: list[bytes]) -> None:
    """The diagnosis names the secret with which Clipia signs; with it in the settings, webhooks are taken."""
    assert "It was signed with the retired secret" in desk.read()
    desk.shoot("rejections")
    service.public.stop()
    service.public.settings["CLIPIA_WEBHOOK_SECRET"] = f"{SECRET},{RETIRED}"
    service.public.start()
    assert [service.callback(each, secret=RETIRED) for each in unsigned] == [200] * 3


def lost_webhook(desk: Desk, request_id: str) -> None:
    """The wrong path is among the causes, and the result is fetched by its id."""
    desk.page.goto("/dashboard/rejections")
    assert "wrong url" in desk.read()
    assert "no event, job, delivery, file or rejected request" in desk.find(request_id)
    assert "404" in desk.window.faults.pop()  # the browser notes the status of the page of an unknown id
    desk.page.get_by_role("link", name="Fetch the result from Clipia").click()
    desk.page.get_by_label("Reason").fill("its webhook went to a wrong path")
    desk.page.get_by_role("button", name="Fetch the result").click()
    desk.page.get_by_role("heading", name="Receipts").wait_for()


def poison_event(desk: Desk, service: Service) -> None:
    """The cause groups the failures, the generation has the consumer's answer; a discard goes on record."""
    assert "answered 422" in desk.read()
    desk.shoot("dead-letters")
    desk.page.get_by_role("link", name=POISON).first.click()
    assert "cost: not a number" in desk.read()
    desk.act("Discard the delivery to orders", "Discard", reason="orders rejects it for good: ticket 1")
    desk.page.goto("/dashboard/audit")
    assert "ticket 1" in desk.read()
    assert "ticket 1" in service.command("audit", "list")


def full_disk(desk: Desk, filler: Path, job: str) -> None:
    """The first page names the disk, and the generation waits for it; it goes on when there is space."""
    if os.geteuid() == 0:
        desk.page.goto("/dashboard")
        desk.page.locator(".problems li", has_text="the disk of").wait_for(timeout=60_000)
        desk.shoot("overview")
        assert "No space left" in desk.find(job)
    filler.unlink(missing_ok=True)


def stop_database(desk: Desk, service: Service) -> None:
    """Without the database a page says so, and comes back by itself."""
    desk.page.goto("/dashboard")
    service.postgres.stop()
    try:
        desk.page.get_by_text("The database does not answer").wait_for(timeout=60_000)
        assert service.callback(body("while-down")) == 503
    finally:
        service.postgres.start()
    desk.page.get_by_role("heading", name="Destinations").wait_for(timeout=60_000)
    # While the database was away, the browser noted each answer with 503.
    faults = desk.window.faults
    faults[:] = [each for each in faults if "503" not in each]


def looks(browser: Browser, service: Service, folder: Path) -> None:
    """The pages are legible on a phone and in the dark, too."""
    with browser.window(service.internal.url, size=PHONE) as window:
        Desk(window.log_in(TOKEN), folder, service.folder).shoot("overview-phone")
        window.assert_fits()
    with browser.window(service.internal.url, scheme="dark") as window:
        Desk(window.log_in(TOKEN), folder, service.folder).shoot("overview-dark")
