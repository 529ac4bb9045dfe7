"""The page of one generation in a real browser: what it shows, and each action on it."""

from collections.abc import Iterator

import pytest
from support.browser import PHONE, Browser, Scheme
from support.dashboard import Site, running_site
from support.jobs import IMAGE, TOKEN, Caller
from support.payloads import body


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests of the file."""
    with Browser(tmp_path_factory.getbasetemp()) as started:
        yield started


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A receiver with a delivered job, `order-1`, and an event that `orders` rejects, `poison-1`."""
    with running_site(tmp_path_factory.mktemp("generation")) as running:
        with Caller(running.url) as caller:
            assert caller.submit("order-1", IMAGE)
        running.receive(body("poison-1"))
        running.wait_for_state("poison-1", "delivery_dead")
        running.wait_for_state("order-1", "delivered")
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_is_accessible(browser: Browser, site: Site, scheme: Scheme) -> None:
    """No page has a serious finding of axe-core, nor is it wider than a phone."""
    with browser.window(site.url, size=PHONE, scheme=scheme) as window:
        window.log_in(TOKEN)
        for key in ("order-1", "poison-1"):
            window.page.goto(f"/dashboard/generations/{key}")
            window.assert_accessible()
            window.assert_fits()


def test_a_dead_letter_is_retried(browser: Browser, site: Site) -> None:
    """The verdict is on top, and a retry delivers the event and goes on record with its reason."""
    site.receive(body("poison-retry"))
    site.wait_for_state("poison-retry", "delivery_dead")
    site.consumer.takes_all = True
    with browser.window(site.url) as window:
        window.log_in(TOKEN, path="/dashboard/generations/poison-retry")
        verdict = window.page.locator("section.verdict")
        assert "orders has not got it" in verdict.inner_text()
        window.page.get_by_text("Retry the delivery to orders").first.click()
        window.page.get_by_label("Reason").first.fill("orders is mended")
        window.page.get_by_role("button", name="Retry the delivery to orders").click()
        assert "due now" in window.page.get_by_role("status").inner_text()
        window.page.wait_for_selector("section.verdict.delivered")  # the page reads itself again
    site.consumer.takes_all = False
    assert site.why("poison-retry")["state"] == "delivered"
    action = site.last_action()
    assert (action["operation"], action["reason"]) == ("retry_dead_letter", "orders is mended")
