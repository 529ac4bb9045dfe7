"""Five incidents in the README's production layout, found and fixed by commands from another machine."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.consumers import wait_until
from support.incidents import (
    POISON,
    RETIRED,
    UNAVAILABLE,
    UNKNOWN,
    WAITING,
    Service,
    fill_disk,
    lose_webhook,
    problems,
    running_service,
)
from support.payloads import SECRET, body


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """The layout, with servers of its own, which the test stops."""
    with running_service(tmp_path) as running:
        yield running


def test_five_incidents(service: Service) -> None:
    """Each incident has an alert or a problem in `status`; another command gives its cause, or mends it.

    All happen at once, because an alert is told when its condition has held for a while, and so is its end.
    """
    service.rabbit.stop()
    waiting = service.submit()
    wait_until(lambda: len(service.consumer.messages) > 0, "the healthy destination")
    assert service.callback(body(POISON)) == 200
    lost = lose_webhook(service)
    unsigned = [body(f"rotated-{number}") for number in range(3)]
    assert [service.callback(each, secret=RETIRED) for each in unsigned] == [401] * 3
    filler = fill_disk(service)
    unstored = service.submit()

    find_dead_broker(service, waiting)
    find_wrong_secret(service)
    find_lost_webhook(service, lost)
    find_poison_event(service)
    find_full_disk(service, unstored)

    service.rabbit.start()
    filler.unlink(missing_ok=True)
    service.command("events", "fetch", lost)
    service.public.stop()
    service.public.settings["CLIPIA_WEBHOOK_SECRET"] = f"{SECRET},{RETIRED}"
    service.public.start()
    assert [service.callback(each, secret=RETIRED) for each in unsigned] == [200] * 3
    for key in (waiting, unstored, lost, "rotated-0", "rotated-1", "rotated-2"):
        service.wait_until_delivered(key)
    for kind in ("destination_down", "secret_mismatch", "dead_letters", "disk_nearly_full"):
        service.wait_for_alert(kind, "resolved")
    stop_database(service)


def find_dead_broker(service: Service, job: str) -> None:
    """`status` names the destination that is down, and `why` gives its error."""
    assert service.wait_for_alert("destination_down", "raised")["subject"] == "rabbit"
    assert "rabbit is down since" in problems(service.command("status"))
    verdict = service.command("why", job, expect=WAITING)
    assert "rabbit has failed since" in verdict
    assert "connection refused" in verdict
    assert "connection refused" in service.command("destinations", "test", "rabbit", expect=None)


def find_wrong_secret(service: Service) -> None:
    """The alert names the command that names the secret with which Clipia signs."""
    alert = service.wait_for_alert("secret_mismatch", "raised")
    listed = service.command(*alert["command"].split()[1:])
    assert "It was signed with the retired secret" in " ".join(listed.split())


def find_lost_webhook(service: Service, request_id: str) -> None:
    """`rejections list` has the wrong path, and `why` names the command that gets the result."""
    assert "rejected requests" in problems(service.command("status"))
    assert "wrong_url" in service.command("rejections", "list", "--cause", "wrong_url")
    assert f"receiver events fetch {request_id}" in service.command("why", request_id, expect=UNKNOWN)


def find_poison_event(service: Service) -> None:
    """The consumer's answer is shown with the message; the delivery is discarded with a reason on record."""
    alert = service.wait_for_alert("dead_letters", "raised")
    assert alert["subject"] == "orders"
    (delivery,) = alert["examples"]
    assert "orders: 1 dead: answered 422" in service.command("deliveries", "failures")
    assert "cost: not a number" in service.command("deliveries", "show", delivery)
    message = service.command("deliveries", "show", delivery, "--message")
    assert json.loads(message)["subject"] == POISON
    service.command("deliveries", "discard", delivery, "--reason", "orders rejects it for good: ticket 1")
    assert "ticket 1" in service.command("audit", "list")


def find_full_disk(service: Service, job: str) -> None:
    """`status` names the disk, and `why` says that the file waits for it."""
    if os.geteuid() != 0:
        return
    service.wait_for_alert("disk_nearly_full", "raised")
    assert "the disk of" in problems(service.command("status"))
    assert "No space left" in service.command("why", job, expect=WAITING)


def stop_database(service: Service) -> None:
    """While the database is away nothing is acked, and commands say why; then work goes on by itself."""
    content = body("while-down")
    service.postgres.stop()
    try:
        assert "database" in service.command("status", expect=UNAVAILABLE)
        assert service.callback(content) == 503
        assert "receiver_database_up 0" in service.metrics(service.internal)
    finally:
        service.postgres.start()
    wait_until(lambda: service.callback(content) == 200, "an ack")
    service.wait_until_delivered("while-down")
