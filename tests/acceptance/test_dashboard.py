"""The dashboard in a real browser."""

from collections.abc import Iterator

import pytest
from support.browser import PHONE, Browser, Scheme
from support.commands import ReceiverProcess
from support.jobs import TOKEN, Sandbox, job_receiver

PAGES = ("/dashboard", "/dashboard/events")


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReceiverProcess]:
    """A receiver beside a sandbox."""
    folder = tmp_path_factory.mktemp("dashboard")
    with Sandbox(folder) as sandbox, job_receiver(folder / "receiver", sandbox) as started:
        yield started


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_is_accessible(browser: Browser, receiver: ReceiverProcess, scheme: Scheme) -> None:
    """No page has a serious finding of axe-core, nor is it wider than a phone."""
    with browser.window(receiver.url, size=PHONE, scheme=scheme) as window:
        window.log_in(TOKEN)
        for path in PAGES:
            window.page.goto(path)
            window.assert_accessible()
            window.assert_fits()


def test_login_needs_a_token(browser: Browser, receiver: ReceiverProcess) -> None:
    """A page leads to the login and back; a wrong token gets a sentence."""
    with browser.window(receiver.url) as window:
        window.page.goto("/dashboard/events?state=ready")
        window.assert_accessible()
        window.page.get_by_label("API token").fill("wrong")
        window.page.get_by_role("button", name="Log in").click()
        assert "unknown" in window.page.get_by_role("alert").first.inner_text()
        assert window.faults.pop().startswith("console: Failed to load resource")  # the answer is a 401
        window.page.get_by_label("API token").fill(TOKEN)
        window.page.get_by_role("button", name="Log in").click()
        window.page.wait_for_url("**/dashboard/events?state=ready")
