"""The overview and the list of events in a real browser: filters, the live list, selections and repairs."""

import hashlib
import re
import time
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect
from support.browser import PHONE, Browser, Scheme
from support.dashboard import HOSTILE, Site, running_site
from support.events import insert_event
from support.jobs import IMAGE, TOKEN, Caller
from support.payloads import body, failure

from receiver.db.database import Database
from receiver.db.rows import event_id
from receiver.ingest import make_event

ROWS = "tbody tr"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A receiver with a job's event, a dead letter, a failed generation and an unrecognized body."""
    with running_site(tmp_path_factory.mktemp("events")) as running:
        with Caller(running.url) as caller:
            assert caller.submit("order-1", IMAGE)
        for content in (body("poison-1"), failure("failed-1", HOSTILE), b'{"no": "event"}'):
            running.receive(content)
        running.wait_for_state("poison-1", "delivery_dead")
        for key in ("order-1", "failed-1"):
            running.wait_for_state(key, "delivered")
        yield running


def listed(page: Page) -> list[str]:
    """Return the request ids of the list."""
    return [each.inner_text() for each in page.locator("tbody td:nth-child(3) a").all()]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_is_accessible(browser: Browser, site: Site, scheme: Scheme) -> None:
    """No page has a serious finding of axe-core, nor is it wider than a phone."""
    with browser.window(site.url, size=PHONE, scheme=scheme) as window:
        window.log_in(TOKEN)
        for path in ("", "/events", "/events?model=m&caller=c", "/events/fetch", "/events/recover"):
            window.page.goto(f"/dashboard{path}")
            window.assert_accessible()
            window.assert_fits()


def test_the_overview_shows_the_status(browser: Browser, site: Site) -> None:
    """Each part of `receiver status` is there; charts have their figures as a text, and problems a page."""
    status = site.get("/v1/status")
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN).page
        assert "orders: 1 dead" in page.locator(".problems").inner_text()
        received, attempts = (
            each.get_attribute("aria-label") or "" for each in page.get_by_role("img").all()
        )
        assert f"received {sum(status['events_last_hour'])}" in received
        assert f"failed {sum(status['failed_last_hour'])}" in attempts
        assert page.locator("svg.chart rect").count() >= 2
        for text in (
            "archive",
            "fanout",
            "Jobs of 24 h",
            "Rejected requests",
            "Disk of the media",
            "running",
        ):
            assert page.get_by_text(text, exact=True).or_(page.get_by_text(text)).first.is_visible(), text


def test_the_overview_is_live(browser: Browser, site: Site) -> None:
    """A figure changes without a person's action."""
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN).page
        label = page.get_by_role("img").first
        before = label.get_attribute("aria-label") or ""
        site.receive(body("live-overview"))
        expect(label).not_to_have_attribute("aria-label", before, timeout=15_000)


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ("delivery_state=dead", {"poison-1"}),
        ("destination=orders&delivery_state=dead", {"poison-1"}),
        ("status=ERROR", {"failed-1"}),
        ("state=unrecognized", {"sha256:"}),
        ("caller=tests", {""}),
        ("metadata=of%3Dorder-1", {""}),
        ("idempotency_key=order-1", {""}),
        ("request_id=poison-1", {"poison-1"}),
        ("since=1m&model=no-such-model", set()),
    ],
)
def test_filters_are_in_the_address(browser: Browser, site: Site, query: str, wanted: set[str]) -> None:
    """An address with filters shows the events that match, and the form has the filters."""
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path=f"/dashboard/events?{query}").page
        found = listed(page)
        if wanted == {""}:  # the sandbox made its id
            (only,) = found
            assert site.why(only)["job_id"]
        else:
            assert {each[:7] if each.startswith("sha256:") else each for each in found} == wanted
        name, _, value = query.partition("&")[0].partition("=")
        field = page.locator(f"form.filters [name={name}]")
        assert field.input_value() == value.replace("%3D", "=")


def test_filters_are_set_by_the_form(browser: Browser, site: Site) -> None:
    """The form leads to an address with its filters; a wrong value gets a sentence beside the form."""
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/events").page
        page.get_by_label("Delivery").select_option("dead")
        page.get_by_label("Since").fill("2h")
        page.get_by_role("button", name="Filter", exact=True).click()
        page.wait_for_url("**delivery_state=dead&since=2h**")
        assert listed(page) == ["poison-1"]
        page.get_by_label("Since").fill("yesterday")
        page.get_by_role("button", name="Filter", exact=True).click()
        assert "write a time" in page.get_by_role("alert").first.inner_text()
        assert page.get_by_label("Since").input_value() == "yesterday"
        assert "Failed to load resource" in window.faults.pop()  # the answer is a 400


def test_older_events_are_on_further_pages(browser: Browser, site: Site) -> None:
    """A page has a bounded number of rows; the next one goes on where it ends."""
    for number in range(60):
        site.receive(body(f"many-{number}"))
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/events?since=1h").page
        first = listed(page)
        assert len(first) == 50
        page.get_by_role("link", name="Older").click()
        page.wait_for_url("**cursor=*")
        assert "since=1h" in page.url
        assert not set(first) & set(listed(page))


def test_new_events_appear_on_top(browser: Browser, site: Site) -> None:
    """The list is live; it stands still if a person says so, and while rows are selected."""
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/events").page
        site.receive(body("tail-1"))
        expect(page.locator(ROWS).first).to_contain_text("tail-1")
        assert page.locator(ROWS).count() <= 50
        follow = page.get_by_label("Follow new events")
        page.get_by_label("Select tail-1").check()
        expect(follow).not_to_be_checked()
        site.receive(body("tail-2"))
        page.wait_for_timeout(2_500)  # more than the time between two readings
        expect(page.locator(ROWS).first).to_contain_text("tail-1")
        assert page.get_by_label("Select tail-1").is_checked()
        follow.check()
        expect(page.locator(ROWS).first).to_contain_text("tail-2")


def test_a_result_that_never_arrived_is_fetched(browser: Browser, site: Site) -> None:
    """The result is stored and forwarded, and the page of its generation says so."""
    request_id = site.submit_elsewhere()
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path=f"/dashboard/generations/{request_id}").page
        assert "Failed to load resource" in window.faults.pop()  # the answer is a 404
        page.get_by_role("link", name="Fetch the result from Clipia").click()
        assert page.get_by_label("request id").input_value() == request_id
        page.get_by_label("Reason").fill("its webhook was lost")
        page.get_by_role("button", name="Fetch the result").click()
        assert "result is stored" in page.get_by_role("status").inner_text()
        page.wait_for_selector("section.verdict.delivered")
        action = site.last_action()
        assert (action["operation"], action["reason"]) == ("fetch_event", "its webhook was lost")
        page.goto("/dashboard/events/fetch")
        page.get_by_label("request id").fill("no-such-id")
        page.get_by_label("Reason").fill("-")
        page.get_by_role("button", name="Fetch the result").click()
        assert "does not know" in page.get_by_role("alert").first.inner_text()
        assert "Failed to load resource" in window.faults.pop()


async def keep_unread(database: Database) -> None:
    """Store a body that this release can read as the release before did: unrecognized."""
    content = body("recovered-1")
    request_id = f"sha256:{hashlib.sha256(content).hexdigest()}"
    event = make_event("clipia", b"?", received_at=time.time())._replace(
        raw_id=event_id("clipia", request_id).bytes,
        request_id=request_id,
        body=content,
        body_sha256=hashlib.sha256(content).digest(),
        secret_id="one",
        signed_at=time.time(),
    )
    async with database.write() as connection:
        await insert_event(connection, event)


def test_unrecognized_events_are_counted_before_they_are_recovered(browser: Browser, site: Site) -> None:
    """A count changes nothing; the events that this release can read are then forwarded."""
    site.change(keep_unread)
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/events/recover").page
        page.get_by_role("button", name="Count them first").click()
        page.wait_for_url("**/recover/count")
        window.assert_accessible()
        assert "1 can be read" in page.locator("main ul").inner_text()
        assert "1 cannot be read" in page.locator("main ul").inner_text()
        assert site.get("/v1/events", state="unrecognized")["data"][0]["origin"] == "webhook"
        page.get_by_text("Recover these events").first.click()
        page.get_by_label("Reason").fill("this release reads them")
        page.get_by_role("button", name="Recover these events").click()
        page.wait_for_url("**/events/recover")
        assert "Done" in page.get_by_role("status").inner_text()
    site.wait_for_state("recovered-1", "delivered")
    action = site.last_action()
    assert (action["operation"], action["reason"]) == ("recover_events", "this release reads them")


def order(page: Page, reason: str) -> str:
    """Order the replay that was counted, and return its id."""
    page.get_by_label("Reason").fill(reason)
    page.get_by_role("button", name="Order the replay").click()
    page.wait_for_url(re.compile("/replays/[0-9a-f-]{36}"))
    return page.url.rpartition("/")[2].partition("?")[0]


def test_selected_events_are_replayed(browser: Browser, site: Site) -> None:
    """The events with a tick, and no others, are counted and then sent again."""
    for number in range(3):
        site.receive(body(f"again-{number}"))
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/events?since=1h").page
        for number in (0, 2):
            page.get_by_label(f"Select again-{number}").check()
        page.get_by_role("button", name="Replay the selected events").click()
        page.wait_for_url("**/replays/count")
        replay = site.get(f"/v1/replays/{order(page, 'two were lost')}")
    assert (replay["matched"], replay["reason"]) == (2, "two were lost")
    ids = {site.event(f"again-{number}")["id"] for number in (0, 2)}
    assert set(replay["selection"]["ids"]) == ids


def test_all_that_match_the_filters_are_replayed(browser: Browser, site: Site) -> None:
    """A replay has the filters of the list; one that it cannot have is named instead."""
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/events?status=ERROR&since=1h").page
        page.get_by_role("button", name="Replay all that match").click()
        page.wait_for_url("**/replays/count")
        replay = site.get(f"/v1/replays/{order(page, 'failed ones')}")
        assert replay["selection"]["status"] == "ERROR"
        assert replay["selection"]["since"]
        assert replay["matched"] == 1
        page.goto("/dashboard/events?state=ready&status=ERROR")
        assert "no filter by state" in page.locator(".actions").inner_text()
        assert page.get_by_role("button", name="Replay all that match").count() == 0
