"""Jobs, replays, settings and the audit in a real browser: each click is checked through the API."""

from collections.abc import Iterator
from uuid import uuid4

import pytest
from support.browser import PHONE, Browser, Scheme, Window
from support.consumers import wait_until
from support.jobs import LIVE_KEY, TOKEN
from support.operators_desk import MARKUP, Desk, act, assert_inert, desk
from support.payloads import SECRET

from receiver.core.signature import Secret

JOBS, ACCOUNT, REPLAYS = "/dashboard/jobs", "/dashboard/jobs/account", "/dashboard/replays"
SETTINGS, AUDIT, ALERTS = "/dashboard/settings", "/dashboard/audit", "/dashboard/audit/alerts"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A receiver with delivered events, a job, a replay, and markup in all that a stranger may write."""
    with desk(tmp_path_factory.mktemp("dashboard")) as running:
        for name in ("first", "second"):
            running.webhook(name)
            running.wait_for_delivery(name, "delivered")
        running.submit("job-1", metadata={"order": MARKUP})
        running.wait_for_job("job-1")
        order = running.post("/v1/replays", {"selection": {"ids": ["first"]}, "reason": MARKUP})
        wait_until(lambda: running.get(f"/v1/replays/{order['id']}")["state"] == "completed", "the replay")
        yield running


@pytest.fixture
def window(browser: Browser, site: Desk) -> Iterator[Window]:
    """A person who has logged in."""
    with browser.window(site.url) as opened:
        yield opened.log_in(TOKEN)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(browser: Browser, site: Desk, scheme: Scheme) -> None:
    """No page has a serious finding of axe-core, nor is it wider than a phone; markup stays text."""
    replay = f"{REPLAYS}/{site.get('/v1/replays')[0]['id']}"
    with browser.window(site.url, size=PHONE, scheme=scheme) as window:
        window.log_in(TOKEN)
        for path in (JOBS, ACCOUNT, REPLAYS, f"{REPLAYS}/new", replay, SETTINGS, AUDIT, ALERTS):
            window.page.goto(path)
            window.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
            window.assert_accessible()
            window.assert_fits()
            assert_inert(window)


def test_jobs_are_filtered(window: Window, site: Desk) -> None:
    """The filters of the list are in the address, and a row leads to the page of its generation."""
    page = window.page
    page.goto(JOBS)
    page.get_by_label("State").select_option("completed")
    page.get_by_label("Metadata").fill(f"order={MARKUP}")
    page.get_by_role("button", name="Filter").click()
    page.wait_for_url("**state=completed**")
    page.get_by_role("link", name="job-1").click()
    assert page.url.endswith(f"/dashboard/generations/{site.get('/v1/jobs')[0]['id']}")
    page.goto(f"{JOBS}?model=absent")
    page.get_by_text("No job matches.").wait_for()


def test_an_unsure_job_is_submitted_again_or_canceled(window: Window, site: Desk) -> None:
    """An unsure job is submitted again only with the warning that it may be paid for twice."""
    page = window.page
    for label, button, operation in (
        ("Submit again", "Submit the job again", "resubmit_job"),
        ("Cancel", "Cancel the job", "cancel_job"),
    ):
        key = str(uuid4())
        job = site.unsure_job(key)
        page.goto(f"{JOBS}?state=unsure")
        row = page.get_by_role("row").filter(has_text=key)
        act(row, label, f"checked {MARKUP}", button)
        page.locator(".notice.good").wait_for()
        site.assert_on_record(operation, f"checked {MARKUP}", job["id"])
        if operation == "resubmit_job":
            site.wait_for_job(key)
    page.goto(f"{JOBS}?state=unsure")
    page.get_by_text("No job matches.").wait_for()


def test_the_warning_of_an_unsure_job(window: Window, site: Desk) -> None:
    """The form says that the job may be paid for twice, before the button."""
    job = site.unsure_job("warned")
    window.page.goto(f"{JOBS}?state=unsure")
    window.page.locator("summary", has_text="Submit again").click()
    window.page.get_by_text("it may be paid for twice").wait_for()
    site.post(f"/v1/jobs/{job['id']}/cancel")


def test_the_account(window: Window) -> None:
    """The page has the balance, the limits, and the credits by day, caller and model."""
    page = window.page
    page.goto(JOBS)
    page.get_by_role("link", name="Account, credits").click()
    page.get_by_role("heading", name="Balance").wait_for()
    page.get_by_label("By").select_option("model")
    page.get_by_role("button", name="Filter").click()
    row = page.get_by_role("row").filter(has_text="nano-banana-2")
    assert row.count() == 1
    assert "by=model" in page.url


def test_freeze_and_thaw(window: Window, site: Desk) -> None:
    """A freeze has a reason, which the list of jobs shows; a thaw ends it."""
    page = window.page
    page.goto(ACCOUNT)
    act(page, "Freeze submissions", f"credits {MARKUP}")
    page.get_by_text("Submissions are frozen.").wait_for()
    site.assert_on_record("freeze_submissions", f"credits {MARKUP}")
    assert site.get("/v1/freeze")["frozen"]
    page.goto(JOBS)
    page.get_by_text("Submissions are frozen by tests").wait_for()
    assert_inert(window)
    page.get_by_role("link", name="Thaw them").click()
    act(page, "Thaw submissions", "bought credits")
    page.get_by_text("Jobs are submitted again.").wait_for()
    site.assert_on_record("thaw_submissions", "bought credits")
    assert not site.get("/v1/freeze")["frozen"]


def test_a_replay_is_counted_and_ordered_once(window: Window, site: Desk) -> None:
    """The number of events is shown before the order, and a second click orders nothing."""
    page, known = window.page, len(site.get("/v1/replays"))
    got = site.consumer.got("first"), site.consumer.got("second")
    page.goto(REPLAYS)
    page.get_by_role("link", name="New replay").click()
    page.get_by_label("Ids of events").fill("first\nsecond")
    page.get_by_label("orders", exact=True).check()
    page.get_by_role("button", name="Count").click()
    page.get_by_text("2 events, 2 deliveries").wait_for()
    window.assert_accessible()
    assert len(site.get("/v1/replays")) == known
    page.get_by_label("Reason").fill(f"lost {MARKUP}")
    order = page.evaluate(
        "new URLSearchParams(new FormData(document.querySelector('form.order'))).toString()"
    )
    page.get_by_role("button", name="Order the replay").click()
    page.get_by_text("2 of 2 events are gone through").wait_for()
    page.get_by_text(f"lost {MARKUP}").wait_for()
    assert_inert(window)
    site.assert_on_record("order_replay", f"lost {MARKUP}")
    wait_until(
        lambda: (site.consumer.got("first"), site.consumer.got("second")) == (got[0] + 1, got[1] + 1),
        "the replayed events",
    )
    again = page.evaluate(
        "async body => (await fetch('/dashboard/replays', {method: 'POST', body, headers: "
        "{'content-type': 'application/x-www-form-urlencoded'}})).url",
        order,
    )
    assert again == page.url
    assert len(site.get("/v1/replays")) == known + 1


def test_a_replay_by_filter(window: Window, site: Desk) -> None:
    """Filters select events, an age is a fixed time from the count on, and an unknown filter is an error."""
    page = window.page
    page.goto(f"{REPLAYS}/new?status=ERROR")
    page.get_by_label("Since").fill("1h")
    page.get_by_role("button", name="Count").click()
    page.get_by_role("heading", name="Order this replay?").wait_for()
    since = page.locator("form.order input[name=since]").input_value()
    assert "T" in since
    errors = len([each for each in site.get("/v1/events", limit=200) if each["status"] == "ERROR"])
    page.get_by_text(f"{errors} events").first.wait_for()
    refused = page.evaluate(
        "async () => (await fetch('/dashboard/replays/count', {method: 'POST', body: "
        "new URLSearchParams({state: 'unrecognized', all: 'true'})})).status"
    )
    assert refused == 400
    assert "Failed to load resource" in window.faults.pop()
    page.goto(f"{REPLAYS}/new")
    page.get_by_role("button", name="Count").click()
    page.get_by_text("say which events").wait_for()
    assert "Failed to load resource" in window.faults.pop()


def test_a_replay_is_canceled(window: Window, site: Desk) -> None:
    """The page of a replay shows its progress without a click, and cancels what waits."""
    site.post("/v1/destinations/orders/pause", {"reason": "a test"})
    order = site.post("/v1/replays", {"selection": {"ids": ["first"]}, "to": ["orders"]})
    page = window.page
    page.goto(f"{REPLAYS}/{order['id']}")
    page.get_by_text("1 of 1 events are gone through").wait_for()
    act(page, "Cancel this replay", "ordered by mistake")
    page.get_by_text("The replay was canceled.").wait_for()
    site.assert_on_record("cancel_replay", "ordered by mistake", order["id"])
    assert site.get(f"/v1/replays/{order['id']}")["deliveries"]["orders"] == {"canceled": 1}
    site.post("/v1/destinations/orders/resume")


def test_events_lead_to_a_count(window: Window) -> None:
    """Events that are selected on their page are counted for a replay."""
    page = window.page
    page.goto("/dashboard/events")
    for name in ("first", "second"):
        page.get_by_label(f"Select {name}").check()
    page.get_by_role("button", name="Replay the selected events").click()
    page.get_by_text("2 events, ").wait_for()
    page.get_by_text("2 events by id").wait_for()


def test_settings_hold_no_secret(window: Window) -> None:
    """The settings are shown with their origin, and secrets by their ids alone."""
    page = window.page
    page.goto(SETTINGS)
    shown = page.locator("main").inner_text()
    assert Secret.from_text(SECRET).id in shown
    for secret in (SECRET, TOKEN, LIVE_KEY):
        assert secret not in page.content()
    origin = page.get_by_role("row").filter(has_text="CLIPIA_BASE_URL").inner_text()
    assert "environment" in origin
    page.get_by_role("link", name="orders").click()
    page.get_by_role("heading", name="orders").wait_for()


def test_the_audit(window: Window, site: Desk) -> None:
    """Actions have author, reason and outcome, dry runs are marked, and a click filters by operation."""
    site.post("/v1/destinations/ledger/pause", {"reason": f"for the audit {MARKUP}"})
    site.post("/v1/destinations/ledger/resume")
    site.post("/v1/replays", {"all": True, "dry_run": True})
    page = window.page
    page.goto(AUDIT)
    page.get_by_role("row").filter(has_text="order replay").filter(has_text="only counted").first.wait_for()
    page.get_by_role("link", name="pause destination").first.click()
    assert "operation=pause_destination" in page.url
    assert page.get_by_role("link", name="resume destination").count() == 0
    first = page.locator("tbody tr").first.inner_text()
    assert "tests" in first
    assert f"for the audit {MARKUP}" in first
    assert_inert(window)
    page.get_by_role("link", name="Alerts").click()
    page.get_by_role("heading", name="Alerts").wait_for()


def test_pages_work_without_scripts(browser: Browser, site: Desk) -> None:
    """A replay is counted and ordered without a script."""
    with browser.window(site.url, scripts=False) as window:
        page = window.log_in(TOKEN, path=f"{REPLAYS}/new").page
        page.get_by_label("Ids of events").fill("second")
        page.get_by_role("button", name="Count").click()
        page.get_by_label("Reason").fill("no script")
        page.get_by_role("button", name="Order the replay").click()
        page.get_by_text("Ordered by tests").wait_for()
        for path in (JOBS, ACCOUNT, SETTINGS, AUDIT):
            page.goto(path)
            assert page.locator("table").count() > 0
    site.assert_on_record("order_replay", "no script")
