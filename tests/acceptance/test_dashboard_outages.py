"""Pages while the database or the receiver is away: they say so, and go on by themselves."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect
from support.browser import Browser
from support.commands import run_command
from support.dashboard import Site, running_site
from support.jobs import TOKEN
from support.payloads import body
from support.servers import Postgres

SECONDS = 60_000
"""The most milliseconds for a page to notice."""


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A server of its own, which the test stops."""
    with Postgres() as started:
        yield started


@pytest.fixture
def site(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A receiver on PostgreSQL."""
    url = postgres.url()
    assert run_command("migrate", settings={"RECEIVER_DATABASE_URL": url}).returncode == 0
    with running_site(tmp_path_factory.mktemp("outages"), RECEIVER_DATABASE_URL=url) as running:
        yield running


def test_an_outage_is_shown_and_ends(
    site: Site, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A stopped receiver makes a banner, a stopped database a page that says so; both go away."""
    with Browser(tmp_path_factory.getbasetemp()) as browser, browser.window(site.url) as window:
        page = window.log_in(TOKEN).page
        banner = page.locator("#stale")
        site.receiver.kill()
        expect(banner).to_contain_text("does not answer", timeout=SECONDS)
        assert re.search(r"as of \d\d:\d\d:\d\d UTC", banner.inner_text())
        assert page.get_by_role("heading", name="Overview").is_visible()  # the last figures stay
        site.receiver.start()
        expect(banner).to_be_hidden(timeout=SECONDS)

        postgres.stop()
        opened = page.context.new_page()
        try:
            expect(page.locator("#live")).to_contain_text("database does not answer", timeout=SECONDS)
            opened.goto("/dashboard/events")
            assert "database does not answer" in opened.get_by_role("alert").last.inner_text()
        finally:
            postgres.start()
        expect(page.get_by_role("heading", name="Overview")).to_be_visible(timeout=SECONDS)
        expect(opened.get_by_role("heading", name="Events")).to_be_visible(timeout=SECONDS)
        site.receive(body("after-1"))
        expect(opened.locator("tbody tr").first).to_contain_text("after-1", timeout=SECONDS)

        # An error page of a proxy is none of ours, and must not take the place of a section.
        page.route("**/dashboard", lambda route: route.fulfill(status=502, body="<h1>Bad gateway</h1>"))
        expect(banner).to_contain_text("answers with an error", timeout=SECONDS)
        assert page.get_by_role("heading", name="Overview").is_visible()
        page.unroute("**/dashboard")
        expect(banner).to_be_hidden(timeout=SECONDS)
        faults, window.faults = window.faults, []
        expected = ("Failed to load resource", "htmx:error: Failed to fetch")
        assert all(any(text in each for text in expected) for each in faults), faults
