"""Destinations, dead letters and rejections in a real browser: each click is checked through the API."""

from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Page
from support.browser import PHONE, Browser, Scheme, Window
from support.consumers import wait_until
from support.jobs import TOKEN
from support.operators_desk import MARKUP, Desk, act, assert_inert, desk
from support.payloads import signed

from receiver.db.tables import deliveries

LIST, DEAD, REJECTED = "/dashboard/destinations", "/dashboard/dead-letters", "/dashboard/rejections"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A receiver with a fine delivery, a dead letter, and rejected requests."""
    with desk(tmp_path_factory.mktemp("dashboard")) as running:
        running.webhook("fine")
        running.wait_for_delivery("fine", "delivered")
        running.dead_letter("always-dead", MARKUP)
        for headers in ({"User-Agent": MARKUP}, signed(b"other", secret="whsec_wrong")):
            answer = httpx.post(f"{running.url}/clipia/webhook", content=MARKUP, headers=headers)
            assert answer.status_code == 401
        wait_until(lambda: len(running.get("/v1/rejections")) == 2, "two rejections")
        yield running


@pytest.fixture
def window(browser: Browser, site: Desk) -> Iterator[Window]:
    """A person who has logged in."""
    with browser.window(site.url) as opened:
        yield opened.log_in(TOKEN)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(browser: Browser, site: Desk, scheme: Scheme) -> None:
    """No page has a serious finding of axe-core, nor is it wider than a phone; markup stays text."""
    rejection = site.get("/v1/rejections")[0]["id"]
    with browser.window(site.url, size=PHONE, scheme=scheme) as window:
        window.log_in(TOKEN)
        for path in (
            LIST,
            f"{LIST}/orders",
            DEAD,
            f"{DEAD}?state=delivered",
            REJECTED,
            f"{REJECTED}/{rejection}",
        ):
            window.page.goto(path)
            window.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            window.assert_accessible()
            window.assert_fits()
            assert_inert(window)


def test_pause_and_resume(window: Window, site: Desk) -> None:
    """A pause shows who made it and why, events wait meanwhile, and the end of it delivers them."""
    page, reason = window.page, f"orders moves {MARKUP}"
    page.goto(LIST)
    page.get_by_role("link", name="orders").click()
    act(page, "Pause", reason, "Pause deliveries")
    page.get_by_text("It is paused: events wait.").wait_for()
    page.get_by_text("Paused by tests").wait_for()
    assert_inert(window)
    site.assert_on_record("pause_destination", reason, "orders")
    site.webhook("while-paused")
    page.reload()
    paused = {each["name"]: each["pause"] for each in site.get("/v1/destinations")}
    assert paused["orders"]["reason"] == reason
    assert site.delivery("while-paused")["state"] == "pending"
    act(page, "Resume", "orders is back", "Resume deliveries")
    page.get_by_text("Deliveries go on.").wait_for()
    site.assert_on_record("resume_destination", "orders is back", "orders")
    site.wait_for_delivery("while-paused", "delivered")


def test_a_test_is_reported(window: Window, site: Desk) -> None:
    """A test says whether it succeeded, and sends a message only if that is ticked."""
    page = window.page
    page.goto(f"{LIST}/orders")
    sent = len(site.consumer.messages)
    act(page, "Test", button="Test the connection")
    page.get_by_text("The test succeeded").wait_for()
    assert len(site.consumer.messages) == sent
    send_test(page)
    page.get_by_text("is confirmed").wait_for()
    assert site.consumer.messages[-1]["type"] == "ai.clipia.receiver.test"
    site.consumer.is_down = True
    try:
        send_test(page)
        page.get_by_text("answered 503").first.wait_for()
    finally:
        site.consumer.is_down = False


def send_test(page: Page) -> None:
    """Order a test with a message."""
    page.locator("summary", has_text="Test").click()
    page.get_by_label("Also send a message").check()
    page.get_by_role("button", name="Test the connection").click()


def test_a_destination_updates_itself(window: Window, site: Desk) -> None:
    """The page of a destination shows a change without a click."""
    page = window.page
    page.goto(f"{LIST}/ledger")
    assert page.get_by_text("Paused by").count() == 0
    site.post("/v1/destinations/ledger/pause", {"reason": "seen live"})
    page.get_by_text("seen live").wait_for()
    site.post("/v1/destinations/ledger/resume")


def test_deliveries_of_a_removed_destination(window: Window, site: Desk) -> None:
    """Deliveries of a removed destination are counted before they are moved or discarded."""
    for name in ("old-1", "old-2"):
        row = site.dead_letter(name)
        site.change(deliveries, row["id"], destination=name)
    del site.consumer.answers["old-1"]
    page = window.page
    page.goto(LIST)
    page.get_by_role("link", name="old-1").click()
    page.get_by_text("It is not in the settings any more").wait_for()
    page.get_by_text("Move deliveries").click()
    page.locator("select[name=to]").select_option("ledger")
    page.get_by_role("button", name="Count").click()
    page.get_by_text("1 would go to ledger.").wait_for()
    window.assert_accessible()
    assert site.get("/v1/deliveries", destination="old-1")[0]["state"] == "dead"
    page.get_by_label("Reason").fill("renamed")
    page.get_by_role("button", name="Move 1 deliveries").click()
    page.get_by_text("1 moved, 0 discarded.").wait_for()
    site.assert_on_record("move_deliveries", "renamed")
    page.goto(f"{LIST}/old-2")
    act(page, "Discard deliveries", button="Count")
    page.get_by_text("1 would be discarded").wait_for()
    page.get_by_label("Reason").fill("not needed")
    page.get_by_role("button", name="Discard 1 deliveries").click()
    page.get_by_text("0 moved, 1 discarded.").wait_for()
    site.assert_on_record("discard_deliveries", "not needed")
    page.goto(f"{LIST}/old-2")
    page.get_by_role("heading", name="Not found").wait_for()
    assert "Failed to load resource" in window.faults.pop()


def test_one_dead_letter_is_retried_or_discarded(window: Window, site: Desk) -> None:
    """A retry or a discard of one dead letter keeps the filters of the list."""
    for name in ("retried", "discarded"):
        site.dead_letter(name)
    del site.consumer.answers["retried"]
    page = window.page
    for name, label, button in (
        ("retried", "Retry", "Retry this one"),
        ("discarded", "Discard", "Discard this one"),
    ):
        page.goto(f"{DEAD}?destination=orders")
        row = page.get_by_role("row").filter(has_text=f"{name} orders")
        act(row, label, f"ticket 1 {MARKUP}", button)
        page.locator(".notice.good").wait_for()
        assert "destination=orders" in page.url
        target = site.delivery(name)["id"]
        operation = "retry_dead_letter" if label == "Retry" else "discard_delivery"
        site.assert_on_record(operation, f"ticket 1 {MARKUP}", target)
    site.wait_for_delivery("retried", "delivered")
    assert site.delivery("discarded")["state"] == "canceled"
    page.goto(f"{DEAD}?state=canceled")
    assert_inert(window)


def test_selected_dead_letters_are_retried(window: Window, site: Desk) -> None:
    """Only the dead letters whose boxes are ticked are retried."""
    names = ("selected-1", "selected-2", "left")
    for name in names:
        site.dead_letter(name)
        del site.consumer.answers[name]
    page = window.page
    page.goto(DEAD)
    for name in names[:2]:
        page.get_by_label(f"Select {name} to orders").check()
    page.locator("form#selected").get_by_label("Reason").fill("corrected")
    page.get_by_role("button", name="Retry the selected ones").click()
    page.get_by_text("2 dead letters will be delivered again.").wait_for()
    site.assert_on_record("retry_dead_letters", "corrected")
    for name in names[:2]:
        site.wait_for_delivery(name, "delivered")
    assert site.delivery("left")["state"] == "dead"


def test_a_cause_is_retried(window: Window, site: Desk) -> None:
    """A group of dead letters with one cause is retried, and those of other causes are not."""
    row = site.dead_letter("other-cause")
    site.change(deliveries, row["id"], error=f"PublishRejected: {MARKUP}")
    site.dead_letter("of-the-cause")
    del site.consumer.answers["of-the-cause"]
    page = window.page
    page.goto(DEAD)
    assert_inert(window)
    group = page.get_by_role("row").filter(has_text="answered 422").first
    act(group, "Retry", "corrected", "Retry these dead letters")
    page.locator(".notice.good").wait_for()
    site.assert_on_record("retry_dead_letters", "corrected")
    site.wait_for_delivery("of-the-cause", "delivered")
    # A retry would have made it anew, with the consumer's answer as its error.
    assert site.delivery("other-cause")["error"] == f"PublishRejected: {MARKUP}"
    site.wait_for_delivery("always-dead", "dead")


def test_all_dead_letters_are_retried(window: Window, site: Desk) -> None:
    """The number of all dead letters is shown before they are retried."""
    site.dead_letter("one-of-all")
    del site.consumer.answers["one-of-all"]
    dead = sum(each["dead"] for each in site.get("/v1/destinations"))
    window.page.goto(DEAD)
    act(window.page, f"Retry all {dead} dead letters", "all is well", "Retry all")
    window.page.get_by_text(f"{dead} dead letters will be delivered again.").wait_for()
    site.assert_on_record("retry_dead_letters", "all is well")
    site.wait_for_delivery("one-of-all", "delivered")
    site.wait_for_delivery("always-dead", "dead")


def test_filters_are_in_the_address(window: Window) -> None:
    """A filter of the form is in the address, and a wrong one gets a sentence."""
    page = window.page
    page.goto(DEAD)
    page.get_by_label("State").select_option("delivered")
    page.get_by_role("button", name="Filter").click()
    page.get_by_role("link", name="fine").first.wait_for()
    assert "state=delivered" in page.url
    page.get_by_label("Since").fill("tomorrow")
    page.get_by_role("button", name="Filter").click()
    page.get_by_role("heading", name="This input is not valid").wait_for()
    assert "since" in page.get_by_role("alert").last.inner_text()
    assert "Failed to load resource" in window.faults.pop()


def test_rejections(window: Window) -> None:
    """A cause is explained with what to do, leads to its requests, and hostile text is shown as text."""
    page = window.page
    page.goto(REJECTED)
    causes = page.locator("#live")
    causes.get_by_text("Compare CLIPIA_WEBHOOK_SECRET with the secret at Clipia").wait_for()
    causes.get_by_role("link", name="1 × no signature").click()
    assert "cause=no_signature" in page.url
    page.locator("tbody a").first.click()
    page.get_by_text("What to do: Let the proxy in front").wait_for()
    shown = page.locator("main").inner_text()
    assert shown.count(MARKUP) == 2  # a header, and the body
    assert_inert(window)


def test_pages_work_without_scripts(browser: Browser, site: Desk) -> None:
    """Lists, details and actions need no script."""
    site.dead_letter("without-scripts")
    del site.consumer.answers["without-scripts"]
    with browser.window(site.url, scripts=False) as window:
        window.log_in(TOKEN, path=f"{DEAD}?destination=orders")
        row = window.page.get_by_role("row").filter(has_text="without-scripts orders")
        act(row, "Retry", "no script", "Retry this one")
        window.page.get_by_text("The delivery is due now.").wait_for()
        for path in (LIST, f"{LIST}/orders", REJECTED):
            window.page.goto(path)
            assert window.page.locator("table").count() > 0
    site.wait_for_delivery("without-scripts", "delivered")
