"""Webhooks that never come, and some that come late: every job ends as Clipia says, once."""

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from support.jobs import (
    LIVE_KEY,
    SPEECH,
    Call,
    Caller,
    Link,
    Proxy,
    Sandbox,
    assert_paid_once,
    forwarded,
    job_receiver,
    read_outcomes,
    run,
    wait_until_done,
)

from receiver.lanes.poll import CONCURRENCY

JOBS = 300
LOSS = 0.1
CANCELED = JOBS // 50
RATE_LIMIT = 1200
SHARE = 0.2
"""The share of the rate limit that polls may take."""


def test_lost_webhooks_are_found_by_polling(tmp_path: Path) -> None:
    """F10, F11, T19: of 300 jobs 10 % lose their webhook, 2 % are canceled, some fail: all end correctly."""
    with (
        Sandbox(
            tmp_path, duration=3, webhook_loss_rate=LOSS, fail_rate=0.05, rate_limit=RATE_LIMIT
        ) as sandbox,
        Proxy(sandbox) as proxy,
        # Jobs are polled long before their webhook is due, so that the polls use up their share.
        job_receiver(tmp_path / "receiver", sandbox, api=proxy.url, RECEIVER_POLL_AFTER="1") as receiver,
        Caller(receiver.url) as caller,
        ThreadPoolExecutor(1) as pool,
    ):
        proxy.handle_call = race = Race(sandbox)
        canceling = pool.submit(cancel_some, sandbox)
        answers = caller.submit_all(map(str, range(JOBS)), at_once=8, job=SPEECH)
        assert all(answer is not None and answer.status in (201, 202) for answer in answers.values())
        canceling.result()
        rows = wait_until_done(receiver.settings["RECEIVER_DATABASE_URL"], seconds=120)
        assert len(rows) == JOBS
        generations = assert_paid_once(sandbox, rows)
        for row in rows:
            generation = generations[row.id]
            assert row.state == generation["status"].lower()
            assert row.charged == (generation["cost"] if row.state == "completed" else 0)
        states = Counter(row.state for row in rows)
        assert states["canceled"] == CANCELED
        assert states["failed"] > 0
        assert sum(row.charged or 0 for row in rows) == sandbox.credits_spent(LIVE_KEY)
        assert_within_share(proxy.calls)

        lost = {each["request_id"] for each in generations.values() if each["webhook"]["lost"]}
        assert len(lost) > JOBS * LOSS / 2
        assert lost & race.run
        for request_id in lost:
            assert sandbox.send_webhook(request_id)["status_code"] == 200
        outcomes = run(receiver.settings["RECEIVER_DATABASE_URL"], read_outcomes)
        assert {outcomes[request_id][-1] for request_id in lost} == {"duplicate"}
        assert {len(outcomes[request_id]) for request_id in lost - race.run} == {1}
    # The receiver has drained, so it has forwarded all that it will.
    messages = forwarded(receiver.folder)
    assert Counter(message["subject"] for message in messages) == Counter(row.request_id for row in rows)


class Race:
    """Handles a proxy's calls: with every other polled result it sends the webhook in parallel."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self.run: set[str] = set()
        """The `request_id` of those results."""

    def __call__(self, link: Link) -> None:
        """Relay a call."""
        *_, request_id = link.call.path.split("/")
        link.send()
        answer = link.receive()
        is_result = is_poll(link.call) and request_id != "status"
        if not is_result or b'"CANCELED"' in answer or int(request_id[-1], 16) % 2:
            link.deliver(answer)
            return
        self.run.add(request_id)
        with ThreadPoolExecutor(1) as pool:
            sending = pool.submit(self._sandbox.send_webhook, request_id)
            link.deliver(answer)
            assert sending.result()["status_code"] == 200


def cancel_some(sandbox: Sandbox) -> None:
    """Cancel a running generation now and then."""
    canceled = 0
    deadline = time.monotonic() + 60
    while canceled < CANCELED:
        assert time.monotonic() < deadline, f"only {canceled} canceled"
        time.sleep(0.5)
        running = [each for each in sandbox.requests()["requests"] if each["ended_at"] is None]
        if running and sandbox.cancel(running[-1]["request_id"]):
            canceled += 1


def is_poll(call: Call) -> bool:
    """Return whether a call polls a generation's state or result."""
    return call.path.startswith("/v1/requests/")


def assert_within_share(calls: Sequence[Call]) -> None:
    """Check that polls always keep within their share of the limit, and that they use it."""
    moments = [call.at for call in calls if is_poll(call)]
    for seconds in (10, 20, 60):
        most = max(bisect_left(moments, first + seconds) - number for number, first in enumerate(moments))
        # A twentieth of a minute's requests may come in one burst, and a result is read right after a state.
        assert most <= SHARE * RATE_LIMIT * (seconds / 60 + 0.05) + CONCURRENCY
    assert len(moments) > SHARE * RATE_LIMIT * (moments[-1] - moments[0]) / 60 / 2, "the share was not needed"
