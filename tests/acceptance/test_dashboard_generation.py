"""The page of one generation in a real browser: what it shows, and each action on it."""

import base64
import hashlib
import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import update
from support.browser import PHONE, Browser, Scheme
from support.consumers import wait_until
from support.dashboard import EVIL_SVG, HOSTILE, Site, running_site
from support.events import with_files
from support.jobs import IMAGE, SPEECH, TOKEN, Caller
from support.payloads import body, failure

from receiver.db.database import Database
from receiver.db.tables import jobs


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A receiver with two delivered jobs, and an event that `orders` rejects."""
    with running_site(tmp_path_factory.mktemp("generation")) as running:
        with Caller(running.url) as caller:
            assert caller.submit("order-1", IMAGE)
            assert caller.submit("speech-1", SPEECH)
        running.receive(body("poison-1"))
        running.wait_for_state("poison-1", "delivery_dead")
        for key in ("order-1", "speech-1"):
            running.wait_for_state(key, "delivered")
        yield running


def act(page: Page, label: str, reason: str) -> None:
    """Open an action, give a reason, and carry it out."""
    page.locator("summary", has_text=label).first.click()
    form = page.locator("details[open] form")
    form.get_by_label("Reason").fill(reason)
    form.get_by_role("button").click()


def done(page: Page) -> str:
    """Return the notice after an action, or its error."""
    return page.locator("[role=status], [role=alert]").locator("visible=true").first.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_is_accessible(browser: Browser, site: Site, scheme: Scheme) -> None:
    """No page has a serious finding of axe-core, nor is it wider than a phone."""
    (delivery,) = [each["id"] for each in site.event("poison-1")["deliveries"] if each["state"] == "dead"]
    with browser.window(site.url, size=PHONE, scheme=scheme) as window:
        page = window.log_in(TOKEN).page
        for path in ("generations/order-1", "generations/poison-1", f"deliveries/{delivery}/message"):
            page.goto(f"/dashboard/{path}")
            for summary in page.locator("summary").all():
                summary.click()
            window.assert_accessible()
            window.assert_fits()


def test_a_generation_is_shown_from_its_job_to_its_deliveries(browser: Browser, site: Site) -> None:
    """The verdict is on top; job, receipts, files with previews, deliveries and history follow."""
    event = site.event("order-1")
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/order-1").page
        assert "delivered to orders" in page.locator("section.verdict").inner_text()
        titles = [each.inner_text().partition(" (")[0] for each in page.locator("h2").all()]
        assert titles == [
            *("Job", "Event", "Receipts", "Files", "Deliveries", "History", "Signed body"),
            "The same by command and API",
        ]
        job = page.locator("dl.facts").first.inner_text()
        for text in ("tests at", "order-1", IMAGE[0], "12 credits", "a cat", event["request_id"]):
            assert text in job, text
        for file in event["media"]:
            card = page.locator(f"#card-{file['id']}")
            assert file["sha256"] in card.inner_text()
            image = card.locator("img")
            image.scroll_into_view_if_needed()
            page.wait_for_function(
                "id => document.getElementById(id).naturalWidth > 0", arg=f"file-{file['id']}"
            )
        for delivery in event["deliveries"]:
            assert delivery["destination"] in page.locator(f"#delivery-{delivery['id']}").inner_text()
        page.locator("summary", has_text="Show the body").click()
        indented, exact = page.locator("details[open] pre").all()
        assert f'"request_id": "{event["request_id"]}"' in indented.inner_text()
        signed = base64.b64decode(site.get(f"/v1/events/{event['id']}", exact="true")["body_base64"])
        assert exact.inner_text() == signed.decode()
        assert hashlib.sha256(signed).hexdigest() == event["body_sha256"]
        commands, calls = page.locator("main > pre").all()
        assert f"receiver events show {event['id']}" in commands.inner_text()
        assert f'"$RECEIVER_URL"/v1/events/{event["id"]}' in calls.inner_text()


def test_speech_can_be_heard(browser: Browser, site: Site) -> None:
    """A player has the stored file, and the live page leaves it alone."""
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/speech-1").page
        player = page.locator("audio").first.element_handle()
        page.wait_for_function("player => player.duration > 0", arg=player)
        page.evaluate("() => document.addEventListener('htmx:after:swap', () => { window.swapped = true })")
        page.wait_for_function("() => window.swapped")
        assert page.evaluate("player => player.isConnected", player)


@pytest.mark.parametrize("kind", ["request_id", "job", "delivery", "file"])
def test_any_id_is_found(browser: Browser, site: Site, kind: str) -> None:
    """The search of each page leads to the generation of any id."""
    event = site.event("order-1")
    ids = {
        "request_id": event["request_id"],
        "job": event["job_id"],
        "delivery": event["deliveries"][0]["id"],
        "file": event["media"][0]["id"],
    }
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN).page
        page.get_by_label("Any id").fill(ids[kind])
        page.get_by_role("button", name="Why?").click()
        page.wait_for_url(f"**/generations/{ids[kind]}")
        assert event["id"] in page.locator("main").inner_text()


def test_a_dead_letter_is_retried(browser: Browser, site: Site) -> None:
    """The verdict is on top, and a retry delivers the event and goes on record with its reason."""
    site.receive(body("poison-retry"))
    event = site.wait_for_state("poison-retry", "delivery_dead")
    with browser.window(site.url) as window, site.consumer.taking_all():
        page = window.log_in(TOKEN, path="/dashboard/generations/poison-retry").page
        assert "orders has not got it" in page.locator("section.verdict").inner_text()
        act(page, "Retry the delivery to orders", "orders is mended")
        assert "due now" in done(page)
        site.wait_for_state("poison-retry", "delivered")
        action = site.last_action()
    assert (action["operation"], action["reason"]) == ("retry_dead_letter", "orders is mended")
    assert action["target"] in {each["id"] for each in event["deliveries"]}


def test_a_generation_is_live(browser: Browser, site: Site) -> None:
    """The verdict and the deliveries change without a person's action."""
    site.receive(body("poison-live"))
    event = site.wait_for_state("poison-live", "delivery_dead")
    (dead,) = [each["id"] for each in event["deliveries"] if each["state"] == "dead"]
    with browser.window(site.url) as window, site.consumer.taking_all():
        page = window.log_in(TOKEN, path="/dashboard/generations/poison-live").page
        expect(page.locator(f"#delivery-{dead}")).to_contain_text("dead")
        site.post(f"/v1/deliveries/{dead}/retry")
        page.wait_for_selector("section.verdict.delivered")
        expect(page.locator(f"#delivery-{dead}")).to_contain_text("delivered")


def test_a_dead_letter_is_retried_by_keyboard_alone(browser: Browser, site: Site) -> None:
    """From the login to the retry a person needs Tab, Enter and letters."""
    site.receive(body("poison-keys"))
    site.wait_for_state("poison-keys", "delivery_dead")
    with browser.window(site.url) as window, site.consumer.taking_all():
        page = window.page
        page.goto("/dashboard")
        page.keyboard.type(TOKEN)  # the field has the focus
        page.keyboard.press("Enter")
        page.wait_for_selector("nav")
        tab_to(page, "#find")
        page.keyboard.type("poison-keys")
        page.keyboard.press("Enter")
        page.wait_for_url("**/generations/poison-keys")
        tab_to(page, "summary", text="Retry the delivery to orders")
        page.keyboard.press("Enter")
        tab_to(page, "details[open] input[name=reason]")
        page.keyboard.type("by keyboard")
        tab_to(page, "details[open] button")
        page.keyboard.press("Enter")
        assert "due now" in done(page)
        site.wait_for_state("poison-keys", "delivered")
    assert site.last_action()["reason"] == "by keyboard"


def tab_to(page: Page, selector: str, *, text: str = "") -> None:
    """Press Tab until an element has the focus, and check that it is seen to have it."""
    for _ in range(60):
        page.keyboard.press("Tab")
        focused = page.locator("*:focus")
        if focused.count() and page.locator(selector, has_text=text).and_(focused).count():
            assert focused.evaluate("each => getComputedStyle(each).outlineStyle") != "none"
            return
    raise AssertionError(f"Tab does not lead to {selector}")


def test_pages_work_without_scripts(browser: Browser, site: Site) -> None:
    """A person without JavaScript finds the generation and carries an action out."""
    site.receive(body("poison-plain"))
    site.wait_for_state("poison-plain", "delivery_dead")
    with browser.window(site.url, scripts=False) as window:
        page = window.log_in(TOKEN, path="/dashboard/events?request_id=poison-plain").page
        page.get_by_role("link", name="poison-plain").click()
        act(page, "Discard the delivery to orders", "not needed")
        assert "was discarded" in done(page)
        assert "canceled" in page.locator("section.verdict").inner_text()
    action = site.last_action()
    assert (action["operation"], action["reason"]) == ("discard_delivery", "not needed")


def test_a_message_is_shown_on_demand(browser: Browser, site: Site) -> None:
    """The message of a delivery has a page of its own."""
    event = site.event("order-1")
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/order-1").page
        page.get_by_role("link", name="Show its message").first.click()
        message = page.locator("pre").inner_text()
        assert f'"id": "{event["id"]}"' in message
        assert "ai.clipia.generation.completed" in message


def test_files_are_given_up(browser: Browser, site: Site) -> None:
    """An event whose file cannot be had is delivered without it."""
    site.receive(with_files(site.consumer.url, "late-1", "/files/late.png"))
    site.wait_for_state("late-1", "media_pending")
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/late-1").page
        act(page, "Give up the files", "the file is gone")
        assert "given up: 1" in done(page)
        expect(page.locator("section.verdict")).to_contain_text("delivered to orders", timeout=15_000)
    assert site.event("late-1")["media"][0]["state"] == "gone"


def test_an_event_is_erased(browser: Browser, site: Site) -> None:
    """After a warning the event's body is gone, and a tombstone is left."""
    site.receive(body("erased-1"))
    site.wait_for_state("erased-1", "delivered")
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/erased-1").page
        act(page, "Erase this event", "the customer asked for it")
        assert "erased" in done(page)
        assert page.get_by_text("Show the body").count() == 0
    assert site.event("erased-1")["state"] == "erased"


def test_an_unsure_job_is_submitted_again_after_a_warning(browser: Browser, site: Site) -> None:
    """The page says that it may be paid for twice; the sandbox gets a second generation."""
    site.sandbox.change(duration=600)
    with Caller(site.url) as caller:
        assert caller.submit("unsure-1", IMAGE)
    site.sandbox.change(duration=0)

    async def forget(database: Database) -> None:
        lost = {"state": "unsure", "request_id": None, "next_attempt_at": None, "lease": None}
        async with database.write() as connection:
            await connection.execute(update(jobs).where(jobs.c.idempotency_key == "unsure-1").values(**lost))

    site.change(forget)
    before = len(site.sandbox.requests()["requests"])
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/unsure-1").page
        page.locator("summary", has_text="Submit the job again").click()
        assert "paid for twice" in page.locator("details[open] .warning").inner_text()
        page.locator("details[open]").get_by_label("Reason").fill("Clipia does not have it")
        page.locator("details[open]").get_by_role("button").click()
        assert "submitted again" in done(page)
        page.wait_for_selector("section.verdict.delivered")
    assert len(site.sandbox.requests()["requests"]) == before + 1
    assert site.last_action()["operation"] == "resubmit_job"


def test_a_job_is_canceled(browser: Browser, site: Site) -> None:
    """A job that Clipia has becomes unsure, and the page says so."""
    site.sandbox.change(duration=600)
    with Caller(site.url) as caller:
        assert caller.submit("canceled-1", IMAGE)
    site.sandbox.change(duration=0)
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/canceled-1").page
        act(page, "Cancel the job", "a mistake")
        assert "The job" in done(page)
    assert site.get(f"/v1/jobs/{site.why('canceled-1')['job_id']}")["state"] in ("canceled", "unsure")
    assert site.last_action()["reason"] == "a mistake"


def test_a_conflict_is_shown_with_its_body(browser: Browser, site: Site) -> None:
    """Both bodies of a request are there; the second one is kept apart."""
    site.receive(body("twice-1"))
    site.receive(body("twice-1", payload={"output": {}, "note": HOSTILE}))
    site.wait_for_state("twice-1", "conflict")
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/twice-1").page
        assert "<script>alert(1)</script>" in page.locator("tr pre").inner_text()


def test_an_event_is_replayed_to_one_destination(browser: Browser, site: Site) -> None:
    """The replay is counted first, goes on record with its reason, and is on the page of the event."""
    event = site.event("order-1")
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/order-1").page
        page.locator("summary", has_text="Replay this event").click()
        page.locator("details[open]").get_by_label("archive").check()
        page.locator("details[open]").get_by_role("button").click()
        page.wait_for_url("**/replays/count")
        page.get_by_label("Reason").fill("the archive was lost")
        page.get_by_role("button", name="Order the replay").click()
        page.wait_for_url(re.compile("/replays/[0-9a-f-]{36}"))
        replay = page.url.rpartition("/")[2].partition("?")[0]
        wait_until(lambda: site.get(f"/v1/replays/{replay}")["state"] == "completed", "the replay")
        page.goto("/dashboard/generations/order-1")
        assert "the archive was lost" in page.locator("#steps").inner_text()
        assert page.get_by_role("link", name=replay).is_visible()
    found = site.get(f"/v1/replays/{replay}")
    assert found["destinations"] == ["archive"]
    assert found["selection"]["ids"] == [event["id"]]


def test_a_conflict_is_promoted(browser: Browser, site: Site) -> None:
    """The page shows what would change, asks for a reason, and then the destinations get the other body."""
    site.receive(failure("promoted-1"))
    site.wait_for_state("promoted-1", "delivered")
    site.receive(body("promoted-1", payload={"model": "m", "output": {}, "cost": 3}))
    site.wait_for_state("promoted-1", "conflict")
    with browser.window(site.url, size=PHONE) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/promoted-1").page
        page.get_by_role("button", name="Promote the conflict").click()
        page.wait_for_url("**/promote/count")
        facts = page.locator("dl.facts").inner_text()
        assert "archive, orders" in facts or "orders, archive" in facts
        window.assert_accessible()
        window.assert_fits()
        assert site.event("promoted-1")["status"] == "ERROR"
        page.get_by_label("Reason").fill("the first one was a mistake")
        page.get_by_role("button", name="Promote this body").click()
        assert "get it: 2" in done(page)
        assert "superseded" in page.locator("main").inner_text()
    assert site.event("promoted-1")["status"] == "OK"
    action = site.last_action()
    assert (action["operation"], action["reason"]) == ("promote_receipt", "the first one was a mistake")


def test_hostile_texts_do_not_run(browser: Browser, site: Site) -> None:
    """Markup in payloads, prompts, errors, URLs, headers and answers is shown as text, in its place."""
    with Caller(site.url) as caller:
        assert caller.submit(HOSTILE[:200].replace("\u202e", ""), (IMAGE[0], {"prompt": HOSTILE}))
    url = f"/files/evil.svg?{HOSTILE[:60]}".replace(" ", "%20")
    output = {
        "images": [{"url": f"{site.consumer.url}{url}"}],
        "note": HOSTILE,
        "link": "javascript:alert(6)",
    }
    payload = {"model": HOSTILE, "output": output, "cost": 1}
    site.receive(body("poison-evil", payload=payload), **{"X-Clipia-Webhook-Id": HOSTILE[:80]})
    keys = [
        each["idempotency_key"]
        for each in site.get("/v1/jobs")["data"]
        if "<script>" in each["idempotency_key"]
    ]
    keys.append("poison-evil")
    assert len(keys) == 2
    site.wait_for_state(keys[1], "delivery_dead")
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN).page
        for key in keys:
            page.get_by_label("Any id").fill(key)
            page.get_by_role("button", name="Why?").click()
            page.wait_for_selector("h1.id")
            assert page.locator("h1.id").inner_text() == key
            for summary in page.locator("summary").all():
                summary.click()
            assert_nothing_ran(page)
            page.goto("/dashboard/events")
            assert_nothing_ran(page)
        for delivery in site.event(keys[1])["deliveries"]:
            page.goto(f"/dashboard/deliveries/{delivery['id']}/message")
            assert_nothing_ran(page)


def assert_nothing_ran(page: Page) -> None:
    """Check that no element of the hostile text is one of the page. A dialog would fail the window."""
    assert page.locator("main script, img[src=x], main svg:not(.chart), [onerror], [onload]").count() == 0
    assert page.locator("a[href^='javascript:'], main a[href*='//']").count() == 0
    assert "alert(1)" in page.locator("main").inner_text()


def test_an_svg_file_is_no_preview(browser: Browser, site: Site) -> None:
    """A file that a browser might run is only offered as a download."""
    site.receive(with_files(site.consumer.url, "svg-1", "/files/evil.svg"))
    (file,) = site.wait_for_state("svg-1", "delivered")["media"]
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/svg-1").page
        assert page.locator(f"#card-{file['id']} img").count() == 0
        answer = page.request.get(f"/dashboard/media/{file['id']}")
        assert answer.body() == EVIL_SVG
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment")


def test_an_unknown_id_has_a_next_step(browser: Browser, site: Site) -> None:
    """An id that nothing has says so, and offers to ask Clipia."""
    with browser.window(site.url) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/no-such-id").page
        assert "Failed to load resource" in window.faults.pop()  # the answer is a 404
        assert "no event, job, delivery" in page.locator("section.verdict").inner_text()
        assert page.get_by_role("link", name="Fetch the result from Clipia").is_visible()
        window.assert_accessible()


def test_a_long_text_stays_in_its_box(browser: Browser, site: Site) -> None:
    """A body that is larger than a page shows is cut with a note, and scrolls in itself."""
    site.receive(body("long-1", payload={"output": {"text": "x" * 200_000}}))
    with browser.window(site.url, size=PHONE) as window:
        page = window.log_in(TOKEN, path="/dashboard/generations/long-1").page
        page.locator("summary", has_text="Show the body").click()
        text = page.locator("details[open] pre").last.inner_text()
        assert "more characters" in text
        assert len(text) < 70_000
        window.assert_fits()
